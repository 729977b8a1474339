"""Text from `transformers`: parity with its own `generate`, answers free of their neighbours, shared prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_engines import cross_encoder_folder
from tiny_writers import writer_folder

from relevance_ray.engines import transformers_generation
from relevance_ray.engines.generation import Generated, Message, Sampling
from relevance_ray.engines.openai import OpenAIGenerator
from relevance_ray.engines.options import EndpointOptions, GeneratorOptions, VllmOptions
from relevance_ray.engines.registry import check_generator, open_generator
from relevance_ray.engines.transformers_generation import TransformersGenerator
from relevance_ray.errors import UserError

FEW_SHOT: list[Message] = [
    {"role": "system", "content": "You write what a shopper types to find a product."},
    {"role": "user", "content": "Norrvik trail tent for two, red"},
    {"role": "assistant", "content": "red two person tent"},
]
TITLES = [
    "Gas stove",
    "USB-C cable 2 m 日本語 — 100W",
    "Steel tent pegs, " + "galvanised " * 20,
    "Botas de montaña impermeables",
    "y",
    "Wool socks, three pairs, grey, for hiking in winter",
]
CONVERSATIONS = [[*FEW_SHOT, {"role": "user", "content": title}] for title in TITLES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return writer_folder(tmp_path_factory.mktemp("writer") / "model")


@pytest.fixture
def generator(folder: Path) -> TransformersGenerator:
    return TransformersGenerator(folder, "cpu")


def ids_of(generator: TransformersGenerator, conversation: list[Message]) -> list[int]:
    text = generator.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    return generator.tokenizer.encode(text, add_special_tokens=False)


def reference(generator: TransformersGenerator, conversation: list[Message], max_tokens: int, ends: list[int]) -> str:
    """What `model.generate` writes for a conversation alone."""
    ids = ids_of(generator, conversation)
    with torch.inference_mode():
        found = generator.model.generate(
            torch.tensor([ids]), max_new_tokens=max_tokens, do_sample=False, eos_token_id=ends, pad_token_id=0
        )
    return generator.tokenizer.decode([token for token in found[0, len(ids) :].tolist() if token not in ends])


def texts(answers: list[Generated]) -> list[str]:
    assert [answer.error for answer in answers] == [None] * len(answers)
    return [answer.text for answer in answers]


@contextmanager
def counted_tokens(generator: TransformersGenerator) -> Iterator[list[int]]:
    """Padded tokens of each forward pass."""
    seen: list[int] = []
    hook = generator.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    yield seen
    hook.remove()


@pytest.mark.parametrize("max_batch_tokens", [8192, 300, 1])
def test_greedy_answers_are_those_of_generate(folder: Path, max_batch_tokens: int) -> None:
    generator = TransformersGenerator(folder, max_batch_tokens=max_batch_tokens)
    free = texts(generator.generate(CONVERSATIONS, Sampling(max_tokens=12)))
    assert free == [reference(generator, conversation, 12, [2]) for conversation in CONVERSATIONS]
    assert len(set(free)) > 3
    # Two tokens that some answers hold now end them, so that rows leave the batch at different times.
    ends = [2, *(generator.tokenizer.encode(text)[place] for text, place in ((free[0], 3), (free[2], 1)))]
    generator._ends = set(ends)
    ended = generator.generate(CONVERSATIONS, Sampling(max_tokens=12))
    assert texts(ended) == [reference(generator, conversation, 12, ends) for conversation in CONVERSATIONS]
    assert len({answer.completion_tokens for answer in ended}) > 1
    assert [answer.prompt_tokens for answer in ended] == [len(ids_of(generator, each)) for each in CONVERSATIONS]


def test_a_model_whose_attention_has_a_window_writes_the_same_too(tmp_path: Path) -> None:
    generator = TransformersGenerator(writer_folder(tmp_path / "model", window=16))
    free = texts(generator.generate(CONVERSATIONS, Sampling(max_tokens=8)))
    assert free == [reference(generator, conversation, 8, [2]) for conversation in CONVERSATIONS]
    ends = [2, *(generator.tokenizer.encode(text)[1] for text in free[1:])]
    generator._ends = set(ends)
    ended = texts(generator.generate(CONVERSATIONS, Sampling(max_tokens=8)))
    assert ended == [reference(generator, conversation, 8, ends) for conversation in CONVERSATIONS]


def test_a_sampled_answer_depends_on_its_seed_and_conversation_alone(folder: Path) -> None:
    generator = TransformersGenerator(folder)
    sampling = Sampling(max_tokens=10, temperature=0.8, seed=1)
    together = texts(generator.generate(CONVERSATIONS, sampling))
    alone = [texts(generator.generate([conversation], sampling))[0] for conversation in CONVERSATIONS]
    assert together == alone
    backwards = TransformersGenerator(folder, max_batch_tokens=300).generate(CONVERSATIONS[::-1], sampling)
    assert texts(backwards) == together[::-1]
    assert texts(generator.generate([CONVERSATIONS[0]] * 2, sampling)) == [together[0]] * 2
    other = texts(generator.generate(CONVERSATIONS, Sampling(max_tokens=10, temperature=0.8, seed=2)))
    assert all(one != two for one, two in zip(together, other, strict=True))
    shorter = texts(generator.generate(CONVERSATIONS, Sampling(max_tokens=4, temperature=0.8, seed=1)))
    assert all(text.startswith(start) for text, start in zip(together, shorter, strict=True))


def test_choices_are_drawn_as_often_as_they_are_likely(generator: TransformersGenerator) -> None:
    choices = ("A", "B", "C", "D")
    temperature = 8.0  # the random model is far too sure
    drawn = np.zeros(4)
    for seed in range(300):
        (answer,) = generator.generate(CONVERSATIONS[:1], Sampling(choices=choices, temperature=temperature, seed=seed))
        drawn[choices.index(answer.text)] += 1
    assert answer.choice_logits is not None
    weights = np.exp(answer.choice_logits / temperature)
    np.testing.assert_allclose(drawn / 300, weights / weights.sum(), atol=0.09)
    assert (drawn > 0).all()


def test_choices_come_with_the_models_own_log_probabilities(generator: TransformersGenerator) -> None:
    choices = ("A", "B", "C")
    tokens = [generator.tokenizer.encode(choice)[0] for choice in choices]
    for conversation, answer in zip(
        CONVERSATIONS, generator.generate(CONVERSATIONS, Sampling(choices=choices)), strict=True
    ):
        with torch.inference_mode():
            found = generator.model(torch.tensor([ids_of(generator, conversation)])).logits[0, -1].log_softmax(-1)
        assert answer.choice_logits is not None
        assert answer.choice_logits.dtype == np.float32
        np.testing.assert_allclose(answer.choice_logits, found[tokens].numpy(), atol=1e-3)
        assert answer.text == choices[int(np.argmax(answer.choice_logits))]
        assert answer.completion_tokens == 1
    for wrong, sentence in ((("A", "not a token"), "'not a token' is 3 tokens"), (("A", "A"), "not all different")):
        with pytest.raises(ValueError, match=sentence):
            generator.generate(CONVERSATIONS, Sampling(choices=wrong))


def test_a_shared_prompt_is_read_once_and_changes_no_answer(
    generator: TransformersGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = [{"role": "system", "content": "You misspell what shoppers type to find a product. " * 3}]
    mixed = [*CONVERSATIONS, *([*other, *conversation[-1:]] for conversation in CONVERSATIONS), [*other]]
    lengths = [len(ids_of(generator, conversation)) for conversation in mixed]
    with counted_tokens(generator) as first:
        shared = texts(generator.generate(mixed, Sampling(max_tokens=6)))
    with counted_tokens(generator) as again:
        assert texts(generator.generate(mixed[:12:-1] + mixed, Sampling(max_tokens=6)))[-13:] == shared
    generator.close()
    monkeypatch.setattr(transformers_generation, "MIN_SHARED_ROWS", 100)
    with counted_tokens(generator) as alone:
        assert texts(generator.generate(mixed, Sampling(max_tokens=6))) == shared
    assert sum(first) < 0.7 * sum(alone)
    assert sum(again) < sum(first), "the second call runs the prompts again"
    assert sum(alone) >= sum(lengths)


def test_rows_that_are_done_are_not_run_to_the_end(generator: TransformersGenerator) -> None:
    long = generator.generate(CONVERSATIONS, Sampling(max_tokens=40))
    generator._ends = {generator.tokenizer.encode(answer.text)[1] for answer in long[1:]}
    with counted_tokens(generator) as seen:
        answers = generator.generate(CONVERSATIONS, Sampling(max_tokens=40))
    written = [answer.completion_tokens for answer in answers]
    assert sorted(written)[-2] < 10 < max(written), "the tiny model writes otherwise; choose other ends"
    assert seen[-1] == 1
    # The first token comes of reading the prompt (its beginning is kept from before), each other one of a step.
    assert len(seen) == max(written)


def test_an_answer_ends_before_the_first_stop_string(generator: TransformersGenerator) -> None:
    free = texts(generator.generate(CONVERSATIONS, Sampling(max_tokens=12)))
    stop = free[0][len(free[0]) // 2 :][:6]  # across tokens
    cut = generator.generate(CONVERSATIONS, Sampling(max_tokens=12, stop=(stop, "\n")))
    assert texts(cut) == [text.split(stop)[0].split("\n")[0] for text in free]
    assert cut[0].completion_tokens < 12
    for wrong in (("",), ("a", "b", "c", "d", "e")):
        with pytest.raises(ValueError, match="at most 4 strings"):
            Sampling(stop=wrong)


def test_a_conversation_that_cannot_be_answered_takes_no_other_with_it(generator: TransformersGenerator) -> None:
    rotten: list[Any] = ["tent \ud800", "te\x00nt", None, "tent " * 600]
    conversations: list[Any] = [CONVERSATIONS[0], *([{"role": "user", "content": text}] for text in rotten), []]
    answers = generator.generate([*conversations, CONVERSATIONS[1]], Sampling(max_tokens=5))
    assert answers[0].error is answers[-1].error is None
    assert texts([answers[0], answers[-1]]) == texts(generator.generate(CONVERSATIONS[:2], Sampling(max_tokens=5)))
    sentences = ["surrogate", "NUL", "NoneType", "tokens, more than the 511", "no messages"]
    for answer, sentence in zip(answers[1:-1], sentences, strict=True):
        assert answer.error is not None
        assert sentence in answer.error
        assert answer.text == ""
    assert generator.generate([], Sampling()) == []
    ids = ids_of(generator, [{"role": "user", "content": ""}])
    nearly = [{"role": "user", "content": "tent " * (505 - len(ids))}]
    (answer,) = generator.generate([nearly], Sampling(max_tokens=50))
    assert 0 < answer.completion_tokens < 50, "an answer ends where the model's positions do"


def test_logits_that_are_not_finite_are_an_error_of_their_row(generator: TransformersGenerator) -> None:
    rotten = generator.tokenizer.encode("stove")[-1]
    with torch.no_grad():
        generator.model.get_input_embeddings().weight[rotten] = float("nan")
    conversations = [CONVERSATIONS[3], [{"role": "user", "content": "stove"}]]
    good, bad = generator.generate(conversations, Sampling(max_tokens=3, temperature=1.0))
    assert good.error is None
    assert (bad.text, bad.error) == ("", "the model gave a logit that is not finite")


def test_a_tokenizer_without_a_chat_template_reads_paragraphs(generator: TransformersGenerator) -> None:
    generator.tokenizer.chat_template = None
    special = generator.tokenizer.eos_token
    ids, error = generator._chat.encode([*FEW_SHOT[:1], {"role": "user", "content": f"red{special}tent"}], 500)
    assert error is None
    assert generator.tokenizer.decode(ids) == (
        f"System:\n{FEW_SHOT[0]['content']}\n\nUser:\nred{special[0]} {special[1:]}tent\n\nAssistant:\n"
    )
    assert generator.generate([CONVERSATIONS[0]], Sampling(max_tokens=3))[0].completion_tokens == 3


# From options


def test_options_open_the_generator_they_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_generator(GeneratorOptions(model=str(folder), max_batch_tokens=77), "generate.llm")
    assert isinstance(opened, TransformersGenerator)
    assert opened.max_batch_tokens == 77
    endpoint = EndpointOptions(model="writer", base_url="http://localhost:1/v1")
    assert isinstance(
        open_generator(GeneratorOptions(engine="openai", openai=endpoint), "generate.llm"), OpenAIGenerator
    )


def test_what_cannot_write_is_refused_before_anything_is_spent(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    no_key = GeneratorOptions(engine="openai", openai=EndpointOptions(model="writer"))
    refused = [
        (no_key, "OPENAI_API_KEY holds no key for OpenAI; .*generate.llm.openai.base_url"),
        (GeneratorOptions(model="smollm3"), "model 'smollm3' is unknown"),
        (GeneratorOptions(model=str(cross_encoder_folder(tmp_path / "model"))), "writes no text"),
    ]
    for options, sentence in refused:
        for use in (check_generator, open_generator):
            with pytest.raises(UserError, match=sentence):
                use(options, "generate.llm")
    with pytest.raises(UserError, match="cannot force JSON; take engine vllm or openai"):
        TransformersGenerator(folder).generate(CONVERSATIONS, Sampling(json_schema={"type": "object"}))
    check_generator(GeneratorOptions(model=str(folder)), "generate.llm")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"engine": "openai"}, "give both or neither"),
        ({"openai": EndpointOptions(model="writer")}, "only read with engine `openai`"),
        ({"engine": "openai", "openai": EndpointOptions(model="w"), "model": "x"}, "model 'x' is not read"),
        ({"vllm": VllmOptions({"max_num_seqs": 3})}, "only read with engine `vllm`"),
        ({"model": ""}, "needs a model"),
        ({"max_batch_tokens": 0}, "must be at least 1"),
        ({"num_threads": -1}, "must not be negative"),
    ],
)
def test_an_option_that_nobody_would_read_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GeneratorOptions(**changes)
