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
from relevance_ray.generate.index.catalog import Catalog
from relevance_ray.generate.index.lexical import Lexicon
from relevance_ray.generate.index.search import CatalogSearch
from relevance_ray.generate.options import GenerateOptions
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
        catalog: what is known of all products.
        lexicon: the word counts of the whole catalog.
        search: the catalog's shards.
        embed: texts to normalised float32 [n, d], for the queries; None where no quota asks for dense candidates.
        read_pool: the POOL rows of a range.
    """

    options: GenerateOptions
    catalog: Catalog
    lexicon: Lexicon
    search: CatalogSearch
    embed: Callable[[list[str]], np.ndarray] | None
    read_pool: Callable[[int, int], pa.Table]


def generate_shard(context: ShardContext, start: int, stop: int) -> pa.Table:
    """The groups [start, stop) of the pool: a GROUP table with `stop - start` rows."""
    options = context.options
    pool = context.read_pool(start, stop).to_pylist()
    assert len(pool) == stop - start
    rankings = iter(_rankings(context, [entry["query"] for entry in pool if entry["rows"] is None]))
    quotas = scale_quotas(options.quotas, options.candidates_per_query)
    first, last = options.middle_ranks
    chosen: list[list[tuple[int, list[Origin]]]] = []
    for entry in pool:
        if entry["rows"] is not None:
            own = zip(entry["rows"], entry["ranks"], strict=True)
            chosen.append([(row, [("file", rank)]) for row, rank in own])
            continue
        ranked = next(rankings)
        if "engine" in quotas:
            ranked["engine"] = np.asarray(entry["engine_rows"] or [], dtype=np.int64)
        seed = query_seed(options.seed, entry["query"])
        chosen.append(choose(context.catalog, ranked, quotas, (first, last), entry["anchor"], seed))
    return _group_table(context.search, pool, chosen)


def _rankings(context: ShardContext, queries: list[str]) -> list[dict[str, np.ndarray]]:
    """For each query its rankings by name: catalog rows, best first."""
    if not queries:
        return []
    depth = max(context.options.middle_ranks[1], 4 * context.options.candidates_per_query)
    lexical = context.search.lexical([context.lexicon.query(query) for query in queries], depth)
    out = [{"bm25": top.rows} for top in lexical]
    if context.embed is not None:
        # Each by itself: the last bits of a vector hang on what it is computed next to, and could flip two ranks.
        vectors = np.concatenate([context.embed([query]) for query in queries])
        for rankings, top in zip(out, context.search.dense(vectors, depth), strict=True):
            rankings["dense"] = top.rows
    return out


def _group_table(search: CatalogSearch, pool: list[dict], chosen: list[list[tuple[int, list[Origin]]]]) -> pa.Table:
    flat = [candidate for group in chosen for candidate in group]
    products = search.products(np.asarray([row for row, _ in flat], dtype=np.int64))
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
