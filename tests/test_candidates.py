"""Which products are chosen from the rankings: by quotas, evenly, and steady while the catalog grows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from small_catalog import make_catalog, make_products

from relevance_ray.generate.candidates import choose, query_seed, scale_quotas
from relevance_ray.generate.stable import hash_seed, ring_draws


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


def test_what_the_shops_engine_found_comes_first_and_its_gaps_are_filled(tmp_path: Path) -> None:
    catalog = make_catalog(tmp_path, make_products())
    rankings = {"bm25": np.arange(0, 60), "engine": np.asarray([200, 3])}
    found = choose(catalog, rankings, {"engine": 3, "bm25": 2, "random": 1}, (20, 50), None, seed=0)
    assert found[:4] == [
        (200, [("engine", 1)]),
        (3, [("engine", 2), ("bm25", 4)]),
        (0, [("bm25", 1)]),
        (1, [("bm25", 2)]),
    ]
    assert len(found) == 6


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
