"""All metrics of one model on judged pairs, as they are and under any resample of the queries.

Three kinds of metrics, by what a resample costs: means over queries (ranking) and sums over queries (grades, calibration)
are one matrix product; what a threshold over all pairs does (AUC, recall at a precision) is a sparse product with the pairs
of each query in each bin of scores. Values are exact; under a resample more than `MAX_BINS` distinct scores share bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from relevance_ray.evaluation.significance import Statistic, means_over_queries, sums_over_queries
from relevance_ray.metrics import (
    Ranking,
    Thresholds,
    brier_score,
    calibration_error,
    calibration_sums,
    confusion_by_query,
    count_by_query,
    macro_f1,
    micro_f1,
    pooled_figures,
)

if TYPE_CHECKING:
    from relevance_ray.evaluation.judged import Judgments

MAX_BINS = 8192


@dataclass(frozen=True)
class Predictions:
    """What one model says of n judged pairs.

    Attributes:
        logits: float64 [n], -inf where the model could not score the pair.
        classes: int64 [n] predicted class index, or None for a model without calibration (it has no F1).
        probabilities: float64 [n], P(grade >= `relevant_from`), or None likewise (it has no calibration error).
        seconds: time spent scoring, 0 where nothing was timed.
        errors: why pairs failed, the first few, each naming its query and product.
    """

    logits: np.ndarray
    classes: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    seconds: float = 0.0
    errors: tuple[str, ...] = ()

    @property
    def num_failed(self) -> int:
        return int(np.isneginf(self.logits).sum())


@dataclass(frozen=True)
class Measured:
    """m metrics of one model.

    Attributes:
        names: of the metrics.
        values: float64 [m], NaN for undefined.
        draw: the metrics under a resample of the queries.
        num_queries: int64 [m], of how many queries each tells.
        by_query: float64 [q, m] where the metrics are means of these, else None.
    """

    names: tuple[str, ...]
    values: np.ndarray
    draw: Statistic
    num_queries: np.ndarray
    by_query: np.ndarray | None = None

    @classmethod
    def means(cls, names: tuple[str, ...], by_query: np.ndarray) -> Measured:
        """Metrics that are means of values [q, m]; NaN leaves its query out."""
        draw = means_over_queries(by_query)
        values = draw(np.ones((1, len(by_query))))[0]
        return cls(names, values, draw, (~np.isnan(by_query)).sum(0), by_query)

    @classmethod
    def pooled(cls, names: tuple[str, ...], values: np.ndarray, draw: Statistic, pairs: Judgments) -> Measured:
        """Metrics of all pairs together."""
        return cls(names, values, draw, np.full(len(names), np.count_nonzero(np.diff(pairs.offsets))))


def metric_names(ks: Sequence[int], precisions: Sequence[float]) -> list[str]:
    """The metrics' names, in the order of the report."""
    return [*_ranking_names(ks), *_pooled_names(precisions), *_GRADE_NAMES, *_PROBABILITY_NAMES, *_LEVEL_NAMES]


_GRADE_NAMES = ("macro_f1", "micro_f1")
_PROBABILITY_NAMES = ("calibration_error", "brier")
_LEVEL_NAMES = ("query_calibration_error", "query_brier")


def _ranking_names(ks: Sequence[int]) -> tuple[str, ...]:
    at = [f"{name}@{k}" for name in ("ndcg", "recall") for k in ks]
    return ("ndcg", *at, "mrr", "map", "pairwise_accuracy", "kendall_tau")


def _pooled_names(precisions: Sequence[float]) -> tuple[str, ...]:
    return ("roc_auc", "pr_auc", *(f"recall@precision{precision:g}" for precision in precisions))


def measure(
    pairs: Judgments, predictions: Predictions, num_classes: int, ks: Sequence[int], precisions: Sequence[float]
) -> list[Measured]:
    """All metrics of a model; without classes there is no F1, without probabilities no calibration error.

    Args:
        pairs: n judged pairs.
        predictions: of the same n pairs.
        num_classes: of the label scale.
        ks: cutoffs of nDCG and recall.
        precisions: at which recall is measured.

    Raises:
        ValueError: another number of predictions than of judgments.
    """
    if len(predictions.logits) != pairs.num_pairs:
        raise ValueError(f"{len(predictions.logits)} predictions for {pairs.num_pairs} judged pairs")
    found = [_ranking(pairs, predictions.logits, ks), _pooled(pairs, predictions.logits, precisions)]
    if predictions.classes is not None:
        found.append(_grades(pairs, predictions.classes, num_classes))
    if predictions.probabilities is not None:
        found += [_probabilities(pairs, predictions.probabilities), _levels(pairs, predictions.probabilities)]
    return found


