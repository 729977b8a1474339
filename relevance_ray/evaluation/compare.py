"""Models side by side on the same judged pairs, with paired intervals: numbers in, figures out.

It does not ask where the numbers come from: `ask.py` asks models, cross-validation joins the predictions of its folds.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from relevance_ray.evaluation.judged import Judgments
from relevance_ray.evaluation.measure import Measured, Predictions, measure
from relevance_ray.evaluation.options import EvaluateOptions
from relevance_ray.evaluation.significance import (
    MIN_QUERIES,
    bootstrap_p,
    holm,
    percentile_interval,
    permutations_drawn,
    randomization_test,
    resample_blocks,
)
from relevance_ray.metrics import count_by_query
from relevance_ray.schema import LabelScale

LEVEL = 0.05
"""Of every test of a difference."""


def compare_predictions(
    pairs: Judgments, predictions: Mapping[str, Predictions], scale: LabelScale, options: EvaluateOptions
) -> dict[str, Any]:
    """Every metric of every model, and of every two models their difference, with 95% paired bootstrap intervals.

    Args:
        pairs: n judged pairs.
        predictions: model name -> its predictions of the same n pairs, in the order of the report.

    Returns:
        Plain JSON values, None for undefined::

            {"num_queries", "num_pairs", "num_queries_without_gain", "num_queries_without_relevant", "num_permutations",
             "models": {name: {"num_failed", "errors", "pairs_per_second",
                               "metrics": {metric: {"value", "low", "high"}}}},
             "differences": [{"metric", "model", "other", "difference", "low", "high", "p", "p_holm"}]}

        What tells of fewer than `significance.MIN_QUERIES` queries has no interval. `p` is the randomization test's for
        metrics that are means over queries, and the bootstrap's for the others; `p_holm` holds it against the comparisons
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
        seen, number = (
            np.concatenate([getattr(part, of) for part in measured[name]]) for of in ("values", "num_queries")
        )
        drawn = np.where(number < MIN_QUERIES, np.nan, np.concatenate(draws[name])).T
        values[name] = {metric: (float(value), draw) for metric, value, draw in zip(names, seen, drawn, strict=True)}
        models[name] = {
            "num_failed": prediction.num_failed,
            "errors": list(prediction.errors),
            "pairs_per_second": pairs.num_pairs / prediction.seconds if prediction.seconds > 0 else None,
            "metrics": {metric: _with_interval("value", *found) for metric, found in values[name].items()},
        }
    p_values = _p_values(measured, options)
    differences: list[dict[str, Any]] = []
    for model, other in itertools.combinations(predictions, 2):
        for metric in (metric for metric in values[model] if metric in values[other]):
            (own, own_draw), (its, its_draw) = values[model][metric], values[other][metric]
            p_values.setdefault(metric, {}).setdefault((model, other), bootstrap_p(own - its, own_draw - its_draw))
            row: dict[str, Any] = {"metric": metric, "model": model, "other": other}
            differences.append(row | _with_interval("difference", own - its, own_draw - its_draw))
    corrected = {metric: holm(by_pair) for metric, by_pair in p_values.items()}
    for row in differences:
        of, pair = row["metric"], (row["model"], row["other"])
        row |= {"p": _or_none(p_values[of][pair]), "p_holm": _or_none(corrected[of][pair])}
    everything = np.zeros(pairs.num_pairs, dtype=np.int64)
    gain, relevant = (count_by_query(everything, 1, pairs.offsets, worth) for worth in (pairs.gains, pairs.relevant))
    return {
        "num_queries": pairs.num_queries,
        "num_pairs": pairs.num_pairs,
        "num_queries_without_gain": int((gain == 0).sum()),
        "num_queries_without_relevant": int((relevant == 0).sum()),
        "num_permutations": permutations_drawn(options.num_permutations, pairs.num_queries),
        "models": models,
        "differences": differences,
    }


def _p_values(
    measured: Mapping[str, Sequence[Measured]], options: EvaluateOptions
) -> dict[str, dict[tuple[str, str], float]]:
    """metric -> (model, other) -> p of the metrics that are means over queries."""
    by_query = {
        name: {part.names: part.by_query for part in parts if part.by_query is not None}
        for name, parts in measured.items()
    }
    found: dict[str, dict[tuple[str, str], float]] = {}
    for model, other in itertools.combinations(measured, 2):
        for metrics in by_query[model].keys() & by_query[other].keys():
            difference_by_query = by_query[model][metrics] - by_query[other][metrics]
            p_values = randomization_test(difference_by_query, options.num_permutations, options.seed)
            for metric, p in zip(metrics, p_values.tolist(), strict=True):
                found.setdefault(metric, {})[model, other] = p
    return found


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _with_interval(key: str, value: float, samples: np.ndarray) -> dict[str, float | None]:
    low, high = percentile_interval(samples)
    return {name: _or_none(v) for name, v in ((key, value), ("low", low), ("high", high))}


def is_sure(found: Mapping[str, float | None], p: float | None = None) -> bool:
    """Whether a `difference` can be told from 0: by its interval, and by its p (`p_holm` unless another is given)."""
    low, high, p = found.get("low"), found.get("high"), found.get("p_holm") if p is None else p
    return low is not None and high is not None and (low > 0 or high < 0) and p is not None and p < LEVEL


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
