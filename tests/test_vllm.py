"""The vLLM engine on a CPU, in the environment of `make test-vllm`: parity, generation, a dead engine, a labeling job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from test_labeling import make_groups
from tiny_engines import (
    ESCI,
    PRODUCTS,
    QUERIES,
    as_pairs,
    causal_folder,
    cross_encoder_folder,
    ensemble_folder,
)
from transformers import AutoModelForCausalLM

pytest.importorskip("vllm", reason="vllm is not installed in this environment; run make test-vllm")

from vllm.v1.engine.exceptions import EngineDeadError

from relevance_ray.engines.base import ModelEngine
from relevance_ray.engines.ensemble import EnsembleModel
from relevance_ray.engines.generation import Sampling
from relevance_ray.engines.options import EngineOptions, VllmOptions
from relevance_ray.engines.registry import load_pair_model, open_engine
from relevance_ray.engines.vllm import VllmGenerator, VllmModel
from relevance_ray.errors import UserError
from relevance_ray.labeling.labeler import ShardLabeler
from relevance_ray.labeling.pipeline import Shard, label, shards_to_label
from relevance_ray.models import resolve_model
from relevance_ray.storage import CommitLog

# The same queries with one that fails and one product more for the first, so that a prefix is shared.
PAIRS = as_pairs(
    [*QUERIES[:2], "tent " * 200, *QUERIES[2:], "red tent"], [*PRODUCTS[:2], PRODUCTS[0], *PRODUCTS[2:], PRODUCTS[2]]
)


def vllm_processes() -> list[psutil.Process]:
    """The processes of vLLM that this one started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "VLLM" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def assert_same_labels(folder: Path, engine: Any) -> None:
    expected = open_engine(EngineOptions(), folder, ESCI).label(PAIRS)
    found = engine.label(PAIRS)
    assert found.errors == expected.errors
    assert found.errors[2] is not None
    assert engine.gains == load_pair_model(folder).gains
    np.testing.assert_allclose(found.class_logits, expected.class_logits, atol=1e-4)
    assert np.nanmax(expected.class_logits[:, -1]) - np.nanmin(expected.class_logits[:, -1]) > 0.02


# Parity


def test_an_ensemble_gives_the_logits_of_transformers_and_its_cross_encoder_too(tmp_path: Path) -> None:
    folder = ensemble_folder(tmp_path / "model")
    engine = open_engine(EngineOptions(engine="vllm", max_batch_tokens=64), folder, ESCI)
    assert isinstance(engine, ModelEngine)
    assert isinstance(engine.model, EnsembleModel)
    cross_encoder = engine.model.members[0]
    assert [type(member).__name__ for member in engine.model.members] == ["VllmModel", "BM25Model"]
    assert_same_labels(folder, engine)
    assert_same_labels(folder / "members" / "0", ModelEngine(cross_encoder))  # of one logit
    engine.close()
    assert vllm_processes() == []
    engine.close()


def test_a_cross_encoder_of_k_classes_gives_the_logits_of_transformers(tmp_path: Path) -> None:
    folder = cross_encoder_folder(tmp_path / "model", num_labels=4)
    options = EngineOptions(engine="vllm", num_threads=1, vllm=VllmOptions({"max_num_seqs": 3}))
    engine = open_engine(options, folder, ESCI)
    assert isinstance(engine, ModelEngine)
    assert isinstance(engine.model, VllmModel)
    config = engine.model._llm.llm_engine.vllm_config
    assert config.scheduler_config.max_num_seqs == 3
    assert config.model_config.dtype == torch.float32
    assert_same_labels(folder, engine)
    engine.close()


def test_a_causal_classifier_gives_the_logits_of_transformers_and_reads_a_shared_prefix_once(tmp_path: Path) -> None:
    folder = causal_folder(tmp_path / "model")
    # Prefixes are kept in blocks: smaller ones than a CPU's usual 128 tokens, to see it with short prompts.
    model = VllmModel(folder, engine_args={"block_size": 32})
    assert_same_labels(folder, ModelEngine(model))
    ids = model.encoder.encode(QUERIES[:1], [{"title": "never seen before"}]).input_ids[0].tolist()
    (output,) = model._llm.classify([{"prompt_token_ids": ids}], use_tqdm=False)
    assert output.num_cached_tokens == 32
    model.close()


