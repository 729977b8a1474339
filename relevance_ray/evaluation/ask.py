"""What models say of judged pairs: each is asked once, and flat numbers are kept.

A pair that a model could not score is ranked last, takes the lowest grade, and is counted as failed, with examples:
leaving it out would reward a model for refusing what is hard.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from relevance_ray.calibration import Calibration, logit_of_classes
from relevance_ray.engines.base import Labels
from relevance_ray.evaluation.judged import JudgedPairs
from relevance_ray.evaluation.measure import Predictions
from relevance_ray.schema import LabelScale

PAIRS_PER_CALL = 2048
ERROR_EXAMPLES = 3


class Asked(Protocol):
    """What can be asked about pairs: a model, or a file of scores.

    Attributes:
        gains: of its K class logits.
        scale: what its calibration's grades mean.
        calibration: logit to class probabilities, if it has one.
    """

    @property
    def gains(self) -> tuple[float, ...]: ...

    @property
    def scale(self) -> LabelScale: ...

    @property
    def calibration(self) -> Calibration | None: ...

    def label_rows(self, queries: Sequence[str], products: Sequence[Mapping[str, Any]]) -> Labels: ...


def predict(model: Asked, pairs: JudgedPairs, on_progress: Callable[[int], object] | None = None) -> Predictions:
    """Ask a model about all judged pairs, in blocks of whole queries; `on_progress` hears of each block's pairs."""
    logits = np.full(pairs.num_pairs, -np.inf)
    errors: list[str] = []
    started = time.perf_counter()
    start = 0
    for stop in pairs.offsets[1:].tolist():
        if stop == start or (stop - start < PAIRS_PER_CALL and stop != pairs.num_pairs):
            continue
        labels = model.label_rows(pairs.queries[start:stop], pairs.products[start:stop])
        found = logit_of_classes(labels.class_logits, model.gains)
        logits[start:stop] = np.where(np.isnan(found), -np.inf, found)
        errors += [
            f"query {pairs.queries[i]!r}, product {pairs.product_ids[i]!r}: {error}"
            for i, error in enumerate(labels.errors, start)
            if error is not None
        ]
        if on_progress is not None:
            on_progress(stop - start)
        start = stop
    seconds = time.perf_counter() - started
    calibration, classes, probabilities = model.calibration, None, None
    if calibration is not None:
        scored = np.isfinite(logits)
        known = np.where(scored, logits, 0.0)
        classes = np.where(scored, calibration.grade_index(known), 0)
        probabilities = np.where(scored, calibration.probability(known, model.scale.relevant_index), 0.0)
    return Predictions(logits, classes, probabilities, seconds, tuple(errors[:ERROR_EXAMPLES]))


def random_predictions(num_pairs: int) -> Predictions:
    """Random order, in expectation: all pairs tied, and a tie is worth the mean over its orders (see metrics.py)."""
    return Predictions(np.zeros(num_pairs))


def predictions_table(
    split: str, pairs: JudgedPairs, predictions: Mapping[str, Predictions], beside: Mapping[str, pa.Array]
) -> pa.Table:
    """What every model said of every pair: `split`, `query_id`, `query`, `product_id`, `title`, `gain`, `true_class`, the
    columns `beside`, and for each model `NAME.logit` (null where it could not score the pair), `NAME.class` and
    `NAME.probability` (null without calibration)."""
    columns: dict[str, Any] = {
        "split": [split] * pairs.num_pairs,
        "query_id": np.repeat(pairs.query_ids, np.diff(pairs.offsets)),
        "query": pairs.queries,
        "product_id": pairs.product_ids,
        "title": [str(product.get("title") or "") for product in pairs.products],
        "gain": pairs.gains,
        "true_class": pairs.classes,
        **beside,
    }
    for name, found in predictions.items():
        columns[f"{name}.logit"] = pa.array(found.logits, pa.float64(), mask=np.isneginf(found.logits))
        for column, values, kind in (
            ("class", found.classes, pa.int64()),
            ("probability", found.probabilities, pa.float64()),
        ):
            there = pa.nulls(pairs.num_pairs, kind) if values is None else pa.array(values, kind)
            columns[f"{name}.{column}"] = there
    return pa.table(columns)
