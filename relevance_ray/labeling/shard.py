"""Label one shard of groups: the plain core of labeling, without Ray.

A row that an engine cannot label keeps its place with an `error` and no logit; the groups come out in the order they
went in, so that a shard's labels can be checked against it row by row.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from relevance_ray.calibration import logit_of_classes
from relevance_ray.engines.base import Engine, Labels, Pair
from relevance_ray.schema import LABELED_GROUP


def pairs_of(groups: pa.Table) -> list[Pair]:
    """The pairs of a GROUP table, flat, group after group."""
    return [
        Pair(candidate["pair_id"], group["query"], candidate["product_id"], candidate["fields"])
        for group in groups.select(["query", "products"]).to_pylist()
        for candidate in group["products"]
    ]


def label_groups(groups: pa.Table, engine: Engine) -> pa.Table:
    """GROUP table -> LABELED_GROUP table: per product the engine's class logits, their one logit, and its error."""
    return _with_labels(groups, engine.label(pairs_of(groups)), engine.gains)


def relabel_failed(labeled: pa.Table, engine: Engine) -> pa.Table:
    """A LABELED_GROUP table with its failed rows labeled anew by the same engine, and all others as they were."""
    flat = labeled.column("products").combine_chunks().flatten()
    failed = np.flatnonzero(flat.field("error").is_valid().to_numpy(zero_copy_only=False))
    pairs = pairs_of(labeled)
    found = engine.label([pairs[row] for row in failed])
    width = found.class_logits.shape[1]
    class_logits = np.full((len(pairs), width), np.nan, dtype=np.float32)
    kept = np.ones(len(pairs), dtype=bool)
    kept[failed] = False
    class_logits[kept] = flat.field("class_logits").drop_null().flatten().to_numpy().reshape(-1, width)
    class_logits[failed] = found.class_logits
    errors: list[str | None] = [None] * len(pairs)
    rationales = flat.field("rationale").to_pylist()
    for row, error, rationale in zip(failed, found.errors, found.rationales, strict=True):
        errors[row], rationales[row] = error, rationale
    return _with_labels(labeled, Labels(class_logits, errors, rationales), engine.gains)


def _with_labels(groups: pa.Table, labels: Labels, gains: tuple[float, ...]) -> pa.Table:
    num_pairs = len(labels.errors)
    failed = np.array([error is not None for error in labels.errors], dtype=bool)
    logit = np.zeros(num_pairs, dtype=np.float32)
    logit[~failed] = logit_of_classes(labels.class_logits[~failed], gains)
    not_finite = ~failed & ~np.isfinite(logit)
    errors = list(labels.errors)
    for row in np.flatnonzero(not_finite):
        errors[row] = "the engine returned logits that are not finite"
    failed |= not_finite

    width = labels.class_logits.shape[1]
    values = pa.array(labels.class_logits.reshape(-1), pa.float32())
    class_logits = pa.ListArray.from_arrays(np.arange(0, (num_pairs + 1) * width, width, dtype=np.int32), values)
    class_logits = pc.if_else(pa.array(failed), pa.scalar(None, class_logits.type), class_logits)

    products = groups.column("products").combine_chunks()
    candidates = products.flatten()
    columns = {field.name: candidates.field(field.name) for field in candidates.type}
    columns["logit"] = pa.array(logit, pa.float32(), mask=failed)
    columns["class_logits"] = class_logits
    columns["rationale"] = pa.array(labels.rationales, pa.string())
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
