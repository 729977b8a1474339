"""The demo market is a pure function of its numbers, its truth can be read from text, and words alone do not win it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from relevance_ray.data import market, market_queries
from relevance_ray.data.market_truth import (
    ASPECTS,
    MARKET_SCALE,
    WORDS,
    Intent,
    correct,
    parse_query,
    true_grade,
    true_verdicts,
    typos,
)
from relevance_ray.data.prepare import prepare, read_judged, read_queries, read_whole_log
from relevance_ray.data.readers import open_source
from relevance_ray.data.source import DataOptions
from relevance_ray.engines.base import Pair
from relevance_ray.engines.oracle import OracleEngine
from relevance_ray.errors import UserError
from relevance_ray.schema import PRODUCT, SCALES, normalize_query

HOODIE = {
    "title": "Tidal Modern Cotton Hoodie",
    "brand": "Tidal",
    "color": "Navy",
    "category": "Fashion > Tops > Hoodie",
    "attributes": [("Material", "cotton"), ("Size", "Size M"), ("Audience", "Women")],
    "price": 39.99,
}


def test_a_product_does_not_depend_on_block_or_market_size() -> None:
    block = market.products(7, 0, 3000)
    assert block.schema.equals(PRODUCT)
    assert market.products(7, 1234, 1300).equals(block.slice(1234, 66))
    small = open_source(DataOptions(market_size=500, seed=7))
    assert next(small.products()).equals(block.slice(0, 500))
    assert not market.products(8, 0, 100)["title"].equals(block.slice(0, 100)["title"])


def test_a_query_does_not_depend_on_block_or_market_size() -> None:
    assert market_queries.queries(3, 0, 400)[150:160] == market_queries.queries(3, 150, 160)


def test_numbers_far_out_are_as_good_as_near_ones() -> None:
    far = market.products(0, 99_999_000, 100_000_000)
    assert far.num_rows == 1000
    assert far["product_id"][-1].as_py() == "p099999999"
    assert all(parse_query(row["title"]).type == row["category"].rsplit(" > ", 1)[-1] for row in far.to_pylist())


def test_the_catalog_streams_in_blocks() -> None:
    rows = [block.num_rows for block in market.stream_products(0, 120_000)]
    assert rows == [50_000, 50_000, 20_000]


@pytest.mark.parametrize("seed", [0, 1])
def test_parsing_a_rendered_query_gives_its_intent(seed: int) -> None:
    numbers = np.arange(6000)
    intents = market_queries.intents(seed, numbers)
    texts = market_queries.queries(seed, 0, 6000)
    wrong = [(intent, text) for intent, text in zip(intents, texts, strict=True) if parse_query(text) != intent]
    assert wrong == []
    assert sum(any(correct(word) != word for word in text.split()) for text in texts) > 500  # typos are there


def test_every_typo_is_undone_and_every_long_word_has_some() -> None:
    long_words = [word for word in WORDS if len(word) > 4 and word.isalpha()]
    assert all(typos(word) for word in long_words)
    assert all(correct(typo) == word for word in long_words for typo in typos(word))


def test_parse_reads_constraints_synonyms_and_typos() -> None:
    expected = Intent(type="Hoodie", color="Navy", material="cotton", size="Size M", audience="Women", max_price=50.0)
    assert parse_query("navvy cotton hooddie for women, Size M under $50") == expected
    assert parse_query("Silver Peak couch").brand == "Silver Peak"  # a brand, not a color
    assert parse_query("Silver Peak couch").type == "Sofa"
    assert parse_query("case for smartphone").type == "Phone Case"
    assert parse_query("zzz qqq").is_empty


@pytest.mark.parametrize(
    "query, grade",
    [
        ("navy hoodie", "exact"),
        ("hooded sweatshirt", "exact"),
        ("blue tops", "exact"),  # a family of types and a family of shades
        ("red hoodie", "substitute"),
        ("sweater", "substitute"),  # interchangeable
        ("hoodie under 30", "substitute"),
        ("red wool hoodie", "related"),
        ("red sweater", "related"),
        ("jeans", "irrelevant"),
        ("something else", "irrelevant"),
        ("tidal", "exact"),
    ],
)
def test_true_grades(query: str, grade: str) -> None:
    assert true_grade(query, HOODIE) == grade
    assert true_grade(query, HOODIE | {"attributes": dict(HOODIE["attributes"])}) == grade  # type: ignore[call-overload]


def test_accessories_are_related_to_what_they_are_for() -> None:
    case = {"category": "Electronics > Device Accessories > Phone Case", "title": "Case For Smartphone", "color": "Red"}
    assert true_grade("mobile phone", case) == "related"
    assert true_grade("phone case", {"category": "Electronics > Phones > Smartphone"}) == "related"
    assert true_grade("red phone case", case) == "exact"


def test_true_verdicts_name_every_aspect() -> None:
    verdicts = true_verdicts("red tidal hoodie size m", HOODIE)
    assert tuple(verdicts) == ASPECTS
    assert verdicts == {
        "type": "match", "brand": "match", "color": "mismatch", "material": "unspecified",
        "size": "match", "audience": "unspecified", "price": "unspecified",
    }  # fmt: skip


def test_judgments_are_noisy_by_one_grade_and_of_every_grade() -> None:
    source = open_source(DataOptions(market_size=4000))
    products = {row["product_id"]: row for block in source.products() for row in block.to_pylist()}
    rows = source.judgments.to_pylist()
    grades = MARKET_SCALE.grades
    true = [grades.index(true_grade(row["query"], products[row["product_id"]])) for row in rows]
    steps = [grades.index(row["grade"]) - index for row, index in zip(rows, true, strict=True)]
    assert set(steps) == {-1, 0, 1}
    assert np.mean(np.array(steps) != 0) == pytest.approx(market_queries.NOISE, abs=0.03)
    shares = [np.mean([row["grade"] == grade for row in rows]) for grade in grades]
    assert min(shares) > 0.1
    assert source.judgments.equals(open_source(DataOptions(market_size=4000)).judgments)


def test_prepare_makes_the_market_ready(tmp_path: Path) -> None:
    summary = prepare(DataOptions(market_size=3000), tmp_path)
    assert summary["products"] == 3000
    test = read_judged(tmp_path, "test").to_pylist()
    assert len(test) == summary["queries_by_split"]["test"] > 5
    held_out = {row["query"] for row in test} | {row["query"] for row in read_judged(tmp_path, "dev").to_pylist()}
    log = read_queries(tmp_path).to_pylist()
    assert not held_out & {row["query"] for row in log}
    # Reports may know how often the queries are typed that models are measured by; generation never reads them.
    logged = {row["query"]: row["frequency"] for row in read_whole_log(tmp_path).to_pylist()[len(log) :]}
    log_lines = [line for block in market_queries.query_log(0, 3000) for line in block.to_pylist()]
    # The first of equal lines has the largest frequency.
    asked = {normalize_query(line["query"]): line["frequency"] for line in reversed(log_lines)}
    assert logged
    assert logged.keys() <= held_out
    assert all(asked[normalize_query(query)] == frequency for query, frequency in logged.items())
    assert [row["frequency"] for row in log] == sorted((row["frequency"] for row in log), reverse=True)


def test_oracle_puts_the_true_grade_first_and_errors_in_their_rows() -> None:
    pairs = [Pair(i, query, "p", HOODIE) for i, query in enumerate(["navy hoodie", "", "jeans"])]
    labels = OracleEngine(MARKET_SCALE).label(pairs)
    assert labels.class_logits.shape == (3, 4)
    assert labels.class_logits.dtype == np.float32
    assert labels.class_logits[[0, 2]].argmax(axis=1).tolist() == [3, 0]
    assert np.isfinite(labels.class_logits[[0, 2]]).all()
    assert np.isnan(labels.class_logits[1]).all()
    assert labels.errors == [None, "the query is empty", None]


def test_oracle_noise_depends_on_the_pair_alone() -> None:
    engine = OracleEngine(MARKET_SCALE, noise=0.3)
    pairs = [Pair(i, "navy hoodie", "p", HOODIE) for i in range(500)]
    labels = engine.label(pairs).class_logits.argmax(axis=1)
    assert np.array_equal(labels, engine.label(pairs[::-1]).class_logits.argmax(axis=1)[::-1])
    assert np.mean(labels != 3) == pytest.approx(0.3, abs=0.06)


def test_oracle_refuses_other_data() -> None:
    with pytest.raises(UserError, match="knows the demo market only"):
        OracleEngine(SCALES["esci"])
