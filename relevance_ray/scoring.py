"""The `score` command's core: a file of pairs in, the same rows with their scores out.

Two passes over the input. The first reads only texts and finds, in seconds, what would otherwise end the run after an
hour: an empty query in the last row. The second scores, batch by batch, so that memory does not grow with the file.
What only the model can tell (a query longer than it reads) leaves that row without numbers and is counted, not fatal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from relevance_ray.errors import UserError
from relevance_ray.row_files import RowReader, RowWriter
from relevance_ray.serving.scorer import Scorer, StrPath

SCORE_COLUMNS = {"logit": pa.float32(), "probability": pa.float32(), "score": pa.float32()}
BATCH_ROWS = 4096
"""Rows scored at once: enough to sort by length within the batch, small enough to stream."""


@dataclass(frozen=True)
class ScoreSummary:
    """What became of a file: rows written, how many of them without numbers, and why the first one was."""

    rows: int
    failed: int
    first_failure: str | None


def score_file(
    model_folder: StrPath,
    input_path: StrPath,
    output_path: StrPath,
    *,
    device: str = "auto",
    num_threads: int | None = None,
    batch_rows: int = BATCH_ROWS,
    on_progress: Callable[[int, int], None] | None = None,
) -> ScoreSummary:
    """Score every row of a Parquet, CSV or JSON-lines file.

    The output has the input's rows in their order, its columns untouched, and `logit`, `probability`, `score` (float32)
    after them; it appears whole or not at all, and replaces a file of that name. Formats follow the file endings and
    may differ.

    Args:
        model_folder: a student or a teacher.
        input_path: a file with a `query` column and at least one column the model's template reads (`title`, ...).
            `attributes` may be a map, an object, or text that is a JSON object.
        output_path: where to write; not the input itself.
        batch_rows: rows scored at once.
        on_progress: called with (rows done, rows failed) after each batch.

    Raises:
        UserError: a bad model folder or file, a missing column, or a row that is empty or of a wrong type (named).
    """
    input_path, output_path = Path(input_path), Path(output_path)
    reader = RowReader(input_path)
    if output_path.resolve() == input_path.resolve():
        raise UserError(f"{output_path} is the input itself; write to another file")
    if output_path.is_dir():
        raise UserError(f"{output_path} is a folder; name the file to write")
    scorer = Scorer(model_folder, device=device, num_threads=num_threads)
    columns = _check(reader, scorer, batch_rows)
    rows = failed = 0
    first_failure = None
    with RowWriter(output_path, reader, SCORE_COLUMNS) as writer:
        for batch in reader.batches(batch_rows):
            queries = [row["query"] for row in batch.rows]
            scores = scorer.score_pairs(queries, [_product(row, columns) for row in batch.rows])
            numbers = (scores.logit, scores.probability, scores.score)
            writer.write(batch, {name: _nullable(values) for name, values in zip(SCORE_COLUMNS, numbers, strict=True)})
            for number, error in enumerate(scores.errors, start=batch.first_row):
                if error is not None:
                    failed += 1
                    first_failure = first_failure or f"{input_path}, row {number}: {error}"
            rows += len(batch.rows)
            if on_progress is not None:
                on_progress(rows, failed)
    return ScoreSummary(rows, failed, first_failure)


def _check(reader: RowReader, scorer: Scorer, batch_rows: int) -> list[str]:
    """Pass over all rows; returns the product columns the model reads, or raises for the first bad row."""
    known = reader.format != "jsonl"
    wanted = ["query", *scorer.info.template.fields]
    if known:
        _check_columns(reader, scorer)
    subset = [name for name in wanted if name in reader.columns] if known else None
    rows = 0
    for batch in reader.batches(batch_rows, subset):
        rows += len(batch.rows)
        present = [name for name in wanted[1:] if name in reader.columns]
        for number, row in enumerate(batch.rows, start=batch.first_row):
            where = f"{reader.path}, row {number}"
            if "query" not in row:
                raise UserError(f"{where}: it has no `query`; give every row one")
            try:
                problem = scorer.problem(row["query"], _product(row, present))
            except ValueError as error:
                problem = str(error)
            if problem is not None:
                raise UserError(f"{where}: {problem}; mend or remove the row")
    if rows == 0:
        raise UserError(f"{reader.path} has no rows; there is nothing to score")
    if not known:
        _check_columns(reader, scorer)
    return [name for name in wanted[1:] if name in reader.columns]


def _check_columns(reader: RowReader, scorer: Scorer) -> None:
    found = ", ".join(reader.columns) or "none"
    fields = scorer.info.template.fields
    if "query" not in reader.columns:
        raise UserError(
            f"{reader.path} has no column `query` (it has {found}); rename the column that holds the queries"
        )
    if not set(fields) & set(reader.columns):
        raise UserError(f"{reader.path} has none of the columns this model reads ({', '.join(fields)}); it has {found}")
    if "title" in fields and "title" not in reader.columns:
        raise UserError(f"{reader.path} has no column `title` (it has {found}); rename your titles' column")
    taken = [name for name in SCORE_COLUMNS if name in reader.columns]
    if taken:
        raise UserError(f"{reader.path} has a column `{taken[0]}` already; rename it, since the output adds one")


def _product(row: Mapping[str, Any], columns: list[str]) -> dict[str, Any]:
    """The product fields of a row in the types that templates read; an empty CSV cell is a field not given. Raises
    `ValueError` for text that is no price or no attributes."""
    product = {name: row.get(name) for name in columns}
    for name, value in product.items():
        if value == "":
            product[name] = None
    price, attributes = product.get("price"), product.get("attributes")
    if isinstance(price, str):
        product["price"] = _price(price)
    if isinstance(attributes, str):
        product["attributes"] = _attributes(attributes)
    return product


def _price(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"the price {text!r} is no number")
    return value


def _attributes(text: str) -> dict[str, str]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError("the attributes are text but no JSON object of names and values")
    return value


def _nullable(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]
