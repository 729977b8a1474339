"""Label one shard of groups: the plain core of labeling, without Ray.

A row that an engine cannot label keeps its place with an `error` and no logit; the groups come out in the order they
went in, so that a shard's labels can be checked against it row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from relevance_ray.calibration import logit_of_classes
from relevance_ray.engines.base import Engine, Pair
from relevance_ray.schema import LABELED_GROUP


def rows_of(groups: pa.Table) -> list[dict[str, Any]]:
    """Query and products of each group as Python values. Bytes that are no UTF-8, which Arrow reads from Parquet without
    a word, come as lone surrogates, so that they are an error of their row and not of the shard."""
    groups = groups.select(["query", "products"])
    try:
        return groups.to_pylist()
    except UnicodeDecodeError:
        schema = pa.schema([field.with_type(_as_bytes(field.type)) for field in groups.schema])
        return [_decoded(row) for row in groups.cast(schema).to_pylist()]


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_as_bytes(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_as_bytes(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_as_bytes(kind.key_type), _as_bytes(kind.item_type))
    return kind


def _decoded(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, list | tuple):
        return type(value)(_decoded(item) for item in value)
    return {key: _decoded(item) for key, item in value.items()} if isinstance(value, dict) else value


def pairs_of(groups: pa.Table) -> list[Pair]:
    """The pairs of a GROUP table, flat, group after group."""
    return [
        Pair(candidate["pair_id"], group["query"], candidate["product_id"], candidate["fields"])
        for group in rows_of(groups)
        for candidate in group["products"]
    ]


@dataclass(frozen=True)
class Known:
    """Labels of m of the n pairs of a table that need not be asked for.

    Attributes:
        rows: int64 [m], which of the pairs, rising.
        class_logits: float32 [m, K].
        logits: float32 [m].
        rationales: m reasonings, or None each.
    """

    rows: np.ndarray
    class_logits: np.ndarray
    logits: np.ndarray
    rationales: list[str | None]


def known_rows(labeled: pa.Table) -> Known:
    """What a LABELED_GROUP table knows of its own pairs: all but the failed rows."""
    flat = labeled.column("products").combine_chunks().flatten()
    rows = np.flatnonzero(flat.field("error").is_null().to_numpy(zero_copy_only=False))
    kept = flat.take(pa.array(rows))
    class_logits = kept.field("class_logits").flatten().to_numpy()
    return Known(
        rows,
        class_logits.reshape(len(rows), -1) if len(rows) else np.empty((0, 0), dtype=np.float32),
        kept.field("logit").to_numpy(),
        kept.field("rationale").to_pylist(),
    )


def label_groups(groups: pa.Table, open_engine: Callable[[], Engine], known: Known | None = None) -> pa.Table:
    """GROUP table -> LABELED_GROUP table: per product the engine's class logits, their one logit, and its error.

    Args:
        groups: a GROUP table, or a LABELED_GROUP table whose labels are dropped.
        open_engine: gives the engine; not called where every pair is known.
        known: labels to take over.
    """
    num_pairs = len(groups.column("products").combine_chunks().flatten())
    asked = np.ones(num_pairs, dtype=bool)
    if known is not None:
        asked[known.rows] = False
    errors: list[str | None] = [None] * num_pairs
    rationales: list[str | None] = [None] * num_pairs
    logits = np.zeros(num_pairs, dtype=np.float32)
    rows = np.flatnonzero(asked)
    if len(rows) or known is None:
        engine, pairs = open_engine(), pairs_of(groups)
        found = engine.label([pairs[row] for row in rows])
        class_logits = np.full((num_pairs, len(engine.gains)), np.nan, dtype=np.float32)
        class_logits[rows] = found.class_logits
        for row, error, rationale in zip(rows, found.errors, found.rationales, strict=True):
            errors[row], rationales[row] = error, rationale
        fit = np.asarray([row for row in rows if errors[row] is None], dtype=np.int64)
        logits[fit] = logit_of_classes(class_logits[fit], engine.gains)
        for row in fit[~np.isfinite(logits[fit])]:
            errors[row] = "the engine returned logits that are not finite"
    else:
        class_logits = np.full((num_pairs, known.class_logits.shape[1]), np.nan, dtype=np.float32)
    if known is not None and len(known.rows):
        class_logits[known.rows], logits[known.rows] = known.class_logits, known.logits
        for row, rationale in zip(known.rows, known.rationales, strict=True):
            rationales[row] = rationale
    return _with_labels(groups, logits, class_logits, errors, rationales)


def _with_labels(
    groups: pa.Table,
    logits: np.ndarray,
    class_logits: np.ndarray,
    errors: list[str | None],
    rationales: list[str | None],
) -> pa.Table:
    failed = np.array([error is not None for error in errors], dtype=bool)
    num_pairs, width = class_logits.shape
    values = pa.array(class_logits.reshape(-1), pa.float32())
    lists = pa.ListArray.from_arrays(np.arange(0, (num_pairs + 1) * width, width, dtype=np.int32), values)

    products = groups.column("products").combine_chunks()
    candidates = products.flatten()
    columns = {field.name: candidates.field(field.name) for field in candidates.type}
    columns["logit"] = pa.array(logits, pa.float32(), mask=failed)
    columns["class_logits"] = pc.if_else(pa.array(failed), pa.scalar(None, lists.type), lists)
    columns["rationale"] = pa.array(rationales, pa.string())
    columns["error"] = pa.array(errors, pa.string())
    struct = LABELED_GROUP.field("products").type.value_type
    flat = pa.StructArray.from_arrays([columns[field.name].cast(field.type) for field in struct], fields=list(struct))
    offsets = pc.subtract(products.offsets, products.offsets[0])
    labeled = pa.ListArray.from_arrays(offsets, flat, type=LABELED_GROUP.field("products").type)
    index = groups.schema.get_field_index("products")
    return groups.set_column(index, LABELED_GROUP.field("products"), labeled).cast(LABELED_GROUP)


def count_errors(labeled: pa.Table) -> int:
    """Failed rows of a LABELED_GROUP table."""
    flat = labeled.column("products").combine_chunks().flatten()
    return len(flat) - flat.field("error").null_count
