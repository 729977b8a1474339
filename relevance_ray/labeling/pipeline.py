"""Shards of groups through a pool of engine actors on Ray Data, to committed labels.

Ray Data moves only shard names and counts; each actor reads its shard, labels it and commits it. So a driver or an actor
that dies loses at most the shards in flight, and no list of row ids is held anywhere. Labels are keyed by the content of
the shard within a folder named after the teacher and the engine's options: labels of two teachers never mix, and a
growing set of groups is labeled only where it is new.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from relevance_ray.engines.base import Engine
from relevance_ray.labeling.shard import count_errors, label_groups
from relevance_ray.progress import Progress
from relevance_ray.storage import CommitLog, read_table

EngineFactory = Callable[[], Engine]


@dataclass(frozen=True)
class Shard:
    """A committed shard of groups: where it lies, and the name its labels are committed under."""

    path: str
    label_name: str
    num_pairs: int


def shards_to_label(groups: CommitLog, names: Sequence[str]) -> list[Shard]:
    """The named shards of a generate folder; their labels' names carry the content's checksum."""
    records = groups.committed()
    return [
        Shard(groups.path(name), label_name(name, records[name]["checksum"]), records[name]["pairs"]) for name in names
    ]


def label_name(shard: str, checksum: str) -> str:
    return f"{shard}-{checksum[:12]}"


class ShardLabeler:
    """The actor: an engine, opened once, that labels and commits one shard at a time."""

    def __init__(self, folder: str, fingerprint: str, open_engine: EngineFactory) -> None:
        self._log = CommitLog(folder)
        self._fingerprint = fingerprint
        self._engine = open_engine()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        pairs, errors = [], []
        for path, name in zip(batch["path"], batch["label_name"], strict=True):
            labeled = label_groups(read_table(str(path)), self._engine)
            failed = count_errors(labeled)
            num_pairs = len(labeled.column("products").combine_chunks().flatten())
            self._log.commit(str(name), labeled, self._fingerprint, {"pairs": num_pairs, "errors": failed})
            pairs.append(num_pairs)
            errors.append(failed)
        return {"pairs": pairs, "errors": errors}


def label(
    shards: Sequence[Shard],
    folder: str,
    fingerprint: str,
    open_engine: EngineFactory,
    *,
    num_actors: int = 1,
    num_cpus: float = 1,
    num_gpus: float = 0,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Label the shards that have no labels in `folder` yet; ray must be initialised.

    Returns counts over all the shards: `pairs`, `errors`, and how many `shards` there are and were `skipped`.
    """
    import ray

    log = CommitLog(folder)
    log.sweep()
    committed = log.committed()
    todo = [shard for shard in shards if shard.label_name not in committed]
    done = [committed[shard.label_name] for shard in shards if shard.label_name in committed]
    if progress is not None:
        progress.restart(sum(record["pairs"] for record in done))
        progress.update(failures=sum(record["errors"] for record in done))
    if todo:
        rows = [{"path": shard.path, "label_name": shard.label_name} for shard in todo]
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            ShardLabeler,
            fn_constructor_args=(folder, fingerprint, open_engine),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(num_actors, len(todo)), max_tasks_in_flight_per_actor=2),
            num_cpus=num_cpus,
            num_gpus=num_gpus,
        )
        for row in results.iter_rows():
            if progress is not None:
                progress.advance(int(row["pairs"]), failures=int(row["errors"]))
    committed = log.committed()
    records = [committed[shard.label_name] for shard in shards]
    return {
        "shards": len(shards),
        "skipped": len(done),
        "pairs": sum(record["pairs"] for record in records),
        "errors": sum(record["errors"] for record in records),
    }
