"""Generation: shards of groups, and the whole of it on Ray."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_catalog import (
    COLORS,
    LEXICAL,
    TYPES,
    make_prepared,
    make_products,
    make_search,
    no_guard,
    stream_of,
    write_pairs,
)

from relevance_ray.cluster.workers import Workers
from relevance_ray.data.splits import LeakGuard
from relevance_ray.errors import UserError
from relevance_ray.generate.candidates import query_seed
from relevance_ray.generate.index import catalog_index
from relevance_ray.generate.index.catalog_index import latest_vectors
from relevance_ray.generate.options import GenerateOptions
from relevance_ray.generate.pipeline import generate
from relevance_ray.generate.queries.pool import PoolFile, write_pool
from relevance_ray.generate.queries.sources import PoolCounts
from relevance_ray.generate.shards import ShardContext, generate_shard, plan_ranges, shard_name, shard_range
from relevance_ray.schema import GROUP, pair_id
from relevance_ray.storage import CommitLog

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


def unit_vectors(count: int) -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(count, 32))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def embed(texts: list[str]) -> np.ndarray:
    found = [np.random.default_rng(query_seed(9, text)).normal(size=32) for text in texts]
    return np.stack([vector / np.linalg.norm(vector) for vector in found]).astype(np.float32)


@pytest.mark.parametrize("per_shard", [1000, 70])
def test_group_is_the_same_in_whichever_range_it_is_computed(tmp_path: Path, per_shard: int) -> None:
    products = make_products()
    vectors = unit_vectors(240)
    catalog, lexicon, search = make_search(tmp_path, products, per_shard, vectors)
    options = GenerateOptions(groups_per_shard=16)
    counts = PoolCounts()
    stream = stream_of(products, options, ["red lamp", "wool hat zzz"], no_guard(), counts)
    write_pool(stream, tmp_path / "pool", 320, 8, counts)
    read_pool = PoolFile(tmp_path / "pool").read
    context = ShardContext(options, catalog, lexicon, search, embed, read_pool)
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
    held_out = ["acme red lamp", "pink yoga mats", "blue rain jacket", "lámpara de mesa"]
    planted = ["lampara de mesa", "rain jacket, blue", "blue rain jackets"]
    log = planted + log
    prepared = make_prepared(tmp_path / "prepare", make_products(), log, held_out)
    out = tmp_path / "generate"
    first = generate(lexical_options(num_pairs=160), str(prepared), str(out), workers=Workers(2))
    assert (first["groups"], first["pairs"], first["skipped"]) == (20, 160, 0)
    assert first["shards"] == [shard_name(0, 8), shard_name(8, 16), shard_name(16, 20)]
    assert first["sources"] == {"log": 10, "titles": 10}
    assert sum(first["origins"].values()) == 160
    before = {name: record["file"] for name, record in CommitLog(str(out)).committed().items()}
    second = generate(lexical_options(num_pairs=400), str(prepared), str(out), workers=Workers(2))
    assert (second["groups"], second["pairs"], second["skipped"]) == (50, 400, 3)
    log_after = CommitLog(str(out))
    after = {name: record["file"] for name, record in log_after.committed().items()}
    assert before.items() <= after.items()
    with pytest.raises(UserError, match=r"earlier, larger run .* set it to 128"):
        generate(lexical_options(num_pairs=96), str(prepared), str(out))
    at_once = tmp_path / "at-once"
    generate(lexical_options(num_pairs=400), str(prepared), str(at_once), workers=Workers(1))

    def groups(folder: Path) -> list[dict]:
        return pa.concat_tables([pq.read_table(path) for path in CommitLog(str(folder)).files()]).to_pylist()

    assert groups(out) == groups(at_once)
    guard = LeakGuard(held_out)
    assert {group["query"] for group in groups(out)}.isdisjoint({*held_out, *planted, "pink yoga mat"})
    everything = tmp_path / "everything"
    whole = generate(lexical_options(num_pairs=8 * (len(log) - 5), source="log"), str(prepared), str(everything))
    # "rain jacket, blue" and "blue rain jacket" have the same words: the second is a repeat before it is a leak.
    assert whole["left_out"] == {"leaks": {"log": 4}, "repeats": {"log": 1}, "refused": {}}
    assert not [group["query"] for group in groups(out) if guard.is_leak(group["query"])]
    assert {len(group["products"]) for group in groups(out)} == {8}


def test_groups_depend_on_no_shard_of_the_catalog(tmp_path: Path, ray_cluster: None) -> None:
    log = [f"{color} {kind}" for color in COLORS for kind in TYPES]
    prepared = make_prepared(tmp_path / "prepare", make_products(), log, [])
    results = write_pairs(tmp_path / "engine.csv", ["red desk lamp,P1,1", "Red  desk lamp,P9,2"])
    found = []
    for name, per_shard, actors in (("whole", 1000, 0), ("parts", 50, 0), ("spread", 50, 2)):
        quotas = {**LEXICAL, "dense": 2.0, "dense_middle": 1.0, "engine": 2.0}
        options = GenerateOptions(
            num_pairs=576,
            source="log",
            quotas=quotas,
            candidates_per_query=12,
            products_per_shard=per_shard,
            engine_file=results,
        )
        out = str(tmp_path / name)
        generate(options, str(prepared), out, workers=Workers(2), search_actors=actors)
        found.append(pa.concat_tables([pq.read_table(path) for path in CommitLog(out).files()]).to_pylist())
    assert found[0] == found[1] == found[2]
    lamp = next(group for group in found[0] if group["query"] == "red desk lamp")
    of_engine = [p["product_id"] for p in lamp["products"] if p["origins"][0]["name"] == "engine"]
    assert of_engine == ["P1", "P9"]


SPANISH = {
    "Zapatillas de correr": ["Zapatillas de correr para hombre talla 42", "Zapatillas de correr niña rosa"],
    "Lámparas": ["Lámpara de mesa táctil con luz cálida", "Lámpara de pie para salón"],
}
JAPANESE = {
    "イヤホン": ["ワイヤレスイヤホン 防水 黒", "有線イヤホン マイク付き"],
    "炊飯器": ["炊飯器 5.5合 圧力IH", "小型炊飯器 一人暮らし用 白"],
}


@pytest.mark.parametrize(
    "titles, log, stopwords",
    [
        (SPANISH, {"zapatos correr nina": "Zapatillas de correr", "lampara de mesa": "Lámparas"}, ["es"]),
        (JAPANESE, {"防水 イヤホン": "イヤホン", "炊飯器一人暮らし": "炊飯器", "ｲﾔﾎﾝ 有線": "イヤホン"}, []),
    ],
    ids=["spanish", "japanese"],
)
def test_groups_of_another_language_hold_what_a_shopper_would_find(
    tmp_path: Path, ray_cluster: None, titles: dict[str, list[str]], log: dict[str, str], stopwords: list[str]
) -> None:
    products = [
        {"product_id": f"{number}-{kind}", "title": f"{title} {number}", "category": kind, "brand": f"B{number % 3}"}
        for kind, of_kind in titles.items()
        for title in of_kind
        for number in range(6)
    ]
    prepared = make_prepared(tmp_path / "prepare", products, list(log), [])
    options = lexical_options(
        num_pairs=80,
        candidates_per_query=4,
        quotas={"bm25": 2.0, "random": 2.0},
        stopwords=stopwords,
        min_title_words=1,
    )
    out = str(tmp_path / "generate")
    summary = generate(options, str(prepared), out, workers=Workers(2))
    assert summary["sources"]["log"] == len(log)
    groups = pa.concat_tables([pq.read_table(path) for path in CommitLog(out).files()]).to_pylist()
    cut = [group["query"] for group in groups if group["query_source"] == "titles"]
    assert len(cut) == len(set(cut)) == 20 - len(log)
    for group in groups:
        if group["query_source"] == "log":
            found = [p for p in group["products"] if p["origins"][0]["name"] == "bm25"]
            assert [p["product_id"].split("-")[1] for p in found] == [log[group["query"]]] * 2


def test_an_index_is_shared_by_all_that_is_generated_from_a_catalog(tmp_path: Path, ray_cluster: None) -> None:
    prepared = make_prepared(tmp_path / "prepare", make_products(), ["red lamp"], [])
    index = tmp_path / "index"
    run = partial(generate, prepared_dir=str(prepared), index_dir=str(index))
    run(lexical_options(num_pairs=64), out_dir=str(tmp_path / "one"))
    made = {path: path.stat().st_mtime_ns for path in index.rglob("*")}
    run(lexical_options(num_pairs=64, seed=5, quotas={"bm25": 1.0}), out_dir=str(tmp_path / "other"))
    assert {path: path.stat().st_mtime_ns for path in index.rglob("*")} == made
    assert not (tmp_path / "other" / "index").exists()


def test_vectors_of_an_earlier_catalog_are_taken_over_for_products_that_read_the_same(
    tmp_path: Path, ray_cluster: None
) -> None:
    products = make_products()
    before = make_prepared(tmp_path / "before", products, ["red lamp"], [])
    changed = [product | {"title": "Changed " + product["title"]} for product in products[:5]]
    after = make_prepared(tmp_path / "after", changed + products[5:], ["red lamp"], [])
    options = GenerateOptions(num_pairs=8, source="log", quotas={"dense": 8})
    old, new = tmp_path / "root" / "index-old", tmp_path / "root" / "index-new"
    generate(options, str(before), str(tmp_path / "one"), index_dir=str(old))
    part = old / "vectors" / "00000" / "part-000000.npy"
    marked = np.load(part)
    marked[:, 0] = np.arange(240)  # so that what is taken over can be told from what is computed
    np.save(part, marked)
    assert latest_vectors(str(tmp_path / "root"), str(new), options) == str(old)
    assert latest_vectors(str(tmp_path / "root"), str(old), options) == ""
    assert latest_vectors(str(tmp_path / "root"), str(new), GenerateOptions(dense_model="mpnet")) == ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog_index, "EMBEDDED_TOKENS", 32)  # as of another version
        assert latest_vectors(str(tmp_path / "root"), str(new), options) == ""
    generate(options, str(after), str(tmp_path / "other"), index_dir=str(new), earlier_index=str(old))
    found = np.load(new / "vectors" / "00000" / "part-000000.npy")
    np.testing.assert_array_equal(found[5:], marked[5:])
    assert np.abs(found[:5, 0]).max() < 1
    np.testing.assert_allclose(np.linalg.norm(found[:5], axis=1), 1, rtol=1e-5)


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
    summary = generate(GenerateOptions(source="file", pairs_file=pairs, num_pairs=2), str(prepared), str(out))
    assert not list(out.rglob("vectors")), "nothing is searched for"
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
    summary = generate(options, str(prepared), str(out), workers=Workers(2))
    assert 1 <= summary["skipped"] < len(summary["shards"]) == 125
    after = {name: record["file"] for name, record in CommitLog(str(out)).committed().items()}
    assert left.items() <= after.items()
    assert summary["pairs"] == 8000
    files = {path.name for path in (out / "data").iterdir()}
    assert set(after.values()) <= files


def test_a_search_actor_that_dies_is_started_again_and_asked_again(tmp_path: Path, ray_cluster: None) -> None:
    prepared = make_prepared(tmp_path / "prepare", make_products(4), [], [])
    run = partial(generate, prepared_dir=str(prepared), workers=Workers(1))
    run(lexical_options(num_pairs=4000, source="titles"), out_dir=str(tmp_path / "undisturbed"))
    out = tmp_path / "generate"
    killed = []

    def kill_one_after_the_first_commit() -> None:
        while not (out / "commits").is_dir() or not list((out / "commits").iterdir()):
            time.sleep(0.001)
        actors = [process for process in psutil.process_iter(["name"]) if "SearchActor" in process.info["name"]]
        actors[0].kill()
        killed.append(actors[0].pid)

    thread = threading.Thread(target=kill_one_after_the_first_commit)
    thread.start()
    options = lexical_options(num_pairs=4000, source="titles", products_per_shard=300)
    run(options, out_dir=str(out), search_actors=2)
    thread.join()
    assert killed

    def groups(folder: Path) -> list[dict]:
        return pa.concat_tables([pq.read_table(path) for path in CommitLog(str(folder)).files()]).to_pylist()

    assert groups(out) == groups(tmp_path / "undisturbed")


def test_dense_candidates_come_from_a_real_model(tmp_path: Path, ray_cluster: None) -> None:
    products = make_products()
    prepared = make_prepared(tmp_path / "prepare", products, ["something to keep the rain off"], [])
    out = tmp_path / "generate"
    options = GenerateOptions(num_pairs=8, source="log", quotas={"dense": 8}, dense_max_products=60)
    summary = generate(options, str(prepared), str(out), workers=Workers(1))
    assert summary["origins"] == {"dense": 8}
    group = pq.read_table(CommitLog(str(out)).files()[0]).to_pylist()[0]
    titles = [product["fields"]["title"] for product in group["products"]]
    rows = np.load(out / "index" / "vectors" / "00000" / "rows.npy")
    assert len(rows) == 60
    jackets = {products[row]["title"] for row in rows if "Rain Jacket" in products[row]["title"]}
    assert jackets
    assert jackets <= set(titles)
    assert [product["origins"][0]["rank"] for product in group["products"]] == list(range(1, 9))
