"""Figures of a stream of queries: lengths, types, repetition, in bounded memory.

Lengths and types are counted over every query that is read. What needs the texts beside each other (n-grams, vocabulary,
near-duplicates) is of an even sample of at most `MAX_TEXTS` different queries, and every such figure says of how many.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from relevance_ray.data.splits import SIMILARITY, LeakGuard
from relevance_ray.generate.diversity.counting import KeySample, even_sample
from relevance_ray.generate.diversity.query_text import TYPES, TypeRules, ngrams, words
from relevance_ray.schema import normalize_query
from relevance_ray.tokens import tokenize

MAX_WORDS, MAX_CHARS = 32, 160
"""Longer queries stand in the last bin of a histogram; means are of the lengths as they are."""

MAX_TEXTS = 20_000
MAX_NEAR = 5_000
"""Queries among which near-duplicates are looked for: the search is exact, and quadratic in the worst case."""

MAX_LOG = 200_000
"""Rows of a log whose lengths and types are read."""
_ROWS_AT_ONCE = 10_000
VIEWS = {"each once": 0.0, "by root of frequency": 0.5, "by frequency": 1.0}
"""How a log may be weighted, name -> power of the frequency: as a list of queries, as traffic, and between the two."""

SHOWN_VIEWS = ("each once", "by frequency")


@dataclass(frozen=True, slots=True)
class ReadQuery:
    """A query's normalised text, its number of words and its types."""

    text: str
    num_words: int
    types: set[str]


def read_query(query: str, rules: TypeRules) -> ReadQuery:
    """What is counted of a query; read once, it may be counted in several places."""
    normal = normalize_query(query)
    return ReadQuery(normal, len(words(normal)), rules.types(normal))


class QueryStats:
    """Counts queries, under one or several weightings at once.

    Attributes:
        num_words: float64 [views, MAX_WORDS + 1], weight by number of words; `num_chars` by characters.
        sample: the different queries, normalised, and how often each came.
    """

    def __init__(self, num_views: int = 1, seed: int = 0) -> None:
        self.num_words = np.zeros((num_views, MAX_WORDS + 1))
        self.num_chars = np.zeros((num_views, MAX_CHARS + 1))
        self._sums = np.zeros((num_views, 2))
        self._types = {name: np.zeros(num_views) for name in TYPES}
        self.weight = np.zeros(num_views)
        self.sample = KeySample(MAX_TEXTS, seed)

    def add(self, query: ReadQuery, weights: np.ndarray | float = 1.0) -> None:
        """Count a query with its weight in each view."""
        self.count(query, weights)
        self.sample.add(query.text)

    def count(self, query: ReadQuery, weights: np.ndarray | float) -> None:
        """Count lengths and types of a query, and leave `sample` to the caller."""
        self.num_words[:, min(query.num_words, MAX_WORDS)] += weights
        self.num_chars[:, min(len(query.text), MAX_CHARS)] += weights
        self._sums[:, 0] += np.multiply(weights, query.num_words)
        self._sums[:, 1] += np.multiply(weights, len(query.text))
        for name in query.types:
            self._types[name] += weights
        self.weight += weights

    def mean_lengths(self) -> np.ndarray:
        """float64 [views, 2]: mean words and mean characters."""
        return self._sums / np.maximum(self.weight, 1e-12)[:, None]

    def type_shares(self) -> dict[str, np.ndarray]:
        """Type -> float64 [views], the share of queries that have it."""
        return {name: found / np.maximum(self.weight, 1e-12) for name, found in self._types.items()}

    def lengths(self, view: int = 0) -> dict[str, Any]:
        """Mean, median and 95th percentile of words and characters, and the histogram of words."""
        out: dict[str, Any] = {}
        for index, (name, histogram) in enumerate((("words", self.num_words), ("chars", self.num_chars))):
            out[name] = {
                "mean": float(self.mean_lengths()[view, index]),
                "median": _percentile(histogram[view], 0.5),
                "p95": _percentile(histogram[view], 0.95),
                "histogram": [round(float(count), 3) for count in histogram[view]],
            }
        return out

    def figures(self) -> dict[str, Any]:
        """What is told of generated queries (of their first view), without the log."""
        texts = self.sample.in_random_order()
        return {
            "groups": int(self.sample.total),
            "different": self.sample.distinct,
            "different_exact": self.sample.exact,
            "repeated_share": 1 - self.sample.distinct / self.sample.total if self.sample.total else 0.0,
            "length": self.lengths(),
            "types": {name: float(share[0]) for name, share in self.type_shares().items()},
            "distinct_n": distinct_ngrams(texts) | {"queries": len(texts)},
            "near_duplicates": near_duplicates(texts),
        }


