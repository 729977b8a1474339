"""Chorus, the e-commerce search demo: Icecat electronics in `products.parquet`, `Broad_Query_Set_rated.csv` with grades 0 to
3, and, where present, the votes of three raters in `Broad_Query_Set_individual_ratings.csv`. No official split.

Attribute names such as `attr_t_print_technology` are made readable ("print technology"), "product
colour" is also the color; prices are in cents.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from relevance_ray.data import files
from relevance_ray.data.source import DataOptions, Source
from relevance_ray.errors import UserError
from relevance_ray.schema import SCALES, query_id

FILES = ("Broad_Query_Set_rated.csv", "Broad_Query_Set_individual_ratings.csv", "products.parquet")
_VOTES = ("agent_1_rating", "agent_2_rating", "agent_3_rating")


def open_chorus(options: DataOptions) -> Source:
    """Reads the ratings; products stream. Raises `UserError` for a missing file or column, and for a vote off the scale."""
    folder = Path(options.path)
    path, votes_path, products_path = (folder / name for name in FILES)
    table = files.read(path, ["query", "docid", "rating"])
    queries, products = table["query"].to_pylist(), table["docid"].to_pylist()
    votes = _votes(votes_path) if votes_path.exists() else {}
    judgments = pa.table(
        {
            "query_id": pa.array([query_id(query or "") for query in queries], pa.string()),
            "query": table["query"],
            "product_id": table["docid"],
            "grade": table["rating"],
            "rater_grades": pa.array(
                [votes.get(pair) for pair in zip(queries, products, strict=True)], pa.list_(pa.float32())
            ),
            "split": pa.nulls(table.num_rows, pa.string()),
            "row": pa.array(range(1, table.num_rows + 1), pa.int64()),
        }
    )
    files.existing(products_path)
    return Source(
        scale=SCALES["chorus"],
        judgments=judgments,
        products=partial(_products, products_path),
        queries=files.no_queries,
        judgments_name=str(path),
        products_name=str(products_path),
    )


def _votes(path: Path) -> dict[tuple[str, str], list[float]]:
    table = files.read(path, ["query", "docid", *_VOTES])
    raters = [files.number(table, name, path).to_pylist() for name in _VOTES]
    out = {}
    for row, (query, product, *votes) in enumerate(
        zip(table["query"].to_pylist(), table["docid"].to_pylist(), *raters, strict=True), start=1
    ):
        given = [vote for vote in votes if vote is not None]
        if any(not 0 <= vote <= 3 for vote in given):
            raise UserError(f"{path}, row {row}: votes {given} must be from 0 to 3; mend the row")
        out[query, product] = given
    return out


def _products(path: Path) -> Iterator[pa.Table]:
    required, optional = ["id", "title"], ["short_description", "supplier", "price", "attributes"]
    first_row = 1
    for block in files.blocks(path, required, optional):
        attributes = [
            _attributes(value, path, row)
            for row, value in enumerate(files.text(block, "attributes").to_pylist(), start=first_row)
        ]
        columns = {
            "product_id": files.text(block, "id"),
            "title": files.text(block, "title"),
            "description": files.text(block, "short_description"),
            "brand": files.text(block, "supplier"),
            "price": pc.divide(files.number(block, "price", path, first_row), pa.scalar(100.0, pa.float32())),
            "attributes": [list(pairs.items()) or None for pairs in attributes],
            "color": [pairs.get("product colour") for pairs in attributes],
        }
        first_row += block.num_rows
        yield files.product_table(columns, block.num_rows)


def _attributes(value: str | None, path: Path, row: int) -> dict[str, str]:
    if value is None:
        return {}
    try:
        parsed = json.loads(value)
    except ValueError as error:
        raise UserError(
            f"{path}, row {row}: attributes is no JSON ({error}); write an object or leave it empty"
        ) from error
    if not isinstance(parsed, dict):
        raise UserError(f"{path}, row {row}: attributes must be a JSON object; write one or leave it empty")
    out: dict[str, str] = {}
    for name, item in parsed.items():
        readable = name.split("_", 2)[-1] if name.startswith("attr_") else name
        out.setdefault(" ".join(readable.replace("_", " ").split()), _plain(item))
    return out


def _plain(item: object) -> str:
    if isinstance(item, bool):
        return "yes" if item else "no"
    return f"{item:g}" if isinstance(item, float) and abs(item) < 1e6 else str(item)
