"""The loop: its order, its exact resume, and that the number of workers changes nothing but speed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray import cloudpickle
from safetensors.torch import load_file
from tiny_training import SCALE, build_tiny_encoder, judged_groups, labeled_groups, write
from torch._dynamo.utils import counters

from relevance_ray.errors import UserError
from relevance_ray.file_systems import StorageError
from relevance_ray.student.cross_encoder import build_cross_encoder
from relevance_ray.student.two_tower import build_two_tower
from relevance_ray.teacher.classifier import build_classifier
from relevance_ray.teacher.options import ClassifierOptions
from relevance_ray.training.fit import (
    FitResult,
    OnProgress,
    Task,
    TaskSpec,
    micro_batches,
    schedule,
    share_by_cost,
)
from relevance_ray.training.ingest import IngestSpec, ingest
from relevance_ray.training.options import FitOptions, StudentOptions, TeacherFitOptions
from relevance_ray.training.ray_train import ray_runner
from relevance_ray.training.runners import Job, local_runner
from relevance_ray.training.student_task import StudentTask, StudentTaskSpec
from relevance_ray.training.teacher_task import TeacherTaskSpec

OPTIONS = FitOptions(
    epochs=2, learning_rate=3e-3, batch_size=10, max_batch_tokens=128, checkpoint_every=3, eval_every=4, seed=3
)


def student_spec(tmp_path: Path, dropout: float = 0.0, **options: Any) -> StudentTaskSpec:
    model = build_tiny_encoder(tmp_path / "encoder")
    student = StudentOptions(model=str(model), max_tokens=16, dropout=dropout, max_group_products=8, **options)
    build = build_two_tower if student.kind == "two_tower" else build_cross_encoder
    build(student, SCALE, tmp_path / "start", seed=0)
    labeled = [
        write(tmp_path / "groups.parquet", labeled_groups(30)),
        write(tmp_path / "more.parquet", labeled_groups(17, seed=4)),
    ]
    judged = write(tmp_path / "judged.parquet", judged_groups(20))
    how = IngestSpec(str(tmp_path / "start"), student)
    human = ingest(how, [judged], tmp_path / "tokens") if student.human_share else []
    return StudentTaskSpec(how.start, ingest(how, labeled, tmp_path / "tokens"), judged, student, human)


def train(spec: TaskSpec, options: FitOptions, work_dir: Path, on_progress: OnProgress | None = None) -> FitResult:
    return local_runner([Job(spec, options, work_dir)], on_progress)[0]


def train_on_two(
    spec: TaskSpec, options: FitOptions, work_dir: Path, on_progress: OnProgress | None = None
) -> FitResult:
    return ray_runner(num_workers=2)([Job(spec, options, work_dir)], on_progress)[0]


def losses_of(result: FitResult) -> list[float]:
    lines = [json.loads(line) for line in (Path(result.work_dir) / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, result.steps + 1))
    return [line["loss"] for line in steps]


def weights_of(result: FitResult) -> dict[str, torch.Tensor]:
    return load_file(Path(result.model_folder) / "model.safetensors")


def test_the_order_is_a_pure_function_of_seed_and_epoch(tmp_path: Path) -> None:
    task = student_spec(tmp_path).build(0, 1)
    assert sorted(task.order(1, 0)) == list(range(47))
    assert task.order(1, 0).tolist() == task.order(1, 0).tolist()
    assert task.order(1, 0).tolist() != task.order(1, 1).tolist()
    assert task.order(1, 0).tolist() != task.order(2, 0).tolist()


def test_human_groups_take_their_share_and_come_last_where_that_is_asked(tmp_path: Path) -> None:
    mixed = student_spec(tmp_path, human_share=0.25).build(0, 1)
    human = np.arange(63) >= mixed.num_generated
    assert len(mixed.examples) == len(mixed.costs) == len(mixed.num_pairs) == 63
    assert human.sum() == 16  # of 63
    assert sorted(mixed.order(0, 0)) == list(range(63))
    assert human[mixed.order(0, 0)][:40].any()
    last = student_spec(tmp_path / "last", human_share=0.25, human_order="last").build(0, 1)
    assert human[last.order(0, 1)].tolist() == [False] * 47 + [True] * 16
    assert last.order(0, 1).tolist() != last.order(0, 2).tolist()


def test_classes_of_teacher_and_humans_that_differ_are_refused_by_every_worker(tmp_path: Path) -> None:
    spec = student_spec(tmp_path, human_share=0.25, kl_weight=1.0)
    with pytest.raises(UserError, match="labels have 2 classes and the human ones 3"):
        spec.build(0, 1)


def test_patience_ends_a_run_that_no_longer_gains_and_stays_ended(tmp_path: Path) -> None:
    spec = student_spec(tmp_path)
    options = replace(OPTIONS, learning_rate=1e-9, epochs=10, eval_every=2, patience=3)
    result = train(spec, options, tmp_path / "work")
    assert (result.best_step, result.steps) == (2, 8)


@pytest.mark.parametrize("kind", ["cross_encoder", "two_tower"])
def test_bfloat16_follows_float32_closely_and_leaves_float32_weights(tmp_path: Path, kind: str) -> None:
    spec = student_spec(tmp_path, kind=kind)
    whole = train(spec, OPTIONS, tmp_path / "whole")
    low = train(spec, replace(OPTIONS, precision="bfloat16"), tmp_path / "low")
    assert losses_of(low) != losses_of(whole)
    np.testing.assert_allclose(losses_of(low), losses_of(whole), rtol=0.1)
    assert {weight.dtype for weight in weights_of(low).values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
@pytest.mark.parametrize("kind", ["cross_encoder", "two_tower"])
def test_a_compiled_run_takes_the_same_steps(tmp_path: Path, kind: str) -> None:
    spec = student_spec(tmp_path, kind=kind)
    plain = train(spec, OPTIONS, tmp_path / "plain")
    counters.clear()
    compiled = train(spec, replace(OPTIONS, compiled=True), tmp_path / "compiled")
    assert counters["stats"]["unique_graphs"] > 0
    np.testing.assert_allclose(losses_of(compiled), losses_of(plain), rtol=1e-4)
    assert weights_of(compiled).keys() == weights_of(plain).keys()


def test_workers_get_nearly_equal_costs_and_every_example_once() -> None:
    rng = np.random.default_rng(0)
    examples, costs = rng.permutation(64), rng.integers(20, 200, 64)
    cost_of = dict(zip(examples.tolist(), costs.tolist(), strict=True))
    shares = share_by_cost(examples, costs, 3)
    assert sorted(np.concatenate(shares)) == list(range(64))
    loads = [sum(cost_of[example] for example in share.tolist()) for share in shares]
    assert max(loads) < 1.02 * min(loads)
    assert [len(share) for share in share_by_cost(np.array([7]), np.array([5]), 2)] == [1, 0]


def test_micro_batches_stay_within_their_tokens() -> None:
    runs = micro_batches(np.arange(5), np.array([40, 40, 30, 200, 10]), 100)
    assert [run.tolist() for run in runs] == [[0, 1], [2], [3], [4]]
    assert micro_batches(np.arange(0), np.arange(0), 100) == []


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [schedule(step, 10, 0.2) for step in range(10)]
    np.testing.assert_allclose(rates, [1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


OBJECTIVES = {
    "margins": {},
    "differing margins": {"margins": "differing", "level_weight": 0.0},
    "classes": {"kl_weight": 1.0, "margin_weight": 0.0},
    "mixed": {"bce_weight": 0.5, "human_share": 0.3},
    "two-tower": {"kind": "two_tower"},
    "contrast": {"kind": "two_tower", "infonce_weight": 1.0},
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_micro_batching_does_not_change_the_gradient(tmp_path: Path, objective: dict[str, Any]) -> None:
    spec = student_spec(tmp_path, **objective)
    whole = train(spec, replace(OPTIONS, max_batch_tokens=100_000), tmp_path / "whole")
    parts = train(spec, replace(OPTIONS, max_batch_tokens=1), tmp_path / "parts")
    np.testing.assert_allclose(losses_of(whole), losses_of(parts), rtol=1e-4)


class KilledError(Exception):
    """Stands for a kill: the loop gets no chance to put anything in order."""


@pytest.mark.parametrize("kill_at", [2, 5, 7])
def test_a_killed_run_takes_the_same_steps_as_an_undisturbed_one(tmp_path: Path, kill_at: int) -> None:
    spec = student_spec(tmp_path, dropout=0.2)
    undisturbed = train(spec, OPTIONS, tmp_path / "undisturbed")

    def kill(record: dict[str, Any]) -> None:
        if record["step"] == kill_at:
            raise KilledError

    with pytest.raises(KilledError):
        train(spec, OPTIONS, tmp_path / "killed", kill)
    ran: list[int] = []
    resumed = train(spec, OPTIONS, tmp_path / "killed", lambda record: ran.append(record["step"]))
    assert ran[0] == kill_at // 3 * 3 + 1
    assert losses_of(resumed) == losses_of(undisturbed)
    assert (resumed.best_step, resumed.metrics, resumed.pairs) == (
        undisturbed.best_step,
        undisturbed.metrics,
        undisturbed.pairs,
    )
    expected = weights_of(undisturbed)
    for name, weight in weights_of(resumed).items():
        assert torch.equal(weight, expected[name]), name


def test_an_ended_run_returns_at_once(tmp_path: Path) -> None:
    spec = student_spec(tmp_path)
    first = train(spec, OPTIONS, tmp_path / "work")
    ran: list[dict[str, Any]] = []
    assert train(spec, OPTIONS, tmp_path / "work", ran.append) == first
    assert not ran


def test_two_checkpoints_are_kept_and_a_half_written_one_is_not_read(tmp_path: Path) -> None:
    spec = student_spec(tmp_path)
    work = tmp_path / "work"

    def kill(record: dict[str, Any]) -> None:
        if record["step"] == 10:
            raise KilledError

    with pytest.raises(KilledError):
        train(spec, replace(OPTIONS, epochs=3), work, kill)
    assert sorted(path.name for path in (work / "checkpoints").iterdir()) == ["step-0000000006", "step-0000000009"]
    (work / "checkpoints" / ".step-0000000012.abc").mkdir()
    ran: list[int] = []
    train(spec, replace(OPTIONS, epochs=3), work, lambda record: ran.append(record["step"]))
    assert ran[0] == 10
    assert not (work / "checkpoints").exists()


@dataclass(frozen=True)
class FadingSpec:
    """A student whose dev metric is scripted: the best comes second of four."""

    spec: StudentTaskSpec

    def build(self, rank: int, world_size: int) -> StudentTask:
        task = StudentTask(self.spec)
        values = iter([0.5, 0.9, 0.7, 0.9])
        task.evaluate = lambda: {"ndcg": next(values)}  # type: ignore[method-assign]
        return task


def test_the_best_weights_are_kept_and_the_earliest_of_equals(tmp_path: Path) -> None:
    spec = student_spec(tmp_path)
    options = replace(OPTIONS, epochs=3)
    result = train(FadingSpec(spec), options, tmp_path / "work")
    assert (result.steps, result.best_step, result.metrics) == (15, 8, {"ndcg": 0.9})
    task = StudentTask(spec)
    assert not torch.equal(weights_of(result)["classifier.weight"], task.model.classifier.weight)


def test_a_loss_that_explodes_stops_the_run(tmp_path: Path) -> None:
    spec = student_spec(tmp_path)
    with pytest.raises(UserError, match=r"lower fit\.learning_rate"):
        train(spec, replace(OPTIONS, learning_rate=1e30, warmup_ratio=0.0), tmp_path / "work")


@pytest.mark.usefixtures("ray_cluster")
class TestRayTrain:
    def test_two_workers_take_the_steps_of_one(self, tmp_path: Path) -> None:
        spec = student_spec(tmp_path)
        fifty = replace(OPTIONS, epochs=10)
        one = train(spec, fifty, tmp_path / "one")
        seen: list[dict[str, Any]] = []
        contrast = student_spec(tmp_path / "contrast", **OBJECTIVES["contrast"])
        jobs = [
            Job(spec, fifty, tmp_path / "two", "first"),
            Job(contrast, OPTIONS, tmp_path / "second", keep_model=False),
        ]
        two, second = ray_runner(num_workers=2)(jobs, seen.append)
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

    def test_a_killed_worker_is_replaced_and_the_steps_stay_the_same(self, tmp_path: Path) -> None:
        spec = student_spec(tmp_path)
        undisturbed = train(spec, OPTIONS, tmp_path / "undisturbed")
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        mortal = MortalSpec(spec, str(tmp_path / "died"), at_loss=5)
        result = train_on_two(mortal, OPTIONS, tmp_path / "work")
        assert (tmp_path / "died").exists()
        np.testing.assert_allclose(losses_of(result), losses_of(undisturbed), rtol=1e-4)

    @pytest.mark.parametrize("lora", [0, pytest.param(2, marks=pytest.mark.slow)])
    def test_a_teacher_shared_out_over_workers_takes_the_steps_of_one_and_survives_a_kill(
        self, tmp_path: Path, lora: int
    ) -> None:
        model = build_tiny_encoder(tmp_path / "encoder")
        teacher = ClassifierOptions(model=str(model), max_tokens=16, dropout=0.0)
        build_classifier(teacher, SCALE, tmp_path / "start", seed=0)
        judged = write(tmp_path / "judged.parquet", judged_groups(20))
        spec = TeacherTaskSpec(str(tmp_path / "start"), judged, lora, label_smoothing=0.1, seed=0)
        options = TeacherFitOptions(**{**asdict(OPTIONS), "batch_size": 24, "sharded": True})
        alone = train(spec, options, tmp_path / "alone")  # with nobody to share with
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
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
    def test_a_run_goes_on_under_another_placement_and_number_of_workers(self, tmp_path: Path, first: str) -> None:
        spec = student_spec(tmp_path)
        undisturbed = train(spec, OPTIONS, tmp_path / "undisturbed")
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
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

    def test_what_the_user_must_mend_reaches_the_driver_as_such(self, tmp_path: Path) -> None:
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
        ],
    )
    def test_what_fails_one_worker_ends_all_of_them_in_one_sentence(
        self, tmp_path: Path, error: Exception, said: str
    ) -> None:
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        with pytest.raises(UserError, match=said):
            train_on_two(FailingSpec(student_spec(tmp_path), error), OPTIONS, tmp_path / "work")
        assert not list(tmp_path.glob("*-ray"))


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