# What vLLM is not given


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"engine_args": {"gpu_memory_utilisation": 0.5}}, "did you mean gpu_memory_utilization"),
        ({"engine_args": {"model": "other"}}, "engine_args.model is set by the engine itself"),
        ({"engine_args": {"max_model_len": 20}}, "max_model_len 20 is below the teacher's max_tokens 48"),
        ({"engine_args": {"dtype": "float99"}}, "vLLM refuses .*float99"),
        ({"device": "tpu"}, "device tpu is not for vLLM"),
    ],
)
def test_what_vllm_cannot_take_is_refused_in_a_sentence(
    tmp_path: Path, arguments: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        VllmModel(cross_encoder_folder(tmp_path / "model"), **arguments)
    assert vllm_processes() == []


# Generation

SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue"]}, "grade": {"type": "integer", "minimum": 0, "maximum": 3}},
    "required": ["color", "grade"],
    "additionalProperties": False,
}
CONVERSATIONS = [
    [{"role": "user", "content": f"How relevant is {product['title'][:40]!r} to {query!r}? Answer A, B or C."}]
    for query, product in zip(QUERIES, PRODUCTS, strict=True)
]


@pytest.fixture(scope="module")
def generator() -> Iterator[VllmGenerator]:
    generator = VllmGenerator(resolve_model("smollm2-135m"), engine_args={"max_model_len": 512})
    yield generator
    generator.close()


def test_json_parses_under_its_schema(generator: VllmGenerator) -> None:
    answers = generator.generate(CONVERSATIONS, Sampling(json_schema=SCHEMA, max_tokens=64))
    for answer in answers:
        assert answer.error is None
        value = json.loads(answer.text)
        assert value.keys() == {"color", "grade"}
        assert value["color"] in ("red", "blue")
        assert 0 <= value["grade"] <= 3
        assert answer.prompt_tokens > 10
        assert answer.completion_tokens > 3
    (cut,) = generator.generate(CONVERSATIONS[:1], Sampling(json_schema=SCHEMA, max_tokens=3))
    assert (cut.text, cut.error) == ("", "the JSON was cut at 3 tokens")


