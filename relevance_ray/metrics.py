"""Ranking and classification metrics on human judgments: numpy in, numpy out.

Everything is flat: `n` pairs of `q` queries lie one query after another, and `offsets` [q + 1] says where each begins,
so a metric of ten thousand queries is a few array operations. The price is a sort of all pairs at once.

Two conventions, the same for every metric here:

- **Ties** are worth the mean over all orders of the tied pairs (McSherry & Najork, "Computing information retrieval
  performance measures efficiently in the presence of tied scores", ECIR 2008; what scikit-learn does too). File order
  never decides, and a constant score is worth exactly what random order is worth on average.
- **Undefined** is NaN: nDCG of a query without any gain, pairwise accuracy of one whose judgments are all equal. Means
  leave those queries out; trec_eval would count such an nDCG as 0, which lowers all models alike. A query whose grades
  are all the same and above 0 has an nDCG of 1 for every model, as in the common tools.

Scores may be -inf (a pair that a model could not score comes last) but not NaN.
"""

from __future__ import annotations

import itertools

import numpy as np


def group_offsets(lengths: np.ndarray | list[int]) -> np.ndarray:
    """Sizes of the queries [q] to offsets, int64 [q + 1]."""
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))])


def _ranked(scores: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sort each query's pairs by falling score.

    Returns `order` [n]; and for the sorted pairs their `position` within the query (from 0) [n], their tie group's
    `tie_index` (rising over the whole table) [n], and `tie_start`, each tie group's first sorted pair [t].
    """
    scores = np.asarray(scores, dtype=np.float64)
    offsets = np.asarray(offsets)
    if len(scores) != offsets[-1]:
        raise ValueError(f"{len(scores)} scores for offsets that end at {offsets[-1]}")
    if np.isnan(scores).any():
        raise ValueError("scores hold NaN; give -inf to a pair that could not be scored")
    query = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    order = np.lexsort((-scores, query))
    position = np.arange(len(scores)) - offsets[query]
    new_tie = position == 0
    new_tie[1:] |= scores[order][1:] != scores[order][:-1]
    return order, position, np.cumsum(new_tie) - 1, np.flatnonzero(new_tie)


def _sum_by_query(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """[n] -> [q]; 0 for an empty query."""
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return total[offsets[1:]] - total[offsets[:-1]]


def _dcg(gains: np.ndarray, scores: np.ndarray, offsets: np.ndarray, k: int | None) -> np.ndarray:
    order, position, tie, tie_start = _ranked(scores, offsets)
    discount = 1.0 / np.log2(position + 2.0)
    if k is not None:
        discount[position >= k] = 0.0
    if not len(order):
        return np.zeros(len(offsets) - 1)
    mean_discount = np.add.reduceat(discount, tie_start) / np.bincount(tie)
    return _sum_by_query(gains[order] * mean_discount[tie], offsets)


def ndcg(gains: np.ndarray, scores: np.ndarray, offsets: np.ndarray, k: int | None = None) -> np.ndarray:
    """Normalized discounted cumulative gain of each query (Järvelin & Kekäläinen, TOIS 2002), linear in the gain.

    `DCG@k = sum over positions i < k of gain_i / log2(i + 2)`, divided by that of the best order; equal scores
    share the mean of their discounts.

    Args:
        gains: [n] gain of each pair, >= 0.
        scores: [n] what the model ranks by, higher is better.
        offsets: [q + 1].
        k: the cutoff; None for the whole list.

    Returns:
        float64 [q], NaN for a query without positive gain.
    """
    gains = np.asarray(gains, dtype=np.float64)
    ideal = _dcg(gains, gains, offsets, k)
    actual = _dcg(gains, scores, offsets, k)
    return np.divide(actual, ideal, out=np.full(len(ideal), np.nan), where=ideal > 0)


def pairwise_accuracy(gains: np.ndarray, scores: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Share of each query's pairs of products with different gains that are in the right order; a tie counts half.

    Returns float64 [q], NaN where all of a query's gains are equal. Quadratic in the products of one query, as the
    definition is: a few hundred each at most in judged data.
    """
    gains, scores = np.asarray(gains, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    out = np.full(len(offsets) - 1, np.nan)
    for query, (start, stop) in enumerate(itertools.pairwise(offsets)):
        better = gains[start:stop, None] > gains[None, start:stop]
        if better.any():
            s = scores[start:stop]
            won = (s[:, None] > s[None, :]) + 0.5 * (s[:, None] == s[None, :])
            out[query] = won[better].mean()
    return out


def reciprocal_rank(relevant: np.ndarray, scores: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """1 / rank of the first relevant product of each query, in expectation over the orders of tied products.

    Returns float64 [q], NaN for a query without a relevant product. Its mean is MRR.
    """
    relevant = np.asarray(relevant, dtype=bool)
    order, position, tie, tie_start = _ranked(scores, offsets)
    tie_size = np.bincount(tie, minlength=len(tie_start))
    tie_relevant = np.bincount(tie, weights=relevant[order], minlength=len(tie_start)).astype(int)
    query_of_tie = np.searchsorted(offsets, tie_start, side="right") - 1
    out = np.full(len(offsets) - 1, np.nan)
    candidates = np.flatnonzero(tie_relevant)
    _, first = np.unique(query_of_tie[candidates], return_index=True)
    for group in candidates[first]:
        size, hits, above = tie_size[group], tie_relevant[group], position[tie_start[group]]
        expected, none_so_far = 0.0, 1.0
        for j in range(size - hits + 1):  # the first relevant one stands at the j-th place of its tie group
            expected += none_so_far * hits / (size - j) / (above + j + 1)
            none_so_far *= (size - hits - j) / (size - j)
        out[query_of_tie[group]] = expected
    return out


def _threshold_sums(
    relevant: np.ndarray, scores: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Weight of the relevant and of the other pairs at each distinct score, highest first: two [..., t]."""
    relevant = np.asarray(relevant, dtype=bool)
    weights = np.ones(len(relevant)) if weights is None else np.asarray(weights, dtype=np.float64)
    if weights.shape[-1] != len(relevant):
        raise ValueError(f"weights of {weights.shape[-1]} pairs for {len(relevant)} judgments")
    order, _, _, tie_start = _ranked(scores, np.array([0, len(relevant)]))
    if not len(order):
        return np.zeros((*weights.shape[:-1], 0)), np.zeros((*weights.shape[:-1], 0))
    hits = np.add.reduceat(np.where(relevant[order], weights[..., order], 0.0), tie_start, axis=-1)
    every = np.add.reduceat(weights[..., order], tie_start, axis=-1)
    return hits, every - hits


def roc_auc(relevant: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Chance that a relevant pair scores above one that is not, all queries pooled; a tie counts half.

    Args:
        relevant: bool [n].
        scores: [n].
        weights: [..., n], for example the counts of bootstrap resamples; None for 1 each.

    Returns:
        float64 [...], NaN where only one of the two classes has weight.
    """
    hits, misses = _threshold_sums(relevant, scores, weights)
    misses_below = misses.sum(-1, keepdims=True) - np.cumsum(misses, axis=-1)
    won = (hits * (misses_below + 0.5 * misses)).sum(-1)
    possible = hits.sum(-1) * misses.sum(-1)
    return np.divide(won, possible, out=np.full(np.shape(won), np.nan), where=possible > 0)


def recall_at_precision(
    relevant: np.ndarray, scores: np.ndarray, precision: float = 0.9, weights: np.ndarray | None = None
) -> np.ndarray:
    """The highest recall of any threshold on the score whose precision is at least `precision`, all queries pooled.

    Tied pairs pass a threshold together. 0 where no threshold is that precise.

    Args, shapes and NaN (no relevant pair) as in `roc_auc`.
    """
    hits, misses = _threshold_sums(relevant, scores, weights)
    true_positives = np.cumsum(hits, axis=-1)
    predicted = true_positives + np.cumsum(misses, axis=-1)
    # a hair of slack, so that 9 of 10 is .9 whatever the rounding of weights
    precise = (true_positives >= (precision - 1e-12) * predicted) & (predicted > 0)
    best = np.max(np.where(precise, true_positives, 0.0), axis=-1, initial=0.0)
    total = hits.sum(-1)
    return np.divide(best, total, out=np.full(np.shape(total), np.nan), where=total > 0)


def confusion_by_query(
    true_class: np.ndarray, predicted_class: np.ndarray, num_classes: int, offsets: np.ndarray
) -> np.ndarray:
    """Counts, float64 [q, K, K]: of each query, its pairs of a true class (rows) given a predicted class (columns)."""
    query = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    out = np.zeros((len(offsets) - 1, num_classes, num_classes))
    np.add.at(out, (query, np.asarray(true_class), np.asarray(predicted_class)), 1.0)
    return out


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """Mean F1 of the classes of confusion matrices [..., K, K] -> [...].

    As scikit-learn's `f1_score(average="macro")`: a class neither true nor predicted anywhere is left out, one that is
    never right counts 0.
    """
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    support = confusion.sum(-1) + confusion.sum(-2)
    f1 = np.divide(2.0 * right, support, out=np.zeros_like(support), where=support > 0)
    present = (support > 0).sum(-1)
    return np.divide(f1.sum(-1), present, out=np.full(np.shape(present), np.nan), where=present > 0)


def micro_f1(confusion: np.ndarray) -> np.ndarray:
    """Micro F1 of confusion matrices [..., K, K] -> [...]: with one grade a pair, the share of right grades."""
    right = np.trace(confusion, axis1=-2, axis2=-1)
    total = confusion.sum((-2, -1))
    return np.divide(right, total, out=np.full(np.shape(total), np.nan), where=total > 0)
