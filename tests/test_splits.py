"""Splits keep near-duplicate queries together, and a leak is found or refused."""

from __future__ import annotations

import random

import pyarrow as pa
import pytest

from relevance_ray.data.splits import (
    LeakGuard,
    _grams,
    assign_splits,
    check_no_leak,
    near_duplicate_clusters,
    query_hash,
)
from relevance_ray.errors import UserError
from relevance_ray.schema import normalize_query


def judgments(queries: list[str], splits: list[str | None] | None = None) -> pa.Table:
    splits = splits or [None] * len(queries)
    return pa.table({"query": queries, "split": pa.array(splits, pa.string())})


def test_hash_never_changes() -> None:
    assert query_hash("Red  Shoes") == query_hash("red shoes") == 8452533967879416406


@pytest.mark.parametrize(
    "query, leaks",
    [
        ("Wireless  HEADPHONES for running", True),  # the same after normalisation
        ("running headphones, wireless for", True),  # the same words in another order
        ("wireless headphones for runnin", True),  # near-duplicate by 3-grams
        ("wireless headphones", False),
        ("garden hose", False),
        ("", False),
    ],
)
def test_guard_knows_near_duplicates(query: str, leaks: bool) -> None:
    assert LeakGuard(["wireless headphones for running", "size 10 boots"]).is_leak(query) is leaks


@pytest.mark.parametrize(
    "query, leaks",
    [
        ("lampara de mesa", True),  # shoppers leave accents out
        ("Mesa, lámpara de", True),
        ("zapatillas de correr nino", True),
        ("ガラス", False),  # marks of other scripts make other letters
        ("カラス", True),
    ],
)
def test_guard_sees_through_latin_accents(query: str, leaks: bool) -> None:
    assert LeakGuard(["lámpara de mesa", "zapatillas de correr niño", "カラス"]).is_leak(query) is leaks


def test_guard_finds_exactly_what_comparing_all_pairs_finds() -> None:
    rng = random.Random(0)
    words = ["red", "shoes", "shoe", "lamp", "lamps", "desk", "table", "tables", "wood", "wooden"]
    queries = sorted({" ".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(400)})
    held_out, others = queries[::2], queries[1::2]
    guard = LeakGuard(held_out)

    def near(a: str, b: str) -> bool:
        x, y = _grams(a), _grams(b)
        return len(x & y) / len(x | y) >= 0.8 or sorted(a.split()) == sorted(b.split())

    expected = {query: [other for other in held_out if near(query, other)] for query in others}
    assert {query: guard.near_duplicates(query) for query in others} == expected
    assert 10 < sum(map(bool, expected.values())) < len(others)


def test_near_duplicates_of_near_duplicates_form_one_cluster() -> None:
    clusters = near_duplicate_clusters(["desk lamp", "lamp desk", "Desk Lamp", "garden hose"])
    assert clusters == {"desk lamp": "desk lamp", "lamp desk": "desk lamp", "garden hose": "garden hose"}


def test_shares_are_close_to_the_percentages_and_stable_when_queries_are_added() -> None:
    queries = [f"{i * 7919 % 10007:x} thing {i * i:x}" for i in range(3000)]
    first, dropped = assign_splits(judgments(queries[:2000]))
    second, _ = assign_splits(judgments(queries))
    splits = first["split"].to_pylist()
    assert dropped == 0
    assert splits.count("test") / 2000 == pytest.approx(0.15, abs=0.03)
    assert splits.count("dev") / 2000 == pytest.approx(0.15, abs=0.03)
    clusters = near_duplicate_clusters(queries)
    alone = [i for i in range(2000) if list(clusters.values()).count(clusters[normalize_query(queries[i])]) == 1]
    assert len(alone) > 500
    assert all(second["split"][i].as_py() == splits[i] for i in alone)


def test_near_duplicates_land_in_one_split() -> None:
    queries = [f"{name} {i} deluxe" for i in range(100) for name in ("oak table", "table oak")]
    table, _ = assign_splits(judgments(queries))
    splits = table["split"].to_pylist()
    assert splits[::2] == splits[1::2]
    check_no_leak(table)


def test_official_test_is_kept_and_its_near_duplicates_in_train_are_dropped() -> None:
    queries = ["red running shoes", "shoes running red", *(f"query {i * 977:x} {i * i * 31:x}" for i in range(200))]
    table, dropped = assign_splits(judgments(queries, ["test", *["train"] * 201]))
    assert dropped == 1
    assert "shoes running red" not in table["query"].to_pylist()
    assert table.filter(pa.compute.equal(table["split"], "test"))["query"].to_pylist() == ["red running shoes"]
    assert "dev" in table["split"].to_pylist()
    check_no_leak(table)


def test_official_dev_is_kept() -> None:
    table, _ = assign_splits(judgments(["alpha", "beta", "gamma"], ["train", "validation", "test"]))
    assert table["split"].to_pylist() == ["train", "dev", "test"]


def test_folds_test_every_query_once() -> None:
    queries = [f"{i * 7919 % 10007:x} {i:x}" for i in range(300)]
    tests: list[str] = []
    for fold in range(5):
        table, _ = assign_splits(judgments(queries, ["test"] * 300), folds=5, fold=fold)
        splits = table["split"].to_pylist()
        tests += [query for query, split in zip(queries, splits, strict=True) if split == "test"]
        assert {"train", "dev", "test"} == set(splits)
    assert sorted(tests) == sorted(queries)


@pytest.mark.parametrize(
    "splits, message", [(["test", "train"], "train query .* leaks from test"), (["dev", "train"], "leaks from dev")]
)
def test_a_leak_stops_the_run(splits: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_no_leak(judgments(["red running shoes", "running  RED shoes"], list(splits)))
