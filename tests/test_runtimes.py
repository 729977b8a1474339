"""A student through other libraries than torch: the same scores, or refused."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_chain import cli, values
from tiny_student import build_tiny_student, build_tiny_two_tower
from transformers import AlbertConfig, AlbertForSequenceClassification

from relevance_ray.engines.registry import load_pair_model
from relevance_ray.engines.runtimes import RUNTIMES, TORCH, read_runtime, write_runtime
from relevance_ray.errors import UserError
from relevance_ray.evaluation import runtimes
from relevance_ray.evaluation.judged import JudgedPairs
from relevance_ray.evaluation.runtimes import MeasuredRuntimes, RuntimeFigures, _why_refused, runtimes_text
from relevance_ray.metrics import group_offsets
from relevance_ray.model_folder import finish_folder, read_model_info
from relevance_ray.serving.app import check_model
from relevance_ray.serving.scorer import Scorer
from relevance_ray.student.export import check_exportable, check_libraries

for module in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(module)

COLORS, THINGS = (
    ("red", "blue", "green"),
    ("shoes", "running shoes nike", "wallet", "leather wallet 3 1 2 for and with a"),
)


def some_pairs() -> JudgedPairs:
    """12 queries with 12 products each, those that share words with it graded higher."""
    titles = [f"{color} {thing}" for color in COLORS for thing in THINGS]
    queries = [f"{color} {thing}" for color in COLORS for thing in THINGS]
    gains = np.asarray([len({*query.split()} & {*title.split()}) / 9 for query in queries for title in titles])
    return JudgedPairs(
        offsets=group_offsets([len(titles)] * len(queries)),
        gains=gains,
        classes=(gains > 0.2).astype(np.int64),
        relevant=gains > 0.2,
        query_ids=queries,
        queries=[query for query in queries for _ in titles],
        product_ids=[str(place) for _ in queries for place in range(len(titles))],
        products=[{"title": title} for _ in queries for title in titles],
    )


@pytest.fixture(scope="module", params=[build_tiny_student, build_tiny_two_tower])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request.param(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def measured(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MeasuredRuntimes:
    graphs = tmp_path_factory.mktemp("graphs")
    return MeasuredRuntimes(folder, some_pairs(), some_pairs(), 1, graphs)


def exported(folder: Path, out: Path, measured: MeasuredRuntimes, name: str) -> Path:
    shutil.copytree(folder, out)
    graph = measured.graph_of(name)
    shutil.copy(graph, out / graph.name)
    write_runtime(out, name, graph.name, {})
    return out


def test_all_runtimes_are_made_and_measured(measured: MeasuredRuntimes) -> None:
    assert not measured.failed
    assert [each.name for each in measured.figures] == list(RUNTIMES)
    assert all(each.pairs_per_second > 0 for each in measured.figures)
    torchs = measured.figures[0]
    assert (torchs.ndcg_loss, torchs.tau, torchs.refused) == (0.0, 1.0, None)
    best = measured.fastest()
    assert best.refused is None
    assert all(best.pairs_per_second >= each.pairs_per_second for each in measured.figures if each.refused is None)
    text = runtimes_text(measured)
    assert all(name in text for name in RUNTIMES)


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_float32_runtimes_score_as_torch_does(
    name: str, folder: Path, measured: MeasuredRuntimes, tmp_path: Path
) -> None:
    pairs = some_pairs()
    ours = load_pair_model(exported(folder, tmp_path / "model", measured, name), device="cpu")
    torchs = load_pair_model(folder, device="cpu")
    np.testing.assert_allclose(
        ours.logits(pairs.queries, pairs.products), torchs.logits(pairs.queries, pairs.products), atol=2e-5
    )
    found = next(each for each in measured.figures if each.name == name)
    assert found.refused is None
    assert found.tau == pytest.approx(1.0, abs=0.01)


def test_int8_is_near_and_a_score_stands_alone(folder: Path, measured: MeasuredRuntimes, tmp_path: Path) -> None:
    pairs = some_pairs()
    ours = load_pair_model(exported(folder, tmp_path / "model", measured, "openvino-int8"), device="cpu")
    expected = load_pair_model(folder, device="cpu").logits(pairs.queries, pairs.products)
    found = ours.logits(pairs.queries, pairs.products)
    assert 0 < np.abs(found - expected).max() < 0.1 * np.ptp(expected)
    alone = np.concatenate(
        [
            ours.logits([query], [product])
            for query, product in zip(pairs.queries[:20], pairs.products[:20], strict=True)
        ]
    )
    np.testing.assert_allclose(alone, found[:20], atol=1e-5)
    assert next(each for each in measured.figures if each.name == "openvino-int8").neighbours < 0.02


def test_a_scale_of_the_whole_batch_is_told(measured: MeasuredRuntimes) -> None:
    found = {each.name: each for each in measured.figures}
    assert found["onnx-int8-dynamic"].neighbours > 10 * found["openvino-int8"].neighbours


GOOD = RuntimeFigures("onnx", 10.0, 0.9, 0.001, -0.001, 0.003, 0.97, 0.001)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"ndcg_loss": -0.1}, None),
        ({"ndcg_loss": 0.0021}, "loses 0.0021 of nDCG"),
        ({"ndcg_loss": math.nan}, "loses nan"),
        ({"tau": 0.949}, "tau 0.949"),
        ({"tau": math.nan}, "tau nan"),
        ({"neighbours": 0.06}, "products beside it"),
        ({"neighbours": math.nan}, "products beside it"),
    ],
)
def test_what_auto_refuses(change: dict[str, Any], said: str | None) -> None:
    found = _why_refused(replace(GOOD, **change))
    assert (found is None) if said is None else (found is not None and said in found)


def test_the_fastest_that_is_not_refused(measured: MeasuredRuntimes, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = (
        replace(GOOD, name=TORCH, pairs_per_second=1.0),
        replace(GOOD, pairs_per_second=9.0, refused="it loses"),
    )
    monkeypatch.setattr(measured, "figures", [slow, fast])
    assert measured.fastest().name == TORCH


def test_an_exported_folder_is_served_as_it_says(folder: Path, measured: MeasuredRuntimes, tmp_path: Path) -> None:
    model = exported(folder, tmp_path / "model", measured, "onnx")
    assert read_runtime(model) == ("onnx", "float32.onnx")
    ours, torchs = (
        Scorer(model).score("red shoes", ["red shoes", "wallet"]),
        Scorer(folder).score("red shoes", ["red shoes", "wallet"]),
    )
    for mine, its in zip(ours, torchs, strict=True):
        assert mine == pytest.approx(its, abs=1e-4)
    assert Scorer(model).describe()["runtime"] == "onnx"
    assert Scorer(folder).describe()["runtime"] == TORCH
    (model / "float32.onnx").write_bytes(b"no graph")
    with pytest.raises(UserError, match="onnxruntime cannot read .*float32.onnx .*export the model again"):
        Scorer(model)
    (model / "float32.onnx").unlink()
    with pytest.raises(UserError, match="is not there; export the model again, or remove runtime.json"):
        Scorer(model)
    (model / "runtime.json").write_text('{"format": 1, "runtime": "abacus", "file": "x"}')
    with pytest.raises(UserError, match="runtime.json is not a file of this version"):
        Scorer(model)


def test_a_missing_library_is_named(
    folder: Path, measured: MeasuredRuntimes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    model = exported(folder, tmp_path / "model", measured, "onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        UserError, match="onnxruntime, which is not installed; pip install 'relevance-ray\\[runtimes\\]'"
    ):
        Scorer(model)
    with pytest.raises(UserError, match="onnxruntime is not installed; pip install"):
        check_libraries()
    check_model(model, on_gpu=True)  # whose weights torch runs there
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))
    found = MeasuredRuntimes(folder, some_pairs(), some_pairs(), 1, tmp_path, [TORCH, "openvino"])
    assert found.failed == {"openvino": "openvino is not installed"}
    assert "not measured: openvino is not installed" in runtimes_text(found)


def test_what_has_no_graph_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "relevance.json").write_text(
        json.dumps(json.loads((folder / "relevance.json").read_text()) | {"kind": "bm25"})
    )
    with pytest.raises(UserError, match="is a bm25, which only runs as it is"):
        check_exportable(tmp_path)
    monkeypatch.setattr("relevance_ray.student.export.MAX_BYTES", 10)
    with pytest.raises(UserError, match="2 GB can be exported"):
        check_exportable(folder)


def test_a_model_that_torch_cannot_turn_into_a_graph_is_measured_in_torch_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_folder: Path, _out: Path) -> None:
        raise RuntimeError("unsupported\noperator")

    monkeypatch.setattr(runtimes, "export_float32", fails)
    found = MeasuredRuntimes(folder, some_pairs(), some_pairs(), 1, tmp_path)
    assert [each.name for each in found.figures] == [TORCH]
    assert found.fastest().name == TORCH
    assert set(found.failed) == set(RUNTIMES) - {TORCH}
    assert set(found.failed.values()) == {"no graph can be made of it: unsupported operator"}


def test_products_without_text_are_refused(folder: Path, tmp_path: Path) -> None:
    pairs = replace(some_pairs(), products=[{"title": ""}] * some_pairs().num_pairs)
    with pytest.raises(UserError, match="finds no text in any judged product"):
        MeasuredRuntimes(folder, pairs, pairs, 1, tmp_path)


def test_layers_that_share_their_weights_are_quantized(tmp_path: Path) -> None:
    folder = build_tiny_student(tmp_path / "model")
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=50,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        num_labels=1,
        initializer_range=0.5,
    )
    info = read_model_info(folder)
    (folder / "model.safetensors").unlink()
    AlbertForSequenceClassification(config).save_pretrained(folder)
    finish_folder(folder, info)
    measured = MeasuredRuntimes(folder, some_pairs(), some_pairs(), 1, tmp_path, [TORCH, "openvino-int8"])
    assert not measured.failed
    assert measured.figures[1].tau > 0.9


@pytest.mark.usefixtures("ray_cluster")
def test_the_export_command(tmp_path: Path, encoder: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(values(tmp_path / "root", encoder) | {"label": {"engine": "oracle"}}))
    refused = cli("export", str(config), "--runtime", "abacus")
    assert refused.returncode == 2
    assert "--runtime abacus is none; give auto, or one of torch, onnx," in refused.stderr
    assert not (tmp_path / "root").exists()

    done = cli("export", str(config))
    assert done.returncode == 0, done.stderr
    out = tmp_path / "root" / "exported"
    told = json.loads((out / "runtime.json").read_text())
    assert set(told["measured"]) == set(RUNTIMES)
    assert f"runs through {told['runtime']}; serve it with: relevance-ray serve {out}" in done.stdout
    graphs = list((out / "onnx").iterdir())
    assert [f"onnx/{path.name}" for path in graphs] == [told["file"]] if told["file"] else not graphs
    assert Scorer(out).score("red lamp", ["red lamp"])[0]["logit"] == pytest.approx(
        Scorer(json.loads((tmp_path / "root" / "latest.json").read_text())["student"]).score("red lamp", ["red lamp"])[
            0
        ]["logit"],
        abs=0.1,
    )
    again = cli("export", str(config))
    assert (again.returncode, "is there already; name another folder" in again.stderr) == (2, True)

    chosen = cli("export", str(config), "--runtime", "onnx-int8-static", "--out", str(tmp_path / "static"))
    assert chosen.returncode == 0, chosen.stderr
    assert read_runtime(tmp_path / "static") == ("onnx-int8-static", "onnx/static.onnx")
    figures = json.loads((tmp_path / "static" / "runtime.json").read_text())["measured"]
    assert set(figures) == {TORCH, "onnx-int8-static"}
    if figures["onnx-int8-static"]["refused"]:
        assert "warning: onnx-int8-static would not have been chosen" in chosen.stderr
