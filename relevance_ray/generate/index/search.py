"""Search over a catalog in shards: each shard answers for its own products, and the lists are merged.

One interface, whether the shards lie in this process (`ShardSearch`) or elsewhere (`SpreadSearch` over any others), and
one answer: what a single index over the whole catalog would give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from relevance_ray.generate.index.catalog import Catalog, ProductFile, in_order, products_file, take_rows
from relevance_ray.generate.index.dense import Vectors
from relevance_ray.generate.index.lexical import LexicalQuery, Lexicon, Postings
from relevance_ray.generate.index.tops import Top, merge

Locate = Callable[[str], Path]
"""From a name within the index to a local path."""


class CatalogSearch(Protocol):
    """What generation asks of the catalog's shards."""

    def lexical(self, queries: Sequence[LexicalQuery], depth: int) -> list[Top]: ...

    def dense(self, vectors: np.ndarray, depth: int) -> list[Top]: ...

    def products(self, rows: np.ndarray) -> pa.Table: ...


class ShardSearch:
    """Some shards of the catalog, or all of them, mapped into this process.

    Args:
        shards: their numbers.
        locate: where the index lies.
        dense: whether there are vectors.
    """

    def __init__(self, shards: Sequence[int], locate: Locate, *, dense: bool) -> None:
        catalog, lexicon = Catalog(locate("catalog/arrays")), Lexicon(locate("lexicon"))
        self._starts = catalog.starts
        self._products, self._postings, self._vectors = {}, [], []  # type: dict[int, ProductFile], list[Postings], list[Vectors]
        for shard in shards:
            self._products[shard] = ProductFile(locate(f"catalog/{products_file(shard)}"))
            rows = catalog.shard_rows(shard)
            keys = catalog.keys[rows.start : rows.stop]
            self._postings.append(Postings(locate(f"postings/{shard:05d}"), rows.start, keys, lexicon.mean_length))
            if dense:
                self._vectors.append(Vectors(locate(f"vectors/{shard:05d}")))

    def lexical(self, queries: Sequence[LexicalQuery], depth: int) -> list[Top]:
        """For each query its best products by BM25 among these shards."""
        return [merge([postings.top(query, depth) for postings in self._postings], depth) for query in queries]

    def dense(self, vectors: np.ndarray, depth: int) -> list[Top]:
        """For each normalised query vector [q, d] its nearest products among these shards."""
        found = [shard.top(vectors, depth) for shard in self._vectors]
        return [merge(tops, depth) for tops in zip(*found, strict=True)]

    def products(self, rows: np.ndarray) -> pa.Table:
        """The products of catalog rows int64 [n], all of these shards, in their order."""
        return take_rows(self._products.__getitem__, self._starts, rows)


class SpreadSearch:
    """Several searches, each with its shards, asked at once.

    Args:
        parts: for each search its shards, and a call that starts a method with its arguments and gives a future.
        starts: int64 [shards + 1], the first row of each shard of the catalog.
    """

    def __init__(self, parts: Sequence[tuple[Sequence[int], Callable[..., Future]]], starts: np.ndarray) -> None:
        self._calls = [call for _, call in parts]
        self._starts = starts
        self._part_of = np.empty(len(starts) - 1, dtype=np.int64)
        for index, (shards, _) in enumerate(parts):
            self._part_of[list(shards)] = index

    def lexical(self, queries: Sequence[LexicalQuery], depth: int) -> list[Top]:
        """As `ShardSearch.lexical`, over all shards."""
        return self._merged("lexical", queries, depth)

    def dense(self, vectors: np.ndarray, depth: int) -> list[Top]:
        """As `ShardSearch.dense`, over all shards."""
        return self._merged("dense", vectors, depth)

    def products(self, rows: np.ndarray) -> pa.Table:
        """As `ShardSearch.products`, of any shards."""
        owner = self._part_of[np.searchsorted(self._starts, rows, side="right") - 1]
        order = np.argsort(owner, kind="stable")
        futures = [self._calls[part]("products", rows[owner == part]) for part in np.unique(owner)]
        return in_order([future.result() for future in futures], order)

    def _merged(self, method: str, *arguments: object) -> list[Top]:
        futures = [call(method, *arguments) for call in self._calls]
        found = [future.result() for future in futures]
        depth = arguments[-1]
        assert isinstance(depth, int)
        return [merge(tops, depth) for tops in zip(*found, strict=True)]
