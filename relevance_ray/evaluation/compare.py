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
from typing import Any

import numpy as np
import pyarrow as pa

from relevance_ray.calibration import logit_of_classes
from relevance_ray.engines.base import FolderModel
from relevance_ray.errors import UserError
from relevance_ray.evaluation.judged import JudgedPairs, Judgments, flatten, of_split
from relevance_ray.evaluation.measure import Measured, Predictions, measure, metric_names
from relevance_ray.evaluation.options import EvaluateOptions
from relevance_ray.evaluation.significance import holm, percentile_interval, randomization_test, resample_blocks
from relevance_ray.metrics import count_by_query
from relevance_ray.schema import LabelScale

PAIRS_PER_CALL = 2048
ERROR_EXAMPLES = 3


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
    calibration, classes, probabilities = model.info.calibration, None, None
    if calibration is not None:
        scored = np.isfinite(logits)
        known = np.where(scored, logits, 0.0)
        classes = np.where(scored, calibration.grade_index(known), 0)
        probabilities = np.where(scored, calibration.probability(known, model.info.scale.relevant_index), 0.0)
    return Predictions(logits, classes, probabilities, seconds, tuple(errors[:ERROR_EXAMPLES]))


def random_predictions(num_pairs: int) -> Predictions:
    """Random order, in expectation: all pairs tied, and a tie is worth the mean over its orders (see metrics.py)."""
    return Predictions(np.zeros(num_pairs))


def compare_predictions(
    pairs: Judgments, predictions: Mapping[str, Predictions], scale: LabelScale, options: EvaluateOptions
) -> dict[str, Any]:
    """Every metric of every model, and of every two models their difference, with 95% paired bootstrap intervals.

    Args:
        pairs: n judged pairs.
        predictions: model name -> its predictions of the same n pairs, in the order of the report.

    Returns:
        Plain JSON values, None for undefined::

            {"num_queries", "num_pairs", "num_queries_without_gain", "num_queries_without_relevant",
             "models": {name: {"num_failed", "errors", "pairs_per_second",
                               "metrics": {metric: {"value", "low", "high"}}}},
             "differences": [{"metric", "model", "other", "difference", "low", "high", "p", "p_holm"}]}

        `p` is the randomization test's, of metrics that are means over queries; `p_holm` holds it against the comparisons
        of all models by that metric.
    """
    measured = {
        name: measure(pairs, prediction, scale.num_classes, options.ks, options.precisions)
        for name, prediction in predictions.items()
    }
    draws: dict[str, list[np.ndarray]] = {name: [] for name in measured}
    for counts in resample_blocks(pairs.num_queries, options.num_resamples, options.seed):
        for name, parts in measured.items():
            draws[name].append(np.concatenate([part.draw(counts) for part in parts], axis=1))
    values: dict[str, dict[str, tuple[float, np.ndarray]]] = {}
    models: dict[str, Any] = {}
    for name, prediction in predictions.items():
        names = [metric for part in measured[name] for metric in part.names]
        seen, drawn = np.concatenate([part.values for part in measured[name]]), np.concatenate(draws[name]).T
        values[name] = {metric: (float(value), draw) for metric, value, draw in zip(names, seen, drawn, strict=True)}
        models[name] = {
            "num_failed": prediction.num_failed,
            "errors": list(prediction.errors),
            "pairs_per_second": pairs.num_pairs / prediction.seconds if prediction.seconds > 0 else None,
            "metrics": {metric: _with_interval("value", *found) for metric, found in values[name].items()},
        }
    p_values = _p_values(measured, options)
    differences: list[dict[str, Any]] = [
        {"metric": metric, "model": model, "other": other}
        | _with_interval(
            "difference",
            values[model][metric][0] - values[other][metric][0],
            values[model][metric][1] - values[other][metric][1],
        )
        | p_values.get((metric, model, other), {"p": None, "p_holm": None})
        for model, other in itertools.combinations(predictions, 2)
        for metric in values[model]
        if metric in values[other]
    ]
    everything = np.zeros(pairs.num_pairs, dtype=np.int64)
    gain, relevant = (count_by_query(everything, 1, pairs.offsets, worth) for worth in (pairs.gains, pairs.relevant))
    return {
        "num_queries": pairs.num_queries,
        "num_pairs": pairs.num_pairs,
        "num_queries_without_gain": int((gain == 0).sum()),
        "num_queries_without_relevant": int((relevant == 0).sum()),
        "models": models,
        "differences": differences,
    }


def _p_values(
    measured: Mapping[str, Sequence[Measured]], options: EvaluateOptions
) -> dict[tuple[str, str, str], dict[str, float | None]]:
    """(metric, model, other) -> "p" and "p_holm" of the metrics that are means over queries."""
    ranking = {name: part for name, parts in measured.items() for part in parts if part.by_query is not None}
    found: dict[str, dict[tuple[str, str], float]] = {}
    for model, other in itertools.combinations(ranking, 2):
        own, others = ranking[model].by_query, ranking[other].by_query
        assert own is not None
        assert others is not None
        p_values = randomization_test(own - others, options.num_permutations, options.seed)
        for metric, p in zip(ranking[model].names, p_values.tolist(), strict=True):
            found.setdefault(metric, {})[model, other] = p
    return {
        (metric, *key): {"p": _or_none(by_pair[key]), "p_holm": _or_none(corrected)}
        for metric, by_pair in found.items()
        for key, corrected in holm(by_pair).items()
    }


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


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
    `NAME.logit` (null where it could not score the pair), `NAME.class` and `NAME.probability` (null without
    calibration)."""
    columns: dict[str, Any] = {
        "split": [split] * pairs.num_pairs,
        "query_id": np.repeat(pairs.query_ids, np.diff(pairs.offsets)),
        "query": pairs.queries,
        "product_id": pairs.product_ids,
        "gain": pairs.gains,
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


def as_results(splits: Mapping[str, Any], scale: LabelScale, options: EvaluateOptions) -> dict[str, Any]:
    """What reports are written from: comparisons by split (or other name), with what is needed to read them."""
    return {
        "scale": scale.to_dict(),
        "metrics": metric_names(options.ks, options.precisions),
        "num_resamples": options.num_resamples,
        "seed": options.seed,
        "splits": dict(splits),
    }


def _with_interval(key: str, value: float, samples: np.ndarray) -> dict[str, float | None]:
    low, high = percentile_interval(samples)
    return {name: _or_none(v) for name, v in ((key, value), ("low", low), ("high", high))}


def difference(split: Mapping[str, Any], metric: str, model: str, other: str) -> dict[str, float | None] | None:
    """`model` minus `other` from one split's results, whichever way around it is stored: `difference`, `low`, `high`, `p`
    and `p_holm`; None where not measured."""
    for row in split["differences"]:
        found = {name: row.get(name) for name in ("difference", "low", "high", "p", "p_holm")}
        if row["metric"] == metric and (row["model"], row["other"]) == (model, other):
            return found
        if row["metric"] == metric and (row["model"], row["other"]) == (other, model):
            turned = {"difference": found["difference"], "low": found["high"], "high": found["low"]}
            return found | {name: None if value is None else -value for name, value in turned.items()}
    return None
