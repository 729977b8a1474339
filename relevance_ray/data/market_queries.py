"""The demo market's queries and judgments.

Query j is a pure function of (seed, j): it asks for something like a product of the first ten thousand, with no to three
constraints, in the shop's words or a shopper's (synonyms, shade families, broad terms), sometimes misspelled. Low numbers
are the head of the log: short and frequent. Judgments carry noise: one in ten is off by one grade.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from relevance_ray.data import market
from relevance_ray.data.market_truth import (
    FAMILY_OF_SHADE,
    KINDS_OF_MATERIAL,
    MARKET_SCALE,
    MATCH,
    PHRASES,
    TYPES,
    Intent,
    true_grade,
    true_verdicts,
    typos,
)
from relevance_ray.data.source import BLOCK_ROWS, SOURCE_JUDGMENT, DataOptions, Source
from relevance_ray.schema import QUERY, normalize_query, query_id

WINDOW = 10_000
"""Queries ask for products among the first of the catalog, and judged products are taken from there."""

PRODUCTS_PER_QUERY = 20
NOISE = 0.1
"""The chance that a judgment is off by one grade."""

_CONSTRAINTS = ("brand", "color", "material", "size", "audience", "max_price")
_CONSTRAINT_WEIGHTS = (3, 4, 3, 3, 4, 1)
_CUMULATIVE_COUNTS = {100: (0.6, 1.0, 1.0), 1000: (0.25, 0.7, 1.0)}  # up to this query number: P(0, 1, 2 constraints)
_TAIL_COUNTS = (0.1, 0.45, 0.8)
_ORDERS = (
    ("brand", "color", "material", "audience", "type", "size", "max_price"),
    ("color", "material", "type", "brand", "size", "audience", "max_price"),
    ("audience", "type", "color", "size", "material", "brand", "max_price"),
    ("type", "brand", "material", "audience", "color", "size", "max_price"),
)
_SURFACES: dict[tuple[str, str], list[str]] = {}
for _phrase, _meaning in PHRASES.items():
    _SURFACES.setdefault(_meaning, []).append(" ".join(_phrase))


def open_market(options: DataOptions) -> Source:
    """The market of `options.market_size` products, its judged queries and its query log."""
    size, seed = options.market_size, options.seed
    return Source(
        scale=MARKET_SCALE,
        judgments=judgments(seed, size),
        products=partial(market.stream_products, seed, size),
        queries=partial(query_log, seed, size),
        judgments_name="the market's judgments",
        products_name="the market's catalog",
    )


def num_queries(market_size: int) -> int:
    """Lines of the query log of a market: a quarter of its products, at least 200."""
    return max(200, market_size // 4)


def num_judged(market_size: int) -> int:
    """Judged queries: 300 at ten thousand products, growing with the root of the size, up to 3,000."""
    return int(min(3000, max(40, 300 * (market_size / 10_000) ** 0.5)))


def intents(seed: int, numbers: np.ndarray) -> list[Intent]:
    """What the queries with the given numbers, int64 [n], ask for."""
    codes = market.product_codes(seed, market.below(seed, "query product", numbers, WINDOW))
    uniform = market.draw(seed, "query count", numbers) / 2.0**64
    picks = np.stack([market.draw(seed, f"query {name}", numbers) / 2.0**64 for name in _CONSTRAINTS], axis=1)
    priority = -np.log(np.maximum(picks, 1e-12)) / np.array(
        _CONSTRAINT_WEIGHTS
    )  # weighted sampling without replacement
    broad = market.draw(seed, "query broad", numbers)
    out = []
    for row, number in enumerate(numbers.tolist()):
        shares = next((shares for limit, shares in _CUMULATIVE_COUNTS.items() if number < limit), _TAIL_COUNTS)
        count = int(np.searchsorted(shares, uniform[row], side="right"))
        name = market.TYPE_NAMES[codes.type[row]]
        shade = market.SHADE_NAMES[codes.shade[row]]
        material = market.MATERIAL_NAMES[codes.material[row]] if codes.material[row] >= 0 else None
        any_material = next((family for family, kinds in KINDS_OF_MATERIAL.items() if material in kinds), material)
        dollars = int(codes.cents[row]) / 100
        step = 5 if dollars < 50 else 25
        bits = int(broad[row])
        values = {
            "brand": market.BRAND_NAMES[codes.brand[row]],
            "color": FAMILY_OF_SHADE[shade] if bits & 3 else shade,
            "material": any_material if bits & 4 else material,
            "size": market.SIZE_NAMES[codes.size[row]] if codes.size[row] >= 0 else None,
            "audience": market.AUDIENCE_NAMES[codes.audience[row]] if codes.audience[row] >= 0 else None,
            "max_price": float((dollars // step + 1) * step),
        }
        order = [_CONSTRAINTS[index] for index in np.argsort(priority[row])]
        chosen = [key for key in order if values[key] is not None][:count]
        family = f"any {TYPES[name][1].name}" if (bits >> 8) % 100 < 6 else name
        out.append(Intent(type=family, **{key: values[key] for key in chosen}))  # type: ignore[arg-type]
    return out


def render(intent: Intent, bits: int, misspell: bool = False) -> str:
    """A text for an intent; `bits`, a uint64 drawn at random, decides its words, their order and the typo.
    `market_truth.parse_query` of it is the intent again."""
    words: list[str] = []
    for aspect in _ORDERS[bits % len(_ORDERS)]:
        value = getattr(intent, aspect)
        if value is None:
            continue
        bits //= 5
        if aspect == "max_price":
            words += [("under", "below", "less than", "up to")[bits % 4], f"{value:g}"]
        else:
            surfaces = _SURFACES[aspect, value]
            words.append(surfaces[bits % len(surfaces)])
    text = " ".join(words)
    if not misspell:
        return text
    parts = text.split(" ")
    candidates = [index for index, word in enumerate(parts) if typos(word)]
    if candidates:
        index = candidates[bits // 11 % len(candidates)]
        choices = typos(parts[index])
        parts[index] = choices[bits // 101 % len(choices)]
    return " ".join(parts)


def queries(seed: int, start: int, stop: int) -> list[str]:
    """The texts of queries `start` to `stop` (excluded)."""
    numbers = np.arange(start, stop, dtype=np.int64)
    bits = market.draw(seed, "query text", numbers).tolist()
    misspell = market.chance(seed, "query typo", numbers, 0.15)
    return [render(*row) for row in zip(intents(seed, numbers), bits, misspell.tolist(), strict=True)]


def query_log(seed: int, market_size: int) -> Iterator[pa.Table]:
    """The market's query log as `QUERY` tables; query j is asked about 20000 / (j + 1)^0.8 times, at least once."""
    total = num_queries(market_size)
    for start in range(0, total, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, total)
        frequency = np.maximum(20_000 / np.arange(start + 1, stop + 1) ** 0.8, 1).astype(np.int64)
        columns = [pa.array(queries(seed, start, stop)), pa.array(frequency), pa.nulls(stop - start, pa.string())]
        yield pa.table(columns, schema=QUERY)


