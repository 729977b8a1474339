"""Queries that one model ranks better than another, and worse: what a person looks at first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from relevance_ray.evaluation.judged import JudgedPairs
from relevance_ray.evaluation.measure import Predictions
from relevance_ray.evaluation.significance import TIE
from relevance_ray.metrics import ndcg
from relevance_ray.schema import LabelScale

NUM_QUERIES, NUM_PRODUCTS = 5, 3


def won_and_lost(
    pairs: JudgedPairs,
    predictions: Mapping[str, Predictions],
    scale: LabelScale,
    model: str,
    other: str,
) -> dict[str, Any] | None:
    """The queries with the largest differences of nDCG either way, and the first products of both rankings.

    Returns:
        None where one of the two was not measured, else plain JSON values::

            {"model", "other", "num_won", "num_lost", "num_equal",
             "won": [{"query", "ndcg": {name: value}, "first": {name: [{"product_id", "title", "grade"}]}}], "lost": [...]}
    """
    if model not in predictions or other not in predictions:
        return None
    values = {name: ndcg(pairs.gains, predictions[name].logits, pairs.offsets) for name in (model, other)}
    difference = values[model] - values[other]
    defined = np.flatnonzero(~np.isnan(difference))
    by_difference = defined[np.argsort(-difference[defined], kind="stable")]
    won = [query for query in by_difference[:NUM_QUERIES] if difference[query] > TIE]
    lost = [query for query in by_difference[::-1][:NUM_QUERIES] if difference[query] < -TIE]

    def example(query: int) -> dict[str, Any]:
        start, stop = pairs.offsets[query], pairs.offsets[query + 1]
        first = {}
        for name in (model, other):
            order = np.argsort(-predictions[name].logits[start:stop], kind="stable")[:NUM_PRODUCTS]
            first[name] = [
                {
                    "product_id": pairs.product_ids[start + place],
                    "title": str(pairs.products[start + place].get("title") or ""),
                    "grade": scale.grades[pairs.classes[start + place]],
                }
                for place in order
            ]
        return {
            "query": pairs.queries[start],
            "ndcg": {name: float(values[name][query]) for name in (model, other)},
            "first": first,
        }

    return {
        "model": model,
        "other": other,
        "num_won": int((difference[defined] > TIE).sum()),
        "num_lost": int((difference[defined] < -TIE).sum()),
        "num_equal": int((np.abs(difference[defined]) <= TIE).sum()),
        "won": [example(query) for query in won],
        "lost": [example(query) for query in lost],
    }
