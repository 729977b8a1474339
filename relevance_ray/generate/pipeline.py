"""Generation on Ray: the index, the vectors and the shards of groups, through pools of actors.

Only numbers of parts and ranges of groups travel through Ray Data; each actor maps the index into memory and commits what
it made. Where a catalog is too large for every worker, its shards are spread over search actors, which all workers ask.
A killed run loses the shards in flight and nothing else; a run with a larger `num_pairs` adds shards to those that are
there.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from relevance_ray.errors import UserError
from relevance_ray.generate.index.catalog_index import CatalogIndex
from relevance_ray.generate.index.search import CatalogSearch, SpreadSearch
from relevance_ray.generate.options import GenerateOptions
from relevance_ray.generate.queries.pool import PoolSummary
from relevance_ray.generate.queries.store import QueryStore, file_contents
from relevance_ray.generate.shards import ShardContext, generate_shard, plan_ranges, shard_name, shard_range
from relevance_ray.generate.staging import sweep_staging
from relevance_ray.options import semantic
from relevance_ray.progress import Progress
from relevance_ray.storage import CommitLog, fingerprint, join

Embed = Callable[[list[str]], np.ndarray]
OpenSearch = Callable[[CatalogIndex], CatalogSearch]

EMBEDDED_TOKENS = 64
"""What of a text the dense candidates see: product titles rarely go further, and marketing text that does is slow."""


@dataclass(frozen=True)
class Workers:
    """A pool of actors: how many, and CPUs and GPUs of each."""

    count: int
    cpus: float = 1
    gpus: float = 0


class PostingsWriter:
    """The actor that indexes the words of one shard of the catalog at a time."""

    def __init__(self, index: CatalogIndex) -> None:
        self._index = index

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        for shard in batch["shard"]:
            self._index.build_postings(int(shard))
        return {"shard": [int(shard) for shard in batch["shard"]]}


class VectorWriter:
    """The actor that embeds products, one part of the vectors at a time."""

    def __init__(self, index: CatalogIndex) -> None:
        self._index, self._embed = index, open_embedder(index.options)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        for shard, part in zip(batch["shard"], batch["part"], strict=True):
            self._index.build_vectors(int(shard), int(part), self._embed)
        return {"part": [int(part) for part in batch["part"]]}


class QueryWriter:
    """The actor whose language model writes a part of the queries at a time.

    What the user must mend is told as a row: an exception would come out of Ray without its kind.
    """

    def __init__(self, index: CatalogIndex, queries: QueryStore) -> None:
        from relevance_ray.engines.registry import open_generator

        self._queries, self._refusal = queries, ""
        try:
            self._generator = open_generator(index.options.llm, "generate.llm")
        except UserError as error:
            self._refusal = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"refusal": [self._refusal or self._write(int(part)) for part in batch["part"]]}

    def _write(self, part: int) -> str:
        try:
            self._queries.write(part, self._generator)
        except UserError as error:
            return str(error)
        return ""


class ShardWriter:
    """The actor that generates and commits one shard of groups at a time."""

    def __init__(
        self, index: CatalogIndex, queries: QueryStore, out_dir: str, key: str, open_search: OpenSearch
    ) -> None:
        self._log, self._key = CommitLog(out_dir), key
        self._context = ShardContext(
            options=index.options,
            catalog=index.catalog,
            lexicon=index.lexicon,
            search=open_search(index),
            embed=open_embedder(index.options) if index.options.uses_dense else None,
            read_pool=queries.read_pool().read,
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        pairs = []
        for start, stop in zip(batch["start"], batch["stop"], strict=True):
            table = generate_shard(self._context, int(start), int(stop))
            members = table["products"].combine_chunks().flatten()
            origins = Counter(found[0]["name"] for found in members.field("origins").to_pylist())
            extra = {"pairs": len(members), "origins": dict(origins)}
            self._log.commit(shard_name(int(start), int(stop)), table, self._key, extra)
            pairs.append(len(members))
        return {"pairs": pairs}


class SearchActor:
    """The actor that holds some shards of the catalog for all workers."""

    def __init__(self, index: CatalogIndex, shards: Sequence[int], dense: bool) -> None:
        self._search = index.search(shards, dense=dense)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._search, method)(*arguments)


def open_whole(index: CatalogIndex, *, dense: bool) -> CatalogSearch:
    """The whole catalog, mapped into this process."""
    return index.search(range(index.catalog.num_shards), dense=dense)


def open_spread(parts: Sequence[tuple[Sequence[int], Any]], index: CatalogIndex) -> CatalogSearch:
    """The catalog by way of search actors, each given with its shards."""

    def caller(actor: Any) -> Callable[..., Any]:
        return lambda method, *arguments: actor.call.remote(method, *arguments).future()

    return SpreadSearch([(shards, caller(actor)) for shards, actor in parts], index.catalog.starts)


@contextlib.contextmanager
def spread(index: CatalogIndex, num_actors: int, *, dense: bool) -> Iterator[OpenSearch]:
    """How workers search: in their own process, or, with `num_actors`, in actors that share the catalog's shards; `dense`
    where there are vectors."""
    import ray

    size = min(num_actors, index.catalog.num_shards)
    if size == 0:
        yield partial(open_whole, dense=dense)
        return
    # An actor that dies with its node is started on another, and what was asked of it is asked again.
    remote = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)(SearchActor)
    shares = [range(first, index.catalog.num_shards, size) for first in range(size)]
    actors = [remote.remote(index, list(shards), dense) for shards in shares]
    try:
        yield partial(open_spread, list(zip(shares, actors, strict=True)))
    finally:
        for actor in actors:
            ray.kill(actor)


def open_embedder(options: GenerateOptions) -> Embed:
    """The dense model, loaded once; torch is imported only where it is used."""
    from relevance_ray.engines.bi_encoder import TextEncoder
    from relevance_ray.models import resolve_model

    encoder = TextEncoder(
        resolve_model(options.dense_model), max_batch_tokens=options.max_batch_tokens, max_tokens=EMBEDDED_TOKENS
    )
    return encoder.embed


def generate(
    options: GenerateOptions,
    prepared_dir: str,
    out_dir: str,
    *,
    index_dir: str = "",
    earlier_index: str = "",
    num_workers: int = 1,
    search_actors: int = 0,
    writers: Workers | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Generate the groups of a run into `out_dir`; ray must be initialised, and the caller hold the lease on the root.

    Args:
        options: what to generate. A folder holds what one set of semantic options makes from one prepared folder.
        prepared_dir: what the prepare step wrote; local or s3://, as is `out_dir`.
        index_dir: where the catalog's index lies, which all that is generated from one catalog under the same
            `index_options` may share; by default `index/` in `out_dir`.
        earlier_index: an index of an earlier catalog, whose vectors are taken over where a product reads the same.
        num_workers: actors, of one CPU each, that index and embed products and generate shards.
        search_actors: actors, of one CPU each, that hold the catalog's shards between them; 0: every worker maps the
            whole catalog.
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
    workers = Workers(num_workers)
    _run_stage(progress, "words", postings, PostingsWriter, (index,), workers)
    index.build_lexicon()
    progress.update(stage="queries")
    write = partial(_write_queries, progress, index, queries, writers or Workers(1))
    with spread(index, search_actors if options.uses_llm else 0, dense=False) as open_search:
        pool = queries.build_pool(write, open_search)
    committed = log.committed()
    missing = plan_ranges(pool.groups, options.groups_per_shard, map(shard_range, committed))
    if missing and options.uses_dense:
        parts = [{"shard": shard, "part": part} for shard, part in index.missing_vectors()]
        _run_stage(progress, "vectors", parts, VectorWriter, (index,), workers)
        index.finish_vectors()
    there = [record["pairs"] for name, record in committed.items() if shard_range(name)[0] < pool.groups]
    progress.restart(sum(there))
    progress.update(total=pool.pairs, stage="groups")
    if missing:
        rows = [{"start": start, "stop": stop} for start, stop in missing]
        with spread(index, search_actors, dense=options.uses_dense) as open_search:
            for row in _run(rows, ShardWriter, (index, queries, out_dir, key, open_search), workers, search_actors):
                progress.advance(int(row["pairs"]))
    summary = _summary(log, pool, len(there))
    if abs(summary["pairs"] - options.num_pairs) > 0.01 * options.num_pairs:
        raise UserError(
            f"generate.num_pairs {options.num_pairs:,} ends within a shard that an earlier, larger run wrote to {out_dir}; "
            f"set it to {summary['pairs']}"
        )
    return summary


def _write_queries(
    progress: Progress, index: CatalogIndex, queries: QueryStore, writers: Workers, parts: Sequence[int]
) -> None:
    """Have some parts of the queries written. Raises `UserError` for what the user must mend; what is written stays."""
    _run_stage(progress, "writing", [{"part": part} for part in parts], QueryWriter, (index, queries), writers)
    progress.update(stage="queries")


def _run_stage(
    progress: Progress,
    stage: str,
    items: Sequence[Mapping[str, int]],
    actor: type,
    arguments: tuple[Any, ...],
    workers: Workers,
) -> None:
    """Make what the index lacks of one kind, counted on the live line."""
    if not items:
        return
    progress.update(stage=f"{stage} 0/{len(items)}")
    for count, row in enumerate(_run(items, actor, arguments, workers), start=1):
        if row.get("refusal"):
            raise UserError(row["refusal"])
        progress.update(stage=f"{stage} {count}/{len(items)}")


def _run(
    items: Sequence[Mapping[str, int]], actor: type, arguments: tuple[Any, ...], workers: Workers, taken_cpus: int = 0
) -> Iterator[Mapping[str, Any]]:
    """The items through a pool of actors, in any order. No more actors than CPUs: a pool that waits for actors which no
    node can hold would never start."""
    import ray

    cpus = int(ray.cluster_resources().get("CPU", 1)) - taken_cpus
    size = max(1, min(workers.count, int(cpus / workers.cpus), len(items)))
    dataset = ray.data.from_items(list(items), override_num_blocks=min(len(items), 1000)).map_batches(
        actor,
        fn_constructor_args=arguments,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus,
    )
    yield from dataset.iter_rows()


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
