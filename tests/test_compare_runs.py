"""Two evaluated runs beside each other, by the command that users give."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from judged_groups import ESCI, FAST, TitleReader, judged_table
from tiny_chain import cli

from relevance_ray.evaluation.evaluate import evaluate_models
from relevance_ray.evaluation.report.write import write_report
from relevance_ray.evaluation.runs import read_run
from relevance_ray.evaluation.slices import SliceContext
from relevance_ray.storage import join, write_json, write_table


def evaluated(root: Path, noise: float, num_queries: int = 60, *, seed: int = 0) -> Path:
    """A run's root as far as its evaluation."""
    folder = str(root / "evaluate-1")
    keep = partial(write_table, join(folder, "predictions.parquet"))
    models = {"student": TitleReader(noise=noise), "teacher": TitleReader()}
    context = SliceContext(pa.table({"query": ["query 1"], "frequency": [1]}), frozenset())
    judged = judged_table(num_queries, seed=seed)
    results = evaluate_models(judged, models, ESCI, FAST, on_predictions=keep, context=context)
    write_report({**results, "settings": {"student.kind": "two_tower", "student.noise": str(noise)}}, folder)
    write_json(str(root / "latest.json"), {"evaluate": folder})
    return root


def test_two_runs_are_compared_on_what_both_judged(tmp_path: Path) -> None:
    better, worse = evaluated(tmp_path / "better", 0.5), evaluated(tmp_path / "worse", 6.0, 50)
    done = cli("compare", str(better), f"{worse}/evaluate-1", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "better passes worse on test nDCG: +0." in done.stdout
    table = pq.read_table(worse / "evaluate-1" / "predictions.parquet")
    left_out = pq.read_table(better / "evaluate-1" / "predictions.parquet").num_rows - table.num_rows
    assert f"{left_out:,} pairs that better alone has in this split are left out." in done.stdout
    stored = json.loads((tmp_path / "out" / "report.json").read_text())["splits"]["test"]
    assert stored["num_queries"] == 50
    own = json.loads((worse / "evaluate-1" / "report.json").read_text())["splits"]["test"]["models"]["student"]
    assert stored["models"]["worse"]["metrics"]["ndcg"]["value"] == pytest.approx(own["metrics"]["ndcg"]["value"])
    assert (tmp_path / "out" / "report.html").is_file()
    assert "| student.noise | 0.5 | 6.0 |" in done.stdout
    assert "student.kind" not in done.stdout
    assert "### Slices, the worst for better first" in done.stdout
    assert [found["other"] for found in stored["examples"]] == ["worse"]
    assert stored["examples"][0]["won"][0]["first"]["better"][0]["title"].startswith("product ")


def test_another_model_and_equal_names_can_be_told_apart(tmp_path: Path) -> None:
    first, second = evaluated(tmp_path / "a" / "run", 1.0), evaluated(tmp_path / "b" / "run", 1.0)
    done = cli("compare", str(first), str(second), "--model", "teacher")
    assert done.returncode == 0, done.stderr
    assert "teacher of run beside run (second)" in done.stdout
    assert "cannot be told" in done.stdout
    assert "The settings of the two are the same." in done.stdout


def test_a_split_that_one_run_lacks_is_named(tmp_path: Path) -> None:
    run, other = evaluated(tmp_path / "run", 1.0), evaluated(tmp_path / "other", 1.0)
    file = run / "evaluate-1" / "predictions.parquet"
    table = pq.read_table(file)
    dev = table.set_column(0, "split", pa.array(["dev"] * table.num_rows))
    pq.write_table(pa.concat_tables([table, dev]), file)
    for arguments in ((run, other), (other, run)):
        assert "Split dev is left out: run alone has it." in cli("compare", *map(str, arguments)).stdout


def test_settings_that_a_run_did_not_keep_are_not_called_the_same(tmp_path: Path) -> None:
    run, other = evaluated(tmp_path / "run", 1.0), evaluated(tmp_path / "other", 1.0)
    file = other / "evaluate-1" / "report.json"
    report = json.loads(file.read_text())
    del report["settings"]
    file.write_text(json.dumps(report))
    done = cli("compare", str(run), str(other))
    assert done.returncode == 0, done.stderr
    assert "settings of the two" not in done.stdout


def test_a_copied_run_is_read_from_its_copy(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "run", 1.0)
    copied = shutil.copytree(run, tmp_path / "copied")
    assert read_run(str(copied)).folder == f"{copied}/evaluate-1"


def test_a_run_that_was_moved_is_found(tmp_path: Path) -> None:
    moved = evaluated(tmp_path / "run", 1.0).rename(tmp_path / "moved")
    assert read_run(str(moved)).folder == f"{moved}/evaluate-1"


def test_what_cannot_be_compared_is_one_sentence(tmp_path: Path) -> None:
    run, other = evaluated(tmp_path / "run", 1.0), evaluated(tmp_path / "other", 1.0, seed=1)
    (tmp_path / "empty").mkdir()
    compared = tmp_path / "compared"
    assert cli("compare", str(run), str(run), "--out", str(compared)).returncode == 0
    for arguments, said in (
        ((tmp_path / "empty", run), "holds no evaluation; give the root of a run that was evaluated"),
        ((run, other, "--out", run / "evaluate-1"), "holds an evaluation, whose report it would replace"),
        ((run, compared), "compared holds no predictions of models"),
        ((run, run, "--model", "bm25"), "measured no model bm25; name one of student, teacher"),
        ((run, other), "is graded differently in"),
    ):
        done = cli("compare", *map(str, arguments))
        assert done.returncode == 2
        assert said in done.stderr
