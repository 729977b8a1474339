"""The pool of queries: from a log, from titles, from a file of the shop's own pairs.

The pool is one endless-looking stream, a pure function of the options and the prepared data, of which a run takes the
head that its `num_pairs` needs. So a larger run repeats a smaller one and adds to it. The trade-off: one process walks
the stream from its start each time (some ten thousand queries a second), and remembers what it has seen.
"""

from __future__ import annotations

import heapq
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from relevance_ray.data.splits import LeakGuard
from relevance_ray.errors import UserError
from relevance_ray.generate.options import GenerateOptions
from relevance_ray.generate.titles import MAX_ROUNDS, TitleProduct, count_title_words, cut_query, draws
from relevance_ray.row_files import RowReader
from relevance_ray.schema import normalize_query
from relevance_ray.storage import is_remote, localize

POOL = pa.schema(
    [
        pa.field("query", pa.string(), nullable=False),
        pa.field("query_source", pa.string(), nullable=False),
        pa.field("locale", pa.string()),
        pa.field("anchor", pa.int64()),
        pa.field("rows", pa.list_(pa.int64())),
        pa.field("ranks", pa.list_(pa.int32())),
    ]
)
"""One row a group. `anchor`: catalog row of the product whose title the query was cut from. `rows` and `ranks`: the
products that a pairs file gives; null where candidates are to be found."""

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class PoolQuery:
    """A query of the pool; `parts` are the groups of a pairs file's query, each a list of (catalog row, rank)."""

    query: str
    source: str
    locale: str | None = None
    anchor: int | None = None
    parts: tuple[tuple[tuple[int, int], ...], ...] = ()


@dataclass
class PoolCounts:
    """What the stream left out while it was read."""

    leaks: Counter[str] = field(default_factory=Counter)
    repeats: Counter[str] = field(default_factory=Counter)


def query_key(query: str) -> str:
    """Equal for queries of the same words in whatever order: the second of two is left out."""
    normal = normalize_query(query)
    return " ".join(sorted(_WORD.findall(normal))) or normal


def log_queries(log: pa.Table, seed: int, frequency_power: float) -> Iterator[PoolQuery]:
    """The log in a seeded order in which a query's chance to come early grows with `frequency ** frequency_power`.

    Weighted sampling without replacement by exponential keys (Efraimidis and Spirakis, 2006): a query's place depends
    on nothing but the seed, itself and its frequency.
    """
    keyed = []
    for index, (query, frequency) in enumerate(
        zip(log["query"].to_pylist(), log["frequency"].to_pylist(), strict=True)
    ):
        uniform = (draws(seed, "log", normalize_query(query))[0] + 0.5) / 2**32
        keyed.append((-math.log(uniform) / max(frequency, 1) ** frequency_power, index))
    locales = log["locale"].to_pylist()
    queries = log["query"].to_pylist()
    for _, index in sorted(keyed):
        yield PoolQuery(queries[index], "log", locales[index])


def title_queries(
    products: Sequence[TitleProduct], locales: Sequence[str | None], options: GenerateOptions
) -> Iterator[PoolQuery]:
    """Cuts of every title in a seeded order, then second cuts of every title, and so on for `MAX_ROUNDS` rounds."""
    counts = count_title_words(product.title for product in products)
    for round_index in range(MAX_ROUNDS):
        keys = [draws(options.seed, "order", round_index, product.product_id)[0] for product in products]
        for row in sorted(range(len(products)), key=keys.__getitem__):
            query = cut_query(
                products[row],
                counts,
                seed=options.seed,
                round_index=round_index,
                min_words=options.min_title_words,
                max_words=options.max_title_words,
            )
            if query is not None:
                yield PoolQuery(query, "titles", locales[row], anchor=row)


