"""Models side by side on held-out human judgments, with paired intervals.

Scoring and measuring are apart: `predict` asks a model once and keeps flat numbers, `compare_predictions` measures
whatever numbers it is given. Cross-validation joins the predictions of its folds and calls only the second half.

A pair that a model could not score is ranked last, takes the lowest grade, and is counted as failed, with examples:
leaving it out would reward a model for refusing what is hard.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from relevance_ray.calibration import logit_of_classes
from relevance_ray.engines.base import FolderModel
from relevance_ray.errors import UserError
from relevance_ray.evaluation.judged import JudgedPairs, flatten, of_split
from relevance_ray.evaluation.options import EvaluateOptions
from relevance_ray.evaluation.significance import (
    Statistic,
    mean_over_queries,
    over_confusion,
    over_pairs,
    percentile_interval,
    resample_counts,
    value_of,
)
from relevance_ray.metrics import (
    confusion_by_query,
    macro_f1,
    micro_f1,
    ndcg,
    pairwise_accuracy,
    recall_at_precision,
    reciprocal_rank,
    roc_auc,
)
from relevance_ray.schema import LabelScale

PAIRS_PER_CALL = 2048
ERROR_EXAMPLES = 3


@dataclass(frozen=True)
class Predictions:
    """What one model says of n judged pairs.

    Attributes:
        logits: float64 [n], -inf where the model could not score the pair.
        classes: int64 [n] predicted class index, or None for a model without calibration (it has no F1).
        seconds: time spent scoring, 0 where nothing was timed.
        errors: why pairs failed, the first few, each naming its query and product.
    """

    logits: np.ndarray
    classes: np.ndarray | None = None
    seconds: float = 0.0
    errors: tuple[str, ...] = ()

    @property
    def num_failed(self) -> int:
        return int(np.isneginf(self.logits).sum())


def predict(model: FolderModel, pairs: JudgedPairs, on_progress: Callable[[int], object] | None = None) -> Predictions:
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
    calibration, classes = model.info.calibration, None
    if calibration is not None:
        scored = np.isfinite(logits)
        classes = np.where(scored, calibration.grade_index(np.where(scored, logits, 0.0)), 0)
    return Predictions(logits, classes, seconds, tuple(errors[:ERROR_EXAMPLES]))


def random_predictions(num_pairs: int) -> Predictions:
    """Random order, in expectation: all pairs tied, and a tie is worth the mean over its orders (see metrics.py)."""
    return Predictions(np.zeros(num_pairs))


def metric_names(options: EvaluateOptions) -> list[str]:
    """The metrics' names, in the order of the report."""
    recall = f"recall@precision{options.precision:g}"
    ranking = ["ndcg", *(f"ndcg@{k}" for k in options.ks), "mrr", "pairwise_accuracy"]
    return [*ranking, "roc_auc", recall, "macro_f1", "micro_f1"]


def model_statistics(
    pairs: JudgedPairs, predictions: Predictions, num_classes: int, options: EvaluateOptions
) -> dict[str, Statistic]:
    """Each metric of one model as a statistic of how often each query is drawn; without classes there is no F1."""
    scores, offsets, gains = predictions.logits, pairs.offsets, pairs.gains
    if len(scores) != pairs.num_pairs:
        raise ValueError(f"{len(scores)} predictions for {pairs.num_pairs} judged pairs")
    names = metric_names(options)
    per_query = [ndcg(gains, scores, offsets)]
    per_query += [ndcg(gains, scores, offsets, k) for k in options.ks]
    per_query += [reciprocal_rank(pairs.relevant, scores, offsets), pairwise_accuracy(gains, scores, offsets)]
    pooled = [
        partial(roc_auc, pairs.relevant, scores),
        partial(recall_at_precision, pairs.relevant, scores, options.precision),
    ]
    found: list[Statistic] = [mean_over_queries(values) for values in per_query]
    found += [over_pairs(metric, offsets) for metric in pooled]
    if predictions.classes is not None:
        confusion = confusion_by_query(pairs.classes, predictions.classes, num_classes, offsets)
        found += [over_confusion(macro_f1, confusion), over_confusion(micro_f1, confusion)]
    return dict(zip(names, found, strict=False))


