"""Training on nodes that share an object store and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from training_job import STEPS, request_at

from relevance_ray.storage import exists, join, listdir, localize, read_bytes
from relevance_ray.training.student import train_student

SCRIPT = Path(__file__).with_name("training_job.py")


def run(root: str, work: Path, *arguments: str) -> str:
    command = [sys.executable, str(SCRIPT), root, str(work), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses_at(root: str) -> list[float]:
    lines = [json.loads(line) for line in read_bytes(join(root, "work", "fit", "log.jsonl")).splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    return [line["loss"] for line in steps]


def test_a_student_is_distilled_on_s3_without_ray(
    s3_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELEVANCE_RAY_CACHE", str(tmp_path / "cache"))
    summary = train_student(request_at("s3://bucket/alone", tmp_path))
    assert summary["steps"] == STEPS
    assert train_student(request_at("s3://bucket/alone", tmp_path)) == summary
    model = localize("s3://bucket/alone/model")
    assert (model / "model.safetensors").is_file()
    assert listdir("s3://bucket/alone/work") == ["fit"]
    assert not exists(join("s3://bucket/alone", "work", "fit", "checkpoints"))
    assert len(losses_at("s3://bucket/alone")) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("lose", [False, True])
def test_nodes_that_share_nothing_but_a_store_train_as_one_does(
    s3_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lose: bool
) -> None:
    monkeypatch.setenv("RELEVANCE_RAY_CACHE", str(tmp_path / "cache"))
    root, alone = f"s3://bucket/nodes-{lose}", f"s3://bucket/alone-{lose}"
    said = run(root, tmp_path / "nodes", *(["--lose-nodes"] if lose else []))
    assert said.count("node killed") == (2 if lose else 0)
    train_student(request_at(alone, tmp_path))
    np.testing.assert_allclose(losses_at(root), losses_at(alone), rtol=1e-3)
