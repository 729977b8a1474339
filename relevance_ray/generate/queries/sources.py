"""Queries to label products for: from a log, from titles, from a file of the shop's own pairs, mixed into one stream.

The stream looks endless and is a pure function of the options and the prepared data; a run takes the head that its
`num_pairs` needs. So a larger run repeats a smaller one and adds to it.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from relevance_ray.data.splits import LeakGuard, words_key
from relevance_ray.errors import UserError
from relevance_ray.generate.options import BANDS, GenerateOptions
from relevance_ray.generate.queries.keys import TextSet
from relevance_ray.generate.queries.titles import MAX_ROUNDS, TitleProduct, cut_query, draws
from relevance_ray.generate.stable import hash_seed, shuffled
from relevance_ray.row_files import RowReader
from relevance_ray.schema import normalize_query
from relevance_ray.storage import is_remote, localize

_TITLES_AT_ONCE = 2000
_ROWS_AT_ONCE = 10_000
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PoolQuery:
    """A query of the pool; `parts` are the groups of a pairs file's query, each a list of (catalog row, rank), and
    `engine_rows` the catalog rows that the shop's own engine found, best first."""

    query: str
    source: str
    locale: str | None = None
    anchor: int | None = None
    parts: tuple[tuple[tuple[int, int], ...], ...] = ()
    engine_rows: tuple[int, ...] = ()


@dataclass
class PoolCounts:
    """What the stream left out while it was read: by source, and of written queries by reason."""

    leaks: Counter[str] = field(default_factory=Counter)
    repeats: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)


def log_queries(log: pa.Table, seed: int, frequency_power: float, bands: Mapping[str, float]) -> Iterator[PoolQuery]:
    """The log's queries, its bands interleaved by their weights; a band that runs out leaves its turns to the others.

    Within a band the order is seeded, and a query's chance to come early grows with `frequency ** frequency_power`:
    weighted sampling without replacement by exponential keys (Efraimidis and Spirakis, 2006), so that a query's place
    depends on nothing but the seed, itself and its frequency.
    """
    log = log.combine_chunks()
    frequencies = np.maximum(log["frequency"].to_numpy(), 1)
    uniform = np.empty(log.num_rows, dtype=np.float64)
    for start in range(0, log.num_rows, _ROWS_AT_ONCE):  # never all texts as Python's: they take 200 bytes each
        texts = log["query"].slice(start, _ROWS_AT_ONCE).to_pylist()
        drawn = [draws(seed, "log", normalize_query(text))[0] for text in texts]
        uniform[start : start + len(texts)] = (np.asarray(drawn) + 0.5) / 2**32
    order = np.argsort(-np.log(uniform) / frequencies**frequency_power, kind="stable")
    band = log_bands(frequencies)[order] if bands else np.zeros(len(order), dtype=np.int64)
    members = [order[band == number] for number in range(len(BANDS))]
    weights = [bands.get(name, 0.0) for name in BANDS] if bands else [1.0] * len(BANDS)
    streams = [(weight, map(int, rows)) for weight, rows in zip(weights, members, strict=True) if weight]
    rows = interleave(streams)
    while block := list(itertools.islice(rows, _ROWS_AT_ONCE)):
        taken = log.select(["query", "locale"]).take(pa.array(block))
        for query, locale in zip(taken["query"].to_pylist(), taken["locale"].to_pylist(), strict=True):
            yield PoolQuery(query, "log", locale)


