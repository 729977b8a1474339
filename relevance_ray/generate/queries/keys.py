"""Sets of a hundred million texts in a gigabyte: 64-bit hashes, most of them in one sorted array."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

_MERGE_AT_LEAST = 4096
_MERGE_SHARE = 32
"""New numbers wait in a set until they are so many, or that part of the array: merging copies it."""


class NumberSet:
    """Remembers numbers from 0 to 2^64 - 1: 8 bytes each, a quarter more for those that wait, twice that while they are
    merged. A Python set takes ten times as much."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, dtype=np.uint64)
        self._waiting: set[int] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._waiting)

    @property
    def num_bytes(self) -> int:
        """Of the sorted array and, at 80 bytes each, of those that wait."""
        return self._sorted.nbytes + 80 * len(self._waiting)

    def holds_any(self, numbers: Sequence[int]) -> bool:
        if not self._waiting.isdisjoint(numbers):
            return True
        if not len(self._sorted):
            return False
        wanted = np.asarray(numbers, dtype=np.uint64)
        places = np.searchsorted(self._sorted, wanted).clip(max=len(self._sorted) - 1)
        return bool((self._sorted[places] == wanted).any())

    def update(self, numbers: Sequence[int]) -> None:
        """Remember numbers, none of which may be there."""
        self._waiting.update(numbers)
        if len(self._waiting) >= max(_MERGE_AT_LEAST, len(self._sorted) // _MERGE_SHARE):
            waiting = np.fromiter(self._waiting, dtype=np.uint64, count=len(self._waiting))
            # The stable sort finds the two sorted runs and merges them.
            self._sorted = np.sort(np.concatenate([self._sorted, np.sort(waiting)]), kind="stable")
            self._waiting.clear()


class TextSet:
    """Remembers texts by their BLAKE2b-64 hashes. The chance that any of a hundred million new texts is taken for one that
    is there is 3 in 10,000."""

    def __init__(self) -> None:
        self._hashes = NumberSet()

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, text: str) -> bool:
        """Remember a text; False where it was there."""
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        number = [int.from_bytes(digest, "little")]
        if self._hashes.holds_any(number):
            return False
        self._hashes.update(number)
        return True
