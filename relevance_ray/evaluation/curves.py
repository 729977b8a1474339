"""What a report draws of one model: its precision-recall curve and how far its probabilities hold."""

from __future__ import annotations

from typing import Any

import numpy as np

from relevance_ray.evaluation.judged import Judgments
from relevance_ray.evaluation.measure import Predictions
from relevance_ray.evaluation.significance import share_interval
from relevance_ray.metrics import Thresholds, calibration_sums

MAX_POINTS = 200


def curves(pairs: Judgments, predictions: Predictions) -> dict[str, Any]:
    """Plain JSON values::

        {"pr_curve": {"recall": [p], "precision": [p]},
         "reliability": {"probability": [b], "relevant": [b], "low": [b], "high": [b], "pairs": [b]}}

    The curve goes by falling threshold, in at most `MAX_POINTS`, and is None without a relevant pair; the bins are those
    that hold pairs, and None for a model without calibration. Low and high are the interval of the share that is relevant
    (`significance.share_interval`), None where too few queries tell of it.
    """
    return {
        "pr_curve": _pr_curve(pairs, predictions.logits),
        "reliability": None if predictions.probabilities is None else _reliability(pairs, predictions.probabilities),
    }


def _pr_curve(pairs: Judgments, scores: np.ndarray) -> dict[str, list[float | None]] | None:
    hits, misses = Thresholds(pairs.relevant, scores).sums()
    found, accepted = np.cumsum(hits), np.cumsum(hits + misses)
    if not hits.sum():
        return None
    kept = np.unique(np.linspace(0, len(found) - 1, min(len(found), MAX_POINTS)).round().astype(int))
    return {"recall": _rounded(found[kept] / found[-1]), "precision": _rounded(found[kept] / accepted[kept])}


def _reliability(pairs: Judgments, probabilities: np.ndarray) -> dict[str, list[float | None]]:
    by_query = calibration_sums(pairs.relevant, probabilities, pairs.offsets)
    count, probability, relevant = by_query.sum(0)
    low, high = share_interval(by_query[:, 2], by_query[:, 0])
    kept = count > 0
    return {
        "probability": _rounded(probability[kept] / count[kept]),
        "relevant": _rounded(relevant[kept] / count[kept]),
        "low": _rounded(low[kept]),
        "high": _rounded(high[kept]),
        "pairs": _rounded(count[kept]),
    }


def _rounded(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 4) for value in values]