def log_bands(frequencies: np.ndarray) -> np.ndarray:
    """For frequencies [n] the band of each query, int64 [n]: 0 (head) for the most frequent ones that make up the first
    third of all searches, 1 (torso) the second third, 2 (tail) the last. Equally frequent queries share a band."""
    values, counts = np.unique(frequencies, return_counts=True)
    values, counts = values[::-1], counts[::-1]
    before = np.cumsum(values * counts) - values * counts  # searches of more frequent queries
    band = np.minimum(before * 3 // max(int(frequencies.sum()), 1), 2)
    return band[np.searchsorted(-values, -frequencies)]


def interleave(streams: Sequence[tuple[float, Iterator[T]]]) -> Iterator[T]:
    """Items of (weight, items) in proportion to the weights, until all have run out."""
    heap = [(0.5 / weight, index, 0) for index, (weight, _) in enumerate(streams)]
    heapq.heapify(heap)
    while heap:
        _, index, num_taken = heapq.heappop(heap)
        weight, items = streams[index]
        for item in itertools.islice(items, 1):
            heapq.heappush(heap, ((num_taken + 1.5) / weight, index, num_taken + 1))
            yield item


def title_queries(
    keys: np.ndarray,
    read: Callable[[np.ndarray], Sequence[tuple[TitleProduct, str | None]]],
    is_shared: Callable[[str], bool],
    options: GenerateOptions,
) -> Iterator[PoolQuery]:
    """Cuts of every title in a seeded order, then second cuts of every title, and so on for `MAX_ROUNDS` rounds.

    Args:
        keys: uint64 [products], what the order is drawn by.
        read: the products of catalog rows, with their locales.
        is_shared: whether a word stands in more than one product.
        options: the seed and the lengths of queries.
    """
    for round_index in range(MAX_ROUNDS):
        order = shuffled(np.asarray(keys), hash_seed(options.seed, "titles", str(round_index)))
        for start in range(0, len(order), _TITLES_AT_ONCE):
            rows = order[start : start + _TITLES_AT_ONCE]
            for row, (product, locale) in zip(rows.tolist(), read(rows), strict=True):
                query = cut_query(
                    product,
                    is_shared,
                    seed=options.seed,
                    round_index=round_index,
                    min_words=options.min_title_words,
                    max_words=options.max_title_words,
                )
                if query is not None:
                    yield PoolQuery(query, "titles", locale, anchor=row)


def file_queries(path: str, product_ids: Sequence[str], options: GenerateOptions) -> Iterator[PoolQuery]:
    """The shop's own pairs, a query at a time in seeded order.

    No pair is lost: a query with more than `candidates_per_query` products makes several groups, each of which spans all
    ranks. Raises what `read_pairs` raises.
    """
    pairs = read_pairs(path, product_ids, "generate.pairs_file")
    for key in sorted(pairs, key=lambda key: draws(options.seed, "file", key)[0]):
        query, ranked = pairs[key]
        num_parts = -(-len(ranked) // options.candidates_per_query)
        parts = tuple(tuple(ranked[part::num_parts]) for part in range(num_parts))
        yield PoolQuery(query, "file", parts=parts)


def read_pairs(path: str, product_ids: Sequence[str], key: str) -> dict[str, tuple[str, list[tuple[int, int]]]]:
    """Normalised query -> its first spelling and (catalog row, rank), best rank first. All are held in memory, some 100
    bytes a pair.

    Columns `query`, `product_id` and, if present, `rank` (1 is best; else the order in the file); of a pair given twice
    the better rank counts.

    Raises:
        UserError: no such file, a missing column, an empty query, a product that is not in the catalog, a bad rank; the
            sentence begins with `key`, where the file is configured.
    """
    reader = RowReader(localize(path) if is_remote(path) else Path(path))
    row_of = {product_id: row for row, product_id in enumerate(product_ids)}
    pairs: dict[str, dict[int, int]] = {}
    spelling: dict[str, str] = {}
    for column in ("query", "product_id"):
        if reader.columns and column not in reader.columns:
            raise UserError(f"{key} {path} lacks the column {column!r}; it has {', '.join(reader.columns)}")
    for batch in reader.batches(10_000):
        for number, cells in enumerate(batch.rows, start=batch.first_row):
            where = f"{key} {path}, row {number}"
            for column in ("query", "product_id"):
                if cells.get(column) is None:
                    raise UserError(f"{where}: no {column}; every row needs query and product_id")
            query, product_id = str(cells["query"]), str(cells["product_id"])
            normal = normalize_query(query)
            if not normal:
                raise UserError(f"{where}: the query is empty; fill it in or drop the row")
            if product_id not in row_of:
                raise UserError(f"{where}: product {product_id!r} is not in the catalog; add it or drop the row")
            spelling.setdefault(normal, query)
            found = pairs.setdefault(normal, {})
            rank = _rank(cells.get("rank"), len(found) + 1, where)
            found[row_of[product_id]] = min(rank, found.get(row_of[product_id], rank))
    if not pairs:
        raise UserError(f"{key} {path} has no row; give it at least one (query, product_id)")
    return {
        normal: (spelling[normal], sorted(found.items(), key=lambda pair: pair[1])) for normal, found in pairs.items()
    }


def _rank(value: object, default: int, where: str) -> int:
    if value is None or value == "" or value != value:  # a missing cell makes a column of NaN and fractions
        return default
    try:
        number = float(str(value))
        rank = int(number) if number.is_integer() else -1
    except ValueError:
        rank = -1
    if not 0 <= rank < 2**31:
        raise UserError(
            f"{where}: rank {value!r} is no whole number from 0 to {2**31 - 1:,}; mend it or drop the column"
        )
    return rank


def mix_sources(
    sources: Sequence[tuple[float, Iterable[PoolQuery]]], guard: LeakGuard, counts: PoolCounts
) -> Iterator[PoolQuery]:
    """Interleaves (weight, queries) in proportion, without repeats, held-out queries and near-duplicates of those.

    Of two queries with the same words the first one stays; queries of a pairs file, whose products would be lost, go
    before all others.
    """
    seen = TextSet()
    streams: list[tuple[float, Iterator[PoolQuery]]] = []
    for weight, queries in sources:
        iterator = iter(queries)
        first = next(iterator, None)
        if first is None:
            continue
        own = itertools.chain([first], iterator)
        if first.source == "file":
            pairs = list(own)
            for query in pairs:
                seen.add(words_key(query.query))
            own = itertools.chain(pairs)
        streams.append((weight, _without_known(own, seen, guard, counts)))
    yield from interleave(streams)


def _without_known(
    queries: Iterator[PoolQuery], seen: TextSet, guard: LeakGuard, counts: PoolCounts
) -> Iterator[PoolQuery]:
    for query in queries:
        key = words_key(query.query)
        if query.source != "file" and not (key and seen.add(key)):
            counts.repeats[query.source] += 1
        elif guard.is_leak(query.query):
            counts.leaks[query.source] += 1
        else:
            yield query
