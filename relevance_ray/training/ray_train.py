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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.train.torch
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from relevance_ray.errors import UserError
from relevance_ray.training.fit import LOG_FILE, FitResult, OnProgress, TaskSpec, read_result
from relevance_ray.training.options import FitOptions
from relevance_ray.training.runners import Runner, local_runner

MAX_FAILURES = 2
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

    def run(spec: TaskSpec, options: FitOptions, work_dir: Path, on_progress: OnProgress | None = None) -> FitResult:
        work_dir = work_dir.absolute()
        finished = read_result(work_dir)
        if finished is not None:
            return finished
        work_dir.mkdir(parents=True, exist_ok=True)
        (work_dir / _ERROR_FILE).unlink(missing_ok=True)
        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "spec": spec,
                "options": options,
                "work_dir": str(work_dir),
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
                storage_path=str(work_dir / "ray"),
                failure_config=FailureConfig(max_failures=MAX_FAILURES),
            ),
        )
        with _interruptible(), _follow(work_dir / LOG_FILE, on_progress):
            trainer.fit()
        if (work_dir / _ERROR_FILE).is_file():
            raise UserError(json.loads((work_dir / _ERROR_FILE).read_text(encoding="utf-8"))["message"])
        result = read_result(work_dir)
        if result is None:
            # Ray Train answers Ctrl-C by stopping its workers and returning as if nothing were missing.
            raise KeyboardInterrupt
        shutil.rmtree(work_dir / "ray", ignore_errors=True)
        return result

    return run


def _worker(config: dict[str, Any]) -> None:
    torch.set_num_threads(config["num_threads"])
    if config["use_gpu"]:
        torch.cuda.set_device(ray.train.torch.get_device())
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that was not asked for is somebody else's
    work_dir = Path(config["work_dir"])
    try:
        local_runner(config["spec"], config["options"], work_dir)
    except UserError as error:
        # The same data fails on every worker, and again on a restart: tell the driver instead of retrying.
        if ray.train.get_context().get_world_rank() == 0:
            (work_dir / _ERROR_FILE).write_text(json.dumps({"message": str(error)}), encoding="utf-8")


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
def _follow(log: Path, on_progress: OnProgress | None) -> Iterator[None]:
    """Call `on_progress` with the newest line of the workers' log whenever there is a new one."""
    if on_progress is None:
        yield
        return
    stop = threading.Event()
    start = log.stat().st_size if log.is_file() else 0

    def poll() -> None:
        seen = start
        ended = False
        while not ended:
            ended = stop.wait(_POLL_SECONDS)
            size = log.stat().st_size if log.is_file() else 0
            if size == seen:
                continue
            seen = size
            lines = log.read_bytes().split(b"\n")[:-1]
            if lines:
                on_progress(json.loads(lines[-1]))

    thread = threading.Thread(target=poll, name="training-log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
