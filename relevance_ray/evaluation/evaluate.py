"""Models on each split of human judgments: asked, compared, and compared again on slices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from relevance_ray.errors import UserError
from relevance_ray.evaluation.ask import Asked, predict, predictions_table, random_predictions
from relevance_ray.evaluation.compare import compare_predictions
from relevance_ray.evaluation.curves import curves
from relevance_ray.evaluation.examples import won_and_lost
from relevance_ray.evaluation.judged import JudgedPairs, flatten, of_split
from relevance_ray.evaluation.measure import Predictions, metric_names
from relevance_ray.evaluation.options import EvaluateOptions
from relevance_ray.evaluation.slices import Slice, SliceContext, find_slices, slice_columns, slice_reports
from relevance_ray.schema import LabelScale, normalize_query


def evaluate_models(
    judged: pa.Table,
    models: Mapping[str, Asked],
    scale: LabelScale,
    options: EvaluateOptions | None = None,
    on_progress: Callable[[int], object] | None = None,
    on_predictions: Callable[[pa.Table], object] | None = None,
    context: SliceContext | None = None,
    model: str = "student",
    others: Sequence[str] = ("teacher",),
) -> dict[str, Any]:
    """Score and compare models on each split of a JUDGED_GROUP table.

    Args:
        judged: human judgments, with their split.
        models: name -> model, in the order of the report.
        options: metrics, splits and intervals; "random" among `options.baselines` adds random order.
        on_progress: called with the number of pairs just scored.
        on_predictions: called once with `predictions_table` of all splits.
        context: what slices need to know; None leaves them out.
        model: the one that the report is about.
        others: those that it is held against in words, by slice and by example, as far as they are measured.

    Returns:
        What `as_results` gives of the splits. A split without judgments is left out.

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
        slices = [] if context is None else find_slices(pairs, context, options.slices)
        tables.append(predictions_table(split, pairs, predictions, slice_columns(slices, pairs.num_pairs)))
        splits[split] = report_split(pairs, predictions, slices, scale, options, model, others)
        for name, asked in models.items():
            splits[split]["models"][name]["calibration"] = asked.calibration and asked.calibration.method
    if not splits:
        raise UserError(
            f"no judgment to evaluate on: none lies in split {' or '.join(options.splits)}; "
            "judge more queries, or name other splits in evaluate.splits"
        )
    if on_predictions is not None:
        on_predictions(pa.concat_tables(tables))
    return as_results(splits, scale, options, model, others)


def report_split(
    pairs: JudgedPairs,
    predictions: Mapping[str, Predictions],
    slices: Sequence[Slice],
    scale: LabelScale,
    options: EvaluateOptions,
    model: str,
    others: Sequence[str],
) -> dict[str, Any]:
    """What is told of one split: `compare_predictions`, to each model what `curves.curves` gives, and of the model against
    the others `examples` (`examples.won_and_lost`, one for each other) and `slices` (`slices.slice_reports`); and
    `num_queries_of_a_known_text`, those whose text another query_id before them has."""
    split = compare_predictions(pairs, predictions, scale, options)
    texts = set(map(normalize_query, set(pairs.queries)))
    split["num_queries_of_a_known_text"] = int(np.count_nonzero(np.diff(pairs.offsets))) - len(texts)
    for name, found in predictions.items():
        split["models"][name] |= curves(pairs, found)
    examples = (won_and_lost(pairs, predictions, scale, model, other) for other in others)
    split["examples"] = [found for found in examples if found is not None]
    sliced = {name: predictions[name] for name in (model, *others) if name in predictions}
    split["slices"] = slice_reports(pairs, sliced, slices, scale, options, model)
    return split


def as_results(
    splits: Mapping[str, Any],
    scale: LabelScale,
    options: EvaluateOptions,
    model: str = "student",
    others: Sequence[str] = ("teacher",),
) -> dict[str, Any]:
    """What reports are written from, plain JSON values: what was found of each split (or other part), which model it is
    about and which others that is held against, and what is needed to read the figures."""
    return {
        "model": model,
        "others": list(others),
        "scale": scale.to_dict(),
        "ks": options.ks,
        "precisions": options.precisions,
        "metrics": metric_names(options.ks, options.precisions),
        "num_resamples": options.num_resamples,
        "num_permutations": options.num_permutations,
        "seed": options.seed,
        "splits": dict(splits),
    }
