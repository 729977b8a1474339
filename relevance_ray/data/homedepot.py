"""Kaggle's Home Depot search relevance as published: `train.csv`, latin-1. A product is its title; the grade is the mean
of several raters, 1.0 to 3.0. It has no query id and no official split."""

from __future__ import annotations

import html
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa

from relevance_ray.data import files
from relevance_ray.data.source import BLOCK_ROWS, DataOptions, Source
from relevance_ray.schema import SCALES, query_id

FILES = ("train.csv",)


def open_homedepot(options: DataOptions) -> Source:
    """Reads `train.csv`. Raises `UserError` where it or a column is missing."""
    path = Path(options.path) / FILES[0]
    table = files.read(path, ["product_uid", "product_title", "search_term", "relevance"], encoding="latin-1")
    queries = [html.unescape(query or "") for query in table["search_term"].to_pylist()]
    titles: dict[str | None, str] = {}
    for product, title in zip(table["product_uid"].to_pylist(), table["product_title"].to_pylist(), strict=True):
        titles.setdefault(product, html.unescape(title or ""))
    judgments = pa.table(
        {
            "query_id": pa.array([query_id(query) for query in queries], pa.string()),
            "query": pa.array(queries, pa.string()),
            "product_id": table["product_uid"],
            "grade": table["relevance"],
            "rater_grades": pa.nulls(table.num_rows, pa.list_(pa.float32())),
            "split": pa.nulls(table.num_rows, pa.string()),
            "row": pa.array(range(1, table.num_rows + 1), pa.int64()),
        }
    )
    return Source(
        scale=SCALES["homedepot"],
        judgments=judgments,
        products=partial(_products, pa.array(list(titles), pa.string()), pa.array(list(titles.values()), pa.string())),
        queries=files.no_queries,
        judgments_name=str(path),
        products_name=str(path),
    )


def _products(product_ids: pa.Array, titles: pa.Array) -> Iterator[pa.Table]:
    for start in range(0, len(product_ids), BLOCK_ROWS):
        ids = product_ids.slice(start, BLOCK_ROWS)
        yield files.product_table({"product_id": ids, "title": titles.slice(start, BLOCK_ROWS)}, len(ids))
