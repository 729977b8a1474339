"""The loop: its order, its exact resume, and that the number of workers changes nothing but speed."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_fit import OBJECTIVES, OPTIONS, losses_of, student_spec, train, weights_of
from torch._dynamo.utils import counters

from relevance_ray.errors import UserError
from relevance_ray.training.fit import (
    micro_batches,
    schedule,
    share_by_cost,
)
from relevance_ray.training.student_task import StudentTask, StudentTaskSpec


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
    """A student whose dev metric is scripted: the best comes second of four, and again, but for rounding, at the end."""

    spec: StudentTaskSpec

    def build(self, rank: int, world_size: int) -> StudentTask:
        task = StudentTask(self.spec)
        values = iter([0.5, 0.9, 0.7, 0.9 + 1e-15])
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
