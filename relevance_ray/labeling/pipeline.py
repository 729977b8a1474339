"""Shards of groups through a pool of engine actors on Ray Data, to committed labels.

Ray Data moves only shard names and counts; each actor reads its shard, labels it and commits it. So a driver or an actor
that dies loses at most the shards in flight, and no list of row ids is held anywhere. Labels are keyed by the content of
the shard within a folder named after the teacher and the engine's options: labels of two teachers never mix, and a
growing set of groups is labeled only where it is new.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from relevance_ray.cluster.actor_pool import run_pool
from relevance_ray.cluster.workers import ONE, Workers
from relevance_ray.labeling.attempts import Attempts, shards_set_aside, sweep_marks, take_back
from relevance_ray.labeling.earlier import build_index
from relevance_ray.labeling.labeler import EngineFactory, ShardLabeler
from relevance_ray.progress import Progress, memory_used
from relevance_ray.storage import CommitLog
from relevance_ray.watchdog import StalledError, watchdog

MAX_FAILED_IN_ROW = 3
"""More shards than so many and one for each actor, given up with none labeled between them, end a job."""


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
    """An engine failed on one shard after another: the job ends instead of giving all of them up."""


def label(
    shards: Sequence[Shard],
    folder: str,
    fingerprint: str,
    open_engine: EngineFactory,
    *,
    workers: Workers = ONE,
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
        workers: the pool of actors.
        progress: shows pairs and failures.
        retry: take on the shards that were set aside, and the failed rows (only these) of labeled ones, and nothing else.
        no_progress_seconds: end the job, resumable, after so long without a shard; 0 waits for ever.

    Returns:
        Counts over all the shards: `pairs`, `errors`, the `tokens` that labeling took, how many `shards` there are and were
        `skipped`; of this call alone, how many pairs' labels were `reused` from earlier shards, and pairs and tokens
        `labeled_now`; and `set_aside`, shard -> why, of those that failed `MAX_ATTEMPTS` times and have no labels.

    Raises:
        UserError: no progress for too long, or an engine that the user must mend.
        EngineFailedError: one shard after another failed, and none in between was labeled.
    """
    log = CommitLog(folder)
    log.sweep()
    sweep_marks(folder)
    committed = log.committed()
    given_up = {name for name in shards_set_aside(folder) if name not in committed}
    done = [committed[shard.label_name] for shard in shards if shard.label_name in committed]
    if retry:
        todo = [shard for shard in shards if shard.label_name in given_up or _has_errors(committed, shard)]
        done = [record for record in done if not record["errors"]]
    else:
        todo = [shard for shard in shards if shard.label_name not in committed and shard.label_name not in given_up]
    rows = [
        {
            "path": shard.path,
            "label_name": shard.label_name,
            "previous": log.path(shard.label_name) if shard.label_name in committed else "",
        }
        for shard in todo
    ]
    if progress is not None:
        progress.restart(sum(record["pairs"] for record in done))
        progress.update(failures=sum(record["errors"] for record in done))
    reused, now = 0, {"pairs": 0, "tokens": 0}
    if rows:
        run = uuid.uuid4().hex[:12]
        new = any(shard.label_name not in committed for shard in todo)
        index = _index_earlier(folder, shards, progress) if new else ""
        actor = (folder, fingerprint, open_engine, run, index)
        patience = f"{no_progress_seconds / 60:g} minutes"
        message = (
            f"no shard was labeled in {patience}, so the job was ended and what was in flight set aside; the same command "
            "goes on with the rest (or raise resources.no_progress_minutes)"
        )
        failed_in_row: list[str] = []
        gauges = _Gauges()
        pool = workers.at_most(len(rows))
        try:
            with watchdog(no_progress_seconds, message) as beat:
                for row in run_pool(rows, ShardLabeler, actor, pool, num_blocks=len(rows)):
                    if row["labeled"]:
                        beat()
                        failed_in_row.clear()
                        take_back(folder, row["label_name"])
                        reused += int(row["reused"])
                        now["pairs"] += int(row["asked"])
                        now["tokens"] += int(row["tokens"])
                        if progress is not None:
                            gauges.add(row)
                            progress.advance(int(row["pairs"]), failures=int(row["errors"]), **gauges.shown())
                        continue
                    failed_in_row.append(row["label_name"])
                    if len(failed_in_row) > MAX_FAILED_IN_ROW + workers.count:
                        reason = shards_set_aside(folder)[failed_in_row[-1]]
                        Attempts(folder, run).excuse()
                        raise EngineFailedError(f"{len(failed_in_row)} shards failed in a row; the last: {reason}")
        except StalledError:
            Attempts(folder, run).set_open_aside(f"no progress for {patience}")
            raise
    committed, why = CommitLog(folder).committed(), shards_set_aside(folder)
    records = [committed[shard.label_name] for shard in shards if shard.label_name in committed]
    without = [shard.label_name for shard in shards if shard.label_name not in committed]
    return {
        "shards": len(shards),
        "skipped": len(done),
        "pairs": sum(record["pairs"] for record in records),
        "errors": sum(record["errors"] for record in records),
        "reused": reused,
        "labeled_now": now,
        "tokens": sum(record.get("tokens", 0) for record in records),
        "set_aside": {name: why[name] for name in without if name in why},
    }


class _Gauges:
    """What the live line shows beside pairs and failures."""

    def __init__(self) -> None:
        self._started, self._tokens, self._memory = time.monotonic(), 0, 0

    def add(self, row: Mapping[str, Any]) -> None:
        self._tokens += int(row["tokens"])
        self._memory = max(self._memory, int(row["memory"]))

    def shown(self) -> dict[str, float]:
        """Tokens a second over all actors, and the memory of the largest one beside the driver's."""
        seconds = time.monotonic() - self._started
        memory = {"actor_gb": self._memory / 1e9, "driver_gb": memory_used() / 1e9}
        return {"tokens_per_second": self._tokens / seconds, **memory} if self._tokens else memory


def _index_earlier(folder: str, shards: Sequence[Shard], progress: Progress | None) -> str:
    def show(read: int, of: int) -> None:
        if progress is not None:
            progress.update(stage=f"earlier labels {read}/{of}")

    index = build_index(folder, {shard.label_name for shard in shards}, show)
    if progress is not None:
        progress.update(stage=None)
    return index


def _has_errors(committed: Mapping[str, Mapping[str, Any]], shard: Shard) -> bool:
    return shard.label_name in committed and committed[shard.label_name]["errors"] > 0