def _ranking(pairs: Judgments, scores: np.ndarray, ks: Sequence[int]) -> Measured:
    ranking, ideal = Ranking(scores, pairs.offsets), Ranking(pairs.gains, pairs.offsets)
    columns = [ranking.ndcg(pairs.gains, ideal=ideal)]
    columns += [ranking.ndcg(pairs.gains, k, ideal) for k in ks]
    columns += [ranking.recall(pairs.relevant, k) for k in ks]
    columns += [ranking.reciprocal_rank(pairs.relevant), ranking.average_precision(pairs.relevant)]
    columns += ranking.concordance(pairs.gains)
    return Measured.means(_ranking_names(ks), np.stack(columns, axis=1))


def _pooled(pairs: Judgments, scores: np.ndarray, precisions: Sequence[float]) -> Measured:
    from scipy.sparse import csr_matrix

    values = pooled_figures(*Thresholds(pairs.relevant, scores).sums(), precisions)
    binned = Thresholds(pairs.relevant, scores, MAX_BINS)
    cell = np.where(pairs.relevant, binned.bin, binned.bin + binned.num_bins)
    # Row q holds how many pairs of query q lie in each bin, the relevant ones before the others.
    by_query = csr_matrix(
        (np.ones(pairs.num_pairs), cell, pairs.offsets), shape=(pairs.num_queries, 2 * binned.num_bins)
    )

    def draw(counts: np.ndarray) -> np.ndarray:
        hits, misses = (by_query.T @ np.ascontiguousarray(counts.T)).reshape(2, binned.num_bins, -1)
        return pooled_figures(np.ascontiguousarray(hits.T), np.ascontiguousarray(misses.T), precisions)

    return Measured.pooled(_pooled_names(precisions), values, draw, pairs)


def _grades(pairs: Judgments, classes: np.ndarray, num_classes: int) -> Measured:
    confusion = confusion_by_query(pairs.classes, classes, num_classes, pairs.offsets)
    sums = sums_over_queries(confusion.reshape(pairs.num_queries, -1))

    def draw(counts: np.ndarray) -> np.ndarray:
        drawn = sums(counts).reshape(len(counts), num_classes, num_classes)
        return np.stack([macro_f1(drawn), micro_f1(drawn)], axis=-1)

    return Measured.pooled(_GRADE_NAMES, draw(np.ones((1, pairs.num_queries)))[0], draw, pairs)


def _probabilities(pairs: Judgments, probabilities: np.ndarray) -> Measured:
    bins = calibration_sums(pairs.relevant, probabilities, pairs.offsets)
    squares = brier_score(pairs.relevant, probabilities)
    squared = count_by_query(np.zeros(pairs.num_pairs, dtype=np.int64), 1, pairs.offsets, squares)
    sums = sums_over_queries(np.concatenate([bins.reshape(pairs.num_queries, -1), squared], axis=1))

    def draw(counts: np.ndarray) -> np.ndarray:
        drawn = sums(counts)
        of_bins = drawn[:, :-1].reshape(len(counts), *bins.shape[1:])
        number = of_bins[:, 0].sum(-1)
        brier = np.divide(drawn[:, -1], number, out=np.full(len(counts), np.nan), where=number > 0)
        return np.stack([calibration_error(of_bins), brier], axis=-1)

    return Measured.pooled(_PROBABILITY_NAMES, draw(np.ones((1, pairs.num_queries)))[0], draw, pairs)


def _levels(pairs: Judgments, probabilities: np.ndarray) -> Measured:
    """How far probabilities hold within each query: a model may be right over all pairs and wrong for each query.

    The calibration error of a query is how far the mean of its probabilities is from its share of relevant products, less
    what chance leaves of that where they are right (the mean of a half-normal): 0 is right, whatever the lengths of lists.
    """
    squares = brier_score(pairs.relevant, probabilities)
    one_cell = np.zeros(pairs.num_pairs, dtype=np.int64)
    said, seen, error = (
        count_by_query(one_cell, 1, pairs.offsets, values)[:, 0] for values in (probabilities, pairs.relevant, squares)
    )
    variance = count_by_query(one_cell, 1, pairs.offsets, probabilities * (1 - probabilities))[:, 0]
    lengths = np.diff(pairs.offsets)
    of_query = [np.abs(said - seen) - np.sqrt(2 / np.pi * variance), error]
    held = [np.divide(each, lengths, out=np.full(len(lengths), np.nan), where=lengths > 0) for each in of_query]
    return Measured.means(_LEVEL_NAMES, np.stack(held, axis=1))