def file_queries(path: str, product_ids: Sequence[str], options: GenerateOptions) -> Iterator[PoolQuery]:
    """The shop's own pairs, a query at a time in seeded order.

    Columns `query`, `product_id` and, if present, `rank` (1 is best; else the order in the file). No pair is lost: a
    query with more than `candidates_per_query` products makes several groups, each of which spans all ranks.

    Raises:
        UserError: no such file, a missing column, an empty query, a product that is not in the catalog, a bad rank.
    """
    reader = RowReader(localize(path) if is_remote(path) else Path(path))
    row_of = {product_id: row for row, product_id in enumerate(product_ids)}
    pairs: dict[str, dict[int, int]] = {}
    spelling: dict[str, str] = {}
    for batch in reader.batches(10_000):
        for number, cells in enumerate(batch.rows, start=batch.first_row):
            where = f"generate.pairs_file {path}, row {number}"
            for column in ("query", "product_id"):
                if cells.get(column) is None:
                    raise UserError(f"{where}: no {column}; every row needs query and product_id")
            query, product_id = str(cells["query"]), str(cells["product_id"])
            key = normalize_query(query)
            if not key:
                raise UserError(f"{where}: the query is empty; fill it in or drop the row")
            if product_id not in row_of:
                raise UserError(f"{where}: product {product_id!r} is not in the catalog; add it or drop the row")
            spelling.setdefault(key, query)
            found = pairs.setdefault(key, {})
            found.setdefault(row_of[product_id], _rank(cells.get("rank"), len(found) + 1, where))
    if not pairs:
        raise UserError(f"generate.pairs_file {path} has no row; give it at least one (query, product_id)")
    for key in sorted(pairs, key=lambda key: draws(options.seed, "file", key)[0]):
        ranked = sorted(pairs[key].items(), key=lambda pair: pair[1])
        num_parts = -(-len(ranked) // options.candidates_per_query)
        parts = tuple(tuple(ranked[part::num_parts]) for part in range(num_parts))
        yield PoolQuery(spelling[key], "file", parts=parts)


def _rank(value: object, default: int, where: str) -> int:
    if value is None or value == "":
        return default
    try:
        rank = int(str(value))
    except ValueError:
        rank = -1
    if not 0 <= rank < 2**31:
        raise UserError(f"{where}: rank {value!r} is no whole number from 0 up; mend it or drop the column")
    return rank


def mix(
    sources: Sequence[tuple[float, Iterable[PoolQuery]]], guard: LeakGuard, counts: PoolCounts
) -> Iterator[PoolQuery]:
    """Interleaves (weight, queries) in proportion, without repeats, held-out queries and near-duplicates of those.

    Of two queries with the same words the first one stays; queries of a pairs file, whose products would be lost, go
    before all others.
    """
    iterators = [iter(queries) for _, queries in sources]
    seen: set[str] = set()
    for index, iterator in enumerate(iterators):
        first = next(iterator, None)
        if first is not None and first.source == "file":
            own = [first, *iterator]
            seen.update(query_key(query.query) for query in own)
            iterators[index] = iter(own)
        elif first is not None:
            iterators[index] = itertools.chain([first], iterator)
    heap = [(0.5 / weight, index, 0) for index, (weight, _) in enumerate(sources)]
    heapq.heapify(heap)
    while heap:
        _, index, num_taken = heapq.heappop(heap)
        query = _next_new(iterators[index], seen, guard, counts)
        if query is not None:
            heapq.heappush(heap, ((num_taken + 1.5) / sources[index][0], index, num_taken + 1))
            yield query


def _next_new(iterator: Iterator[PoolQuery], seen: set[str], guard: LeakGuard, counts: PoolCounts) -> PoolQuery | None:
    for query in iterator:
        key = query_key(query.query)
        if query.source != "file":
            if not key or key in seen:
                counts.repeats[query.source] += 1
                continue
            seen.add(key)
        if guard.is_leak(query.query):
            counts.leaks[query.source] += 1
            continue
        return query
    return None


def take_pool(stream: Iterable[PoolQuery], num_pairs: int, group_size: int, counts: PoolCounts) -> tuple[pa.Table, int]:
    """The head of the stream whose groups hold `num_pairs` pairs within 1%.

    Args:
        stream: what `mix` gives.
        num_pairs: how many pairs are wanted.
        group_size: products of each group that brings none of its own.
        counts: filled by the stream while it is read; named in the error.

    Returns:
        A POOL table, one row a group, and the number of pairs.

    Raises:
        UserError: the stream holds fewer, or whole groups do not come within 1%: the sentence says what can be had.
    """
    rows: list[tuple[PoolQuery, tuple[tuple[int, int], ...] | None]] = []
    total = before = 0
    for query in stream:
        for part in query.parts or (None,):
            rows.append((query, part))
            before, total = total, total + (group_size if part is None else len(part))
            if total >= num_pairs:
                break
        if total >= num_pairs:
            break
    if total >= num_pairs and before and num_pairs - before < total - num_pairs:
        rows.pop()
        total, before = before, total
    if abs(total - num_pairs) > 0.01 * num_pairs:
        if max(total, before) < num_pairs:
            left_out = (
                f"{counts.repeats.total():,} repeats and {counts.leaks.total():,} near-duplicates of held-out queries"
            )
            raise UserError(
                f"generate.num_pairs {num_pairs:,} cannot be met: the sources hold {len(rows):,} groups with {total:,} "
                f"pairs ({left_out} left out); lower generate.num_pairs to {total}, raise "
                f"generate.candidates_per_query or add to generate.source"
            )
        choices = " or ".join(str(count) for count in sorted({before, total}) if count)
        raise UserError(
            f"generate.num_pairs {num_pairs:,} cannot be met within 1% by whole groups of "
            f"{group_size}; set it to {choices}"
        )
    return _pool_table(rows), total


def _pool_table(rows: list[tuple[PoolQuery, tuple[tuple[int, int], ...] | None]]) -> pa.Table:
    return pa.table(
        {
            "query": [query.query for query, _ in rows],
            "query_source": [query.source for query, _ in rows],
            "locale": [query.locale for query, _ in rows],
            "anchor": [query.anchor for query, _ in rows],
            "rows": [None if part is None else [row for row, _ in part] for _, part in rows],
            "ranks": [None if part is None else [rank for _, rank in part] for _, part in rows],
        },
        schema=POOL,
    )
