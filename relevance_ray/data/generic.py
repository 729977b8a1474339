"""Your own files: a products file and a judgments file (Parquet, CSV, TSV or JSON lines) with a column map.

`data.columns` says which of your columns is which of ours: {products: {product_id: sku, title: name}, judgments: {grade:
label}}; a name left out keeps ours. `attributes` may be a map, a struct or JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from relevance_ray.data import files
from relevance_ray.data.source import NO_JUDGMENTS, SOURCE_JUDGMENT, DataOptions, Source, own_scale
from relevance_ray.errors import UserError
from relevance_ray.schema import PRODUCT, query_id

_JUDGMENT_REQUIRED = ("query", "product_id", "grade")
_JUDGMENT_OPTIONAL = ("query_id", "rater_grades", "split", "locale")


def open_generic(options: DataOptions) -> Source:
    """Reads the judgments, where there are any; products stream. Raises `UserError` for a missing file or column, an
    unknown name in `data.columns`, or a pair judged twice with different grades."""
    judgments_path = _find(options, "judgments") if options.is_judged else None
    products_path = _find(options, "products")
    product_columns = _column_map(options, "products", PRODUCT.names)
    judgment_columns = _column_map(options, "judgments", [*_JUDGMENT_REQUIRED, *_JUDGMENT_OPTIONAL])
    return Source(
        scale=own_scale(options.scale),
        judgments=_judgments(judgments_path, judgment_columns, options.locale)
        if judgments_path
        else SOURCE_JUDGMENT.empty_table(),
        products=partial(_products, products_path, product_columns, options.locale),
        queries=files.no_queries,
        judgments_name=str(judgments_path),
        products_name=str(products_path),
    )


def files_read(options: DataOptions) -> list[Path]:
    """The files of products and judgments, as far as they are there."""
    folder, found = Path(options.path), []
    for name in ("judgments", "products") if options.is_judged else ("products",):
        given = getattr(options, name)
        candidates = [given] if given else [f"{name}{suffix}" for suffix in files.SUFFIXES]
        found += [folder / candidate for candidate in candidates if (folder / candidate).is_file()]
    return found


def _find(options: DataOptions, name: str) -> Path:
    given = getattr(options, name)
    if given:
        return files.existing(Path(options.path) / given)
    folder = Path(options.path)
    if not folder.is_dir():
        raise UserError(f"data.path {options.path!r} is no folder; give the one that holds products.* and judgments.*")
    found = [folder / f"{name}{suffix}" for suffix in files.SUFFIXES if (folder / f"{name}{suffix}").is_file()]
    if len(found) != 1:
        there = f"several {name} files ({', '.join(path.name for path in found)})"
        what = there if found else f"no {name} file ({name}.parquet, .csv, .tsv, .jsonl)"
        without = f", or write {NO_JUDGMENTS} to generate pairs without" if name == "judgments" and not found else ""
        raise UserError(f"{folder} has {what}; name it in data.{name}{without}")
    return found[0]


def _column_map(options: DataOptions, name: str, known: list[str]) -> dict[str, str]:
    given: Mapping[str, str] = options.columns.get(name, {})
    if unknown := sorted(set(given) - set(known)):
        raise UserError(f"data.columns.{name} has {unknown[0]!r}, which is none of {', '.join(known)}; rename it")
    return {ours: given.get(ours, ours) for ours in known}


def _judgments(path: Path, columns: dict[str, str], locale: str) -> pa.Table:
    required = [columns[name] for name in _JUDGMENT_REQUIRED]
    optional = [columns[name] for name in _JUDGMENT_OPTIONAL]
    if locale:
        required.append(columns["locale"])
        optional.remove(columns["locale"])
    table = files.read(path, required, optional)
    table = table.append_column("__row", pa.array(range(1, table.num_rows + 1), pa.int64()))
    if locale:
        table = table.filter(pc.equal(table[columns["locale"]], locale))
    queries = files.text(table, columns["query"]).to_pylist()
    products = files.text(table, columns["product_id"])
    grades = files.text(table, columns["grade"])
    rows = table["__row"].to_pylist()
    ids = files.text(table, columns["query_id"]).to_pylist()
    ids = [given or query_id(query or "", locale or None) for given, query in zip(ids, queries, strict=True)]
    _refuse_contradictions(path, ids, products.to_pylist(), grades.to_pylist(), rows)
    return pa.table(
        {
            "query_id": pa.array(ids, pa.string()),
            "query": pa.array(queries, pa.string()),
            "product_id": products,
            "grade": grades,
            "rater_grades": _rater_grades(table, columns["rater_grades"], path),
            "split": files.text(table, columns["split"]),
            "row": pa.array(rows, pa.int64()),
        }
    )


def _refuse_contradictions(
    path: Path, queries: list[Any], products: list[Any], grades: list[Any], rows: list[int]
) -> None:
    seen: dict[tuple[Any, Any], tuple[Any, int]] = {}
    for query, product, grade, row in zip(queries, products, grades, rows, strict=True):
        first, first_row = seen.setdefault((query, product), (grade, row))
        if first != grade:
            raise UserError(
                f"{path}, rows {first_row} and {row}: product {product!r} is judged {first!r} and {grade!r} for one query; "
                "keep one row, with the single votes in rater_grades"
            )


def _rater_grades(table: pa.Table, name: str, path: Path) -> pa.Array:
    if name not in table.column_names:
        return pa.nulls(table.num_rows, pa.list_(pa.float32()))
    column = table[name]
    if not pa.types.is_string(column.type):
        return column.cast(pa.list_(pa.float32()))
    out: list[list[float] | None] = []
    for value, row in zip(column.to_pylist(), table["__row"].to_pylist(), strict=True):
        try:
            out.append([float(vote) for vote in json.loads(value)] if value else None)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{path}, row {row}: {name} is {value!r}; write a JSON list of numbers: [2, 3, 3]"
            ) from error
    return pa.array(out, pa.list_(pa.float32()))


def _products(path: Path, columns: dict[str, str], locale: str) -> Iterator[pa.Table]:
    named = [theirs for ours, theirs in columns.items() if ours != theirs]
    required = list(dict.fromkeys([columns["product_id"], columns["title"], *named]))
    required += [columns["locale"]] if locale and columns["locale"] not in required else []
    optional = [theirs for theirs in columns.values() if theirs not in required]
    first_row = 1
    for block in files.blocks(path, required, optional):
        attributes = _attributes(block, columns["attributes"], path, first_row)
        out = {
            ours: files.text(block, theirs) for ours, theirs in columns.items() if ours not in ("attributes", "price")
        }
        out |= {"price": files.number(block, columns["price"], path, first_row), "attributes": attributes}
        first_row += block.num_rows
        table = files.product_table(out, block.num_rows)
        yield table.filter(pc.equal(table["locale"], locale)) if locale else table


def _attributes(block: pa.Table, name: str, path: Path, first_row: int) -> list[list[tuple[str, str]] | None]:
    if name not in block.column_names:
        return [None] * block.num_rows
    out: list[list[tuple[str, str]] | None] = []
    for row, value in enumerate(block[name].to_pylist(), start=first_row):
        if isinstance(value, str):
            try:
                value = json.loads(value) if value.strip() else None
            except ValueError:
                value = 0
        if isinstance(value, list):
            value = dict(value)
        if not isinstance(value, dict | None):
            raise UserError(f"{path}, row {row}: {name} is no JSON object or map; write {{}} pairs or leave it empty")
        pairs = [(str(key), str(item)) for key, item in (value or {}).items() if item is not None]
        out.append(pairs or None)
    return out
