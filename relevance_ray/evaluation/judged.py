"""Judged groups as flat arrays: what every model is asked, and what the answers are held against.

Queries and product fields stay Python objects (a model renders its own text from them); grades become arrays once. All
of it lies in memory, which is the assumption of the whole part: judgments are few, labels are many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from relevance_ray.errors import UserError
from relevance_ray.metrics import group_offsets
from relevance_ray.schema import LabelScale


@dataclass(frozen=True)
class Judgments:
    """What n judged pairs of q queries are worth, one query after another: all that a metric needs.

    Attributes:
        offsets: int64 [q + 1] where each query's pairs begin.
        gains: float64 [n] gain of the published grade (not smoothed).
        classes: int64 [n] class index of the published grade (the nearest one for a fractional mean).
        relevant: bool [n] whether that class is at or above the scale's `relevant_from`.
    """

    offsets: np.ndarray
    gains: np.ndarray
    classes: np.ndarray
    relevant: np.ndarray

    @property
    def num_queries(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_pairs(self) -> int:
        return len(self.gains)


@dataclass(frozen=True)
class JudgedPairs(Judgments):
    """Judgments, with what a model is asked.

    Attributes:
        query_ids: [q].
        queries: [n] the query's text, repeated for each of its pairs.
        product_ids: [n].
        products: [n] the product's fields, with its `product_id`.
    """

    query_ids: list[str]
    queries: list[str]
    product_ids: list[str]
    products: list[Mapping[str, Any]]


def flatten(judged: pa.Table, scale: LabelScale) -> JudgedPairs:
    """Flatten a JUDGED_GROUP table.

    Raises:
        UserError: a grade is not on `scale`; names the query and the product.
    """
    query_ids: list[str] = []
    queries: list[str] = []
    product_ids: list[str] = []
    products: list[Mapping[str, Any]] = []
    grades: list[str] = []
    lengths: list[int] = []
    known: dict[str, tuple[float, int]] = {}
    for row in judged.select(["query_id", "query", "products"]).to_pylist():
        query_ids.append(row["query_id"])
        lengths.append(len(row["products"]))
        for product in row["products"]:
            grade = product["grade"]
            if grade not in known:
                try:
                    known[grade] = scale.gain(grade), scale.class_index(grade)
                except UserError as error:
                    where = f"judgment of query {row['query']!r} and product {product['product_id']!r}"
                    raise UserError(f"{where}: {error}") from error
            grades.append(grade)
            queries.append(row["query"])
            product_ids.append(product["product_id"])
            products.append({"product_id": product["product_id"], **product["fields"]})
    classes = np.array([known[grade][1] for grade in grades], dtype=np.int64)
    return JudgedPairs(
        query_ids=query_ids,
        queries=queries,
        product_ids=product_ids,
        products=products,
        offsets=group_offsets(lengths),
        gains=np.array([known[grade][0] for grade in grades], dtype=np.float64),
        classes=classes,
        relevant=classes >= scale.relevant_index,
    )


def of_split(judged: pa.Table, split: str) -> pa.Table:
    """The rows of one split."""
    return judged.filter(pc.equal(judged["split"], split))