def compare_predictions(
    pairs: JudgedPairs, predictions: Mapping[str, Predictions], scale: LabelScale, options: EvaluateOptions
) -> dict[str, Any]:
    """Every metric of every model, and of every two models their difference, with 95% paired bootstrap intervals.

    Args:
        pairs: n judged pairs.
        predictions: model name -> its predictions of the same n pairs, in the order of the report.

    Returns:
        Plain JSON values, None for undefined::

            {"num_queries", "num_pairs", "num_queries_without_gain",
             "models": {name: {"num_failed", "errors", "pairs_per_second",
                               "metrics": {metric: {"value", "low", "high"}}}},
             "differences": [{"metric", "model", "other", "difference", "low", "high"}]}
    """
    counts = resample_counts(pairs.num_queries, options.num_resamples, options.seed)
    models: dict[str, Any] = {}
    values: dict[str, dict[str, tuple[float, np.ndarray]]] = {}
    for name, prediction in predictions.items():
        statistics = model_statistics(pairs, prediction, scale.num_classes, options)
        values[name] = {
            metric: (value_of(statistic, pairs.num_queries), statistic(counts))
            for metric, statistic in statistics.items()
        }
        models[name] = {
            "num_failed": prediction.num_failed,
            "errors": list(prediction.errors),
            "pairs_per_second": pairs.num_pairs / prediction.seconds if prediction.seconds > 0 else None,
            "metrics": {metric: _with_interval("value", *found) for metric, found in values[name].items()},
        }
    differences = [
        {"metric": metric, "model": model, "other": other}
        | _with_interval(
            "difference",
            values[model][metric][0] - values[other][metric][0],
            values[model][metric][1] - values[other][metric][1],
        )
        for model, other in itertools.combinations(predictions, 2)
        for metric in values[model]
        if metric in values[other]
    ]
    without_gain = np.isnan(ndcg(pairs.gains, pairs.gains, pairs.offsets)).sum()
    return {
        "num_queries": pairs.num_queries,
        "num_pairs": pairs.num_pairs,
        "num_queries_without_gain": int(without_gain),
        "models": models,
        "differences": differences,
    }


def evaluate_models(
    judged: pa.Table,
    models: Mapping[str, FolderModel],
    scale: LabelScale,
    options: EvaluateOptions | None = None,
    on_progress: Callable[[int], object] | None = None,
    on_predictions: Callable[[pa.Table], object] | None = None,
) -> dict[str, Any]:
    """Score and compare models on each split of a JUDGED_GROUP table.

    Args:
        judged: human judgments, with their split.
        models: name -> model, in the order of the report; the first one is what others are compared with there.
        options: metrics, splits and intervals; "random" among `options.baselines` adds random order.
        on_progress: called with the number of pairs just scored.
        on_predictions: called once with `predictions_table` of all splits.

    Returns:
        `{"scale", "metrics", "num_resamples", "seed", "splits": {split: see compare_predictions}}`, plain JSON values.
        A split without judgments is left out.

    Raises:
        UserError: none of the splits holds a judgment, or a grade is not on the scale.
    """
    options = options or EvaluateOptions()
    splits: dict[str, Any] = {}
    tables: list[pa.Table] = []
    for split in options.splits:
        pairs = flatten(of_split(judged, split), scale)
        if not pairs.num_pairs:
            continue
        predictions = {name: predict(model, pairs, on_progress) for name, model in models.items()}
        if "random" in options.baselines:
            predictions["random"] = random_predictions(pairs.num_pairs)
        tables.append(predictions_table(split, pairs, predictions))
        splits[split] = compare_predictions(pairs, predictions, scale, options)
    if not splits:
        raise UserError(
            f"no judgment to evaluate on: none lies in split {' or '.join(options.splits)}; "
            "judge more queries, or name other splits in evaluate.splits"
        )
    if on_predictions is not None:
        on_predictions(pa.concat_tables(tables))
    return as_results(splits, scale, options)


def predictions_table(split: str, pairs: JudgedPairs, predictions: Mapping[str, Predictions]) -> pa.Table:
    """What every model said of every pair: `split`, `query_id`, `query`, `product_id`, `gain`, and for each model
    `NAME.logit` (null where it could not score the pair) and `NAME.class` (null without calibration)."""
    columns: dict[str, Any] = {
        "split": [split] * pairs.num_pairs,
        "query_id": np.repeat(pairs.query_ids, np.diff(pairs.offsets)),
        "query": pairs.queries,
        "product_id": pairs.product_ids,
        "gain": pairs.gains,
    }
    for name, found in predictions.items():
        columns[f"{name}.logit"] = pa.array(found.logits, pa.float64(), mask=np.isneginf(found.logits))
        columns[f"{name}.class"] = (
            pa.array(found.classes, pa.int64()) if found.classes is not None else pa.nulls(pairs.num_pairs, pa.int64())
        )
    return pa.table(columns)


def as_results(splits: Mapping[str, Any], scale: LabelScale, options: EvaluateOptions) -> dict[str, Any]:
    """What reports are written from: comparisons by split (or other name), with what is needed to read them."""
    return {
        "scale": scale.to_dict(),
        "metrics": metric_names(options),
        "num_resamples": options.num_resamples,
        "seed": options.seed,
        "splits": dict(splits),
    }


def _with_interval(key: str, value: float, samples: np.ndarray) -> dict[str, float | None]:
    low, high = percentile_interval(samples)
    return {name: None if np.isnan(v) else float(v) for name, v in ((key, value), ("low", low), ("high", high))}


def difference(split: Mapping[str, Any], metric: str, model: str, other: str) -> dict[str, float | None] | None:
    """`model` minus `other` from one split's results, whichever way around it is stored; None where not measured."""
    names: Sequence[str] = ("difference", "low", "high")
    for row in split["differences"]:
        if row["metric"] == metric and (row["model"], row["other"]) == (model, other):
            return {name: row[name] for name in names}
        if row["metric"] == metric and (row["model"], row["other"]) == (other, model):
            low, high = row["high"], row["low"]
            turned = (row["difference"], low, high)
            return {name: None if v is None else -v for name, v in zip(names, turned, strict=True)}
    return None
