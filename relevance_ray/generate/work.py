"""What one actor of generation does with an item: words and vectors of the catalog, queries, shards of groups.

Each function opens what the work needs, once an actor; what it returns does one item and returns how much that was: pairs,
where an item is a shard of groups, else 1. Actors map the index into memory and commit what they made; only numbers travel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from relevance_ray.generate.index.catalog_index import EMBEDDED_TOKENS, CatalogIndex
from relevance_ray.generate.index.search import CatalogSearch
from relevance_ray.generate.options import GenerateOptions
from relevance_ray.generate.queries.store import QueryStore
from relevance_ray.generate.shards import ShardContext, generate_shard, shard_name
from relevance_ray.storage import CommitLog

OpenSearch = Callable[[CatalogIndex], CatalogSearch]


def open_embedder(options: GenerateOptions) -> Callable[[list[str]], np.ndarray]:
    """The dense model, loaded once; torch is imported only where it is used."""
    from relevance_ray.engines.bi_encoder import TextEncoder
    from relevance_ray.models import resolve_model

    encoder = TextEncoder(
        resolve_model(options.dense_model), max_batch_tokens=options.max_batch_tokens, max_tokens=EMBEDDED_TOKENS
    )
    return encoder.embed


def index_shard(index: CatalogIndex) -> Callable[[int], int]:
    """Indexes the words of one shard of the catalog."""

    def work(shard: int) -> int:
        index.build_postings(shard)
        return 1

    return work


def embed_products(index: CatalogIndex) -> Callable[[int, int], int]:
    """Embeds one part of a shard's products."""
    embed = open_embedder(index.options)

    def work(shard: int, part: int) -> int:
        index.build_vectors(shard, part, embed)
        return 1

    return work


def write_query_part(index: CatalogIndex, queries: QueryStore) -> Callable[[int], int]:
    """Has a language model write one part of the queries."""
    from relevance_ray.engines.registry import open_generator

    generator = open_generator(index.options.llm, "generate.llm")

    def work(part: int) -> int:
        queries.write(part, generator)
        return 1

    return work


def write_groups(
    index: CatalogIndex, queries: QueryStore, out_dir: str, key: str, open_search: OpenSearch
) -> Callable[[int, int], int]:
    """Generates and commits one shard of groups; returns its pairs."""
    log = CommitLog(out_dir)
    context = ShardContext(
        options=index.options,
        catalog=index.catalog,
        lexicon=index.lexicon,
        search=open_search(index),
        embed=open_embedder(index.options) if index.options.uses_dense else None,
        read_pool=queries.read_pool().read,
    )

    def work(start: int, stop: int) -> int:
        table = generate_shard(context, start, stop)
        members = table["products"].combine_chunks().flatten()
        origins = Counter(found[0]["name"] for found in members.field("origins").to_pylist())
        extra = {"pairs": len(members), "origins": dict(origins)}
        log.commit(shard_name(start, stop), table, key, extra)
        return len(members)

    return work
