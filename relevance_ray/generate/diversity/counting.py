"""Counters that stay small whatever is counted, and the divergence between what two of them counted.

Up to its capacity a `KeySample` is an exact counter. Past it, it keeps an even sample of the *keys*, each with its exact
count, so that the same sketch answers how many different keys there are, how unevenly they are used, and which they are.
HyperLogLog would take less memory for the first question and could not answer the other two.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class KeySample:
    """Counts keys in bounded memory by adaptive sampling (Wegman's algorithm; Flajolet, "On adaptive sampling", 1990).

    A key is kept where its hash is below a threshold, which is halved whenever more than `capacity` keys are kept. As the
    hash decides, a kept key was counted from its first time on: its count is exact. The number of different keys is
    estimated as kept keys / threshold, with a relative standard error of about `1.2 / sqrt(capacity)`.

    Args:
        capacity: the most keys kept.
        seed: another seed keeps other keys.
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        self.capacity, self._seed = capacity, seed.to_bytes(8, "big", signed=True)
        self.counts: dict[str, float] = {}
        self.total = 0.0
        self._hashes: dict[str, int] = {}
        self._halvings = 0

    @property
    def exact(self) -> bool:
        """Whether all keys are kept."""
        return self._halvings == 0

    @property
    def rate(self) -> float:
        """The share of all keys that is kept."""
        return 0.5**self._halvings

    @property
    def distinct(self) -> int:
        """How many different keys were counted: exact where `exact`, else estimated."""
        return round(len(self.counts) / self.rate)

    def add(self, key: str, count: float = 1) -> bool:
        """Count a key; whether it is kept."""
        self.total += count
        if key in self.counts:
            self.counts[key] += count
            return True
        value = int.from_bytes(
            hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8, key=self._seed).digest(), "big"
        )
        if value >= 2 ** (64 - self._halvings):
            return False
        self.counts[key], self._hashes[key] = count, value
        while len(self.counts) > self.capacity:
            self._halvings += 1
            for other in [other for other, found in self._hashes.items() if found >= 2 ** (64 - self._halvings)]:
                del self.counts[other], self._hashes[other]
        return key in self.counts

    def in_random_order(self) -> list[str]:
        """The kept keys by rising hash: the first n of them are an even sample of n."""
        return sorted(self.counts, key=self._hashes.__getitem__)

    def shared(self, other: KeySample) -> tuple[list[str], np.ndarray, np.ndarray]:
        """The keys that both samples would have kept, and float64 [n] counts of each: all keys of both where both are
        exact. Both must have the same seed."""
        assert self._seed == other._seed
        limit = 2 ** (64 - max(self._halvings, other._halvings))
        hashes = self._hashes | other._hashes
        names = sorted(name for name, value in hashes.items() if value < limit)
        return names, self._counts_of(names), other._counts_of(names)

    def _counts_of(self, names: list[str]) -> np.ndarray:
        return np.array([self.counts.get(name, 0.0) for name in names], dtype=np.float64)

    def add_column(self, column: pa.ChunkedArray | pa.Array) -> None:
        """Count the values of a column of strings; nulls and empty strings are no values."""
        for value, count in value_counts(column).items():
            if value:
                self.add(value, count)


def value_counts(column: pa.ChunkedArray | pa.Array) -> dict[Any, int]:
    """Value -> how often a column holds it, null included."""
    found = pc.value_counts(column)
    return dict(zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True))


def divergence(first: np.ndarray, second: np.ndarray) -> float | None:
    """Jensen-Shannon divergence in bits (Lin, 1991) of two histograms over the same bins; None where one is empty.

    With p, q the shares and m their mean: `(KL(p||m) + KL(q||m)) / 2`, from 0 (the same) to 1 (nothing in common). Where a
    small share e of one side lies outside the other it is about e / 2.
    """
    if not first.sum() or not second.sum():
        return None
    p, q = first / first.sum(), second / second.sum()
    mean = (p + q) / 2
    return float(max(0.0, (_relative_entropy(p, mean) + _relative_entropy(q, mean)) / 2))


def _relative_entropy(p: np.ndarray, q: np.ndarray) -> float:
    kept = p > 0
    return float(np.sum(p[kept] * np.log2(p[kept] / q[kept])))


def even_sample(num_items: int, size: int, seed: int) -> list[int]:
    """`size` of the indices below `num_items`, rising and evenly spread, from a seeded start; all where there are no more.

    Systematic sampling: one index in each of `size` equal stretches, at the same place in every stretch, so that a source
    that only begins or ends somewhere in a growing folder is met in proportion.
    """
    if num_items <= size:
        return list(range(num_items))
    start = np.random.default_rng(seed).random()
    return [int((index + start) * num_items / size) for index in range(size)]
