"""Training on Ray's workers: the steps of one process, whatever happens to a worker."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray import cloudpickle
from tiny_fit import OBJECTIVES, OPTIONS, losses_of, student_spec, train, weights_of
from tiny_training import SCALE, build_tiny_encoder, judged_groups, write

from relevance_ray.cluster.workers import Workers
from relevance_ray.errors import UserError
from relevance_ray.file_systems import StorageError
from relevance_ray.teacher.classifier import build_classifier
from relevance_ray.teacher.options import ClassifierOptions
from relevance_ray.training.fit import FitResult, OnProgress, Task, TaskSpec
from relevance_ray.training.options import FitOptions, TeacherFitOptions
from relevance_ray.training.ray_train import ray_runner
from relevance_ray.training.runners import Job
from relevance_ray.training.teacher_task import TeacherTaskSpec

pytestmark = pytest.mark.usefixtures("ray_cluster", "workers_know_this_module")


@pytest.fixture(scope="module")
def workers_know_this_module() -> Iterator[None]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def train_on_two(
    spec: TaskSpec, options: FitOptions, work_dir: Path, on_progress: OnProgress | None = None
) -> FitResult:
    return ray_runner(Workers(2))([Job(spec, options, work_dir)], on_progress)[0]


@dataclass(frozen=True)
class FailingSpec:
    """A task one of whose workers fails."""

    spec: TaskSpec
    error: Exception

    def build(self, rank: int, world_size: int) -> Task:
        task = self.spec.build(rank, world_size)

        def begin(examples: np.ndarray) -> None:
            if rank == 1:
                raise self.error

        task.begin = begin  # type: ignore[method-assign]
        return task


@dataclass(frozen=True)
class StoppedSpec:
    """A task that stops on every worker."""

    spec: TaskSpec
    at_step: int

    def build(self, rank: int, world_size: int) -> Task:
        task = self.spec.build(rank, world_size)
        calls = [0]

        def begin(examples: np.ndarray) -> None:
            calls[0] += 1
            if calls[0] == self.at_step:
                raise UserError("stopped here")

        task.begin = begin  # type: ignore[method-assign]
        return task


@dataclass(frozen=True)
class MortalSpec:
    """A task whose second worker kills itself, once."""

    spec: TaskSpec
    marker: str
    at_loss: int

    def build(self, rank: int, world_size: int) -> Task:
        task = self.spec.build(rank, world_size)
        whole_loss, calls = task.loss, [0]

        def loss(examples: np.ndarray) -> torch.Tensor:
            calls[0] += 1
            if rank == 1 and calls[0] == self.at_loss and not Path(self.marker).exists():
                Path(self.marker).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return whole_loss(examples)

        task.loss = loss  # type: ignore[method-assign]
        return task


def test_two_workers_take_the_steps_of_one(tmp_path: Path) -> None:
    spec = student_spec(tmp_path)
    fifty = replace(OPTIONS, epochs=10)
    one = train(spec, fifty, tmp_path / "one")
    seen: list[dict[str, Any]] = []
    contrast = student_spec(tmp_path / "contrast", **OBJECTIVES["contrast"])
    jobs = [
        Job(spec, fifty, tmp_path / "two", "first"),
        Job(contrast, OPTIONS, tmp_path / "second", keep_model=False),
    ]
    two, second = ray_runner(Workers(2))(jobs, seen.append)
    np.testing.assert_allclose(losses_of(two), losses_of(one), rtol=1e-4)
    np.testing.assert_allclose(two.predictions(), one.predictions(), atol=1e-3)
    alone = train(contrast, OPTIONS, tmp_path / "contrast" / "one")
    np.testing.assert_allclose(losses_of(second), losses_of(alone), rtol=1e-4)
    assert not Path(second.model_folder).exists()
    assert [line["step"] for line in seen if line.get("part") == "first"][-1] == one.steps
    assert one.steps == 50
    assert [line["step"] for line in seen if "part" not in line][-1] == second.steps == 10
    assert train_on_two(spec, fifty, tmp_path / "two") == two
    assert not (tmp_path / "two" / "ray").exists()


def test_a_killed_worker_is_replaced_and_the_steps_stay_the_same(tmp_path: Path) -> None:
    spec = student_spec(tmp_path)
    undisturbed = train(spec, OPTIONS, tmp_path / "undisturbed")
    mortal = MortalSpec(spec, str(tmp_path / "died"), at_loss=5)
    result = train_on_two(mortal, OPTIONS, tmp_path / "work")
    assert (tmp_path / "died").exists()
    np.testing.assert_allclose(losses_of(result), losses_of(undisturbed), rtol=1e-4)


@pytest.mark.parametrize("lora", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_teacher_shared_out_over_workers_takes_the_steps_of_one_and_survives_a_kill(
    tmp_path: Path, lora: int
) -> None:
    model = build_tiny_encoder(tmp_path / "encoder")
    teacher = ClassifierOptions(model=str(model), max_tokens=16, dropout=0.0)
    build_classifier(teacher, SCALE, tmp_path / "start", seed=0)
    judged = write(tmp_path / "judged.parquet", judged_groups(20))
    spec = TeacherTaskSpec(str(tmp_path / "start"), judged, lora, label_smoothing=0.1, seed=0)
    options = TeacherFitOptions(**{**asdict(OPTIONS), "batch_size": 24, "sharded": True})
    alone = train(spec, options, tmp_path / "alone")  # with nobody to share with
    mortal = MortalSpec(spec, str(tmp_path / "died"), at_loss=9)
    shared = train_on_two(mortal, options, tmp_path / "shared")
    assert (tmp_path / "died").exists()
    np.testing.assert_allclose(losses_of(shared), losses_of(alone), rtol=1e-3)
    np.testing.assert_allclose(shared.predictions(), alone.predictions(), atol=5e-3)
    weights, expected = weights_of(shared), weights_of(alone)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], atol=5e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["alone", "shared out"])
def test_a_run_goes_on_under_another_placement_and_number_of_workers(tmp_path: Path, first: str) -> None:
    spec = student_spec(tmp_path)
    undisturbed = train(spec, OPTIONS, tmp_path / "undisturbed")
    stopped = StoppedSpec(spec, at_step=5)
    runs = [(train, OPTIONS), (train_on_two, replace(OPTIONS, sharded=True))]
    if first == "shared out":
        runs.reverse()
    with pytest.raises(UserError, match="stopped here"):
        runs[0][0](stopped, runs[0][1], tmp_path / "work")
    assert list((tmp_path / "work" / "checkpoints").glob("step-*"))
    result = runs[1][0](spec, runs[1][1], tmp_path / "work")
    np.testing.assert_allclose(losses_of(result), losses_of(undisturbed), rtol=1e-3)
    np.testing.assert_allclose(result.predictions(), undisturbed.predictions(), atol=5e-3)


def test_what_the_user_must_mend_reaches_the_driver_as_such(tmp_path: Path) -> None:
    options = replace(OPTIONS, learning_rate=1e30, warmup_ratio=0.0)
    with pytest.raises(UserError, match=r"lower fit\.learning_rate"):
        train_on_two(student_spec(tmp_path), options, tmp_path / "work")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "No space left .*; make room, and the same command goes on",
        ),
        (StorageError("s3://bucket failed in spite of retries"), "s3://bucket failed in spite of retries"),
        (UserError("this worker's file is torn"), "this worker's file is torn"),
    ],
)
def test_what_fails_one_worker_ends_all_of_them_in_one_sentence(tmp_path: Path, error: Exception, said: str) -> None:
    with pytest.raises(UserError, match=said):
        train_on_two(FailingSpec(student_spec(tmp_path), error), OPTIONS, tmp_path / "work")
    assert not list(tmp_path.glob("*-ray"))
