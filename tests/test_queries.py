"""The pool of queries: cuts of titles, a log, a pairs file, mixed without repeats and leaks."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from small_catalog import (
    make_products,
    no_guard,
    stream_of,
    write_pairs,
)

from relevance_ray.data.splits import LeakGuard
from relevance_ray.errors import UserError
from relevance_ray.generate.options import GenerateOptions
from relevance_ray.generate.queries import (
    PoolCounts,
    PoolQuery,
    file_queries,
    log_queries,
    mix,
    take_pool,
)
from relevance_ray.generate.titles import TitleProduct, count_title_words, cut_query
from relevance_ray.schema import QUERY

# Titles


def test_title_cuts_keep_their_length_and_end_in_no_function_word() -> None:
    product = TitleProduct(
        "P1", "The Acme Lamp for the Desk, with a Very Bright LED & Dimmer!", "Acme", "red", "Home > Lamps"
    )
    counts = count_title_words([product.title, "desk lamp very bright"])
    cuts = {cut_query(product, counts, seed=0, round_index=i, min_words=2, max_words=4) for i in range(300)} - {None}
    assert len(cuts) > 10
    for cut in cuts:
        assert 2 <= len(cut.split()) <= 4
        assert cut == cut.lower()
        assert not {cut.split()[0], cut.split()[-1]} & {"the", "for", "with", "a"}
    assert any("lamps" in cut for cut in cuts), "no cut of the category style"


def test_title_too_short_gives_no_query() -> None:
    assert cut_query(TitleProduct("P1", "Lamp!"), {}, seed=0, round_index=0, min_words=2, max_words=4) is None


# The pool


def test_larger_pool_starts_with_the_smaller_one() -> None:
    products, log = make_products(), [f"log query {i}" for i in range(30)]
    pools = []
    for num_pairs in (400, 4000):
        counts = PoolCounts()
        stream = stream_of(products, GenerateOptions(), log, no_guard(), counts)
        pools.append(take_pool(stream, num_pairs, 8, counts)[0])
    small, large = pools
    assert (small.num_rows, large.num_rows) == (50, 500)
    assert large.slice(0, 50).equals(small)
    assert large["query_source"].to_pylist().count("log") == 30
    assert small["query_source"].to_pylist()[:8].count("titles") == 6, "one log query to three of titles"


def test_pool_has_no_repeats_and_no_near_duplicates_of_held_out_queries() -> None:
    counts = PoolCounts()
    log = ["Red Lamp", "lamp  red", "RED lamp", "blue lamps", "green hose", "unrelated thing"]
    table = pa.Table.from_pylist([{"query": query, "frequency": 1} for query in log], schema=QUERY)
    found = list(mix([(1.0, log_queries(table, 0, 0.0))], LeakGuard(["hose green"]), counts))
    assert {" ".join(sorted(query.query.casefold().split())) for query in found} == {
        "lamp red",
        "blue lamps",
        "thing unrelated",
    }
    assert len(found) == 3
    assert (counts.repeats["log"], counts.leaks["log"]) == (2, 1)


def test_frequent_log_queries_come_earlier() -> None:
    rows = [{"query": f"q{i}", "frequency": 1000 if i < 50 else 1} for i in range(500)]
    table = pa.Table.from_pylist(rows, schema=QUERY)
    heads = {
        power: sum(int(query.query[1:]) < 50 for query in list(log_queries(table, 3, power))[:50])
        for power in (0.0, 1.0)
    }
    assert heads[1.0] >= 45
    assert heads[0.0] <= 15


def test_num_pairs_beyond_the_pool_is_refused_with_what_can_be_had() -> None:
    queries = [PoolQuery(f"query {i}", "log") for i in range(10)]
    with pytest.raises(UserError, match=r"1,000 cannot be met.*10 groups with 80 pairs.*num_pairs to 80"):
        take_pool(queries, 1000, 8, PoolCounts())


def test_num_pairs_that_whole_groups_miss_is_refused_and_within_one_percent_is_not() -> None:
    queries = [PoolQuery(f"query {i}", "log") for i in range(100)]
    with pytest.raises(UserError, match="set it to 16 or 24"):
        take_pool(queries, 20, 8, PoolCounts())
    pool, num_pairs = take_pool(queries, 402, 8, PoolCounts())
    assert (pool.num_rows, num_pairs) == (50, 400)


def test_pairs_file_keeps_every_pair_in_groups_that_span_all_ranks(tmp_path: Path) -> None:
    rows = [f"red lamp,P{i},{i + 1}" for i in range(10)] + ["blue hat,P3,1", "Blue  Hat,P3,2", "blue hat,P4,2"]
    path = write_pairs(tmp_path / "pairs.csv", rows)
    options = GenerateOptions(source="file", pairs_file=path, candidates_per_query=4)
    queries = {query.query: query for query in file_queries(path, [f"P{i}" for i in range(20)], options)}
    assert queries["blue hat"].parts == (((3, 1), (4, 2)),)
    lamp = queries["red lamp"].parts
    assert sorted(row for part in lamp for row, _ in part) == list(range(10))
    assert [[rank for _, rank in part] for part in lamp] == [[1, 4, 7, 10], [2, 5, 8], [3, 6, 9]]


def test_pairs_file_wins_over_the_same_query_of_the_log() -> None:
    file = [PoolQuery("red lamp", "file", parts=(((0, 1),),))]
    log = [PoolQuery("Lamp red", "log"), PoolQuery("blue lamp", "log")]
    found = list(mix([(9.0, log), (1.0, file)], no_guard(), PoolCounts()))
    assert [(query.query, query.source) for query in found] == [("blue lamp", "log"), ("red lamp", "file")]


@pytest.mark.parametrize(
    "row, message",
    [
        (" ,P1,1", "row 2: the query is empty"),
        ("hat,P99,1", "row 2: product 'P99' is not in the catalog"),
        ("hat,P1,first", "row 2: rank 'first' is no whole number"),
    ],
)
def test_bad_row_of_a_pairs_file_is_named(tmp_path: Path, row: str, message: str) -> None:
    path = write_pairs(tmp_path / "pairs.csv", ["red lamp,P1,1", row])
    with pytest.raises(UserError, match=message):
        list(file_queries(path, ["P0", "P1"], GenerateOptions(source="file", pairs_file=path)))


def test_pairs_file_without_a_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("query,sku\nhat,P1\n")
    with pytest.raises(UserError, match="no product_id"):
        list(file_queries(str(path), ["P1"], GenerateOptions(source="file", pairs_file=str(path))))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"quotas": {"bm52": 1}}, "bm52"),
        ({"quotas": {"bm25": 0}}, "all 0"),
        ({"source": "file"}, "pairs_file"),
        ({"pairs_file": "x.csv"}, "pairs_file"),
        ({"middle_ranks": [9, 3]}, "middle_ranks"),
        ({"source_weights": {"file": 2}}, "not in source"),
        ({"candidates_per_query": 1}, "at least 2"),
    ],
)
def test_contradicting_options_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerateOptions(**values)
