"""Generation: the pool of queries, the candidates, the shards, and the whole of it on Ray."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import bm25s
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from relevance_ray.data.splits import LeakGuard
from relevance_ray.errors import UserError
from relevance_ray.generate.candidates import choose, query_seed, scale_quotas
from relevance_ray.generate.catalog import Catalog, build_catalog, search_text
from relevance_ray.generate.options import GenerateOptions
from relevance_ray.generate.pipeline import generate
from relevance_ray.generate.queries import (
    PoolCounts,
    PoolQuery,
    file_queries,
    log_queries,
    mix,
    take_pool,
    title_queries,
)
from relevance_ray.generate.rankings import Bm25Ranking, DenseRanking, build_bm25, sample_rows
from relevance_ray.generate.shards import ShardContext, generate_shard, plan_ranges, shard_name, shard_range
from relevance_ray.generate.stable import hash_seed, ring_draws
from relevance_ray.generate.titles import TitleProduct, count_title_words, cut_query
from relevance_ray.schema import GROUP, JUDGED_GROUP, PRODUCT, QUERY, pair_id
from relevance_ray.storage import CommitLog

BRANDS = ["Acme", "Bolt", "Cord", "Dune", "Echo"]
COLORS = ["red", "green", "blue", "black", "white", "pink"]
TYPES = [
    "running shoes",
    "rain jacket",
    "water bottle",
    "desk lamp",
    "yoga mat",
    "phone case",
    "garden hose",
    "wool hat",
]
LEXICAL = {"bm25": 3.0, "bm25_middle": 1.0, "category": 2.0, "random": 2.0}


def make_products(repeat: int = 1) -> list[dict]:
    """240 products a repeat: every brand, color and type once; the last one has nothing but a title."""
    out = []
    for series in range(repeat):
        for brand in BRANDS:
            for color in COLORS:
                for kind in TYPES:
                    number = len(out)
                    out.append(
                        {
                            "product_id": f"P{number}",
                            "title": f"{brand} {color.title()} {kind.title()} with Model{series} - Pack of {number % 7 + 1}",
                            "description": "d" * 700,
                            "brand": brand,
                            "color": color,
                            "category": f"Home > {kind.split()[-1].title()}",
                            "attributes": [("size", str(number))],
                            "price": float(number),
                            "locale": "us",
                        }
                    )
    out[-1] = {"product_id": out[-1]["product_id"], "title": "Plain Unbranded Thing for Nothing"}
    return out


def product_table(products: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(products, schema=PRODUCT)


def make_catalog(folder: Path, products: list[dict]) -> Catalog:
    table = product_table(products)
    build_catalog([table.slice(0, 100), table.slice(100)], folder)
    return Catalog(folder)


def make_prepared(folder: Path, products: list[dict], log: list[str], held_out: list[str]) -> Path:
    """What the prepare step leaves, as far as generation reads it."""
    (folder / "products").mkdir(parents=True)
    table = product_table(products)
    pq.write_table(table.slice(0, 150), folder / "products" / "products-00000.parquet")
    pq.write_table(table.slice(150), folder / "products" / "products-00001.parquet")
    queries = [{"query": query, "frequency": 10 - i % 10, "locale": "us"} for i, query in enumerate(log)]
    pq.write_table(pa.Table.from_pylist(queries, schema=QUERY), folder / "queries.parquet")
    judged = [
        {"query_id": str(i), "query": query, "query_source": "human", "split": ("dev", "test")[i % 2], "products": []}
        for i, query in enumerate(held_out)
    ]
    pq.write_table(pa.Table.from_pylist(judged, schema=JUDGED_GROUP), folder / "judged_groups.parquet")
    return folder


def no_guard() -> LeakGuard:
    return LeakGuard([])


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


def stream_of(products: list[dict], options: GenerateOptions, log: list[str], guard: LeakGuard, counts: PoolCounts):  # type: ignore[no-untyped-def]
    texts = [
        TitleProduct(p["product_id"], p["title"], p.get("brand"), p.get("color"), p.get("category")) for p in products
    ]
    table = pa.Table.from_pylist([{"query": q, "frequency": 1} for q in log], schema=QUERY)
    titles = title_queries(texts, ["us"] * len(texts), options)
    return mix([(1.0, log_queries(table, 0, 0.5)), (3.0, titles)], guard, counts)


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


def write_pairs(path: Path, rows: list[str]) -> str:
    path.write_text("\n".join(["query,product_id,rank", *rows]) + "\n")
    return str(path)


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


# Rankings


def test_bm25_ranks_as_the_library_does(tmp_path: Path) -> None:
    texts = search_text(product_table(make_products()).select(["title", "brand", "color", "category"]).to_pydict())
    build_bm25(texts, tmp_path / "bm25")
    ours = Bm25Ranking(tmp_path / "bm25")
    library = bm25s.BM25.load(tmp_path / "bm25")
    for query in ("acme red running shoes", "lamp", "pack of 3 green hose echo", "red red red mat"):
        tokens = bm25s.tokenize([query], token_pattern=r"(?u)\b\w+\b", return_ids=False, show_progress=False)[0]
        scores = library.get_scores(list(dict.fromkeys(tokens)))
        rows = ours.top(query, 20)
        np.testing.assert_allclose(scores[rows], np.sort(scores)[::-1][:20], rtol=1e-5)
    assert len(ours.top("zzz", 20)) == 0
    assert len(ours.top("the", 20)) == 0


def test_bm25_within_a_budget_still_scores_all_words_of_what_it_finds(tmp_path: Path) -> None:
    texts = search_text(product_table(make_products(4)).select(["title", "brand", "color", "category"]).to_pydict())
    build_bm25(texts, tmp_path / "bm25")
    ranking = Bm25Ranking(tmp_path / "bm25")
    query = "acme pink running shoes model2"
    np.testing.assert_array_equal(ranking.top(query, 3, budget=150), ranking.top(query, 3))
    assert 0 < len(ranking.top("acme", 500, budget=10)) <= 10


def test_dense_ranking_is_exact_over_parts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(500, 16)).astype(np.float32)
    rows = np.arange(1000, 1500)
    for part in range(5):
        np.save(tmp_path / f"part-{part:06d}.npy", vectors[part * 100 : (part + 1) * 100])
    np.save(tmp_path / "rows.npy", rows)
    queries = rng.normal(size=(3, 16)).astype(np.float32)
    tops = DenseRanking(tmp_path).top(queries, 40)
    for query, top in zip(queries, tops, strict=True):
        np.testing.assert_array_equal(top, rows[np.argsort(-(vectors @ query), kind="stable")[:40]])


def test_vectors_of_a_large_catalog_are_a_fixed_sample() -> None:
    keys = np.random.default_rng(0).integers(2**63, size=1010).astype(np.uint64)
    rows = sample_rows(keys[:1000], 100, seed=1)
    assert len(set(rows.tolist())) == 100
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, sample_rows(keys[:1000], 100, seed=1))
    assert len(set(rows) & set(sample_rows(keys, 100, seed=1))) >= 95
    np.testing.assert_array_equal(sample_rows(keys[:50], 100, seed=1), np.arange(50))


# Candidates


def test_catalog_gives_rows_in_the_order_asked(tmp_path: Path) -> None:
    products = make_products()
    catalog = make_catalog(tmp_path / "catalog", products)
    rows = np.asarray([239, 0, 120, 5, 99, 100])
    taken = catalog.take(rows).to_pylist()
    assert [row["product_id"] for row in taken] == [f"P{i}" for i in rows]
    assert taken[1]["description"] == "d" * 500
    assert taken[1]["attributes"] == [("size", "0")]
    assert taken[0]["attributes"] is None
    assert catalog.num_products == catalog.num_distinct == 240


def test_empty_catalog_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no product"):
        build_catalog([product_table([])], tmp_path / "catalog")


def test_quotas_scale_to_the_size_of_a_group() -> None:
    assert scale_quotas({"bm25": 3, "dense": 2, "category": 1, "random": 2}, 8) == {
        "bm25": 3,
        "dense": 2,
        "category": 1,
        "random": 2,
    }
    assert scale_quotas({"bm25": 1, "random": 1}, 5) == {"bm25": 3, "random": 2}
    assert scale_quotas({"bm25": 1, "category": 0, "random": 3}, 2) == {"bm25": 1, "random": 1}
    assert sum(scale_quotas({"bm25": 0.1, "dense": 0.7, "random": 0.2}, 17).values()) == 17


def test_quotas_are_met_and_every_product_names_its_origin(tmp_path: Path) -> None:
    products = make_products()
    catalog = make_catalog(tmp_path / "catalog", products)
    rankings = {"bm25": np.arange(0, 60), "dense": np.arange(30, 150)}
    quotas = {"bm25": 2, "bm25_middle": 1, "dense": 2, "dense_middle": 1, "category": 1, "random": 1}
    found = choose(catalog, rankings, quotas, (20, 50), anchor=7, seed=0)
    assert Counter(origins[0][0] for _, origins in found) == quotas
    assert len({row for row, _ in found}) == 8
    by_name = {origins[0][0]: (row, origins) for row, origins in found}
    assert found[0] == (0, [("bm25", 1)])
    assert found[3] == (30, [("dense", 1), ("bm25", 31)])
    row, origins = by_name["bm25_middle"]
    assert origins[0] == ("bm25_middle", row + 1)
    assert 20 <= row + 1 <= 50
    row, _ = by_name["category"]
    assert products[row]["category"] == products[7]["category"]
    assert products[row]["brand"] != products[7]["brand"]


def test_unknown_words_and_missing_category_still_give_a_full_group(tmp_path: Path) -> None:
    catalog = make_catalog(tmp_path / "catalog", make_products())
    quotas = {"bm25": 4, "category": 3, "random": 1}
    nothing = {"bm25": np.empty(0, dtype=np.int64)}
    assert len(choose(catalog, nothing, quotas, (1, 9), None, 0)) == 8
    found = choose(catalog, {"bm25": np.asarray([239, 3])}, quotas, (1, 9), 239, 0)
    assert [origins[0] for _, origins in found[:2]] == [("bm25", 1), ("bm25", 2)]
    assert len(found) == 8


def test_group_holds_no_text_twice_and_a_small_catalog_is_used_up(tmp_path: Path) -> None:
    products = make_products()[:6]
    products += [products[0] | {"product_id": "twin", "price": 9.0}]
    catalog = make_catalog(tmp_path / "catalog", products)
    rankings = {"bm25": np.asarray([0, 6, 1])}
    found = choose(catalog, rankings, {"bm25": 4, "random": 4}, (1, 9), None, 0)
    assert len(found) == 6
    assert not {0, 6} <= {row for row, _ in found}


@pytest.mark.parametrize("quotas", [{"random": 8}, {"category": 8}, {"bm25_middle": 8}, {"bm25": 2, "random": 2}])
def test_a_grown_catalog_changes_few_candidates(tmp_path: Path, quotas: dict[str, int]) -> None:
    """A nightly run labels what is new: old queries must keep their old products, wherever the new ones come in."""
    words = ["lamp", "chair", "tent", "boot"]
    old = [
        {"product_id": str(n), "title": f"{words[n % 4]} no {n}", "brand": f"b{n % 7}", "category": f"c{n % 3}"}
        for n in range(2000)
    ]
    new = [{"product_id": f"x{n}", "title": f"new {n}", "brand": "b9", "category": f"c{n % 3}"} for n in range(20)]
    grown = [row for n, product in enumerate(old) for row in ([new[n // 100], product] if n % 100 == 0 else [product])]
    before, after = make_catalog(tmp_path / "old", old), make_catalog(tmp_path / "grown", grown)
    kept = total = 0
    for number in range(60):
        chosen = []
        for catalog, products in ((before, old), (after, grown)):
            # The same ranking, with what is new put in at its head and in its middle.
            ids = [str((number * 31 + step * 7) % 2000) for step in range(120)]
            if products is grown:
                ids = ["x3", *ids[:50], "x7", *ids[50:]]
            row_of = {product["product_id"]: row for row, product in enumerate(products)}
            rankings = {"bm25": np.asarray([row_of[name] for name in ids])}
            found = choose(catalog, rankings, quotas, (30, 100), row_of[ids[-1]], query_seed(1, str(number)))
            chosen.append({products[row]["product_id"] for row, _ in found})
        kept += len(chosen[0] & chosen[1])
        total += len(chosen[0])
    assert kept / total > (0.7 if "bm25" in quotas else 0.93)


def test_random_products_are_drawn_evenly_and_by_what_they_are() -> None:
    keys = np.sort(np.random.default_rng(1).integers(2**63, size=500).astype(np.uint64) * np.uint64(2))
    drawn = np.bincount(
        [place for seed in range(2000) for place in ring_draws(keys, hash_seed(seed), 20)], minlength=500
    )
    assert drawn.sum() == 40_000
    # A binomial draw alone gives 80 with a standard deviation of 9; a window of 16 gaps adds a quarter of 80.
    assert 15 < drawn.std() < 26
    assert drawn.min() > 20


# Shards


def test_plan_covers_what_is_missing_and_never_what_is_committed() -> None:
    assert plan_ranges(100, 64, []) == [(0, 64), (64, 100)]
    assert plan_ranges(200, 64, [(0, 64), (64, 100)]) == [(100, 128), (128, 192), (192, 200)]
    assert plan_ranges(100, 64, [(64, 100)]) == [(0, 64)]
    assert plan_ranges(50, 64, [(0, 64)]) == []
    assert shard_range(shard_name(64, 100)) == (64, 100)


def test_growth_in_any_steps_covers_every_group_once() -> None:
    rng = random.Random(0)
    for _ in range(50):
        committed: list[tuple[int, int]] = []
        target = 0
        for _ in range(5):
            target += rng.randrange(0, 300)
            committed += plan_ranges(target, 32, committed)
            assert sorted(i for a, b in committed for i in range(a, b)) == list(range(target))
            assert all(a // 32 == (b - 1) // 32 for a, b in committed)


def test_group_is_the_same_in_whichever_range_it_is_computed(tmp_path: Path) -> None:
    products = make_products()
    catalog = make_catalog(tmp_path / "catalog", products)
    build_bm25(
        search_text({k: [p.get(k) for p in products] for k in ("title", "brand", "color", "category")}), tmp_path / "b"
    )
    vectors = np.random.default_rng(0).normal(size=(240, 32)).astype(np.float32)
    (tmp_path / "v").mkdir()
    np.save(tmp_path / "v" / "part-000000.npy", vectors)
    np.save(tmp_path / "v" / "rows.npy", np.arange(240))
    options = GenerateOptions(groups_per_shard=16)
    counts = PoolCounts()
    pool, _ = take_pool(stream_of(products, options, ["red lamp", "wool hat zzz"], no_guard(), counts), 320, 8, counts)
    context = ShardContext(
        options,
        catalog,
        Bm25Ranking(tmp_path / "b"),
        DenseRanking(tmp_path / "v"),
        lambda texts: np.stack([np.random.default_rng(query_seed(9, text)).normal(size=32) for text in texts]).astype(
            np.float32
        ),
        lambda start, stop: pool.slice(start, stop - start),
    )
    whole = generate_shard(context, 0, 40)
    assert whole.schema.equals(GROUP)
    pieces = [generate_shard(context, start, stop) for start, stop in ((0, 7), (7, 16), (16, 40))]
    assert pa.concat_tables(pieces).to_pylist() == whole.to_pylist()
    group = whole.slice(3, 1).to_pylist()[0]
    assert len(group["products"]) == 8
    for product in group["products"]:
        source = products[int(product["product_id"][1:])]
        assert product["pair_id"] == pair_id(group["query"], product["product_id"], source.get("locale"))
        assert product["fields"]["title"] == source["title"]
        assert product["fields"]["price"] == source.get("price")


# On Ray


def lexical_options(**values: object) -> GenerateOptions:
    return GenerateOptions(**{"quotas": LEXICAL, "groups_per_shard": 8, **values})  # type: ignore[arg-type]


def test_more_pairs_keep_the_shards_that_exist(tmp_path: Path, ray_cluster: None) -> None:
    log = [f"{color} {kind}" for color in COLORS for kind in TYPES]
    held_out = ["acme red lamp", "pink yoga mats", "blue rain jacket"]
    prepared = make_prepared(tmp_path / "prepare", make_products(), log, held_out)
    out = tmp_path / "generate"
    first = generate(lexical_options(num_pairs=160), str(prepared), str(out), num_workers=2)
    assert (first["groups"], first["pairs"], first["skipped"]) == (20, 160, 0)
    assert first["shards"] == [shard_name(0, 8), shard_name(8, 16), shard_name(16, 20)]
    assert first["sources"] == {"log": 10, "titles": 10}
    assert sum(first["origins"].values()) == 160
    before = {name: record["file"] for name, record in CommitLog(str(out)).committed().items()}
    second = generate(lexical_options(num_pairs=400), str(prepared), str(out), num_workers=2)
    assert (second["groups"], second["pairs"], second["skipped"]) == (50, 400, 3)
    log_after = CommitLog(str(out))
    after = {name: record["file"] for name, record in log_after.committed().items()}
    assert before.items() <= after.items()
    with pytest.raises(UserError, match=r"earlier, larger run .* set it to 128"):
        generate(lexical_options(num_pairs=96), str(prepared), str(out))
    at_once = tmp_path / "at-once"
    generate(lexical_options(num_pairs=400), str(prepared), str(at_once), num_workers=1)

    def groups(folder: Path) -> list[dict]:
        return pa.concat_tables([pq.read_table(path) for path in CommitLog(str(folder)).files()]).to_pylist()

    assert groups(out) == groups(at_once)
    guard = LeakGuard(held_out)
    assert not [group["query"] for group in groups(out) if guard.is_leak(group["query"])]
    assert {len(group["products"]) for group in groups(out)} == {8}


def test_folder_of_other_options_is_refused(tmp_path: Path, ray_cluster: None) -> None:
    prepared = make_prepared(tmp_path / "prepare", make_products(), ["red lamp"], [])
    out = str(tmp_path / "generate")
    generate(lexical_options(num_pairs=64), str(prepared), out)
    with pytest.raises(UserError, match="other options"):
        generate(lexical_options(num_pairs=64, seed=1), str(prepared), out)


def test_shop_pairs_become_groups_as_they_are(tmp_path: Path, ray_cluster: None) -> None:
    prepared = make_prepared(tmp_path / "prepare", make_products(), [], ["wool hat"])
    pairs = write_pairs(tmp_path / "pairs.csv", ["red lamp,P1,1", "red lamp,P9,2", "hat wool,P3,1", "wool hat,P4,1"])
    out = tmp_path / "generate"
    with pytest.raises(UserError, match="1 groups with 2 pairs .*2 near-duplicates of held-out queries"):
        generate(lexical_options(source="file", pairs_file=pairs, num_pairs=9), str(prepared), str(out))
    summary = generate(lexical_options(source="file", pairs_file=pairs, num_pairs=2), str(prepared), str(out))
    group = pq.read_table(CommitLog(str(out)).files()[0]).to_pylist()[0]
    assert summary["sources"] == {"file": 1}
    assert [(p["product_id"], p["origins"]) for p in group["products"]] == [
        ("P1", [{"name": "file", "rank": 1}]),
        ("P9", [{"name": "file", "rank": 2}]),
    ]


def test_killed_run_goes_on_with_what_it_committed(tmp_path: Path, ray_cluster: None) -> None:
    import ray

    prepared = make_prepared(tmp_path / "prepare", make_products(), [], [])
    out = tmp_path / "generate"
    script = textwrap.dedent(
        """
        import os, signal, sys, threading, time
        import ray
        from relevance_ray.generate.options import GenerateOptions
        from relevance_ray.generate.pipeline import generate
        address, prepared, out, quotas = sys.argv[1:5]

        def kill_after_first_commit():
            while not os.path.isdir(out + "/commits") or not os.listdir(out + "/commits"):
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)

        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        threading.Thread(target=kill_after_first_commit, daemon=True).start()
        generate(GenerateOptions(num_pairs=8000, source="titles", quotas=eval(quotas), groups_per_shard=8), prepared, out)
        """
    )
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", script, address, str(prepared), str(out), repr(LEXICAL)]
    killed = subprocess.run(command, cwd=Path(__file__).parents[1], env=os.environ, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    left = {name: record["file"] for name, record in CommitLog(str(out)).committed().items()}
    options = lexical_options(num_pairs=8000, source="titles")
    summary = generate(options, str(prepared), str(out), num_workers=2)
    assert 1 <= summary["skipped"] < len(summary["shards"]) == 125
    after = {name: record["file"] for name, record in CommitLog(str(out)).committed().items()}
    assert left.items() <= after.items()
    assert summary["pairs"] == 8000
    files = {path.name for path in (out / "data").iterdir()}
    assert set(after.values()) <= files


def test_dense_candidates_come_from_a_real_model(tmp_path: Path, ray_cluster: None) -> None:
    products = make_products()
    prepared = make_prepared(tmp_path / "prepare", products, ["something to keep the rain off"], [])
    out = tmp_path / "generate"
    options = GenerateOptions(num_pairs=8, source="log", quotas={"dense": 8}, dense_max_products=60)
    summary = generate(options, str(prepared), str(out), num_workers=1)
    assert summary["origins"] == {"dense": 8}
    group = pq.read_table(CommitLog(str(out)).files()[0]).to_pylist()[0]
    titles = [product["fields"]["title"] for product in group["products"]]
    rows = np.load(out / "index" / "vectors" / "rows.npy")
    assert len(rows) == 60
    jackets = {products[row]["title"] for row in rows if "Rain Jacket" in products[row]["title"]}
    assert jackets
    assert jackets <= set(titles)
    assert [product["origins"][0]["rank"] for product in group["products"]] == list(range(1, 9))
