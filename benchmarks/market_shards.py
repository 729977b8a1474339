"""Shards of groups of the demo market, real rows to label, made without a search index: queries of the log, each with
products drawn at random. What a benchmark of labeling wants is their shape and their texts, not their relevance."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from relevance_ray.data.market import products
from relevance_ray.data.market_queries import queries
from relevance_ray.labeling.pipeline import Shard, shards_to_label
from relevance_ray.schema import GROUP, pair_id, product_fields, query_id
from relevance_ray.storage import CommitLog

CATALOG, QUERIES = 20_000, 20_000


def write_shards(
    folder: str, num_shards: int, groups_per_shard: int, products_per_group: int, distinct: int | None = None
) -> list[Shard]:
    """The shards of a generate folder, made where they are not there yet, and ready to be labeled.

    Args:
        distinct: so many different contents, in turn; all of them by default. Making rows costs more than labeling them
            with an engine that sleeps.
    """
    log = CommitLog(folder)
    missing = [index for index in range(num_shards) if _name(index, groups_per_shard) not in log.committed()]
    if missing:
        catalog = products(0, 0, CATALOG).to_pylist()
        log_queries = queries(0, 0, QUERIES)
        made: dict[int, pa.Table] = {}
        for index in missing:
            content = index % (distinct or num_shards)
            if content not in made:
                made[content] = _groups(content, groups_per_shard, products_per_group, catalog, log_queries)
            extra = {"pairs": groups_per_shard * products_per_group}
            log.commit(_name(index, groups_per_shard), made[content], "benchmark", extra)
    return shards_to_label(log, [_name(index, groups_per_shard) for index in range(num_shards)])


def _name(index: int, groups: int) -> str:
    return f"groups-{index * groups:010d}-{(index + 1) * groups:010d}"


def _groups(seed: int, groups: int, size: int, catalog: list[dict], log_queries: list[str]) -> pa.Table:
    rng = np.random.default_rng(seed)
    rows = []
    for number in rng.integers(len(log_queries), size=groups):
        query = log_queries[number]
        chosen = [catalog[index] for index in rng.choice(len(catalog), size=size, replace=False)]
        members = [
            {
                "pair_id": pair_id(query, product["product_id"]),
                "product_id": product["product_id"],
                "fields": product_fields(product),
                "origins": [{"name": "random", "rank": 0}],
            }
            for product in chosen
        ]
        rows.append({"query_id": query_id(query), "query": query, "query_source": "log", "products": members})
    return pa.Table.from_pylist(rows, schema=GROUP)
