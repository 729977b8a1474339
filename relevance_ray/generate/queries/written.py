"""Written queries: parts on disk, and the stream that the pool reads of them.

A part is some products asked once each, a pure function of the seed and its number: all products in a seeded order, each
asked for the first of its styles, then all for the second, and so on. Parts are written where they are missing, as far
ahead as the stream will need, so that a killed run asks no product twice and a larger one only the next ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from relevance_ray.engines.generation import TextGenerator
from relevance_ray.errors import UserError
from relevance_ray.generate.index.catalog import Catalog
from relevance_ray.generate.index.lexical import Lexicon
from relevance_ray.generate.index.search import CatalogSearch
from relevance_ray.generate.options import GenerateOptions
from relevance_ray.generate.queries.near_duplicates import NearDuplicates
from relevance_ray.generate.queries.sources import PoolCounts, PoolQuery
from relevance_ray.generate.queries.writing import style_of, write_queries
from relevance_ray.generate.stable import hash_seed, shuffled

PRODUCTS_PER_PART = 128

WRITTEN = pa.schema(
    [
        pa.field("anchor", pa.int64(), nullable=False),
        pa.field("locale", pa.string()),
        pa.field("style", pa.string(), nullable=False),
        pa.field("query", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("answer", pa.string(), nullable=False),
    ]
)
"""One row a product asked: its catalog row, the query or "" with the reason, and the answer as it was given."""

_FIRST_YIELD = 0.5
_LEAST_YIELD = 0.05
"""Queries of each product asked: what is hoped for before any was, and the least that is planned with."""
_ALL_FAILED = 16
"""Where at least so many products of a part are asked and none gets an answer, it is not the products."""


class WrittenPlan:
    """Which products a part asks, and for what."""

    def __init__(self, options: GenerateOptions, catalog: Catalog) -> None:
        self._options, self._catalog = options, catalog
        self.parts_per_round = math.ceil(catalog.num_products / PRODUCTS_PER_PART)
        rounds = sum(weight > 0 for weight in options.llm.styles.values())
        self.num_parts = rounds * self.parts_per_round
        self._order: tuple[int, np.ndarray] | None = None

    def rows(self, part: int) -> tuple[int, np.ndarray]:
        """The round of a part, and the catalog rows int64 [<= PRODUCTS_PER_PART] that it asks."""
        number, place = divmod(part, self.parts_per_round)
        if self._order is None or self._order[0] != number:
            seed = hash_seed(self._options.seed, "written", str(number))
            self._order = (number, shuffled(self._catalog.keys, seed))
        start = place * PRODUCTS_PER_PART
        return number, self._order[1][start : start + PRODUCTS_PER_PART]


def write_part(
    plan: WrittenPlan,
    part: int,
    products: Callable[[np.ndarray], pa.Table],
    generator: TextGenerator,
    options: GenerateOptions,
) -> pa.Table:
    """Ask the products of a part: a WRITTEN table.

    Args:
        products: the products of catalog rows.

    Raises:
        UserError: what the generator cannot go on with, or no answer at all.
    """
    number, rows = plan.rows(part)
    asked = products(rows).to_pylist()
    styles = [style_of(product["product_id"], number, options.llm.styles, options.seed) for product in asked]
    assert None not in styles, "a round beyond the last style"
    found = write_queries(generator, asked, [style or "" for style in styles], options.llm, options.seed)
    errors = [written.answer for written in found if written.reason == "error"]
    if len(errors) == len(found) >= _ALL_FAILED:
        raise UserError(f"generate.llm: none of {len(found)} products got an answer ({errors[0]}); see to the model")
    return pa.table(
        {
            "anchor": rows,
            "locale": [product["locale"] for product in asked],
            "style": [written.style for written in found],
            "query": [written.query for written in found],
            "reason": [written.reason for written in found],
            "answer": [written.answer for written in found],
        },
        schema=WRITTEN,
    )


def written_queries(
    read_parts: Callable[[Sequence[int]], Iterator[pa.Table]],
    num_parts: int,
    wanted: int,
    finds: Callable[[Sequence[str], Sequence[int]], Sequence[bool]],
    options: GenerateOptions,
    counts: PoolCounts,
) -> Iterator[PoolQuery]:
    """The queries of all parts in order, without near-duplicates of each other and those whose product no search finds.

    Args:
        read_parts: the tables of some parts, written now where they are missing.
        num_parts: how many there can be.
        wanted: about how many queries will be read: so far ahead parts are written.
        finds: whether each query finds its product, given as a catalog row.
        counts: gets the refused ones by reason.
    """
    near = NearDuplicates(options.llm.max_similarity)
    at = given = asked = 0
    while at < num_parts:
        share = max(given / asked, _LEAST_YIELD) if asked else _FIRST_YIELD
        # Past `wanted` (another source ran dry, repeats were left out) by a quarter of what was given, not by a part each.
        ahead = math.ceil(max(wanted - given, given // 4, 1) / share / PRODUCTS_PER_PART)
        parts = range(at, min(at + ahead, num_parts))
        at = parts.stop
        for table in read_parts(parts):
            asked += table.num_rows
            rows = []
            for row in table.to_pylist():
                if row["reason"]:
                    counts.refused[row["reason"]] += 1
                else:
                    rows.append(row)
            found = finds([row["query"] for row in rows], [row["anchor"] for row in rows])
            for row, is_found in zip(rows, found, strict=True):
                if not is_found:
                    counts.refused["round_trip"] += 1
                elif not near.is_new(row["query"]):
                    counts.refused["near_duplicate"] += 1
                else:
                    given += 1
                    yield PoolQuery(row["query"], "llm", row["locale"], anchor=row["anchor"])


def round_trip(
    catalog: Catalog, lexicon: Lexicon, search: CatalogSearch, depth: int
) -> Callable[[Sequence[str], Sequence[int]], list[bool]]:
    """Whether BM25 finds a product, or one of the same text, among the `depth` best for its query; 0: all are found."""

    def finds(queries: Sequence[str], anchors: Sequence[int]) -> list[bool]:
        if not depth or not queries:
            return [True] * len(queries)
        tops = search.lexical([lexicon.query(query) for query in queries], depth)
        return [
            bool((catalog.text_ids[top.rows] == catalog.text_ids[anchor]).any())
            for top, anchor in zip(tops, anchors, strict=True)
        ]

    return finds
