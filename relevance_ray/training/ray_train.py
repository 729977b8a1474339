"""The thin Ray Train shell around the loop.

Ray Train starts the workers, joins them in a process group, and starts them again when one dies; checkpoints, log and result
are the loop's own and lie in the work folder, so a run continues after the death of a worker, of the driver, or of the whole
cluster alike. The price is that the work folder must be on a file system that all workers see.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.train.torch
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from relevance_ray.errors import UserError
from relevance_ray.training.fit import LOG_FILE, FitResult, OnProgress, read_result
from relevance_ray.training.runners import Job, Runner, local_runner
from relevance_ray.whole_files import write_bytes

MAX_FAILURES = 2
"""Deaths of workers that a training survives."""
# How often the controller looks at its workers; the default of 2 s is waited for at each end of a training.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
_ERROR_FILE = "user_error.json"
_POLL_SECONDS = 0.5


def ray_runner(num_workers: int, cpus_per_worker: int = 1, use_gpu: bool = False, name: str = "train") -> Runner:
    """A runner that trains with Ray Train's workers.

    Args:
        num_workers: data-parallel workers; the result does not depend on it.
        cpus_per_worker: logical CPUs, and torch threads, of each.
        use_gpu: one GPU for each worker (NCCL); otherwise gloo on CPUs.
        name: what Ray calls the run.
    """

    def run(jobs: Sequence[Job], on_progress: OnProgress | None = None) -> list[FitResult]:
        jobs = [replace(job, work_dir=job.work_dir.absolute()) for job in jobs]
        open_jobs = [job for job in jobs if read_result(job.work_dir) is None]
        if open_jobs:
            _train(open_jobs, on_progress)
        results = [result for job in jobs if (result := read_result(job.work_dir)) is not None]
        if len(results) < len(jobs):
            # Ray Train answers Ctrl-C by stopping its workers and returning as if nothing were missing.
            raise KeyboardInterrupt
        return results

    def _train(jobs: list[Job], on_progress: OnProgress | None) -> None:
        ray_dir = jobs[0].work_dir / "ray"
        ray_dir.mkdir(parents=True, exist_ok=True)
        error_file = ray_dir / _ERROR_FILE
        error_file.unlink(missing_ok=True)
        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "jobs": jobs,
                "error_file": str(error_file),
                "num_threads": cpus_per_worker,
                "use_gpu": use_gpu,
            },
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=num_workers, use_gpu=use_gpu, resources_per_worker={"CPU": cpus_per_worker}
            ),
            run_config=RunConfig(
                # Ray's own state of a run must not be found again: what continues is our checkpoint.
                name=f"{name}-{uuid.uuid4().hex[:8]}",
                storage_path=str(ray_dir),
                failure_config=FailureConfig(max_failures=MAX_FAILURES * len(jobs)),
            ),
        )
        with _interruptible(), _follow(jobs, on_progress):
            trainer.fit()
        if error_file.is_file():
            raise UserError(json.loads(error_file.read_text(encoding="utf-8"))["message"])
        if all(read_result(job.work_dir) is not None for job in jobs):
            shutil.rmtree(ray_dir, ignore_errors=True)

    return run


def _worker(config: dict[str, Any]) -> None:
    torch.set_num_threads(config["num_threads"])
    if config["use_gpu"]:
        torch.cuda.set_device(ray.train.torch.get_device())
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that was not asked for is somebody else's
    try:
        local_runner(config["jobs"])
    except UserError as error:
        # The same data fails on every worker, and again on a restart: tell the driver instead of retrying.
        write_bytes(config["error_file"], json.dumps({"message": str(error)}).encode("utf-8"))


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
def _follow(jobs: Sequence[Job], on_progress: OnProgress | None) -> Iterator[None]:
    """Call `on_progress` with each new line of the jobs' logs."""
    if on_progress is None:
        yield
        return
    stop = threading.Event()
    logs = [(job.work_dir / LOG_FILE, job.progress(on_progress)) for job in jobs]
    seen = [_size(log) for log, _ in logs]

    def poll() -> None:
        ended = False
        while not ended:
            ended = stop.wait(_POLL_SECONDS)
            for index, (log, show) in enumerate(logs):
                if show is None or (size := _size(log)) == seen[index]:
                    continue
                # Shorter than it was: a resumed run has dropped the lines of steps that it takes again.
                start = min(seen[index], size)
                with open(log, "rb") as file:
                    file.seek(start)
                    *lines, rest = file.read().split(b"\n")
                    seen[index] = file.tell() - len(rest)
                for line in lines:
                    if line.startswith(b"{"):
                        show(json.loads(line))

    thread = threading.Thread(target=poll, name="training-log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
