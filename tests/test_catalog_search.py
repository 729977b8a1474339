"""Search over the catalog: exact, and the same in however many shards it lies."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pytest
from small_catalog import make_products, make_search, product_table

from relevance_ray.errors import UserError
from relevance_ray.generate.index.catalog import build_catalog, search_text
from relevance_ray.generate.index.dense import Vectors, part_name, sample_rows
from relevance_ray.generate.index.lexical import word_hash, write_postings
from relevance_ray.generate.index.search import ShardSearch, SpreadSearch
from relevance_ray.generate.index.tops import Top, merge
from relevance_ray.generate.queries.keys import TextSet
from relevance_ray.tokens import tokenize

QUERIES = [
    "acme red running shoes",
    "lamp",
    "pack of 3 green hose echo",
    "red red red mat",
    "wool hat zzz",
    "zzz",
    "the",
]


def texts_of(products: list[dict]) -> list[str]:
    return search_text(product_table(products).select(["title", "brand", "color", "category"]).to_pydict())


def test_bm25_ranks_as_the_library_does(tmp_path: Path) -> None:
    products = make_products()
    _, lexicon, search = make_search(tmp_path, products)
    library = bm25s.BM25(k1=1.2, b=0.75, method="lucene", backend="numpy")
    pattern = r"(?u)\b\w+\b"
    library.index(bm25s.tokenize(texts_of(products), token_pattern=pattern, stopwords="en", show_progress=False))
    for query in QUERIES[:5]:
        tokens = bm25s.tokenize([query], token_pattern=pattern, return_ids=False, show_progress=False)[0]
        scores = library.get_scores(list(dict.fromkeys(tokens)))
        top = search.lexical([lexicon.query(query)], 20)[0]
        np.testing.assert_allclose(top.scores, np.sort(scores)[::-1][:20], rtol=1e-5)
        np.testing.assert_allclose(scores[top.rows], top.scores, rtol=1e-5)
    assert [len(top.rows) for top in search.lexical([lexicon.query(query) for query in QUERIES[5:]], 20)] == [0, 0]


@pytest.mark.parametrize("per_shard", [1, 37, 150])
@pytest.mark.parametrize("budget", [20_000, 120, 10])
def test_merged_lists_of_shards_are_those_of_one_index(tmp_path: Path, per_shard: int, budget: int) -> None:
    products = make_products(2)[: 200 if per_shard == 1 else 480]
    products += [products[7] | {"product_id": "twin"}]
    vectors = np.random.default_rng(0).normal(size=(len(products), 16)).astype(np.float32)
    vectors[-1] = vectors[7]
    _, lexicon, whole = make_search(tmp_path / "whole", products, 1000, vectors)
    _, own_lexicon, parts = make_search(tmp_path / "parts", products, per_shard, vectors, part_size=20)
    queries = [lexicon.query(query, budget) for query in QUERIES]
    assert queries == [own_lexicon.query(query, budget) for query in QUERIES]
    asked = np.concatenate([np.random.default_rng(1).normal(size=(5, 16)), vectors[[7]]]).astype(np.float32)
    for depth in (1, 30, 1000):
        found = [*whole.lexical(queries, depth), *whole.dense(asked, depth)]
        merged = [*parts.lexical(queries, depth), *parts.dense(asked, depth)]
        for one, other in zip(found, merged, strict=True):
            np.testing.assert_array_equal(one.rows, other.rows)
            np.testing.assert_array_equal(one.scores, other.scores)
    rows = np.asarray([199, 0, 120, 5, 5])
    assert whole.products(rows).equals(parts.products(rows))


def test_searches_spread_over_processes_answer_as_one(tmp_path: Path) -> None:
    products = make_products()
    vectors = np.random.default_rng(0).normal(size=(240, 16)).astype(np.float32)
    catalog, lexicon, whole = make_search(tmp_path, products, 50, vectors)
    shares = [[0, 3], [1, 4], [2]]

    def started(shards: list[int]) -> Any:
        search = ShardSearch(shards, tmp_path.joinpath, dense=True)

        def call(method: str, *arguments: Any) -> Future:
            future: Future = Future()
            future.set_result(getattr(search, method)(*arguments))
            return future

        return call

    spread = SpreadSearch([(share, started(share)) for share in shares], catalog.starts)
    queries = [lexicon.query(query) for query in QUERIES]
    for one, other in zip(whole.lexical(queries, 30), spread.lexical(queries, 30), strict=True):
        np.testing.assert_array_equal(one.rows, other.rows)
    for one, other in zip(whole.dense(vectors[:3], 30), spread.dense(vectors[:3], 30), strict=True):
        np.testing.assert_array_equal(one.rows, other.rows)
    rows = np.asarray([239, 0, 120, 5, 99, 100])
    assert spread.products(rows).equals(whole.products(rows))


def test_bm25_within_a_budget_still_scores_all_words_of_what_it_finds(tmp_path: Path) -> None:
    _, lexicon, search = make_search(tmp_path, make_products(4))
    query = "acme pink running shoes model2"
    bounded, free = search.lexical([lexicon.query(query, 150), lexicon.query(query)], 3)
    np.testing.assert_array_equal(bounded.rows, free.rows)
    np.testing.assert_array_equal(bounded.scores, free.scores)
    assert 0 < len(search.lexical([lexicon.query("acme", 20)], 500)[0].rows) < 60


def test_dense_ranking_is_exact_over_parts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(500, 16)).astype(np.float32)
    rows = np.arange(1000, 1500)
    for part in range(5):
        np.save(tmp_path / part_name(part), vectors[part * 100 : (part + 1) * 100])
    np.save(tmp_path / "rows.npy", rows)
    queries = rng.normal(size=(3, 16)).astype(np.float32)
    for query, top in zip(queries, Vectors(tmp_path).top(queries, 40), strict=True):
        scores = vectors.astype(np.float64) @ query
        np.testing.assert_array_equal(top.rows, rows[np.argsort(-scores, kind="stable")[:40]])
        np.testing.assert_allclose(top.scores, np.sort(scores)[::-1][:40], rtol=1e-12)


def test_merging_settles_equal_scores_by_row() -> None:
    one = Top(np.asarray([4, 9]), np.asarray([2.0, 1.0]))
    other = Top(np.asarray([2, 3, 7]), np.asarray([2.0, 1.0, 1.0]))
    assert merge([one, other], 4).rows.tolist() == [2, 4, 3, 7]


def test_vectors_of_a_large_catalog_are_a_fixed_sample() -> None:
    keys = np.random.default_rng(0).integers(2**63, size=1010).astype(np.uint64)
    rows = sample_rows(keys[:1000], 100)
    assert len(set(rows.tolist())) == 100
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, sample_rows(keys[:1000], 100))
    assert len(set(rows) & set(sample_rows(keys, 100))) >= 95
    np.testing.assert_array_equal(sample_rows(keys[:50], 100), np.arange(50))


@pytest.mark.parametrize("per_shard", [1000, 7])
def test_catalog_gives_rows_in_the_order_asked(tmp_path: Path, per_shard: int) -> None:
    catalog, _, search = make_search(tmp_path, make_products(), per_shard)
    rows = np.asarray([239, 0, 120, 5, 99, 100])
    taken = search.products(rows).to_pylist()
    assert [row["product_id"] for row in taken] == [f"P{i}" for i in rows]
    assert taken[1]["description"] == "d" * 500
    assert taken[1]["attributes"] == [("size", "0")]
    assert taken[0]["attributes"] is None
    assert catalog.num_products == catalog.num_distinct == 240


def test_stopwords_are_left_out_with_and_without_their_accents(tmp_path: Path) -> None:
    texts = ["Regal für die Küche", "Der Tisch fur draußen"]
    write_postings([texts], tmp_path / "postings", ["de"])
    known = set(np.load(tmp_path / "postings" / "words.npy").tolist())
    words = ("regal", "kuche", "tisch", "draussen")
    assert known == {word_hash(word) for word in words}


def test_dense_lists_of_many_queries_are_those_of_each_alone(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    np.save(tmp_path / "rows.npy", np.arange(300))
    np.save(tmp_path / part_name(0), vectors)
    shard = Vectors(tmp_path)
    queries = np.random.default_rng(1).normal(size=(70, 8)).astype(np.float32)
    for query, top in zip(queries, shard.top(queries, 5), strict=True):
        [alone] = shard.top(query[None], 5)
        assert top.rows.tolist() == alone.rows.tolist()
        assert top.scores.tolist() == alone.scores.tolist()


def test_empty_catalog_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no product"):
        build_catalog([product_table([])], tmp_path / "catalog", 10)


def test_catalog_without_words_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has a word in its title"):
        make_search(tmp_path, [{"product_id": "1", "title": "!!"}])


@pytest.mark.parametrize(
    "titles, query, expected",
    [
        (["Zapatillas de correr para niño", "Lámpara de mesa", "Camiseta niña"], "zapatillas para NIÑO", 0),
        (["ワイヤレスイヤホン 防水", "防水スプレー", "有線ヘッドホン"], "ワイヤレス イヤホン", 0),
        (["ワイヤレスイヤホン 防水", "防水スプレー", "有線ヘッドホン"], "ﾍｯﾄﾞﾎﾝ", 2),
        (["รองเท้าวิ่งผู้ชาย", "กระเป๋าเดินทาง", "รองเท้าแตะ"], "กระเป๋า", 1),
    ],
)
def test_search_finds_products_in_any_script(tmp_path: Path, titles: list[str], query: str, expected: int) -> None:
    products = [{"product_id": str(n), "title": title} for n, title in enumerate(titles)]
    _, lexicon, search = make_search(tmp_path, products)
    assert search.lexical([lexicon.query(query)], 3)[0].rows[0] == expected


def test_words_of_spaceless_scripts_are_pairs_of_characters() -> None:
    assert tokenize("USB-C 充電器 65W") == ["usb", "c", "充電", "電器", "65w"]
    assert tokenize("Straße, ＡＢＣ!") == ["strasse", "abc"]
    assert tokenize("靴") == ["靴"]
    assert tokenize("Lámpara Ñandú Škoda が й") == ["lampara", "nandu", "skoda", "が", "й"]
    assert tokenize("") == []


def test_key_set_knows_what_it_was_given_and_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relevance_ray.generate.queries.keys._MERGE_AT_LEAST", 100)
    keys = TextSet()
    given = [f"query {n % 3000}" for n in range(5000)]
    assert [keys.add(text) for text in given] == [True] * 3000 + [False] * 2000
    assert len(keys) == 3000
    assert len(keys._hashes._waiting) < 100
