"""Exact cosine search over the vectors of a shard of the catalog.

Products of matrices in float32 find the nearest, and a few more; float64 settles their order, one row at a time, so that
neither the shard nor the batch that a query came in decides between near-equal products. The trade-off: exact and
simple, but linear in the number of vectors, so a large catalog is sampled.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from relevance_ray.generate.index.arrays import mapped
from relevance_ray.generate.index.tops import NOTHING, Top, best
from relevance_ray.generate.stable import scrambled

VECTORS_PER_PART = 2048
_BLOCK_VECTORS = 65_536
_QUERIES_AT_ONCE = 32
"""Each takes 1.8 MB beside a block: similarities, places, and the partition of both."""
_SAMPLE = 0x5EED
_SPARE = 32
"""Products beyond the depth that float32 hands to float64."""


def part_name(part: int) -> str:
    return f"part-{part:06d}.npy"


class Vectors:
    """One shard's vectors: `part-*.npy` float32 [n, d], normalised, and `rows.npy` int64, the catalog row of each."""

    def __init__(self, folder: Path) -> None:
        self._parts = [mapped(path) for path in sorted(folder.glob("part-*.npy"))]
        self._rows = mapped(folder / "rows.npy")
        assert sum(len(part) for part in self._parts) == len(self._rows)

    def top(self, query_vectors: np.ndarray, depth: int) -> list[Top]:
        """For normalised query vectors float32 [q, d]: the nearest products of this shard, q lists."""
        if not len(self._rows):
            return [NOTHING] * len(query_vectors)
        chunks = range(0, len(query_vectors), _QUERIES_AT_ONCE)
        return [top for at in chunks for top in self._top(query_vectors[at : at + _QUERIES_AT_ONCE], depth)]

    def _top(self, query_vectors: np.ndarray, depth: int) -> list[Top]:
        kept_scores = np.empty((len(query_vectors), 0), dtype=np.float32)
        kept = np.empty((len(query_vectors), 0), dtype=np.int64)
        size = depth + _SPARE
        for first, block in self._blocks():
            new = np.concatenate([query_vectors @ part.T for part in block], axis=1)
            places = np.broadcast_to(np.arange(first, first + new.shape[1]), new.shape)
            scores, places = np.concatenate([kept_scores, new], axis=1), np.concatenate([kept, places], axis=1)
            if scores.shape[1] > size:
                at = np.argpartition(-scores, size - 1, axis=1)[:, :size]
                scores, places = np.take_along_axis(scores, at, axis=1), np.take_along_axis(places, at, axis=1)
            kept_scores, kept = scores, places
        vectors = self._gather(np.unique(kept))
        return [
            self._settled(query, np.sort(places), vectors, depth)
            for query, places in zip(query_vectors, kept, strict=True)
        ]

    def _settled(
        self, query: np.ndarray, places: np.ndarray, vectors: tuple[np.ndarray, np.ndarray], depth: int
    ) -> Top:
        known, values = vectors
        scores = (values[np.searchsorted(known, places)] * query.astype(np.float64)).sum(axis=1)
        return best(self._rows[places], scores, depth)

    def _gather(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places, and their vectors float64 [n, d]."""
        starts = np.cumsum([0, *(len(part) for part in self._parts)])
        owner = np.searchsorted(starts, places, side="right") - 1
        values = [self._parts[index][places[owner == index] - starts[index]] for index in np.unique(owner)]
        return places, np.concatenate(values).astype(np.float64)

    def _blocks(self) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Parts together up to `_BLOCK_VECTORS`, with the place of the first vector of each block."""
        first, size, block = 0, 0, []  # type: int, int, list[np.ndarray]
        for part in self._parts:
            block.append(part)
            size += len(part)
            if size >= _BLOCK_VECTORS:
                yield first, block
                first, size, block = first + size, 0, []
        if block:
            yield first, block


def sample_rows(keys: np.ndarray, max_products: int) -> np.ndarray:
    """The catalog rows that get a vector, rising: all, or the `max_products` whose keys (uint64 [n]) hash lowest."""
    if len(keys) <= max_products:
        return np.arange(len(keys))
    return np.sort(np.argpartition(scrambled(np.asarray(keys), _SAMPLE), max_products)[:max_products])