def _percentile(histogram: np.ndarray, share: float) -> int:
    total = histogram.sum()
    return int(np.searchsorted(np.cumsum(histogram), share * total)) if total else 0


def distinct_ngrams(texts: Iterable[str]) -> dict[str, float]:
    """Distinct-n (Li et al., "A Diversity-Promoting Objective Function", 2016) for n = 1, 2, 3: different n-grams over all
    n-grams of the texts, counted over `tokenize`. It falls with the number of texts, so only equally many compare."""
    found: dict[int, set[str]] = {1: set(), 2: set(), 3: set()}
    totals = dict.fromkeys(found, 0)
    for text in texts:
        items = tokenize(text)
        for n, seen in found.items():
            grams = list(ngrams(items, n))
            totals[n] += len(grams)
            seen.update(grams)
    return {f"distinct_{n}": len(seen) / totals[n] if totals[n] else 0.0 for n, seen in found.items()}


def near_duplicates(texts: Sequence[str]) -> dict[str, Any]:
    """The share of queries that have a near-duplicate among `MAX_NEAR` of the different ones: the same words in another
    order, or a Jaccard similarity of character 3-grams from `SIMILARITY` on. Found exactly, by a prefix filter; the share
    rises with the number of queries, so only equally many compare."""
    kept = texts[:MAX_NEAR]
    guard = LeakGuard(kept)
    near = sum(len(guard.near_duplicates(text)) > 1 for text in kept)
    return {"share": near / len(kept) if kept else 0.0, "queries": len(kept), "similarity": SIMILARITY}


def log_rows(log: pa.Table, seed: int, size: int) -> Iterator[tuple[str, float, float]]:
    """(query, frequency, weight) of a QUERY table, of at most `size` rows.

    A longer log gives its `size / 2` most frequent queries, each with weight 1, and an even seeded sample of the rest, each
    standing for as many as were left out, so that sums of weight are unbiased for the head and the tail alike.
    """
    if log.num_rows <= size:
        for query, frequency in zip(log["query"].to_pylist(), log["frequency"].to_pylist(), strict=True):
            yield query, max(float(frequency), 1.0), 1.0
        return
    order = pc.sort_indices(log, sort_keys=[("frequency", "descending"), ("query", "ascending")])
    num_head = size // 2
    tail = even_sample(log.num_rows - num_head, size - num_head, seed)
    for rows, weight in (
        (order.slice(0, num_head), 1.0),
        (order.slice(num_head).take(pa.array(tail)), (log.num_rows - num_head) / len(tail)),
    ):
        part = log.take(rows)
        for query, frequency in zip(part["query"].to_pylist(), part["frequency"].to_pylist(), strict=True):
            yield query, max(float(frequency), 1.0), weight


def log_stats(log: pa.Table, rules: TypeRules, seed: int = 0) -> QueryStats:
    """The figures of a QUERY table under all `VIEWS`."""
    powers = np.array(list(VIEWS.values()))
    stats = QueryStats(len(VIEWS), seed)
    for query, frequency, weight in log_rows(log, seed, MAX_LOG):
        stats.count(read_query(query, rules), weight * frequency**powers)
    # Of every row: what the sample does not hold is taken for a query that the log does not hold.
    for batch in log.select(["query"]).to_batches(max_chunksize=_ROWS_AT_ONCE):
        for query in batch.column(0).to_pylist():
            stats.sample.add(normalize_query(query))
    return stats
