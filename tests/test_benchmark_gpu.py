"""The benchmark that carries cores, weights and data to a machine without Ray, run there as far as a CPU can."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from tiny_training import SCALE, build_tiny_encoder, judged_groups, labeled_groups

from relevance_ray import storage

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
ABSENT = ("ray", "pydantic", "vllm", "s3fs", "bm25s", "faiss", "Stemmer", "datasketch")
WITHOUT = f"""
import runpy, sys
for name in {ABSENT}: sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    prepared = tmp_path / "prepared"
    judged = judged_groups(60)
    splits = ["test" if split == "dev" and row % 2 else split for row, split in enumerate(judged["split"].to_pylist())]
    judged = judged.set_column(judged.schema.get_field_index("split"), judged.schema.field("split"), pa.array(splits))
    storage.write_table(str(prepared / "judged_groups.parquet"), judged)
    (prepared / "scale.json").write_text(json.dumps(SCALE.to_dict()), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("gpu_pack", BENCHMARKS / "gpu_pack.py")
    assert spec is not None
    assert spec.loader is not None
    gpu_pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu_pack)
    shards = [labeled_groups(150, products=8, seed=seed) for seed in (5, 6)]
    sizes = gpu_pack.write_pack(tmp_path / "pack", prepared, shards, build_tiny_encoder(tmp_path / "encoder"))
    assert sizes["pairs"] == 2400
    return tmp_path / "pack"


def measure(packed: Path, *options: str) -> tuple[str, dict]:
    folders = ["--results", str(packed.with_name("results")), "--work", str(packed.with_name("work"))]
    command = [
        sys.executable,
        "-c",
        WITHOUT,
        str(BENCHMARKS / "gpu.py"),
        str(packed),
        "--layers",
        "1",
        *folders,
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


def test_a_curve_is_measured_without_ray_and_goes_on_on_another_machine(packed: Path) -> None:
    said, figures = measure(packed, "--minutes", "0")
    assert "teacher: no time left" in said
    assert figures["law"] is None
    said, figures = measure(packed)
    assert "| teacher |" in said
    assert figures["speed"]["teacher"]["labeled_pairs"] == 2400
    assert figures["speed"]["speed-float32"]["pairs_per_second"] > 0
    assert figures["forecast"]["sentence"]
    shutil.rmtree(packed.with_name("work"))  # what another machine does not have
    file = packed.with_name("results") / "figures.json"
    kept = json.loads(file.read_text(encoding="utf-8"))
    students = [name for name in kept if name.startswith("student-")]
    assert len(students) == 5, students  # of human labels, and of 1, 2, 4 and 8 times as many
    lost = kept.pop(students[-1])
    file.write_text(json.dumps(kept), encoding="utf-8")
    said, again = measure(packed)
    assert again["forecast"] == figures["forecast"]
    assert json.loads(file.read_text(encoding="utf-8"))[students[-1]]["ndcg"] == lost["ndcg"]
    assert [line.split(":")[0] for line in said.splitlines() if line.endswith(" s")] == [students[-1]]