def test_choices_come_with_the_models_own_log_probabilities(generator: VllmGenerator) -> None:
    choices = ("A", "B", "C")
    answers = generator.generate(CONVERSATIONS, Sampling(choices=choices))
    plain = AutoModelForCausalLM.from_pretrained(resolve_model("smollm2-135m"), dtype=torch.float32).eval()
    tokens = [generator.tokenizer.encode(choice, add_special_tokens=False)[0] for choice in choices]
    for conversation, answer in zip(CONVERSATIONS, answers, strict=True):
        ids, error = generator._prompt(conversation)
        assert answer.error is error is None
        with torch.no_grad():
            logprobs = plain(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert answer.choice_logits is not None
        np.testing.assert_allclose(answer.choice_logits, logprobs[tokens].numpy(), atol=1e-3)
        assert answer.text == choices[int(np.argmax(answer.choice_logits))]
        assert answer.completion_tokens == 1


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        (("A", "not a single token"), "'not a single token' is 4 tokens"),
        (("A", "A"), "not all different"),
        (tuple(f"{n}" for n in range(200)), "more than the 128"),
    ],
)
def test_choices_that_are_no_tokens_are_refused(
    generator: VllmGenerator, choices: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        generator.generate(CONVERSATIONS, Sampling(choices=choices))


def test_a_conversation_that_cannot_be_answered_takes_no_other_with_it(generator: VllmGenerator) -> None:
    rotten = ["tent \ud800", "te\x00nt", None, "tent " * 2000]
    conversations: list[Any] = [CONVERSATIONS[0], *([{"role": "user", "content": text}] for text in rotten), []]
    answers = generator.generate([*conversations, CONVERSATIONS[1]], Sampling(max_tokens=5))
    errors = ["surrogate", "NUL", "NoneType", "2[0-9]+ tokens, more than the 511", "no messages"]
    assert answers[0].error is answers[-1].error is None
    assert answers[0].completion_tokens == 5
    assert [bool(answer.error) for answer in answers[1:-1]] == [True] * 5
    for answer, sentence in zip(answers[1:-1], errors, strict=True):
        with pytest.raises(AssertionError, match=sentence):
            raise AssertionError(answer.error)
    assert generator.generate(conversations[1:], Sampling())[0].text == ""
    assert generator.generate([], Sampling()) == []


def test_an_answer_ends_before_the_first_stop_string(generator: VllmGenerator) -> None:
    free = [answer.text for answer in generator.generate(CONVERSATIONS, Sampling(max_tokens=12))]
    stop = free[0][len(free[0]) // 2 :][:4]
    cut = generator.generate(CONVERSATIONS, Sampling(max_tokens=12, stop=(stop,)))
    assert [answer.text for answer in cut] == [text.split(stop)[0] for text in free]


def test_a_seed_repeats_its_sample(generator: VllmGenerator) -> None:
    sampled = [
        generator.generate(CONVERSATIONS[:1], Sampling(max_tokens=12, temperature=1.0, seed=seed))[0].text
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_tokenizer_without_a_chat_template_reads_paragraphs(
    generator: VllmGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    special = generator.tokenizer.eos_token
    conversation = [
        {"role": "system", "content": "You grade."},
        {"role": "user", "content": f"red{special}tent"},
    ]
    monkeypatch.setattr(generator.tokenizer, "chat_template", None)
    ids, error = generator._prompt(conversation)
    assert error is None
    assert generator.tokenizer.eos_token_id not in ids
    apart = f"{special[0]} {special[1:]}"
    assert generator.tokenizer.decode(ids) == f"System:\nYou grade.\n\nUser:\nred{apart}tent\n\nAssistant:\n"
    assert generator.generate([conversation], Sampling(max_tokens=3))[0].error is None


# Labeling


def make_shards(folder: Path, count: int) -> list[Shard]:
    groups = CommitLog(str(folder / "generate"))
    for start in range(0, 4 * count, 4):
        groups.commit(f"groups-{start:010d}-{start + 4:010d}", make_groups(start, start + 4), "g", {"pairs": 12})
    return shards_to_label(groups, sorted(groups.committed()))


def logits_of(folder: Path) -> dict[int, float]:
    log = CommitLog(str(folder))
    rows = [row for name in log.committed() for row in log.read(name, columns=["products"]).to_pylist()]
    return {product["pair_id"]: product["logit"] for row in rows for product in row["products"]}


def label_with_transformers(shards: list[Shard], folder: Path, model: Path) -> dict[int, float]:
    actor = ShardLabeler(str(folder), "t", partial(open_engine, EngineOptions(), model, ESCI), "run")
    for shard in shards:
        actor({"path": [shard.path], "label_name": [shard.label_name], "previous": [""]})
    return logits_of(folder)


def assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def assert_same_logits(found: dict[int, float], expected: dict[int, float]) -> None:
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[key] for key in expected], list(expected.values()), atol=1e-4)
    assert np.ptp(list(expected.values())) > 0.02


def test_the_actor_closes_an_engine_that_died_and_labels_with_another(tmp_path: Path) -> None:
    model = cross_encoder_folder(tmp_path / "model")
    shards = make_shards(tmp_path, 2)
    engines: list[Any] = []

    def opened() -> Any:
        engines.append(open_engine(EngineOptions(engine="vllm"), model, ESCI))
        return engines[-1]

    actor = ShardLabeler(str(tmp_path / "label"), "t", opened, "run")
    results = []
    for shard in shards:
        results.append(actor({"path": [shard.path], "label_name": [shard.label_name], "previous": [""]}))
        if len(results) == 1:
            for process in vllm_processes():
                os.kill(process.pid, signal.SIGKILL)
            with pytest.raises(EngineDeadError):
                engines[0].label(PAIRS)
    assert [result["labeled"] for result in results] == [[True], [True]]
    assert len(engines) == 2
    expected = label_with_transformers(shards, tmp_path / "expected", model)
    assert_same_logits(logits_of(tmp_path / "label"), expected)
    engines[1].close()
    assert vllm_processes() == []


OWNER = """
import sys, time, psutil
from relevance_ray.engines.vllm import VllmModel
model = VllmModel(sys.argv[1])
print("pids", *(process.pid for process in psutil.Process().children(recursive=True)), flush=True)
time.sleep(600)
"""


def test_an_engine_ends_with_its_owner_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(cross_encoder_folder(tmp_path / "model"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        line = next(line for line in owner.stdout if line.startswith("pids"))
        owner.kill()
    started = [int(pid) for pid in line.split()[1:]]
    assert len(started) >= 2
    assert_gone(started)


def test_a_labeling_job_on_ray_gives_the_logits_of_transformers_and_leaves_no_process(
    tmp_path: Path, ray_cluster: None
) -> None:
    model = cross_encoder_folder(tmp_path / "model")
    shards = make_shards(tmp_path, 3)
    pids = tmp_path / "pids"

    def opened() -> Any:
        engine = open_engine(EngineOptions(engine="vllm"), model, ESCI)
        pids.write_text(" ".join(str(process.pid) for process in psutil.Process().children(recursive=True)))
        return engine

    summary = label(shards, str(tmp_path / "label"), "t", opened)
    assert summary == {
        "shards": 3,
        "skipped": 0,
        "pairs": 36,
        "errors": 0,
        "reused": 0,
        "tokens": 252,
        "labeled_now": {"pairs": 36, "tokens": 252},
        "set_aside": {},
    }
    expected = label_with_transformers(shards, tmp_path / "expected", model)
    assert_same_logits(logits_of(tmp_path / "label"), expected)
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) >= 2  # the engine's process and its worker
    assert_gone(started)
