"""From a range of the pool to a table of groups: the pure core of generation.

A shard is a range [start, stop) of groups, cut at multiples of `groups_per_shard`; only a run's last one is shorter,
and a larger run later adds the range from there to the next cut. A group's products depend on the seed and its query
alone, so a range gives the same groups whichever ranges it is computed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from relevance_ray.generate.candidates import Origin, choose, query_seed, scale_quotas
from relevance_ray.generate.catalog import Catalog
from relevance_ray.generate.options import GenerateOptions
from relevance_ray.generate.rankings import Bm25Ranking, DenseRanking
from relevance_ray.schema import FIELDS, GROUP, ORIGIN, pair_id, query_id

Range = tuple[int, int]


def shard_name(start: int, stop: int) -> str:
    return f"groups-{start:010d}-{stop:010d}"


def shard_range(name: str) -> Range:
    _, start, stop = name.split("-")
    return int(start), int(stop)


def plan_ranges(num_groups: int, groups_per_shard: int, committed: Iterable[Range]) -> list[Range]:
    """The ranges still to do so that [0, num_groups) is covered, in order, cut at multiples of `groups_per_shard`.

    Committed ranges (disjoint) are never touched, and what lies beyond `num_groups` is left alone.
    """
    missing: list[Range] = []
    at = 0
    for start, stop in [*sorted(committed), (num_groups, num_groups)]:
        while at < min(start, num_groups):
            end = min((at // groups_per_shard + 1) * groups_per_shard, start, num_groups)
            missing.append((at, end))
            at = end
        at = max(at, stop)
    return missing


@dataclass(frozen=True)
class ShardContext:
    """All that a shard is computed from.

    Attributes:
        options: what was asked for.
        catalog: the products.
        bm25: the lexical ranking.
        dense: the dense ranking, or None where no quota asks for it.
        embed: texts to normalised float32 [n, d], for the queries; None where `dense` is.
        read_pool: the POOL rows of a range.
    """

    options: GenerateOptions
    catalog: Catalog
    bm25: Bm25Ranking
    dense: DenseRanking | None
    embed: Callable[[list[str]], np.ndarray] | None
    read_pool: Callable[[int, int], pa.Table]


def generate_shard(context: ShardContext, start: int, stop: int) -> pa.Table:
    """The groups [start, stop) of the pool: a GROUP table with `stop - start` rows."""
    pool = context.read_pool(start, stop).to_pylist()
    assert len(pool) == stop - start
    searched = [index for index, entry in enumerate(pool) if entry["rows"] is None]
    dense = _dense_tops(context, {start + index: pool[index]["query"] for index in searched})
    quotas = scale_quotas(context.options.quotas, context.options.candidates_per_query)
    chosen: list[list[tuple[int, list[Origin]]]] = []
    for index, entry in enumerate(pool):
        if entry["rows"] is not None:
            own = zip(entry["rows"], entry["ranks"], strict=True)
            chosen.append([(row, [("file", rank)]) for row, rank in own])
            continue
        rankings = {"bm25": context.bm25.top(entry["query"], _depth(context.options))}
        if dense:
            rankings["dense"] = dense[start + index]
        seed = query_seed(context.options.seed, entry["query"])
        first, last = context.options.middle_ranks
        chosen.append(choose(context.catalog, rankings, quotas, (first, last), entry["anchor"], seed))
    return _group_table(context.catalog, pool, chosen)


def _depth(options: GenerateOptions) -> int:
    return max(options.middle_ranks[1], 4 * options.candidates_per_query)


def _dense_tops(context: ShardContext, queries: dict[int, str]) -> dict[int, np.ndarray]:
    """Dense rankings by group number.

    A float's last bits depend on what it is computed next to, and could flip two ranks. So each query is embedded by
    itself, and stands in the product of matrices at the place it has in its whole shard, whichever part of that is
    being computed.
    """
    if context.dense is None or context.embed is None or not queries:
        return {}
    width = context.options.groups_per_shard
    vectors = {group: context.embed([query])[0] for group, query in queries.items()}
    out: dict[int, np.ndarray] = {}
    for shard in sorted({group // width for group in queries}):
        members = [group for group in queries if group // width == shard]
        block = np.zeros((width, len(vectors[members[0]])), dtype=np.float32)
        for group in members:
            block[group % width] = vectors[group]
        tops = context.dense.top(block, _depth(context.options))
        out.update((group, tops[group % width]) for group in members)
    return out


def _group_table(catalog: Catalog, pool: list[dict], chosen: list[list[tuple[int, list[Origin]]]]) -> pa.Table:
    flat = [candidate for group in chosen for candidate in group]
    products = catalog.take(np.asarray([row for row, _ in flat], dtype=np.int64))
    product_ids = products["product_id"].to_pylist()
    locales = products["locale"].to_pylist()
    queries = [entry["query"] for entry, group in zip(pool, chosen, strict=True) for _ in group]
    pair_ids = [pair_id(*pair) for pair in zip(queries, product_ids, locales, strict=True)]
    fields = pa.StructArray.from_arrays(
        [products[field.name].combine_chunks() for field in FIELDS], fields=list(FIELDS)
    )
    origins = [[{"name": name, "rank": rank} for name, rank in found] for _, found in flat]
    struct = GROUP.field("products").type.value_type
    members = pa.StructArray.from_arrays(
        [
            pa.array(pair_ids, pa.int64()),
            pa.array(product_ids, pa.string()),
            fields,
            pa.array(origins, pa.list_(ORIGIN)),
        ],
        fields=list(struct),
    )
    offsets = np.concatenate([[0], np.cumsum([len(group) for group in chosen])])
    return pa.table(
        [
            pa.array([query_id(entry["query"], entry["locale"]) for entry in pool]),
            pa.array([entry["query"] for entry in pool]),
            pa.array([entry["query_source"] for entry in pool]),
            pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), members),
        ],
        schema=GROUP,
    )