def judgments(seed: int, market_size: int) -> pa.Table:
    """`SOURCE_JUDGMENT` rows: queries from all of the log, each with up to `PRODUCTS_PER_QUERY` products of all grades."""
    window = market.products(seed, 0, min(market_size, WINDOW)).to_pylist()
    of_type: dict[str, list[int]] = {}
    for index, product in enumerate(window):
        of_type.setdefault(product["category"].rsplit(" > ", 1)[-1], []).append(index)
    columns: dict[str, list[str]] = {"query_id": [], "query": [], "product_id": [], "grade": []}
    for number, query in _judged_queries(seed, market_size):
        pool = _candidates(seed, number, query, window, of_type)
        by_grade: dict[str, list[int]] = {grade: [] for grade in reversed(MARKET_SCALE.grades)}
        for index in pool:
            by_grade[true_grade(query, window[index])].append(index)
        chosen = _round_robin(list(by_grade.values()), PRODUCTS_PER_QUERY)
        for index in sorted(chosen):  # by product number: the order must not tell the grade
            product = window[index]
            columns["query_id"].append(query_id(query))
            columns["query"].append(query)
            columns["product_id"].append(product["product_id"])
            columns["grade"].append(_noisy(seed, number, index, true_grade(query, product)))
    num_rows = len(columns["query"])
    extra = {
        "rater_grades": pa.nulls(num_rows, pa.list_(pa.float32())),
        "split": pa.nulls(num_rows, pa.string()),
        "row": pa.array(range(1, num_rows + 1), pa.int64()),
    }
    return pa.table({name: pa.array(values) for name, values in columns.items()} | extra).cast(SOURCE_JUDGMENT)


def _judged_queries(seed: int, market_size: int) -> Iterator[tuple[int, str]]:
    """Distinct queries spread evenly over the log's numbers, head and tail, with their numbers."""
    total, wanted = num_queries(market_size), min(num_judged(market_size), num_queries(market_size) // 2)
    seen: set[str] = set()
    for number in (total * k // wanted for k in range(wanted)):
        (query,) = queries(seed, number, number + 1)
        if normalize_query(query) not in seen:
            seen.add(normalize_query(query))
            yield number, query


def _candidates(
    seed: int, number: int, query: str, window: list[dict[str, Any]], of_type: dict[str, list[int]]
) -> list[int]:
    """Window products worth judging, in an order drawn at random: all of the types that the query is about, some of each
    neighbouring type, some of other types that meet a constraint (the right brand on the wrong thing), some at random."""
    (intent,) = intents(seed, np.array([number]))
    asked_product = market.below(seed, "query product", np.array([number]), WINDOW)
    name = market.TYPE_NAMES[market.product_codes(seed, asked_product).type[0]]
    family = TYPES[name][1]
    neighbours = [kind.name for kind in family.types] + [
        k for k, (kind, _) in TYPES.items() if kind.accessory_of == name
    ]
    pool = list(of_type.get(name, ()))
    rng = np.random.default_rng([seed % 2**63, number])
    for neighbour in {*neighbours, TYPES[name][0].accessory_of} - {name, ""}:
        pool += of_type.get(neighbour, [])[:40] if intent.type == name else of_type.get(neighbour, [])
    others = rng.integers(0, len(window), 160).tolist()
    tempting = [index for index in others if MATCH in true_verdicts(query, window[index]).values()]
    pool += others[:20] + tempting[:40]
    pool = sorted(set(pool))
    return [pool[index] for index in rng.permutation(len(pool))]


def _round_robin(lists: list[list[int]], limit: int) -> list[int]:
    """Up to `limit` items, one of each list in turn, so that every grade is there as far as it goes."""
    out: list[int] = []
    for depth in range(max(map(len, lists), default=0)):
        out += [items[depth] for items in lists if depth < len(items)]
    return out[:limit]


def _noisy(seed: int, number: int, index: int, grade: str) -> str:
    key = np.array([number * WINDOW + index], dtype=np.int64)
    if not market.chance(seed, "judgment noise", key, NOISE)[0]:
        return grade
    position = MARKET_SCALE.grades.index(grade)
    up = bool(market.below(seed, "judgment direction", key, 2)[0])
    moved = position + (1 if up else -1)
    return MARKET_SCALE.grades[moved if 0 <= moved < MARKET_SCALE.num_classes else position - (1 if up else -1)]
