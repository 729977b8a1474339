"""Generation on Ray: the index, the vectors and the shards of groups, through pools of actors.

Only numbers of parts and ranges of groups travel through Ray Data; each actor maps the index into memory and commits what
it made. Where a catalog is too large for every worker, its shards are spread over search actors, which all workers ask.
A killed run loses the shards in flight and nothing else; a run with a larger `num_pairs` adds shards to those that are
there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from relevance_ray.cluster.actor_pool import ItemActor, run_pool
from relevance_ray.cluster.workers import ONE, Workers
from relevance_ray.errors import UserError
from relevance_ray.generate.index.catalog_index import CatalogIndex
from relevance_ray.generate.options import GenerateOptions
from relevance_ray.generate.queries.pool import PoolSummary
from relevance_ray.generate.queries.store import QueryStore, file_contents
from relevance_ray.generate.queries.written import PRODUCTS_PER_PART
from relevance_ray.generate.search_actors import spread
from relevance_ray.generate.shards import plan_ranges, shard_range
from relevance_ray.generate.staging import sweep_staging
from relevance_ray.generate.work import embed_products, index_shard, write_groups, write_query_part
from relevance_ray.options import semantic
from relevance_ray.progress import Progress
from relevance_ray.storage import CommitLog, fingerprint, join

MAX_BLOCKS = 1000
"""Of a stage's items, however many: Ray's head keeps account of each."""


def generate(
    options: GenerateOptions,
    prepared_dir: str,
    out_dir: str,
    *,
    index_dir: str = "",
    earlier_index: str = "",
    workers: Workers = ONE,
    search_actors: int = 0,
    writers: Workers = ONE,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Generate the groups of a run into `out_dir`; ray must be initialised, and the caller hold the lease on the root.

    Args:
        options: what to generate. A folder holds what one set of semantic options makes from one prepared folder.
        prepared_dir: what the prepare step wrote; local or s3://, as is `out_dir`.
        index_dir: where the catalog's index lies, which all that is generated from one catalog under the same
            `index_options` may share; by default `index/` in `out_dir`.
        earlier_index: an index of an earlier catalog, whose vectors are taken over where a product reads the same.
        workers: actors that index and embed products and generate shards.
        search_actors: actors, each of what a worker takes, that hold the catalog's shards between them; 0: every worker
            maps the whole catalog.
        writers: actors with a language model, for queries of source llm; one of one CPU by default.
        progress: counts pairs.

    Returns:
        `groups`, `pairs`, `shards` (names of the shards that this `num_pairs` uses, in order), `skipped` (how many of
        them were there), `sources` (groups by query source), `origins` (pairs by origin), `left_out` (queries).

    Raises:
        UserError: `num_pairs` cannot be met within 1%, a bad pairs file, an empty catalog, a folder made with other
            options, a language model that cannot be had.
    """
    progress = progress or Progress("generate", unit="pairs")
    log = CommitLog(out_dir)
    log.sweep()
    key = fingerprint(semantic(options), file_contents(options))
    strangers = sorted(name for name, record in log.committed().items() if record["fingerprint"] != key)
    if strangers:
        raise UserError(
            f"{out_dir} holds shards made with other options ({strangers[0]}); generate into another folder"
        )
    index = CatalogIndex(options, prepared_dir, index_dir or join(out_dir, "index"), earlier_index)
    queries = QueryStore(index, prepared_dir, out_dir)
    for folder in (index.root, out_dir):
        sweep_staging(folder)
    progress.update(stage="catalog")
    index.build_catalog()
    postings = [{"shard": shard} for shard in index.missing_postings()]
    _run_stage(progress, "words", postings, index_shard, (index,), workers)
    index.build_lexicon()
    progress.update(stage="queries")
    search_actors = min(search_actors, index.catalog.num_shards)
    beside = search_actors if options.uses_llm else 0
    write = partial(_write_queries, progress, index, queries, writers)
    with spread(index, workers.of(beside), dense=False, progress=progress) as open_search:
        pool = queries.build_pool(write, open_search)
    committed = log.committed()
    missing = plan_ranges(pool.groups, options.groups_per_shard, map(shard_range, committed))
    if missing and options.uses_dense:
        parts = [{"shard": shard, "part": part} for shard, part in index.missing_vectors()]
        _run_stage(progress, "vectors", parts, embed_products, (index,), workers)
        index.finish_vectors()
    there = [record["pairs"] for name, record in committed.items() if shard_range(name)[0] < pool.groups]
    progress.restart(sum(there))
    progress.update(total=pool.pairs, stage="groups")
    if missing:
        rows = [{"start": start, "stop": stop} for start, stop in missing]
        with spread(index, workers.of(search_actors), dense=options.uses_dense, progress=progress) as open_search:
            arguments = (index, queries, out_dir, key, open_search)
            for pairs in _run(rows, write_groups, arguments, workers):
                progress.advance(pairs)
    summary = _summary(log, pool, len(there))
    if abs(summary["pairs"] - options.num_pairs) > 0.01 * options.num_pairs:
        raise UserError(
            f"generate.num_pairs {options.num_pairs:,} ends within a shard that an earlier, larger run wrote to {out_dir}; "
            f"set it to {summary['pairs']}"
        )
    return summary


def _write_queries(
    progress: Progress,
    index: CatalogIndex,
    queries: QueryStore,
    writers: Workers,
    parts: Sequence[int],
) -> None:
    """Have some parts of the queries written. Raises `UserError` for what the user must mend; what is written stays."""
    stage = f"writing by {PRODUCTS_PER_PART} products"
    items = [{"part": part} for part in parts]
    _run_stage(progress, stage, items, write_query_part, (index, queries), writers)
    progress.update(stage="queries")


def _run_stage(
    progress: Progress,
    stage: str,
    items: Sequence[Mapping[str, int]],
    open_work: Callable[..., Callable[..., int]],
    arguments: tuple[Any, ...],
    workers: Workers,
) -> None:
    """Make what the index lacks of one kind, counted on the live line."""
    if not items:
        return
    progress.update(stage=f"{stage} 0/{len(items)}")
    for count, _ in enumerate(_run(items, open_work, arguments, workers), start=1):
        progress.update(stage=f"{stage} {count}/{len(items)}")


def _run(
    items: Sequence[Mapping[str, int]],
    open_work: Callable[..., Callable[..., int]],
    arguments: tuple[Any, ...],
    workers: Workers,
) -> Iterator[int]:
    """What was done of each item, in any order."""
    pool, num_blocks = workers.at_most(len(items)), min(len(items), MAX_BLOCKS)
    for row in run_pool(items, ItemActor, (open_work, *arguments), pool, num_blocks=num_blocks):
        yield int(row["done"])


def _summary(log: CommitLog, pool: PoolSummary, num_skipped: int) -> dict[str, Any]:
    used = {name: record for name, record in log.committed().items() if shard_range(name)[0] < pool.groups}
    origins: Counter[str] = Counter()
    for record in used.values():
        origins.update(record["origins"])
    return {
        "groups": sum(record["rows"] for record in used.values()),
        "pairs": sum(record["pairs"] for record in used.values()),
        "shards": list(used),
        "skipped": num_skipped,
        "sources": pool.sources,
        "origins": dict(sorted(origins.items())),
        "left_out": pool.left_out,
    }
