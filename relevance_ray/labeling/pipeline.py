"""Shards of groups through a pool of engine actors on Ray Data, to committed labels.

Ray Data moves only shard names and counts; each actor reads its shard, labels it and commits it. So a driver or an actor
that dies loses at most the shards in flight, and no list of row ids is held anywhere. Labels are keyed by the content of
the shard within a folder named after the teacher and the engine's options: labels of two teachers never mix, and a
growing set of groups is labeled only where it is new.
"""

from __future__ import annotations

import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from relevance_ray.engines.base import Engine
from relevance_ray.errors import UserError
from relevance_ray.labeling.attempts import Attempts, shards_set_aside, take_back
from relevance_ray.labeling.shard import count_errors, label_groups, relabel_failed
from relevance_ray.progress import Progress
from relevance_ray.storage import CommitLog, read_table
from relevance_ray.watchdog import watchdog

EngineFactory = Callable[[], Engine]

MAX_RESTARTS = 5
"""Failures of one engine with no success between them that end a job."""


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


class EngineFailedError(Exception):
    """An engine failed over and over, whichever shard it got: the job ends instead of giving up shard after shard."""


class ShardLabeler:
    """The actor: an engine that labels and commits one shard at a time.

    An engine that fails is closed and opened anew, and the shard tried again, `MAX_ATTEMPTS` times in all and over all
    actors; then it is set aside. `max_restarts` failures of this actor's engine with no shard labeled between them end
    the job.
    """

    def __init__(
        self, folder: str, fingerprint: str, open_engine: EngineFactory, run: str, max_restarts: int = MAX_RESTARTS
    ) -> None:
        self._log, self._attempts = CommitLog(folder), Attempts(folder, run)
        self._fingerprint, self._open_engine, self._max_restarts = fingerprint, open_engine, max_restarts
        self._engine: Engine | None = None  # opened by the first shard, where its errors can be told
        self._failures_in_row = 0

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """What became of each shard. What ends the job is told, not raised: Ray Data would strip an error of its kind."""
        results: list[dict[str, Any]] = []
        for path, name, previous in zip(batch["path"], batch["label_name"], batch["previous"], strict=True):
            result = {"pairs": 0, "errors": 0, "user_error": "", "engine_error": ""}
            try:
                result |= self._label(str(path), str(name), str(previous))
            except UserError as error:
                result["user_error"] = str(error)
            except EngineFailedError as error:
                result["engine_error"] = f"{error}\n{traceback.format_exc()}"
            results.append(result)
        return {key: [result[key] for result in results] for key in results[0]}

    def _label(self, path: str, name: str, previous: str) -> dict[str, int]:
        while (attempt := self._attempts.begin(name)) is not None:
            try:
                labeled = self._label_once(path, previous)
            except UserError:
                raise
            except Exception as error:  # noqa: BLE001 (whatever an engine raises is written down, and bounded)
                self._attempts.fail(name, attempt, f"{type(error).__name__}: {error}")
                self._restart_engine(name, error)
                continue
            self._failures_in_row = 0
            failed = count_errors(labeled)
            num_pairs = len(labeled.column("products").combine_chunks().flatten())
            commit = self._log.replace if previous else self._log.commit
            commit(name, labeled, self._fingerprint, {"pairs": num_pairs, "errors": failed})
            self._attempts.end(name, attempt)
            return {"pairs": num_pairs, "errors": failed}
        self._attempts.set_aside(name)
        return {}

    def _label_once(self, path: str, previous: str) -> pa.Table:
        self._engine = self._engine or self._open_engine()
        if previous:
            return relabel_failed(read_table(previous), self._engine)
        return label_groups(read_table(path), self._engine)

    def _restart_engine(self, name: str, error: Exception) -> None:
        self._failures_in_row += 1
        self._engine = None  # what a failed engine holds may be what broke it
        if self._failures_in_row > self._max_restarts:
            raise EngineFailedError(
                f"the engine failed {self._failures_in_row} times in a row, last on shard {name}"
            ) from error


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
    retry: bool = False,
    no_progress_seconds: float = 0,
) -> dict[str, Any]:
    """Label the shards that have no labels in `folder` yet; ray must be initialised, the root leased.

    Args:
        shards: all that are wanted.
        folder: of the label step.
        fingerprint: stands in each commit.
        open_engine: called in each actor.
        num_actors, num_cpus, num_gpus: size of the pool, and of one actor.
        progress: shows pairs and failures.
        retry: also take on shards that were set aside, and the failed rows (only these) of labeled ones.
        no_progress_seconds: end the job, resumable, after so long without a shard; 0 waits for ever.

    Returns:
        Counts over all the shards: `pairs`, `errors`, how many `shards` there are and were `skipped`; and `set_aside`,
        shard -> why, of those that failed `MAX_ATTEMPTS` times and have no labels.

    Raises:
        UserError: no progress for too long, or an engine that the user must mend.
        EngineFailedError: an engine that fails on everything.
    """
    log = CommitLog(folder)
    log.sweep()
    if retry:
        take_back(folder)
    committed, given_up = log.committed(), shards_set_aside(folder)
    done = [committed[shard.label_name] for shard in shards if shard.label_name in committed]
    rows = [
        {"path": shard.path, "label_name": shard.label_name, "previous": ""}
        for shard in shards
        if shard.label_name not in committed and shard.label_name not in given_up
    ]
    if retry:
        with_errors = [shard for shard in shards if committed.get(shard.label_name, {}).get("errors")]
        rows += [
            {"path": shard.path, "label_name": shard.label_name, "previous": log.path(shard.label_name)}
            for shard in with_errors
        ]
        done = [record for record in done if not record["errors"]]
    if progress is not None:
        progress.restart(sum(record["pairs"] for record in done))
        progress.update(failures=sum(record["errors"] for record in done))
    if rows:
        actor = (folder, fingerprint, open_engine, uuid.uuid4().hex[:12])
        message = (
            f"no shard was labeled in {no_progress_seconds / 60:g} minutes, so the job was ended; the same command resumes "
            "it (look at the engine's log first, or raise resources.no_progress_minutes)"
        )
        with watchdog(no_progress_seconds, message) as beat:
            for row in _run_pool(rows, actor, min(num_actors, len(rows)), num_cpus, num_gpus):
                beat()
                if progress is not None:
                    progress.advance(int(row["pairs"]), failures=int(row["errors"]))
    log, given_up = CommitLog(folder), shards_set_aside(folder)
    committed = log.committed()
    records = [committed[shard.label_name] for shard in shards if shard.label_name in committed]
    return {
        "shards": len(shards),
        "skipped": len(done),
        "pairs": sum(record["pairs"] for record in records),
        "errors": sum(record["errors"] for record in records),
        "set_aside": {shard.label_name: given_up[shard.label_name] for shard in shards if shard.label_name in given_up},
    }


def _run_pool(
    rows: list[dict[str, str]], actor: tuple[Any, ...], num_actors: int, num_cpus: float, num_gpus: float
) -> Iterator[dict[str, Any]]:
    """The rows of a Ray Data actor pool, as they come."""
    import ray

    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        ShardLabeler,
        fn_constructor_args=actor,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=num_actors, max_tasks_in_flight_per_actor=2),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )
    for row in results.iter_rows():
        if row["user_error"]:
            raise UserError(row["user_error"])
        if row["engine_error"]:
            raise EngineFailedError(row["engine_error"])
        yield row
