"""What is told of queries' texts, and the counters that stay small, by hand."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from relevance_ray.generate.diversity import query_figures
from relevance_ray.generate.diversity.counting import KeySample, divergence, even_sample
from relevance_ray.generate.diversity.query_figures import distinct_ngrams, log_rows, log_stats, near_duplicates
from relevance_ray.generate.diversity.query_text import TypeRules, category_names, name_key, words
from relevance_ray.schema import QUERY
from relevance_ray.tokens import tokenize

# Text


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("sony wh-1000xm4", {"brand", "model code"}),
        ("black & decker drill 20v", {"brand", "number or size"}),
        ("13 inch laptop", {"number or size"}),
        ("60x40cm rug", {"number or size"}),
        ("iphone 6s?", {"model code", "question or use"}),
        ("head phones", {"category"}),
        ("zapatillas Niño para correr", {"question or use"}),
        ("auriculares", {"single word"}),
        ("ソニーテレビ55インチ", {"brand", "number or size"}),
        ("犬用 スニーカー", {"category", "question or use"}),
        ("ヘッドホン", {"single word"}),
        ("", set()),
    ],
)
def test_types_of_queries_in_several_languages(query: str, expected: set[str]) -> None:
    brands = {name_key(name) for name in ("Sony", "Black & Decker", "ソニー", "X")}
    categories = {name for path in ("Electronics > Head Phones", "靴 > スニーカー") for name in category_names(path)}
    assert TypeRules(brands, categories).types(query) == expected


def test_words_and_tokens_cut_scripts_without_spaces_into_bigrams() -> None:
    assert words("Men's  Ｎｉｋｅ Niño-42") == ["men's", "nike", "niño", "42"]
    assert tokenize("赤い靴 sony") == ["赤い", "い靴", "sony"]
    assert words("赤い靴 sony") == ["赤い靴", "sony"]
    assert words("सोनी हेडफोन") == ["सोनी", "हेडफोन"]


def test_distinct_ngrams_and_near_duplicates_by_hand() -> None:
    found = distinct_ngrams(["red shoes", "red hat", "red shoes sale"])
    assert found == {"distinct_1": 4 / 7, "distinct_2": 3 / 4, "distinct_3": 1.0}
    near = near_duplicates(["red shoes", "shoes red", "wool hat"])
    assert near["share"] == pytest.approx(2 / 3)


# Counters


def test_divergence_is_half_of_a_foreign_share() -> None:
    assert divergence(np.array([1, 1]), np.array([5, 5])) == 0
    assert divergence(np.array([1, 0]), np.array([0, 3])) == pytest.approx(1)
    assert divergence(np.array([9, 1]), np.array([1, 0])) == pytest.approx(0.05, abs=0.005)
    assert divergence(np.array([0, 0]), np.array([1, 0])) is None


def test_key_sample_is_exact_up_to_its_capacity_and_estimates_past_it() -> None:
    small = KeySample(100)
    for index in range(300):
        small.add(f"key{index % 100}")
    assert (small.exact, small.distinct, small.total, set(small.counts.values())) == (True, 100, 300, {3})
    large = KeySample(1000)
    for index in range(60_000):
        large.add(f"key{index % 30_000}")
        assert len(large.counts) <= 1000
    assert not large.exact
    assert large.distinct == pytest.approx(30_000, rel=0.12)
    assert set(large.counts.values()) == {2}


def test_shared_names_of_two_samples_are_those_that_both_would_keep() -> None:
    whole, part = KeySample(10_000), KeySample(100)
    for index in range(2000):
        whole.add(f"key{index}")
        part.add(f"key{index}")
    names, of_whole, of_part = whole.shared(part)
    assert set(names) == set(part.counts)
    assert of_whole.tolist() == of_part.tolist() == [1.0] * len(names)


def test_shards_are_sampled_evenly_by_the_seed() -> None:
    chosen = even_sample(1000, 10, seed=3)
    assert chosen == even_sample(1000, 10, seed=3) != even_sample(1000, 10, seed=4)
    assert [index // 100 for index in chosen] == list(range(10))
    assert even_sample(5, 10, seed=0) == [0, 1, 2, 3, 4]


def test_long_log_keeps_its_head_and_an_even_sample_of_its_tail() -> None:
    log = pa.Table.from_pylist(
        [{"query": f"query {index}", "frequency": 5000 - index} for index in range(5000)], schema=QUERY
    )
    rows = list(log_rows(log, 0, size=500))
    assert len(rows) == 500
    assert [weight for _, _, weight in rows[:250]] == [1.0] * 250
    assert rows[0][:2] == ("query 0", 5000.0)
    assert sum(weight for _, _, weight in rows) == pytest.approx(5000)
    total = sum(frequency * weight for _, frequency, weight in rows)
    assert total == pytest.approx(5000 * 5001 / 2, rel=0.01)


def test_a_log_longer_than_what_is_read_of_it_still_knows_all_its_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_figures, "MAX_LOG", 200)
    texts = [f"query number {index}" for index in range(2000)]
    log = pa.table({"query": texts, "locale": [None] * 2000, "frequency": [1] * 2000}, schema=QUERY)
    stats = log_stats(log, TypeRules(set(), set()))
    assert stats.sample.distinct == 2000
    assert stats.weight[0] == pytest.approx(2000)
