"""What runs trainings: this process, or (`ray_train.py`) a group of Ray Train workers. Both leave the same work folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from relevance_ray import distributed
from relevance_ray.training.fit import FitResult, OnProgress, TaskSpec, fit, read_result
from relevance_ray.training.options import FitOptions


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        spec: of the task.
        options: the loop's.
        work_dir: where the loop keeps checkpoints, log and result; local or s3://.
        part: what it is of a larger whole ("member 0, fold 1 of 2"); stands in the lines that progress shows.
        keep_model: whether the model is wanted afterwards, or only its predictions.
    """

    spec: TaskSpec
    options: FitOptions
    work_dir: str | Path
    part: str = ""
    keep_model: bool = True

    def progress(self, on_progress: OnProgress | None) -> OnProgress | None:
        """`on_progress` with this job's part in each line."""
        if on_progress is None or not self.part:
            return on_progress
        return lambda record: on_progress({**record, "part": self.part})


class Runner(Protocol):
    """Trains jobs one after the other, with all workers in each; a killed run is continued, an ended job returns at once.

    Jobs are handed over together because workers take long to start: to import torch, and to find each other.
    """

    def __call__(self, jobs: Sequence[Job], on_progress: OnProgress | None = None) -> list[FitResult]: ...


def local_runner(jobs: Sequence[Job], on_progress: OnProgress | None = None) -> list[FitResult]:
    """Train in this process, which is one worker (or one of `torchrun`'s)."""
    results = []
    for job in jobs:
        result = distributed.broadcast_object(read_result(job.work_dir) if distributed.rank() == 0 else None)
        if result is None:
            result = fit(
                job.spec.build(distributed.rank(), distributed.world_size()),  # no name holds on to it: it is large
                job.options,
                job.work_dir,
                job.progress(on_progress),
                job.keep_model,
            )
        results.append(result)
    return results
