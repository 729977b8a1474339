"""Generation on Ray Data: the index, the vectors and the shards of groups, through pools of actors.

Only numbers of parts and ranges of groups travel through Ray; each actor maps the index into memory and commits what it
made. A killed run loses the shards in flight and nothing else; a run with a larger `num_pairs` adds shards to those
that are there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from relevance_ray.errors import UserError
from relevance_ray.generate.catalog import Catalog
from relevance_ray.generate.index import (
    build_pool,
    build_search_folder,
    part_texts,
    plan_vector_parts,
    read_pool,
    write_vectors,
)
from relevance_ray.generate.options import GenerateOptions
from relevance_ray.generate.rankings import Bm25Ranking, DenseRanking
from relevance_ray.generate.shards import ShardContext, generate_shard, plan_ranges, shard_name, shard_range
from relevance_ray.options import semantic
from relevance_ray.progress import Progress
from relevance_ray.storage import CommitLog, content_id, fingerprint, join, localize

Embed = Callable[[list[str]], np.ndarray]

EMBEDDED_TOKENS = 64
"""What of a text the dense candidates see: product titles rarely go further, and marketing text that does is slow."""


class VectorWriter:
    """The actor that embeds products, one part of the vectors at a time."""

    def __init__(self, options: GenerateOptions, out_dir: str) -> None:
        self._options, self._out_dir = options, out_dir
        self._catalog = Catalog(localize(join(out_dir, "index", "search")))
        self._embed = open_embedder(options)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        for part in batch["part"]:
            texts = part_texts(self._catalog, self._options, int(part))
            write_vectors(self._out_dir, int(part), self._embed(texts))
        return {"part": [int(part) for part in batch["part"]]}


class ShardWriter:
    """The actor that generates and commits one shard of groups at a time."""

    def __init__(self, options: GenerateOptions, out_dir: str, key: str) -> None:
        self._log, self._key = CommitLog(out_dir), key
        search = localize(join(out_dir, "index", "search"))
        pool = localize(join(out_dir, "index", "pool.arrow"))
        vectors = localize(join(out_dir, "index", "vectors")) if options.uses_dense else None
        self._context = ShardContext(
            options=options,
            catalog=Catalog(search),
            bm25=Bm25Ranking(search / "bm25"),
            dense=DenseRanking(vectors) if vectors else None,
            embed=open_embedder(options) if vectors else None,
            read_pool=lambda start, stop: read_pool(pool, start, stop),
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
    num_workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Generate the groups of a run into `out_dir`; ray must be initialised, and the caller hold the lease on the root.

    Args:
        options: what to generate. A folder holds what one set of semantic options makes from one prepared folder.
        prepared_dir: what the prepare step wrote; local or s3://, as is `out_dir`.
        num_workers: actors, of one CPU each, that embed products and generate shards.
        progress: counts pairs.

    Returns:
        `groups`, `pairs`, `shards` (names of the shards that this `num_pairs` uses, in order), `skipped` (how many of
        them were there), `sources` (groups by query source), `origins` (pairs by origin), `left_out` (queries).

    Raises:
        UserError: `num_pairs` cannot be met within 1%, a bad pairs file, an empty catalog, a folder made with other
            options.
    """
    progress = progress or Progress("generate", unit="pairs")
    log = CommitLog(out_dir)
    log.sweep()
    key = fingerprint(semantic(options), content_id(options.pairs_file) if options.pairs_file else "")
    strangers = sorted(name for name, record in log.committed().items() if record["fingerprint"] != key)
    if strangers:
        raise UserError(
            f"{out_dir} holds shards made with other options ({strangers[0]}); generate into another folder"
        )
    progress.update(stage="index")
    build_search_folder(prepared_dir, out_dir)
    catalog = Catalog(localize(join(out_dir, "index", "search")))
    progress.update(stage="queries")
    pool, num_pairs, counts = build_pool(options, prepared_dir, out_dir, catalog)
    parts = plan_vector_parts(catalog, options, out_dir) if options.uses_dense else []
    ranges = [shard_range(name) for name in log.committed()]
    missing = plan_ranges(pool.num_rows, options.groups_per_shard, ranges)
    if missing and parts:
        progress.update(stage=f"vectors 0/{len(parts)}")
        done = _run([{"part": part} for part in parts], VectorWriter, (options, out_dir), num_workers)
        for count, _ in enumerate(done, start=1):
            progress.update(stage=f"vectors {count}/{len(parts)}")
    names = _names(log, pool.num_rows)
    there = sum(log.committed()[name]["pairs"] for name in names)
    progress.restart(there)
    progress.update(total=num_pairs, stage="groups")
    if missing:
        rows = [{"start": start, "stop": stop} for start, stop in missing]
        for row in _run(rows, ShardWriter, (options, out_dir, key), num_workers):
            progress.advance(int(row["pairs"]))
    left_out = {"repeats": counts.repeats, "leaks": counts.leaks}
    summary = _summary(log, pool["query_source"].to_pylist(), len(names), left_out)
    if abs(summary["pairs"] - options.num_pairs) > 0.01 * options.num_pairs:
        raise UserError(
            f"generate.num_pairs {options.num_pairs:,} ends within a shard that an earlier, larger run wrote to {out_dir}; "
            f"set it to {summary['pairs']}"
        )
    return summary


def _run(
    items: Sequence[Mapping[str, int]], actor: type, arguments: tuple[Any, ...], num_workers: int
) -> Iterator[Mapping[str, Any]]:
    """The items through a pool of actors, in any order. No more actors than CPUs: a pool that waits for actors which no
    node can hold would never start."""
    import ray

    cpus = int(ray.cluster_resources().get("CPU", 1))
    size = max(1, min(num_workers, cpus, len(items)))
    dataset = ray.data.from_items(list(items), override_num_blocks=min(len(items), 1000)).map_batches(
        actor,
        fn_constructor_args=arguments,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
        num_cpus=1,
    )
    yield from dataset.iter_rows()


def _names(log: CommitLog, num_groups: int) -> list[str]:
    """Committed shards that hold groups below `num_groups`, in order."""
    return [name for name in log.committed() if shard_range(name)[0] < num_groups]


def _summary(
    log: CommitLog, sources: Sequence[str], num_skipped: int, left_out: Mapping[str, Mapping[str, int]]
) -> dict[str, Any]:
    names = _names(log, len(sources))
    records = [log.committed()[name] for name in names]
    origins: Counter[str] = Counter()
    for record in records:
        origins.update(record["origins"])
    return {
        "groups": sum(record["rows"] for record in records),
        "pairs": sum(record["pairs"] for record in records),
        "shards": names,
        "skipped": num_skipped,
        "sources": dict(Counter(sources)),
        "origins": dict(sorted(origins.items())),
        "left_out": {reason: dict(found) for reason, found in left_out.items()},
    }
