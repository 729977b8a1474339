"""What the chain refuses, before anything is run where that can be known."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny_chain import cli, values

from relevance_ray.chain.folders import STEPS, StepFolders
from relevance_ray.config import build_config
from relevance_ray.errors import UserError
from relevance_ray.steps import Chain


@pytest.mark.parametrize(
    "change, message",
    [
        ("student.model=nosuch", "model 'nosuch' is unknown; give a short name (minilm, smollm2-135m, mpnet)"),
        ("studnet.model=minilm", "--set studnet is not a section; did you mean student"),
        ("data={format: esci, path: /nosuch}", "/nosuch"),
        ("generate.num_pairs=100000000", "num_pairs"),
        (
            "label={engine: vllm, vllm: {engine_args: {tensor_parallel_size: four}}}",
            "must be a whole number of devices",
        ),
        (
            "label={engine: vllm, vllm: {engine_args: {tensor_parallel_size: 4}}}",
            "share a teacher out over 4 GPUs, and resources.gpus_per_label_actor is 0; set it to 4",
        ),
    ],
)
def test_what_cannot_work_is_one_sentence_exit_2_and_nothing_half_written(
    tmp_path: Path, encoder: Path, change: str, message: str
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values(tmp_path / "root", encoder)))
    done = cli("generate" if "num_pairs" in change else "run", str(config), "--set", change)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    error = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]
    assert not list((tmp_path / "root").glob("*/data/*"))
    assert not list((tmp_path / "root").glob("prepare-*/judgments.parquet")) or "num_pairs" in change


def test_more_actors_than_the_machine_can_hold_are_refused_instead_of_waited_for(tmp_path: Path, encoder: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values(tmp_path / "root", encoder)))
    done = cli("train-teacher", str(config), "--set", "resources.train_workers=64")
    assert done.returncode == 2, done.stderr
    assert "resources.train_workers asks for 64 at 1 CPU each, and this Ray has room for" in done.stderr


def test_a_dry_run_says_what_would_be_done_and_does_nothing(tmp_path: Path, encoder: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values(tmp_path / "root", encoder)))
    shown = cli("run", str(config), "--dry-run")
    assert shown.returncode == 0
    assert [line.split()[:2] for line in shown.stdout.splitlines()] == [[step, "run"] for step in STEPS]
    folders = StepFolders(build_config(values(tmp_path / "root", encoder)))
    assert [(step, state) for step, state, _ in folders.plan()] == [(step, "run") for step in STEPS]
    assert [step for step, _, _ in folders.plan("generate")] == ["prepare", "generate"]
    assert not (tmp_path / "root").exists()


def test_without_a_teacher_to_train_there_is_no_such_step(tmp_path: Path, encoder: Path) -> None:
    config = {**values(tmp_path, encoder), "label": {"engine": "oracle"}}
    assert "train-teacher" not in StepFolders(build_config(config)).steps


def test_a_root_among_the_data_is_refused(tmp_path: Path, encoder: Path) -> None:
    data = {"format": "esci", "path": str(tmp_path)}
    config = build_config({**values(tmp_path / "root", encoder), "data": data})
    with pytest.raises(UserError, match=r"storage\.root .* lies within data\.path"):
        Chain(config).run()
    assert not (tmp_path / "root").exists()


def test_status_of_what_was_never_run_is_refused(tmp_path: Path) -> None:
    for command in ("status", "retry-failed"):
        done = cli(command, str(tmp_path))
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "nothing was run there" in done.stderr


@pytest.mark.parametrize(
    ("student", "said"),
    [
        ("{kind: two_tower, infonce_weight: 0.5}", r"student\.infonce_weight asks which products are relevant"),
        ("{margins: differing}", r"student\.margins=differing asks which products are relevant"),
        ("{bce_weight: 0.5}", r"student\.bce_weight asks which products are relevant"),
        ("{kl_weight: 0.5, human_share: 0.1}", r"student\.kl_weight cannot mix human judgments"),
    ],
)
def test_a_loss_that_a_teachers_labels_do_not_serve_is_refused(
    tmp_path: Path, encoder: Path, student: str, said: str
) -> None:
    base = {**values(tmp_path / "root", encoder), "teacher": {"kind": "bi_encoder", "model": str(encoder)}}
    with pytest.raises(UserError, match=said):
        Chain(build_config(base, [f"student={student}"])).preflight()
    stacked = {**base, "teacher": {"kind": "ensemble", "members": [base["teacher"]]}}
    Chain(build_config(stacked, [f"student={student}"])).preflight()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("student.num_layers=99", "num_layers is 99"),
        ("student.model=minilmm", "model 'minilmm' is unknown"),
        ("label={engine: file, path: nope.csv}", "label.path nope.csv does not exist"),
        ("teacher={kind: query_likelihood}", "model minilm writes no text; give a causal language model"),
        (
            "teacher={kind: ensemble, members: [{kind: query_likelihood, model: smollm2-135m, max_tokens: 9000}]}",
            "max_tokens is 9000, but model smollm2-135m reads 8192 at most",
        ),
        ("evaluate.models={other: nope}", r"evaluate\.models\.other nope does not exist; name the folder"),
        ("evaluate.models={other: /}", "/ is no model folder: it has no relevance.json"),
        ("generate={source: file, pairs_file: nope.csv}", "generate.pairs_file nope.csv does not exist"),
    ],
)
def test_what_can_be_known_to_fail_is_refused_before_anything_is_run(
    tmp_path: Path, encoder: Path, override: str, said: str
) -> None:
    config = build_config(values(tmp_path / "root", encoder), [override])
    with pytest.raises(UserError, match=said):
        Chain(config).preflight()
    with pytest.raises(UserError, match=said):
        Chain(config).run()
    assert not (tmp_path / "root").exists()


def test_a_root_within_the_data_is_refused_on_s3_as_on_disk(s3_server: None, tmp_path: Path, encoder: Path) -> None:
    given = {"format": "generic", "scale": "binary"}
    for data, root in (("s3://bucket/shop", "s3://bucket/shop/run"), (str(tmp_path), str(tmp_path / "run"))):
        config = build_config(
            values(Path("unused"), encoder) | {"data": given | {"path": data}, "storage": {"root": root}}
        )
        with pytest.raises(UserError, match=f"storage.root {root} lies within data.path {data}"):
            Chain(config).preflight()
