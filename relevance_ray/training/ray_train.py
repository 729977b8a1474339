"""The thin Ray Train shell around the loop.

Ray Train starts the workers, joins them in a process group, and starts them again when one dies; checkpoints, log and result
are the loop's own and lie in the work folder, so a run continues after the death of a worker, of the driver, or of the whole
cluster alike. What worker 0 logs, and what the user must mend, reaches the driver through an actor beside it.
"""

from __future__ import annotations

import os
import signal
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import ray
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray import cloudpickle
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from relevance_ray.cluster.workers import Workers
from relevance_ray.errors import UserError
from relevance_ray.file_systems import StorageError
from relevance_ray.storage import absolute, is_remote, makedirs, opened, remove_tree
from relevance_ray.training.fit import FitResult, OnProgress, read_result
from relevance_ray.training.ray_worker import Board, work
from relevance_ray.training.runners import Job, Runner

MAX_FAILURES = 2
"""Deaths of workers that a training survives."""
# How often the controller looks at its workers; the default of 2 s is waited for at each end of a training.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
_POLL_SECONDS = 0.5


def ray_runner(workers: Workers, name: str = "train") -> Runner:
    """A runner that trains with Ray Train's workers.

    Args:
        workers: data-parallel; the result does not depend on how many. Each takes as many torch threads as CPUs, and one
            GPU (NCCL) or none (gloo).
        name: what Ray calls the run.
    """

    use_gpu = workers.gpus > 0

    def run(jobs: Sequence[Job], on_progress: OnProgress | None = None) -> list[FitResult]:
        jobs = [replace(job, work_dir=absolute(job.work_dir)) for job in jobs]
        open_jobs = [job for job in jobs if read_result(job.work_dir) is None]
        if open_jobs:
            _train(open_jobs, on_progress)
        results = [result for job in jobs if (result := read_result(job.work_dir)) is not None]
        if len(results) < len(jobs):
            # Ray Train answers Ctrl-C by stopping its workers and returning as if nothing were missing.
            raise KeyboardInterrupt
        return results

    def _train(jobs: list[Job], on_progress: OnProgress | None) -> None:
        ray_dir = f"{jobs[0].work_dir}-ray"
        remove_tree(ray_dir)
        makedirs(ray_dir)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        board = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()
        trainer = TorchTrainer(
            work,
            train_loop_config={
                "jobs": cloudpickle.dumps(jobs),  # the controller need not load what they hold
                "board": board,
                "follow": on_progress is not None,
                "num_threads": max(1, int(workers.cpus)),
                "use_gpu": use_gpu,
            },
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=workers.count, use_gpu=use_gpu, resources_per_worker=workers.each()
            ),
            run_config=RunConfig(
                # Ray's own state of a run must not be found again: what continues is our checkpoint.
                name=f"{name}-{uuid.uuid4().hex[:8]}",
                **_storage(ray_dir),
                failure_config=FailureConfig(max_failures=MAX_FAILURES * len(jobs)),
            ),
        )
        failure = None
        with _interruptible(), _follow(board, on_progress):
            try:
                trainer.fit()
            except TrainingFailedError as error:
                failure = error
        said = ray.get(board.error.remote())
        with suppress(OSError, StorageError):  # what has gone wrong is said below
            remove_tree(ray_dir)
        if said and any(read_result(job.work_dir) is None for job in jobs):
            raise UserError(said) from failure
        if failure is not None and not said:
            raise failure

    return run


@contextmanager
def _interruptible() -> Iterator[None]:
    """Give back the handler of Ctrl-C, which Ray Train replaces for good, and turn its `sys.exit(0)` into what it was."""
    on_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        if on_main_thread:
            signal.signal(signal.SIGINT, before)


@contextmanager
def _follow(board: Any, on_progress: OnProgress | None) -> Iterator[None]:
    """Call `on_progress` with each line that comes to the board."""
    if on_progress is None:
        yield
        return
    stop = threading.Event()

    def poll() -> None:
        ended = False
        while not ended:
            ended = stop.wait(_POLL_SECONDS)
            with suppress(RayError):  # a driver that was stopped takes its actors along
                for record in ray.get(board.take.remote()):
                    on_progress(record)

    thread = threading.Thread(target=poll, name="training-log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _storage(path: str) -> dict[str, Any]:
    """Where Ray keeps its own state of a run: through our file systems, so that one configuration of a store serves both."""
    if not is_remote(path):
        return {"storage_path": path}
    with opened(path) as (fs, inner):
        return {"storage_path": inner, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}
