"""What runs a task: this process, or (in `ray_train.py`) a group of Ray Train workers. Both leave the same work folder."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from relevance_ray.training import distributed
from relevance_ray.training.fit import FitResult, OnProgress, TaskSpec, fit, read_result
from relevance_ray.training.options import FitOptions


class Runner(Protocol):
    """Trains the task of `spec` in `work_dir`; a killed run is continued, an ended one returns at once."""

    def __call__(
        self, spec: TaskSpec, options: FitOptions, work_dir: Path, on_progress: OnProgress | None = None
    ) -> FitResult: ...


def local_runner(
    spec: TaskSpec, options: FitOptions, work_dir: Path, on_progress: OnProgress | None = None
) -> FitResult:
    """Train in this process, which is one worker (or one of `torchrun`'s)."""
    finished = distributed.broadcast_object(read_result(work_dir))
    if finished is not None:
        return finished
    return fit(spec.build(distributed.rank(), distributed.world_size()), options, work_dir, on_progress)
