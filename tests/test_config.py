from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from relevance_ray.config import Config, build_config, describe, load_config
from relevance_ray.demo import demo_config
from relevance_ray.errors import UserError
from relevance_ray.options import semantic

JOBS = sorted((Path(__file__).resolve().parents[1] / "jobs").glob("*.yaml"))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"studnet": {}}, "conf: studnet is not a section; did you mean student"),
        ({"student": {"modle": "minilm"}}, "conf: student.modle is not a key of student; did you mean model"),
        ({"student": {"fit": {"lr": 1e-4}}}, "conf: student.fit.lr is not a key of student.fit; did you mean"),
        (
            {"teacher": {"kind": "ensemble", "members": [{"modle": "minilm"}]}},
            "conf: teacher.members.0.modle is not a key of teacher.members.0; did you mean model",
        ),
        ({"label": {"engine": "magic"}}, "conf: label.engine: Input should be 'transformers', "),
        ({"generate": {"num_pairs": "many"}}, "conf: generate.num_pairs: Input should be a valid integer"),
        ({"generate": {"num_pairs": 0}}, "conf: generate: num_pairs must be at least 1"),
        ({"data": 3}, "conf: data must be a section of keys"),
        (
            {"generate": {"source": "logs"}},
            "conf: generate.source: Input should be 'log', 'titles', 'llm' or 'file' (it is",
        ),
        (
            {"generate": {"source": ["log", "title"]}},
            "conf: generate.source.1: Input should be 'log', 'titles', 'llm' or",
        ),
        ({"evaluate": {"models": {"student": "elsewhere"}}}, "conf: evaluate: models.student must be named otherwise"),
        ({"student": {"fit": {"patience": 3}}}, "conf: student.fit: patience never ends a run that is evaluated once"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_the_nearest_valid_key(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build_config(values, where="conf")
    assert message in str(caught.value)


def test_an_override_wins_and_its_mistake_names_set() -> None:
    config = build_config({"generate": {"num_pairs": 5}}, ["generate.num_pairs=64", "student.fit.learning_rate=3e-4"])
    assert config.generate.num_pairs == 64
    assert config.student.fit.learning_rate == 3e-4
    with pytest.raises(UserError, match=r"--set student\.modle is not a key of student; did you mean model"):
        build_config({}, ["student.modle=minilm"])
    with pytest.raises(UserError, match=r"--set generate\.source\.1: Input should be .* \(it is 'title'\)"):
        build_config({}, ["generate.source=[log, title]"])
    with pytest.raises(UserError, match="must be key=value"):
        build_config({}, ["student"])


def test_a_file_that_is_missing_or_no_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: there is no such configuration file"):
        load_config(str(tmp_path / "none.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("data: [1,\n")
    with pytest.raises(UserError, match=r"broken\.yaml is no valid YAML: .*line 2"):
        load_config(str(broken))
    broken.write_text("- a\n- b\n")
    with pytest.raises(UserError, match="must hold sections"):
        load_config(str(broken))


def test_every_key_is_described() -> None:
    rows = describe()
    assert len(rows) > 50
    for key, _, description in rows:
        assert len(description) > 10, key


def test_operational_options_do_not_enter_the_fingerprint() -> None:
    one = build_config({"generate": {"num_pairs": 100}, "label": {"max_batch_tokens": 1000}})
    two = build_config({"generate": {"num_pairs": 999}, "label": {"max_batch_tokens": 2000}})
    assert semantic(one.generate) == semantic(two.generate)
    assert semantic(one.label) == semantic(two.label)
    fast = {"engine": "vllm", "vllm": {"engine_args": {"gpu_memory_utilization": 0.5}}}
    assert semantic(build_config({"label": fast}).label) == semantic(build_config({"label": {"engine": "vllm"}}).label)
    fp8 = {"engine": "vllm", "vllm": {"engine_args": {"quantization": "fp8"}}}
    assert semantic(build_config({"label": fp8}).label) != semantic(build_config({"label": fast}).label)
    assert semantic(one.student) != semantic(build_config({"student": {"level_weight": 0.0}}).student)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_the_jobs_that_ship_are_valid(path: Path) -> None:
    assert isinstance(load_config(str(path)), Config)


def test_the_demos_labels_come_from_its_teacher_not_from_the_truth() -> None:
    assert demo_config().label.engine == "transformers"


def test_a_configuration_written_down_and_read_back_has_the_same_fingerprints() -> None:
    config = Config()
    again = build_config(json.loads(json.dumps(dataclasses.asdict(config))))
    assert json.dumps(semantic(again), sort_keys=True) == json.dumps(semantic(config), sort_keys=True)


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data:\n  format: generic\n  format: market\n")
    with pytest.raises(UserError, match="'format' is there twice"):
        load_config(str(tmp_path / "run.yaml"))
    with pytest.raises(UserError, match="is a folder"):
        load_config(str(tmp_path))


def test_a_root_without_a_bucket_is_refused() -> None:
    with pytest.raises(UserError, match="names no bucket"):
        build_config({"storage": {"root": "s3://"}})


def test_an_option_added_later_changes_no_fingerprint_while_it_has_its_default() -> None:
    kept, changed = build_config({}), build_config({"student": {"calibration": "isotonic"}})
    assert "calibration" not in semantic(kept.student)
    assert semantic(changed.student)["calibration"] == "isotonic"
