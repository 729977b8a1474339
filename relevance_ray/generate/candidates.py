"""Which products of the catalog stand beside a query: quotas per origin, then a refill.

Near products teach the hard margins, middle and random ones the scale. Every group comes out with exactly as many
products as asked for, as long as the catalog holds so many different ones; where an origin has too few (a query
whose words the catalog does not know, a product without category), the others stand in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from relevance_ray.generate.index.catalog import Catalog
from relevance_ray.generate.stable import hash_seed, ring_draws, ring_window, shuffled
from relevance_ray.schema import normalize_query

Origin = tuple[str, int]
"""Name and rank: 1 is the best of a ranking, 0 stands for an origin that has no ranks."""

_CATEGORY_WINDOW = 4096
_RANDOM_DRAWS = 256


def scale_quotas(quotas: Mapping[str, float], num_candidates: int) -> dict[str, int]:
    """Whole numbers that sum to `num_candidates`, in proportion to the quotas (largest remainders)."""
    total = sum(quotas.values())
    exact = {name: quota * num_candidates / total for name, quota in quotas.items() if quota > 0}
    out = {name: int(share + 1e-9) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: out[name] - exact[name])
    for name in by_remainder[: num_candidates - sum(out.values())]:
        out[name] += 1
    return {name: count for name, count in out.items() if count}


def query_seed(seed: int, query: str) -> int:
    """The seed of one query: the same wherever in the stream, and in whichever shard, the query comes."""
    return hash_seed(seed, normalize_query(query))


def choose(
    catalog: Catalog,
    rankings: Mapping[str, np.ndarray],
    quotas: Mapping[str, int],
    middle_ranks: tuple[int, int],
    anchor: int | None,
    seed: int,
) -> list[tuple[int, list[Origin]]]:
    """The products of one query.

    Args:
        catalog: where they come from.
        rankings: "bm25" and, where used, "dense": catalog rows, best first.
        quotas: products by origin; their sum is the size of the group.
        middle_ranks: first and last rank (from 1) of the middle origins.
        anchor: row of a product that the query is about, for the category origin; without one, the best ranked product.
        seed: of the query; decides which middle, category and random products.

    Returns:
        (catalog row, origins) in the order chosen. The first origin is the one it was chosen for; rankings that hold
        it as well follow with their ranks. No two have the same text. Shorter than the quotas' sum only where the
        catalog holds fewer different products.
    """
    if anchor is None:
        anchor = next((int(ranking[0]) for ranking in rankings.values() if len(ranking)), None)
    supply: dict[str, Iterator[tuple[int, int]]] = {}
    for name in quotas:
        if name == "random":
            continue
        if name == "category":
            found = (
                _same_category_other_brand(catalog, anchor, hash_seed(seed, name))
                if anchor is not None
                else np.empty(0, np.int64)
            )
            supply[name] = ((int(row), 0) for row in found)
        elif name.endswith("_middle"):
            supply[name] = _middle(catalog, rankings[name.removesuffix("_middle")], middle_ranks, hash_seed(seed, name))
        else:
            supply[name] = ((int(row), rank) for rank, row in enumerate(rankings[name], start=1))
    supply["random"] = _random(catalog, hash_seed(seed, "random"))
    chosen: dict[int, list[Origin]] = {}
    texts: set[int] = set()

    def take(name: str) -> bool:
        for row, rank in supply[name]:
            text = int(catalog.text_ids[row])
            if text not in texts:
                texts.add(text)
                chosen[row] = [(name, rank)]
                return True
        return False

    for name, count in quotas.items():
        for _ in range(count):
            if not take(name):
                break
    size = min(sum(quotas.values()), catalog.num_distinct)
    open_names = [name for name in (*quotas, "random") if name != "random"] + ["random"]
    while len(chosen) < size and open_names:
        open_names = [name for name in open_names if len(chosen) >= size or take(name)]
    assert len(chosen) == size, f"{len(chosen)} of {size} products found"
    _add_ranks(chosen, rankings)
    return list(chosen.items())


def _add_ranks(chosen: dict[int, list[Origin]], rankings: Mapping[str, np.ndarray]) -> None:
    for name, ranking in rankings.items():
        for rank, row in enumerate(ranking.tolist(), start=1):
            if row in chosen and chosen[row][0][0] not in (name, f"{name}_middle"):
                chosen[row].append((name, rank))


def _middle(catalog: Catalog, ranking: np.ndarray, ranks: tuple[int, int], seed: int) -> Iterator[tuple[int, int]]:
    """Products of the middle ranks, by what they are and not by their rank: one that moves up a rank moves no other."""
    rows = ranking[ranks[0] - 1 : ranks[1]]
    for position in shuffled(catalog.keys[rows], seed):
        yield int(rows[position]), int(position) + ranks[0]


def _same_category_other_brand(catalog: Catalog, anchor: int, seed: int) -> np.ndarray:
    """Rows drawn from the anchor's category; those of its own brand, and itself, are left out."""
    rows = catalog.same_category(anchor)
    if len(rows) > _CATEGORY_WINDOW:
        rows = rows[ring_window(catalog.keys[rows], seed, _CATEGORY_WINDOW)]
    brand = int(catalog.brands[anchor])
    rows = np.asarray(rows[rows != anchor])
    if brand >= 0:
        rows = rows[catalog.brands[rows] != brand]
    return rows[shuffled(catalog.keys[rows], seed)]


def _random(catalog: Catalog, seed: int) -> Iterator[tuple[int, int]]:
    """Rows at random; after some draws every row, so that a small catalog is used up to the last product."""
    if catalog.num_products > _RANDOM_DRAWS:
        for place in ring_draws(catalog.ring_keys, seed, _RANDOM_DRAWS):
            yield int(catalog.ring[place]), 0
    for row in shuffled(np.asarray(catalog.keys), seed):
        yield int(row), 0
