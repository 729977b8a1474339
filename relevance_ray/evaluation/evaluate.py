"""Models on each split of human judgments: asked, compared, and compared again on slices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from relevance_ray.errors import UserError
from relevance_ray.evaluation.ask import Asked, predict, predictions_table, random_predictions
from relevance_ray.evaluation.compare import compare_predictions
from relevance_ray.evaluation.curves import curves
from relevance_ray.evaluation.examples import won_and_lost
from relevance_ray.evaluation.judged import flatten, of_split
from relevance_ray.evaluation.measure import metric_names
from relevance_ray.evaluation.options import EvaluateOptions
from relevance_ray.evaluation.slices import SliceContext, find_slices, slice_reports
from relevance_ray.schema import LabelScale

SLICED = ("student", "teacher")
"""The models that slices are measured of."""


def evaluate_models(
    judged: pa.Table,
    models: Mapping[str, Asked],
    scale: LabelScale,
    options: EvaluateOptions | None = None,
    on_progress: Callable[[int], object] | None = None,
    on_predictions: Callable[[pa.Table], object] | None = None,
    context: SliceContext | None = None,
) -> dict[str, Any]:
    """Score and compare models on each split of a JUDGED_GROUP table.

    Args:
        judged: human judgments, with their split.
        models: name -> model, in the order of the report; the first one is what others are compared with there.
        options: metrics, splits and intervals; "random" among `options.baselines` adds random order.
        on_progress: called with the number of pairs just scored.
        on_predictions: called once with `predictions_table` of all splits.
        context: what slices need to know; None leaves them out.

    Returns:
        `{"scale", "metrics", "num_resamples", "seed", "splits": {split: see compare_predictions}}`, plain JSON values;
        each model also has what `curves.curves` gives, each split `examples` (`examples.won_and_lost`), and with a
        `context` `slices` (`slices.slice_reports`, of the student and the teacher). A split without judgments is left
        out.

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
        for name, found in predictions.items():
            splits[split]["models"][name] |= curves(pairs, found)
        splits[split]["examples"] = won_and_lost(pairs, predictions, scale)
        if context is not None:
            slices = find_slices(pairs, context, options.slices)
            compared = {name: predictions[name] for name in SLICED if name in predictions}
            splits[split]["slices"] = slice_reports(pairs, compared, slices, scale, options)
    if not splits:
        raise UserError(
            f"no judgment to evaluate on: none lies in split {' or '.join(options.splits)}; "
            "judge more queries, or name other splits in evaluate.splits"
        )
    if on_predictions is not None:
        on_predictions(pa.concat_tables(tables))
    return as_results(splits, scale, options)


def as_results(splits: Mapping[str, Any], scale: LabelScale, options: EvaluateOptions) -> dict[str, Any]:
    """What reports are written from: comparisons by split (or other name), with what is needed to read them."""
    return {
        "scale": scale.to_dict(),
        "metrics": metric_names(options.ks, options.precisions),
        "num_resamples": options.num_resamples,
        "seed": options.seed,
        "splits": dict(splits),
    }
