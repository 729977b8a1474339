"""A set of texts that holds a hundred million in a gigabyte: 64-bit hashes, most of them in one sorted array."""

from __future__ import annotations

import hashlib

import numpy as np

_RECENT = 100_000


class KeySet:
    """Remembers texts by their BLAKE2b-64 hashes: 8 bytes each, 16 while it grows, and some megabytes for recent ones.
    The chance that any of a hundred million new texts is taken for one that is there is 3 in 10,000."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, dtype=np.uint64)
        self._recent: set[int] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)

    def add(self, text: str) -> bool:
        """Remember a text; False where it was there."""
        key = int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        if key in self._recent:
            return False
        at = int(np.searchsorted(self._sorted, np.uint64(key)))
        if at < len(self._sorted) and int(self._sorted[at]) == key:
            return False
        self._recent.add(key)
        if len(self._recent) >= max(_RECENT, len(self._sorted) // 100):
            recent = np.sort(np.fromiter(self._recent, dtype=np.uint64, count=len(self._recent)))
            self._sorted = np.insert(self._sorted, np.searchsorted(self._sorted, recent), recent)
            self._recent.clear()
        return True
