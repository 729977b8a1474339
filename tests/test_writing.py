"""Queries written by a language model: what it is asked, what is refused and why, near-duplicates."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tiny_writers import writer_folder

from relevance_ray.engines.generation import Generated, Message, Sampling
from relevance_ray.engines.options import EndpointOptions, GeneratorOptions
from relevance_ray.engines.registry import open_generator
from relevance_ray.generate.queries import writing
from relevance_ray.generate.queries.language import count_words, same_language
from relevance_ray.generate.queries.near_duplicates import NearDuplicates
from relevance_ray.generate.queries.writing import REASONS, clean, conversation, refusal, style_of, write_queries
from relevance_ray.generate.writer_options import STYLES, WriterOptions
from relevance_ray.schema import normalize_query

TENT = {
    "title": "Norrvik Trail Tent for Two, Waterproof Backpacking Tent with Rainfly, Forest Green",
    "brand": "Norrvik",
    "color": "Forest Green",
    "category": "Sports > Camping > Tents",
    "description": "A light tent for long walks. " * 20,
    "attributes": {"Weight": "1.9 kg", "Poles": "aluminium"},
}
BOTAS = {
    "title": "Zapatillas de running para mujer con suela de goma, ligeras y transpirables, azul marino",
    "brand": "Correlia",
    "category": "Calzado > Mujer",
}
KNIFE = {"title": "三徳包丁 ステンレス 18cm 食洗機対応 日本製 SAKURA", "brand": "SAKURA", "category": "キッチン"}
OPTIONS = WriterOptions()


class Scripted:
    """Gives the answers of a script, and keeps what it was asked."""

    def __init__(self, *answers: str | Generated) -> None:
        self.answers = [Generated(text=each) if isinstance(each, str) else each for each in answers]
        self.asked: list[Sequence[Message]] = []
        self.sampling: Sampling | None = None

    def generate(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Generated]:
        self.asked, self.sampling = list(conversations), sampling
        return self.answers

    def close(self) -> None:
        pass


# Styles


def test_a_product_is_asked_for_each_style_once_in_an_order_of_its_own() -> None:
    weights = {"plain": 3.0, "use": 1.0, "broader": 1.0, "misspelled": 0.0}
    for key in ("P1", "P2", "P3"):
        asked = [style_of(key, round_index, weights, 0) for round_index in range(5)]
        assert sorted(str(style) for style in asked[:3]) == ["broader", "plain", "use"]
        assert asked[3:] == [None, None]
        assert asked == [style_of(key, round_index, weights, 0) for round_index in range(5)]
    first = Counter(style_of(f"P{row}", 0, weights, 7) for row in range(2000))
    assert 0.55 < first["plain"] / 2000 < 0.65
    assert 0.17 < first["use"] / 2000 < 0.23
    assert {style_of("P1", 0, {"plain": 1, "use": 1}, seed) for seed in range(20)} == {"plain", "use"}


# Prompts


@pytest.mark.parametrize("style", STYLES)
def test_products_of_a_style_share_all_but_the_last_message(style: str) -> None:
    first, second = (conversation(product, style, 200) for product in (TENT, BOTAS))
    assert first[:-1] == second[:-1]
    assert [message["role"] for message in first] == ["system", *["user", "assistant"] * 9, "user"]
    assert first[-1]["content"] != second[-1]["content"]
    queries = [message["content"] for message in first if message["role"] == "assistant"]
    assert len(set(queries)) == 9


@pytest.mark.parametrize("style", STYLES)
def test_the_worked_examples_pass_the_checks_that_answers_must(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_is_echo", lambda *_: False)
    for product, query in writing._prompts().examples[style]:
        assert clean(query) == query
        assert refusal(query, product, style, OPTIONS) is None, query


def test_a_product_is_described_by_the_fields_it_has_and_cut() -> None:
    text = conversation(TENT, "plain", 60)[-1]["content"]
    assert text.splitlines() == [
        f"Product: {TENT['title']}",
        "Category: Tents",
        "Details: Weight: 1.9 kg; Poles: aluminium",
        "Description: A light tent for long walks. A light tent for long walks. A",
    ]
    assert conversation({"title": "x" * 900, "color": "red", "brand": None}, "plain", 60)[-1]["content"] == (
        f"Product: {'x' * 120}\nColor: red"
    )
    assert "Details" not in conversation(TENT, "plain", 0)[-1]["content"]


# Answers


@pytest.mark.parametrize(
    ("answer", "query"),
    [
        ("two person tent", "two person tent"),
        ('  "two  person tent."\nHere is another one', "two person tent"),
        ("1. two person tent", "two person tent"),
        ("- **two person tent**", "two person tent"),
        ("Search query: “two person tent”", "two person tent"),
        ('"Query: two person tent"', "two person tent"),
        ("検索: 「三徳包丁 ステンレス」。", "三徳包丁 ステンレス"),
        ("2.5 inch hard drive", "2.5 inch hard drive"),
        ("women's 12\" boots", "women's 12\" boots"),
        ("\n\n", ""),
        ("", ""),
    ],
)
def test_an_answer_becomes_its_query(answer: str, query: str) -> None:
    assert clean(answer) == query


@pytest.mark.parametrize(
    ("query", "product", "style", "reason"),
    [
        ("two person backpacking tent", TENT, "plain", None),
        ("norrvik tent", TENT, "plain", None),
        ("zapatillas running mujer", BOTAS, "plain", None),
        ("三徳包丁 ステンレス", KNIFE, "plain", None),
        ("sakura 包丁", KNIFE, "plain", None),
        ("", TENT, "plain", "empty"),
        ("!!! 123", TENT, "plain", "empty"),
        ("tent " + "for hiking in the rain and the cold of the north", TENT, "plain", "length"),
        ("三徳包丁ステンレス食洗機対応日本製切れ味抜群プレゼントギフト母の日", KNIFE, "plain", "length"),
        ("tent tent for two", TENT, "plain", "repeats"),
        ("tent or tent or tent", TENT, "plain", "repeats"),
        ("backpacking " + "tentent" * 9, TENT, "plain", "repeats"),
        ("trail-tent-for-two-waterproof-in-the-rain-of-norway-with-norrvik", TENT, "plain", "length"),
        (TENT["title"][:60], TENT, "plain", "verbatim"),
        ("三徳包丁 ステンレス 18cm 食洗機対応 日本製", KNIFE, "plain", "verbatim"),
        ("light running shoes for women", BOTAS, "use", "language"),
        ("stainless steel kitchen knife", KNIFE, "plain", "language"),
        ("палатка для похода", TENT, "use", "language"),
        ("テント", TENT, "broader", "language"),
        ("hammerfeld tent", TENT, "plain", "echo"),
        ("cordles dril", TENT, "misspelled", "echo"),
        ("phone charger", TENT, "broader", "echo"),
        ("summer dresses", {"title": "Summer maxi dress"}, "broader", None),
        ("write a short search for a tent", TENT, "plain", "echo"),
        ("hello how can i help", TENT, "plain", "unrelated"),
        ("norrvik tent for two", TENT, "attribute_dropped", "style"),
        ("waterproof tent with rainfly and poles", TENT, "broader", "style"),
        ("waterproof tent", TENT, "misspelled", "style"),
        ("waterprof tent", TENT, "misspelled", None),
        ("shelter for hiking in rain", TENT, "use", None),
    ],
)
def test_what_is_no_query_is_refused_with_a_reason(
    query: str, product: dict[str, Any], style: str, reason: str | None
) -> None:
    assert refusal(query, product, style, OPTIONS) == reason
    assert reason is None or reason in REASONS


def test_the_check_of_the_language_can_be_switched_off() -> None:
    off = WriterOptions(check_language=False)
    assert refusal("light running shoes for women", BOTAS, "use", off) is None


def test_the_mark_that_repeats_a_character_is_of_its_script() -> None:
    assert same_language("色々 収納", "収納ボックス ふた付き 木製", [])


def test_words_are_counted_where_no_spaces_are() -> None:
    counts = {
        "two person tent": 3,
        "women's 16.4 ft usb-c": 5,
        "電気ケトル": 2,
        "sony ヘッドホン": 3,
        "등산 텐트": 2,
        "": 0,
    }
    assert {text: count_words(text) for text in counts} == counts


def test_a_brand_in_another_script_or_language_is_nobodys_language() -> None:
    assert same_language("correlia azul marino", BOTAS["title"], ["Correlia"])
    assert same_language("SAKURA", KNIFE["title"], ["SAKURA"])
    assert same_language("l'oréal la roche posay crème", "L'Oréal La Roche Posay Crème Face Cream for Dry Skin", [])
    assert same_language("xiaomi redmi 小米", "Xiaomi Redmi Note 12 小米 Smartphone 128GB Blue", [])
    assert same_language("anything at all here", "12345", [])


def test_real_queries_of_a_shop_are_in_its_language(shared_data: Path) -> None:
    queries = sorted(set(pq.read_table(shared_data / "bestbuy" / "queries.parquet")["query"].to_pylist()))
    queries = random.Random(0).sample(queries, 2000)
    english = "The large wireless speaker with a remote control that fills every room of your house with sound"
    spanish = (
        "El altavoz inalámbrico grande con mando a distancia que llena de sonido todas las habitaciones de la casa"
    )
    assert sum(not same_language(query, english, []) for query in queries) <= 10
    long = [query for query in queries if len(query.split()) >= 5]
    assert sum(not same_language(query, spanish, []) for query in long) > 0.3 * len(long)


# Writing


def test_each_product_gets_its_query_or_a_reason_in_order() -> None:
    generator = Scripted(
        'Query: "waterproof tent"',
        Generated(error="too long", prompt_tokens=9),
        "running shoes for women",
        "包丁 日本製\nx",
    )
    products = [TENT, TENT, BOTAS, KNIFE]
    styles = ["plain", "use", "use", "plain"]
    written = write_queries(generator, products, styles, OPTIONS, seed=5)
    assert [(each.query, each.style, each.reason) for each in written] == [
        ("waterproof tent", "plain", None),
        ("", "use", "error"),
        ("", "use", "language"),
        ("包丁 日本製", "plain", None),
    ]
    assert written[1].answer == "too long"
    assert written[2].answer == "running shoes for women"
    assert generator.asked == [conversation(*each, 0) for each in zip(products, styles, strict=True)]
    assert generator.sampling == Sampling(48, 0.3, 5, stop=("\n",))


def test_an_answer_that_took_all_its_tokens_is_refused() -> None:
    cut = Generated(text="電気ケトル 温度\ufffd", prompt_tokens=9, completion_tokens=OPTIONS.max_tokens)
    whole = Generated(text="waterproof tent", prompt_tokens=9, completion_tokens=OPTIONS.max_tokens - 1)
    written = write_queries(Scripted(cut, whole), [KNIFE, TENT], ["plain"] * 2, OPTIONS)
    assert [each.reason for each in written] == ["cut", None]


def test_a_real_model_writes_the_same_queries_again(tmp_path: Path) -> None:
    options = WriterOptions(model=str(writer_folder(tmp_path / "model", max_tokens=2048)), max_tokens=6)
    products = [{**TENT, "title": f"{TENT['title']} {row}"} for row in range(6)]
    styles = ["plain", "use"] * 3
    both = [write_queries(open_generator(options, "generate.llm"), products, styles, options) for _ in range(2)]
    assert both[0] == both[1]
    assert [each.style for each in both[0]] == styles
    assert len({each.answer for each in both[0]}) > 1


@pytest.mark.slow
def test_the_small_model_writes_queries_for_most_real_products(shared_data: Path) -> None:
    rows = pq.read_table(shared_data / "esci" / "shopping_queries_dataset_products.parquet").to_pylist()
    names = ("title", "brand", "color", "category")
    products = [{name: row[f"product_{name}"] for name in names} for row in random.Random(7).sample(rows, 16)]
    written = write_queries(open_generator(OPTIONS, "generate.llm"), products, ["broader"] * 16, OPTIONS)
    queries = [each.query for each in written if each.reason is None]
    assert len(queries) >= 8
    assert len(set(queries)) >= 6


# Near-duplicates


def test_a_query_much_like_one_before_is_not_new() -> None:
    queries = NearDuplicates(0.8)
    assert queries.is_new("two person waterproof backpacking tent")
    assert not queries.is_new("Two  person waterproof backpacking tent")
    assert not queries.is_new("two person waterproof backpacking tents")
    assert queries.is_new("two person camping chair")
    assert queries.is_new("三徳包丁 ステンレス")
    assert not queries.is_new("三徳包丁 ステンレス")
    assert queries.is_new("x")
    assert not queries.is_new("x")
    assert len(queries) == 4
    exact = NearDuplicates(1.0)
    assert exact.is_new("two person waterproof backpacking tent")
    assert exact.is_new("two person waterproof backpacking tents")
    assert not exact.is_new("two person waterproof backpacking tent")


def shingles(text: str) -> set[str]:
    padded = f" {normalize_query(text)} "
    return {padded[at : at + 3] for at in range(len(padded) - 2)}


def test_chances_follow_the_similarity_asked_for() -> None:
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    refused: dict[str, list[bool]] = {"far": [], "near": []}
    for _ in range(600):
        one = "".join(draw.choice(letters) for _ in range(60))
        other = one[: -draw.choice((1, 30))]
        similarity = len(shingles(one) & shingles(other)) / len(shingles(one) | shingles(other))
        kind = "near" if similarity > 0.9 else "far"
        assert kind == "near" or similarity < 0.6
        queries = NearDuplicates(0.8)
        queries.is_new(one)
        refused[kind].append(not queries.is_new(other))
    assert sum(refused["near"]) > 0.9 * len(refused["near"])
    assert sum(refused["far"]) < 0.05 * len(refused["far"])


def test_what_is_kept_is_small_and_survives_merging() -> None:
    queries = NearDuplicates(0.8)
    draw = random.Random(1)
    texts = [f"{draw.getrandbits(60):x} {draw.getrandbits(60):x}" for _ in range(6000)]
    assert sum(queries.is_new(text) for text in texts) > 5990
    assert not any(queries.is_new(text) for text in texts)
    assert queries.num_bytes / len(queries) < 150
    assert queries.num_bytes < 80 * queries.num_bands * len(queries) / 2, "nothing was merged"


def test_keys_are_the_same_in_every_process() -> None:
    code = "from relevance_ray.generate.queries.near_duplicates import NearDuplicates as N;print(N(.8)._keys('rotes Zelt'))"
    found = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert found == {f"{NearDuplicates(0.8)._keys('rotes Zelt')}\n"}


# Options


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"styles": {"rude": 1.0}}, "'rude', which is none of plain"),
        ({"styles": {"plain": -1.0}}, "a number from 0 up"),
        ({"styles": {"plain": 0.0}}, "styles are all 0"),
        ({"min_words": 5, "max_words": 4}, "at most max_words"),
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"temperature": 3.0}, "between 0 and 2"),
        ({"max_similarity": 0.0}, "more than 0 and at most 1"),
        ({"round_trip_depth": -1}, "must not be negative"),
        ({"engine": "openai"}, "give both or neither"),
        ({"openai": EndpointOptions(model="writer")}, "only read with engine `openai`"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        WriterOptions(**changes)


def test_where_the_model_runs_does_not_decide_what_is_written() -> None:
    from relevance_ray.options import semantic

    assert isinstance(OPTIONS, GeneratorOptions)
    assert semantic(WriterOptions(device="cpu", max_batch_tokens=1, num_threads=3)) == semantic(OPTIONS)
    assert semantic(WriterOptions(model="other")) != semantic(OPTIONS)
