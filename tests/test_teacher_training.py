"""Teachers of every kind, trained on the small world's judgments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from tiny_training import COLORS, SCALE, THINGS, build_tiny_causal, build_tiny_encoder, judged_groups, write

from relevance_ray.engines.registry import load_pair_model
from relevance_ray.errors import UserError
from relevance_ray.model_folder import read_model_info
from relevance_ray.schema import PRODUCT
from relevance_ray.training import teacher
from relevance_ray.training.options import TeacherFitOptions, TeacherMemberOptions, TeacherOptions
from relevance_ray.training.teacher import train_teacher
from relevance_ray.training.teacher_task import query_folds

FIT = TeacherFitOptions(epochs=8, learning_rate=5e-3, batch_size=16)
QUERIES = ["red shoe"] * 3
PRODUCTS = [{"title": "red shoe"}, {"title": "blue shoe"}, {"title": "blue lamp"}]


def catalog() -> list[pa.Table]:
    titles = [f"{color} {thing}" for color in COLORS for thing in THINGS]
    rows = [{"product_id": title, "title": title} for title in titles]
    return [pa.Table.from_pylist([dict.fromkeys(PRODUCT.names) | row for row in rows], schema=PRODUCT)]


def no_catalog() -> list[pa.Table]:
    raise AssertionError("the catalog is read though nothing needs it")


def options_for(model: Path, **changes: Any) -> TeacherOptions:
    values = {"model": str(model), "max_tokens": 48, "fields": ["title"], "dropout": 0.0, "fit": FIT}
    return TeacherOptions(**{**values, **changes})


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_encoder(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture(scope="module")
def causal_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_causal(tmp_path_factory.mktemp("models") / "causal")


@pytest.fixture(scope="module")
def judged_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("judged") / "judged.parquet", judged_groups(80))


@pytest.mark.parametrize(("num_classes", "outputs"), [("scale", 3), ("single", 1)])
def test_an_encoder_learns_grades_in_both_forms(
    encoder_folder: Path, judged_file: str, tmp_path: Path, num_classes: str, outputs: int
) -> None:
    options = options_for(encoder_folder, num_classes=num_classes)
    summary = train_teacher(options, SCALE, judged_file, no_catalog, tmp_path / "out", tmp_path / "work")
    assert summary["dev"]["ndcg"] > 0.85
    model = load_pair_model(tmp_path / "out")
    assert model.info.kind == "classifier"
    assert model.info.template.prompt is None
    assert model.info.calibration is not None
    assert len(model.gains) == max(outputs, 2)
    logits = model.logits(QUERIES, PRODUCTS)
    assert logits[0] > logits[2]


def test_a_causal_model_reads_a_prompt_and_pads_without_a_padding_token(
    causal_folder: Path, judged_file: str, tmp_path: Path
) -> None:
    fit = replace(FIT, epochs=1, batch_size=64)
    summary = train_teacher(
        options_for(causal_folder, fit=fit), SCALE, judged_file, no_catalog, tmp_path / "out", tmp_path / "work"
    )
    assert summary["steps"] > 0
    model = load_pair_model(tmp_path / "out")
    assert model.info.template.prompt is not None
    alone = [model.logits([query], [product])[0] for query, product in zip(QUERIES, PRODUCTS, strict=True)]
    longer = {"title": "red shoe red shoe red shoe red shoe"}
    together = model.logits([*QUERIES, "red shoe"], [*PRODUCTS, longer])[:3]
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_lora_is_merged_into_a_plain_folder_and_moves_every_linear_layer(
    encoder_folder: Path, causal_folder: Path, judged_file: str, tmp_path: Path, kind: str
) -> None:
    source = encoder_folder if kind == "encoder" else causal_folder
    options = options_for(source, lora=4, fit=replace(FIT, epochs=1))
    train_teacher(options, SCALE, judged_file, no_catalog, tmp_path / "out", tmp_path / "work")
    tuned, base = load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors")
    assert not any("lora" in name for name in tuned)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    moved = {
        name.split(".", 1)[1]
        for name, weight in tuned.items()
        if (old := base.get(name, base.get(name.split(".", 1)[1]))) is not None and not torch.equal(old, weight)
    }
    assert any("layers.0" in name or "layer.0" in name for name in moved)
    assert not any("embed" in name for name in moved)
    load_pair_model(tmp_path / "out").logits(QUERIES, PRODUCTS)


def test_a_teacher_that_can_read_no_judged_pair_says_so(encoder_folder: Path, judged_file: str, tmp_path: Path) -> None:
    options = options_for(encoder_folder, fields=["color"])  # of which these products have none
    with pytest.raises(
        UserError, match=r"no judged pair of train can be read by this teacher; raise teacher\.max_tokens"
    ):
        train_teacher(options, SCALE, judged_file, no_catalog, tmp_path / "out", tmp_path / "work")
    assert not (tmp_path / "out").exists()


def test_an_option_that_a_kind_would_not_read_is_refused() -> None:
    with pytest.raises(ValueError, match="num_layers is not read by kind bi_encoder"):
        TeacherMemberOptions(kind="bi_encoder", num_layers=2)
    with pytest.raises(ValueError, match="model is not read by kind bm25"):
        TeacherMemberOptions(kind="bm25", model="mpnet")
    with pytest.raises(ValueError, match="fit is not read by kind ensemble"):
        TeacherOptions(kind="ensemble", members=[TeacherMemberOptions()], fit=FIT)


def test_an_untrained_bi_encoder_is_only_calibrated(encoder_folder: Path, judged_file: str, tmp_path: Path) -> None:
    options = TeacherOptions(kind="bi_encoder", model=str(encoder_folder), max_tokens=48, fields=["title"])
    train_teacher(options, SCALE, judged_file, no_catalog, tmp_path / "out", tmp_path / "work")
    info = read_model_info(tmp_path / "out")
    assert (info.kind, info.extra["logit_scale"]) == ("bi_encoder", 20.0)
    assert info.calibration is not None


def test_an_ensemble_is_stacked_and_resumes_at_the_fold_where_it_was_killed(
    encoder_folder: Path, judged_file: str, tmp_path: Path
) -> None:
    def member(**changes: Any) -> TeacherMemberOptions:
        values = {"model": str(encoder_folder), "max_tokens": 32, "fields": ["title"], "dropout": 0.0, "fit": FIT}
        return TeacherMemberOptions(**{**values, **changes})

    bm25 = TeacherMemberOptions(kind="bm25", fields=["title"])
    bi_encoder = TeacherMemberOptions(kind="bi_encoder", model=str(encoder_folder), max_tokens=32, fields=["title"])
    options = TeacherOptions(kind="ensemble", members=[bm25, member(), bi_encoder])

    class KilledError(Exception):
        pass

    def kill(record: dict[str, Any]) -> None:
        if record["part"] == "member 1, fold 2 of 2" and record["step"] == 3:
            raise KilledError

    arguments = (options, SCALE, judged_file, catalog, tmp_path / "out", tmp_path / "work")
    with pytest.raises(KilledError):
        train_teacher(*arguments, on_progress=kill)
    assert not (tmp_path / "out").exists()
    parts: list[str] = []
    summary = train_teacher(*arguments, on_progress=lambda record: parts.append(record["part"]))
    assert list(dict.fromkeys(parts)) == [
        *("member 1, fold 2 of 2", "member 1, all folds"),
        *("member 0, dev pairs", "member 0, train pairs", "member 1, dev pairs"),
        *("member 2, dev pairs", "member 2, train pairs"),
    ]
    assert [one["labels"] for one in summary["members"]] == ["none", "human judgments", "none"]

    model = load_pair_model(tmp_path / "out")
    assert model.info.kind == "ensemble"
    assert model.gains == SCALE.gains
    logits = model.logits(QUERIES, PRODUCTS)
    assert logits[0] > logits[1] > logits[2]
    assert model.info.calibration is not None
    again = train_teacher(*arguments)
    assert again == summary


def test_a_member_that_is_killed_while_it_scores_goes_on_behind_what_is_kept(
    encoder_folder: Path, judged_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "_PAIRS_KEPT", 64)
    encoder = TeacherMemberOptions(kind="bi_encoder", model=str(encoder_folder), max_tokens=32, fields=["title"])
    options = TeacherOptions(kind="ensemble", members=[encoder])
    arguments = (options, SCALE, judged_file, no_catalog, tmp_path / "out", tmp_path / "work")

    class KilledError(Exception):
        pass

    def kill(record: dict[str, Any]) -> None:
        if record["part"] == "member 0, train pairs" and record["step"] == 128:
            raise KilledError

    with pytest.raises(KilledError):
        train_teacher(*arguments, on_progress=kill)
    seen: list[dict[str, Any]] = []
    train_teacher(*arguments, on_progress=seen.append)
    scored = [record["step"] for record in seen if record["part"] == "member 0, train pairs"]
    assert scored[0] == 64, "what was scored before is not scored again"
    assert scored[-1] == seen[-1]["steps"]
    assert not [record for record in seen if record["part"] == "member 0, dev pairs"]
    assert {record["unit"] for record in seen} == {"pairs"}
    train_teacher(*arguments[:4], tmp_path / "undisturbed", tmp_path / "other-work")
    assert read_model_info(tmp_path / "out") == read_model_info(tmp_path / "undisturbed")


def test_folds_hold_all_spellings_of_a_query_and_are_even() -> None:
    queries = ["Red  Shoe", "red shoe", "lamp", "table", "case", "LAMP"]
    folds = query_folds(queries, 2)
    assert folds[0] == folds[1]
    assert folds[2] == folds[5]
    assert sorted(np.bincount(folds[[0, 2, 3, 4]]).tolist()) == [2, 2]
    with pytest.raises(UserError, match="1 train queries, too few for 2 folds"):
        query_folds(["lamp"], 2)


@pytest.mark.slow
def test_smollm2_trains_with_lora(judged_file: str, tmp_path: Path) -> None:
    fit = TeacherFitOptions(epochs=1, learning_rate=5e-4, batch_size=8, max_batch_tokens=512)
    options = TeacherOptions(model="smollm2-135m", num_layers=4, lora=8, max_tokens=64, fields=["title"], fit=fit)
    train_teacher(options, SCALE, judged_file, no_catalog, tmp_path / "out", tmp_path / "work")
    model = load_pair_model(tmp_path / "out")
    assert np.isfinite(model.logits(QUERIES, PRODUCTS)).all()


def test_a_kind_without_its_members_is_refused() -> None:
    with pytest.raises(ValueError, match="needs at least one"):
        TeacherOptions(kind="ensemble")
