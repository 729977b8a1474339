"""The pool of queries: cuts of titles, a log, a pairs file, mixed without repeats and leaks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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
from relevance_ray.generate.queries.pool import PoolFile, write_pool
from relevance_ray.generate.queries.sources import (
    PoolCounts,
    PoolQuery,
    file_queries,
    log_bands,
    log_queries,
    mix_sources,
    read_pairs,
)
from relevance_ray.generate.queries.titles import TitleProduct, cut_query
from relevance_ray.schema import QUERY


def taken(stream: Iterable[PoolQuery], num_pairs: int, counts: PoolCounts, folder: Path) -> tuple[pa.Table, int]:
    """A pool of groups of 8, and its number of pairs."""
    path = folder / f"pool-{num_pairs}"
    summary = write_pool(stream, path, num_pairs, 8, counts)
    return PoolFile(path).read(0, summary.groups), summary.pairs


# Titles


def test_title_cuts_keep_their_length_and_end_in_no_function_word() -> None:
    product = TitleProduct(
        "P1", "The Acme Lamp for the Desk, with a Very Bright LED & Dimmer!", "Acme", "red", "Home > Lamps"
    )
    shared = {"desk", "lamp", "very", "bright"}.__contains__
    cuts = {cut_query(product, shared, seed=0, round_index=i, min_words=2, max_words=4) for i in range(300)} - {None}
    assert len(cuts) > 10
    for cut in cuts:
        assert 2 <= len(cut.split()) <= 4
        assert cut == cut.lower()
        assert not {cut.split()[0], cut.split()[-1]} & {"the", "for", "with", "a"}
    assert any("lamps" in cut for cut in cuts), "no cut of the category style"


def test_title_too_short_gives_no_query() -> None:
    assert cut_query(TitleProduct("P1", "Lamp!"), bool, seed=0, round_index=0, min_words=2, max_words=4) is None


# The pool


def test_larger_pool_starts_with_the_smaller_one(tmp_path: Path) -> None:
    products, log = make_products(), [f"log query {i}" for i in range(30)]
    pools = []
    for num_pairs in (400, 4000):
        counts = PoolCounts()
        stream = stream_of(products, GenerateOptions(), log, no_guard(), counts)
        pools.append(taken(stream, num_pairs, counts, tmp_path)[0])
    small, large = pools
    assert (small.num_rows, large.num_rows) == (50, 500)
    assert large.slice(0, 50).equals(small)
    assert large["query_source"].to_pylist().count("log") == 30
    assert small["query_source"].to_pylist()[:8].count("titles") == 6, "one log query to three of titles"


def test_pool_has_no_repeats_and_no_near_duplicates_of_held_out_queries() -> None:
    counts = PoolCounts()
    log = ["Red Lamp", "lamp  red", "RED lamp", "blue lamps", "green hose", "unrelated thing"]
    table = pa.Table.from_pylist([{"query": query, "frequency": 1} for query in log], schema=QUERY)
    found = list(mix_sources([(1.0, log_queries(table, 0, 0.0, {}))], LeakGuard(["hose green"]), counts))
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
        power: sum(int(query.query[1:]) < 50 for query in list(log_queries(table, 3, power, {}))[:50])
        for power in (0.0, 1.0)
    }
    assert heads[1.0] >= 45
    assert heads[0.0] <= 15


def test_bands_are_thirds_of_all_searches() -> None:
    frequencies = np.asarray([1] * 30 + [10] * 3 + [30])
    assert np.bincount(log_bands(frequencies)).tolist() == [1, 3, 30]
    assert log_bands(np.ones(5)).tolist() == [0] * 5


def test_bands_of_the_log_come_in_their_shares_until_one_runs_out() -> None:
    rows = [{"query": f"q{i}", "frequency": 100 if i < 10 else 20 if i < 60 else 1} for i in range(1060)]
    table = pa.Table.from_pylist(rows, schema=QUERY)

    def heads(bands: dict[str, float], count: int) -> list[int]:
        numbers = [int(query.query[1:]) for query in list(log_queries(table, 3, 0.5, bands))[:count]]
        return [sum(n < 10 for n in numbers), sum(10 <= n < 60 for n in numbers), sum(n >= 60 for n in numbers)]

    assert heads({"head": 1, "torso": 1, "tail": 2}, 40) == [10, 10, 20]
    assert heads({"head": 1, "torso": 1, "tail": 2}, 1060) == [10, 50, 1000]
    assert heads({"tail": 1}, 1060) == [0, 0, 1000]


@pytest.mark.parametrize(
    "title, words",
    [
        ("ワイヤレスイヤホン 防水の Bluetooth5.3", {"ワイヤレスイヤホン", "防水", "の", "bluetooth5.3"}),
        ("Lámpara de mesa de noche táctil", {"lámpara", "mesa", "noche", "táctil", "de"}),
    ],
)
def test_titles_of_other_languages_are_cut_at_words(title: str, words: set[str]) -> None:
    product = TitleProduct("P1", title)
    cuts = {cut_query(product, bool, seed=0, round_index=i, min_words=1, max_words=3) for i in range(100)} - {None}
    assert len(cuts) >= 5
    said = {word for cut in cuts if cut for word in cut.split()}
    assert said <= words
    assert len(said) >= len(words) - 1


def test_num_pairs_beyond_the_pool_is_refused_with_what_can_be_had(tmp_path: Path) -> None:
    queries = [PoolQuery(f"query {i}", "log") for i in range(10)]
    with pytest.raises(UserError, match=r"1,000 cannot be met.*10 groups with 80 pairs.*num_pairs to 80"):
        taken(queries, 1000, PoolCounts(), tmp_path)


def test_a_source_without_any_query_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"generate\.source gives no query .*; add a source, such as titles$"):
        taken([], 1000, PoolCounts(), tmp_path)


def test_num_pairs_that_whole_groups_miss_is_refused_and_within_one_percent_is_not(
    tmp_path: Path,
) -> None:
    queries = [PoolQuery(f"query {i}", "log") for i in range(100)]
    with pytest.raises(UserError, match="set it to 16 or 24"):
        taken(queries, 20, PoolCounts(), tmp_path)
    pool, num_pairs = taken(queries, 402, PoolCounts(), tmp_path)
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
    found = list(mix_sources([(9.0, log), (1.0, file)], no_guard(), PoolCounts()))
    assert [(query.query, query.source) for query in found] == [("blue lamp", "log"), ("red lamp", "file")]


@pytest.mark.parametrize(
    "row, message",
    [
        (" ,P1,1", "row 2: the query is empty"),
        ("hat,P99,1", "row 2: product 'P99' is not in the catalog"),
        ("hat,P1,99999999999", "row 2: rank '99999999999' is no whole number from 0 to 2,147,483,647"),
        ("hat,P1,first", "row 2: rank 'first' is no whole number"),
    ],
)
def test_bad_row_of_a_pairs_file_is_named(tmp_path: Path, row: str, message: str) -> None:
    path = write_pairs(tmp_path / "pairs.csv", ["red lamp,P1,1", row])
    with pytest.raises(UserError, match=message):
        list(file_queries(path, ["P0", "P1"], GenerateOptions(source="file", pairs_file=path)))


def test_a_rank_column_with_missing_cells_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    rows = {"query": ["hat"] * 3 + ["hat"], "product_id": ["P0", "P1", "P2", "P0"], "rank": [7.0, None, 1.0, 3.0]}
    pq.write_table(pa.table(rows), path)
    pairs = read_pairs(str(path), ["P0", "P1", "P2"], "generate.pairs_file")
    assert pairs == {"hat": ("hat", [(2, 1), (1, 2), (0, 3)])}


def test_a_rank_that_is_no_whole_number_is_named(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.csv", ["red lamp,P1,1.5"])
    with pytest.raises(UserError, match=r"row 1: rank '?1\.5'? is no whole number"):
        read_pairs(path, ["P1"], "generate.pairs_file")


def test_pairs_file_without_a_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("query,sku\nhat,P1\n")
    with pytest.raises(UserError, match="lacks the column 'product_id'; it has query, sku"):
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
        ({"stopwords": ["xx"]}, "'xx', which is none of da, de"),
        ({"log_bands": {"middle": 1}}, "'middle', which is none of head"),
        ({"log_bands": {"head": 0}}, "all 0"),
        ({"quotas": {"engine": 1, "bm25": 1}}, "engine_file go together"),
        ({"products_per_shard": 0}, "products_per_shard must be at least 1"),
    ],
)
def test_contradicting_options_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerateOptions(**values)
