"""The two rankings that candidates are drawn from: BM25 and dense vectors.

Both are bounded per query. BM25 lets the rarest words of a query choose the products and scores those exactly (the
"continue" strategy of Moffat and Zobel, 1996), so a query costs the same in a catalog of ten thousand and of ten
million; dense search is an exact product of matrices over at most `dense_max_products` vectors. The trade-off: in a
catalog with more than `POSTINGS_BUDGET` hits for a query, products that match only its commonest words are not ranked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import bm25s
import numpy as np

from relevance_ray.errors import UserError
from relevance_ray.generate.stable import mix

POSTINGS_BUDGET = 50_000
_BLOCK_VECTORS = 65_536
_TOKEN = r"(?u)\b\w+\b"


class Bm25Ranking:
    """BM25 (Lucene's form, k1=1.2, b=.75) over the catalog's search texts, memory-mapped from a folder."""

    def __init__(self, folder: Path) -> None:
        index = bm25s.BM25.load(folder, mmap=True)
        self._vocabulary: dict[str, int] = index.vocab_dict
        self._scores = index.scores["data"]
        self._rows = index.scores["indices"]
        self._starts = index.scores["indptr"]

    def top(self, query: str, depth: int, budget: int = POSTINGS_BUDGET) -> np.ndarray:
        """Rows of the best products, best first, int64 [<= depth]; those without a word of the query are left out."""
        tokens = set(_tokens([query])[0]) & self._vocabulary.keys()
        columns = sorted(self._vocabulary[token] for token in tokens)
        columns = [column for column in columns if column + 1 < len(self._starts)]
        spans = sorted((int(self._starts[c + 1] - self._starts[c]), c) for c in columns)
        lists = [self._postings(column) for length, column in spans if length]
        if not lists:
            return np.empty(0, dtype=np.int64)
        num_open, total = 1, len(lists[0][0])
        while num_open < len(lists) and total + len(lists[num_open][0]) <= budget:
            total += len(lists[num_open][0])
            num_open += 1
        if num_open == 1 and total > budget:
            # Even the rarest word is everywhere: an even share of its products stands for all.
            stride = -(-total // budget)
            rows = np.asarray(lists[0][0][::stride])
            scores: np.ndarray = np.asarray(lists[0][1][::stride], dtype=np.float64)
        else:
            opened = lists[:num_open]
            rows, inverse = np.unique(np.concatenate([found_rows for found_rows, _ in opened]), return_inverse=True)
            scores = np.bincount(inverse, weights=np.concatenate([weights for _, weights in opened]))
        for other_rows, other_scores in lists[num_open:]:
            at = np.minimum(np.searchsorted(other_rows, rows), len(other_rows) - 1)
            scores += np.where(other_rows[at] == rows, other_scores[at], 0.0)
        best = _best(scores, depth)
        return rows[best].astype(np.int64)

    def _postings(self, column: int) -> tuple[np.ndarray, np.ndarray]:
        span = slice(int(self._starts[column]), int(self._starts[column + 1]))
        return self._rows[span], self._scores[span]


def build_bm25(texts: Sequence[str], folder: Path) -> None:
    """Index the search texts of the whole catalog, row by row."""
    tokens = bm25s.tokenize(list(texts), token_pattern=_TOKEN, stopwords="en", show_progress=False)
    if not tokens.vocab:
        raise UserError("no product of the catalog has a word in its title; check the title column of the products")
    index = bm25s.BM25(k1=1.2, b=0.75, method="lucene", backend="numpy", csc_backend="scipy")
    index.index(tokens, show_progress=False)
    rows, starts = index.scores["indices"], index.scores["indptr"]
    inside = np.ones(max(len(rows) - 1, 0), dtype=bool)
    inside[starts[(starts > 0) & (starts < len(rows))] - 1] = False
    assert not (np.diff(rows)[inside] <= 0).any(), "postings must rise by row for searchsorted"
    index.save(folder, show_progress=False)


def _tokens(texts: list[str]) -> list[list[str]]:
    return bm25s.tokenize(texts, token_pattern=_TOKEN, stopwords="en", return_ids=False, show_progress=False)


def _best(scores: np.ndarray, depth: int) -> np.ndarray:
    """Positions of the `depth` highest scores, best first; equal scores in the order of their positions."""
    if len(scores) > depth:
        threshold = np.partition(scores, len(scores) - depth)[len(scores) - depth]
        kept = np.flatnonzero(scores >= threshold)
    else:
        kept = np.arange(len(scores))
    return kept[np.argsort(-scores[kept], kind="stable")][:depth]


class DenseRanking:
    """Exact cosine search over the parts that `vectors/` holds: `part-*.npy` float32 [n, d], normalised, and `rows.npy`
    int64, the catalog row of each vector in order."""

    def __init__(self, folder: Path) -> None:
        self._parts = [np.load(path, mmap_mode="r") for path in sorted(folder.glob("part-*.npy"))]
        self._rows = np.load(folder / "rows.npy", mmap_mode="r")
        assert sum(len(part) for part in self._parts) == len(self._rows)

    def top(self, query_vectors: np.ndarray, depth: int) -> list[np.ndarray]:
        """For normalised query vectors [q, d]: rows of the nearest products, best first, q arrays int64 [<= depth]."""
        scores = np.empty((len(query_vectors), 0), dtype=np.float32)
        positions = np.empty((len(query_vectors), 0), dtype=np.int64)
        for first, block in self._blocks():
            new = np.concatenate([query_vectors @ part.T for part in block], axis=1)
            scores = np.concatenate([scores, new], axis=1)
            span = np.arange(first, first + new.shape[1])
            positions = np.concatenate([positions, np.broadcast_to(span, new.shape)], axis=1)
            kept = np.stack([_best(row, depth) for row in scores])
            scores = np.take_along_axis(scores, kept, axis=1)
            positions = np.take_along_axis(positions, kept, axis=1)
        return [np.asarray(self._rows[row]) for row in positions]

    def _blocks(self) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Parts together up to `_BLOCK_VECTORS`, with the position of the first vector of each block."""
        first, size, block = 0, 0, []  # type: int, int, list[np.ndarray]
        for part in self._parts:
            block.append(part)
            size += len(part)
            if size >= _BLOCK_VECTORS:
                yield first, block
                first, size, block = first + size, 0, []
        if block:
            yield first, block


def sample_rows(keys: np.ndarray, max_products: int, seed: int) -> np.ndarray:
    """The catalog rows that get a vector, rising: all, or the `max_products` whose keys (uint64 [n]) hash lowest."""
    if len(keys) <= max_products:
        return np.arange(len(keys))
    return np.sort(np.argpartition(mix(np.asarray(keys), seed), max_products)[:max_products])
