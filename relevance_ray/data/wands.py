"""Wayfair's WANDS as published: `product.csv`, `query.csv` and `label.csv`, tab-separated. It has no official split.

`product_features` is "name : value|name : value"; a name that repeats keeps its values joined by a comma.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa

from relevance_ray.data import files
from relevance_ray.data.source import DataOptions, Source
from relevance_ray.errors import UserError
from relevance_ray.schema import SCALES

FILES = ("label.csv", "query.csv", "product.csv")


def open_wands(options: DataOptions) -> Source:
    """Reads queries and labels; products stream. Raises `UserError` for a missing file or column and for a label whose
    query is not in `query.csv`."""
    folder = Path(options.path)
    label_path, query_path, product_path = (folder / name for name in FILES)
    labels = files.read(label_path, ["query_id", "product_id", "label"], delimiter="\t")
    queries = files.read(query_path, ["query_id", "query"], delimiter="\t")
    files.existing(product_path)
    text_of = dict(zip(queries["query_id"].to_pylist(), queries["query"].to_pylist(), strict=True))
    ids = labels["query_id"].to_pylist()
    for row, query_id in enumerate(ids, start=1):
        if query_id not in text_of:
            raise UserError(
                f"{label_path}, row {row}: query_id {query_id!r} is not in {query_path}; add it or drop the row"
            )
    judgments = pa.table(
        {
            "query_id": labels["query_id"],
            "query": pa.array([text_of[query_id] for query_id in ids], pa.string()),
            "product_id": labels["product_id"],
            "grade": labels["label"],
            "rater_grades": pa.nulls(len(ids), pa.list_(pa.float32())),
            "split": pa.nulls(len(ids), pa.string()),
            "row": pa.array(range(1, len(ids) + 1), pa.int64()),
        }
    )
    return Source(
        scale=SCALES["wands"],
        judgments=judgments,
        products=partial(_products, product_path),
        queries=files.no_queries,
        judgments_name=str(label_path),
        products_name=str(product_path),
    )


def _products(path: Path) -> Iterator[pa.Table]:
    optional = ["product_class", "category hierarchy", "product_description", "product_features"]
    for block in files.blocks(path, ["product_id", "product_name"], optional, delimiter="\t"):
        hierarchy = files.text(block, "category hierarchy").to_pylist()
        classes = files.text(block, "product_class").to_pylist()
        columns = {
            "product_id": files.text(block, "product_id"),
            "title": files.text(block, "product_name"),
            "description": files.text(block, "product_description"),
            "category": [_category(*pair) for pair in zip(hierarchy, classes, strict=True)],
            "attributes": [_features(value) for value in files.text(block, "product_features").to_pylist()],
        }
        yield files.product_table(columns, block.num_rows)


def _category(hierarchy: str | None, product_class: str | None) -> str | None:
    if hierarchy is None:
        return product_class
    return " > ".join(part.strip() for part in hierarchy.split("/") if part.strip())


def _features(features: str | None) -> list[tuple[str, str]] | None:
    out: dict[str, str] = {}
    for feature in (features or "").split("|"):
        name, separator, value = (part.strip() for part in feature.partition(":"))
        if separator and name and value:
            out[name] = f"{out[name]}, {value}" if name in out else value
    return list(out.items()) or None
