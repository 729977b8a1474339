"""Runs of `fit` on the tiny world, and what they left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_training import SCALE, build_tiny_encoder, judged_groups, labeled_groups, write

from relevance_ray.student.cross_encoder import build_cross_encoder
from relevance_ray.student.two_tower import build_two_tower
from relevance_ray.training.fit import FitResult, OnProgress, TaskSpec
from relevance_ray.training.ingest import IngestSpec, ingest
from relevance_ray.training.options import FitOptions, StudentOptions
from relevance_ray.training.runners import Job, local_runner
from relevance_ray.training.student_task import StudentTaskSpec

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


def losses_of(result: FitResult) -> list[float]:
    lines = [json.loads(line) for line in (Path(result.work_dir) / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, result.steps + 1))
    return [line["loss"] for line in steps]


def weights_of(result: FitResult) -> dict[str, torch.Tensor]:
    return load_file(Path(result.model_folder) / "model.safetensors")


OBJECTIVES = {
    "margins": {},
    "differing margins": {"margins": "differing", "level_weight": 0.0},
    "classes": {"kl_weight": 1.0, "margin_weight": 0.0},
    "mixed": {"bce_weight": 0.5, "human_share": 0.3},
    "two-tower": {"kind": "two_tower"},
    "contrast": {"kind": "two_tower", "infonce_weight": 1.0},
}
