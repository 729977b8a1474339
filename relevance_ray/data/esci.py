"""Amazon's Shopping Queries (ESCI, arXiv 2206.06588) as published: `shopping_queries_dataset_examples.parquet` and
`shopping_queries_dataset_products.parquet`, with its official test split. A `product_category` column is read if present.

A product id is unique within its locale only, so a run keeps one locale.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from relevance_ray.data import files
from relevance_ray.data.source import SOURCE_JUDGMENT, DataOptions, Source
from relevance_ray.errors import UserError
from relevance_ray.schema import SCALES

_JUDGMENTS = "shopping_queries_dataset_examples.parquet"
_PRODUCTS = "shopping_queries_dataset_products.parquet"
FILES = (_JUDGMENTS, _PRODUCTS)
_COLUMNS = {
    "product_id": "product_id",
    "title": "product_title",
    "description": "product_description",
    "bullets": "product_bullet_point",
    "brand": "product_brand",
    "color": "product_color",
    "category": "product_category",
    "locale": "product_locale",
}


def open_esci(options: DataOptions) -> Source:
    """Reads the judgments; products stream. Raises `UserError` where a file or column is missing, or where several
    locales are there and `data.locale` names none."""
    path = Path(options.path) / _JUDGMENTS
    table = files.read(path, ["query_id", "query", "product_id", "product_locale", "esci_label"], ["split"])
    table = table.append_column("row", pa.array(range(1, table.num_rows + 1), pa.int64()))
    locales = sorted(str(locale) for locale in pc.unique(table["product_locale"]).to_pylist())
    if options.locale:
        table = table.filter(pc.equal(table["product_locale"], options.locale))
        if not table.num_rows:
            raise UserError(f"{path} has no judgment of locale {options.locale!r}; it has {', '.join(locales)}")
    elif len(locales) > 1:
        raise UserError(f"{path} holds the locales {', '.join(locales)}; set data.locale to one of them")
    judgments = pa.table(
        {
            "query_id": table["query_id"],
            "query": table["query"],
            "product_id": table["product_id"],
            "grade": table["esci_label"],
            "rater_grades": pa.nulls(table.num_rows, pa.list_(pa.float32())),
            "split": files.text(table, "split"),
            "row": table["row"],
        }
    )
    products_path = Path(options.path) / _PRODUCTS
    files.existing(products_path)
    locale = options.locale or (locales[0] if locales else "")
    return Source(
        scale=SCALES["esci"],
        judgments=judgments.select(SOURCE_JUDGMENT.names),
        products=partial(_products, products_path, locale),
        queries=files.no_queries,
        judgments_name=str(path),
        products_name=str(products_path),
    )


def _products(path: Path, locale: str) -> Iterator[pa.Table]:
    required = ["product_id", "product_title", "product_locale"]
    optional = [name for name in _COLUMNS.values() if name not in required]
    for block in files.blocks(path, required, optional):
        block = block.filter(pc.equal(block["product_locale"].cast(pa.string()), locale))
        columns = {ours: files.text(block, theirs) for ours, theirs in _COLUMNS.items()}
        yield files.product_table(columns, block.num_rows)
