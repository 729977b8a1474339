"""Ranking and classification metrics on human judgments: numpy in, numpy out.

Everything is flat: `n` pairs of `q` queries lie one query after another, and `offsets` [q + 1] says where each begins. A
`Ranking` sorts one model's scores within the queries once, `Thresholds` sorts them over all pairs once; every metric then is
a few passes over arrays, so ten million pairs take seconds. Functions of the common names wrap them for single use.

Two conventions, the same for every metric here:

- **Ties** are worth the mean over all orders of the tied pairs (McSherry & Najork, "Computing information retrieval
  performance measures efficiently in the presence of tied scores", ECIR 2008; what scikit-learn does too). File order
  never decides, and a constant score is worth exactly what random order is worth on average. (trec_eval orders ties by
  document id; without ties all metrics equal it.)
- **Undefined** is NaN: nDCG of a query without any gain, MRR, MAP and recall of one without a relevant product, pairwise
  accuracy and Kendall's tau of one whose judgments are all equal. Means leave those queries out; trec_eval would count them
  as 0, which lowers all models alike. A query whose grades are all the same and above 0 has an nDCG of 1 for every model,
  as in the common tools.

Scores may be -inf (a pair that a model could not score comes last) but not NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

MAX_BLOCK_VALUES = 4_000_000
"""Cells of the largest array that a metric builds beside its inputs."""
NUM_BINS = 15
"""Bins of the calibration error, as in Guo et al."""


def group_offsets(lengths: np.ndarray | list[int]) -> np.ndarray:
    """Sizes of the queries [q] to offsets, int64 [q + 1]."""
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))])


class Ranking:
    """The order of each query's pairs under one model, sorted once.

    Args:
        scores: [n] what the model ranks by, higher is better.
        offsets: [q + 1].

    Raises:
        ValueError: NaN among the scores, or a number of them that the offsets do not end at.
    """

    def __init__(self, scores: np.ndarray, offsets: np.ndarray) -> None:
        self.scores, self.offsets = np.asarray(scores, dtype=np.float64), np.asarray(offsets)
        if len(self.scores) != self.offsets[-1]:
            raise ValueError(f"{len(self.scores)} scores for offsets that end at {self.offsets[-1]}")
        if np.isnan(self.scores).any():
            raise ValueError("scores hold NaN; give -inf to a pair that could not be scored")
        self._order = np.empty(len(self.scores), dtype=np.int64)
        for rows in _equal_lengths(self.offsets):
            sorted_rows = np.argsort(-self.scores[rows], axis=1, kind="stable")
            self._order[rows] = np.take_along_axis(rows, sorted_rows, axis=1)
        lengths = np.diff(self.offsets)
        self._position = np.arange(len(self.scores)) - np.repeat(self.offsets[:-1], lengths)
        new_tie = self._position == 0
        ranked = self.scores[self._order]
        new_tie[1:] |= ranked[1:] != ranked[:-1]
        self._tie_start = np.flatnonzero(new_tie)
        self._tie_size = np.diff(np.append(self._tie_start, len(self.scores)))

    @property
    def num_queries(self) -> int:
        return len(self.offsets) - 1

    def _by_tie(self, values: np.ndarray) -> np.ndarray:
        """Sums [t] over each group of ties of values [n] in ranked order."""
        return np.add.reduceat(values, self._tie_start) if len(values) else np.zeros(0)

    def _by_query(self, values: np.ndarray) -> np.ndarray:
        """Sums [q] over each query of values [n] in ranked order; 0 for an empty query."""
        out = np.zeros(self.num_queries)
        held = np.diff(self.offsets) > 0
        if held.any():  # each by itself: what a difference of running sums rounds away hangs on the queries before
            out[held] = np.add.reduceat(values, self.offsets[:-1][held], dtype=np.float64)
        return out

    def _tie_means(self, values: np.ndarray) -> np.ndarray:
        """[n] of values [n] in ranked order, each replaced by the mean of its group of ties."""
        if len(self._tie_start) == len(values):
            return values
        return np.repeat(self._by_tie(values) / self._tie_size, self._tie_size)

    def _dcg(self, gains: np.ndarray, k: int | None) -> np.ndarray:
        discount = 1.0 / np.log2(np.arange(self._position.max(initial=0) + 1) + 2.0)
        if k is not None:
            discount[k:] = 0.0
        return self._by_query(gains[self._order] * self._tie_means(discount[self._position]))

    def ndcg(self, gains: np.ndarray, k: int | None = None, ideal: Ranking | None = None) -> np.ndarray:
        """Normalized discounted cumulative gain of each query (Järvelin & Kekäläinen, TOIS 2002), linear in the gain.

        `DCG@k = sum over positions i < k of gain_i / log2(i + 2)`, divided by that of the best order; equal scores share
        the mean of their discounts.

        Args:
            gains: [n] gain of each pair, >= 0.
            k: the cutoff; None for the whole list.
            ideal: the ranking by the gains, where it is at hand.

        Returns:
            float64 [q], NaN for a query without positive gain.
        """
        gains = np.asarray(gains, dtype=np.float64)
        best = (ideal or Ranking(gains, self.offsets))._dcg(gains, k)
        return _ratio(self._dcg(gains, k), best)

    def reciprocal_rank(self, relevant: np.ndarray) -> np.ndarray:
        """1 / rank of the first relevant product of each query, in expectation over the orders of tied products.

        Returns float64 [q], NaN for a query without a relevant product. Its mean is MRR.
        """
        hits = self._by_tie(self._ranked(relevant))
        query = np.searchsorted(self.offsets, self._tie_start, side="right") - 1
        candidates = np.flatnonzero(hits)
        owners, first = np.unique(query[candidates], return_index=True)
        groups = candidates[first]
        above, size, hits = self._position[self._tie_start[groups]], self._tie_size[groups], hits[groups]
        found, none_so_far = np.zeros(len(groups)), np.ones(len(groups))
        for j in range(int((size - hits).max(initial=-1)) + 1):  # the first one stands at the j-th place of its ties
            here = size - hits >= j
            left = np.where(here, size - j, 1)
            found += np.where(here, none_so_far * hits / left / (above + j + 1), 0.0)
            none_so_far = np.where(here, none_so_far * (size - hits - j) / left, 0.0)
        out = np.full(self.num_queries, np.nan)
        out[owners] = found
        return out

    def average_precision(self, relevant: np.ndarray) -> np.ndarray:
        """Mean, over each query's relevant products, of the precision at their ranks; in expectation over ties.

        Returns float64 [q], NaN for a query without a relevant product. Its mean is MAP.
        """
        ranked = self._ranked(relevant)
        total = np.concatenate([[0.0], np.cumsum(ranked)])
        start = np.repeat(self._tie_start, self._tie_size)
        size, hits = np.repeat(self._tie_size, self._tie_size), np.repeat(self._by_tie(ranked), self._tie_size)
        before = total[start] - np.repeat(total[self.offsets[:-1]], np.diff(self.offsets))
        place = np.arange(len(ranked)) - start
        # A relevant product at this place of its ties has so many of the others before it, on average.
        others = np.where(size > 1, place * (hits - 1) / np.maximum(size - 1, 1), 0.0)
        precision = (before + 1 + others) / (self._position + 1)
        return _ratio(self._by_query(hits / size * precision), self._by_query(ranked))

    def recall(self, relevant: np.ndarray, k: int) -> np.ndarray:
        """Share of each query's relevant products among its first k; in expectation over ties.

        Returns float64 [q], NaN for a query without a relevant product.
        """
        ranked = self._ranked(relevant)
        within = self._tie_means((self._position < k).astype(np.float64))
        return _ratio(self._by_query(ranked * within), self._by_query(ranked))

    def concordance(self, gains: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How the model orders each query's pairs of products, of all n(n-1)/2 of them.

        Returns:
            Pairwise accuracy, float64 [q]: the share of the pairs of different gain that are in the right order, a tie
            counting half; NaN where all gains are equal. And Kendall's tau-b (Kendall, Biometrika 1945), float64 [q]:
            right minus wrong pairs, over the geometric mean of how many differ in gain and in score; NaN where none
            differ in gain, and 0, what random order is worth, where none differ in score (scipy has NaN there: a model
            that refuses a query would not be measured by it).
            The time is quadratic in the products of one query, as the definition is; the memory is not.
        """
        gains = np.asarray(gains, dtype=np.float64)
        accuracy, tau = np.full((2, self.num_queries), np.nan)
        for rows in _equal_lengths(self.offsets, square=True):
            balance, differ, ranked = _agreement(gains[rows], self.scores[rows])
            query = np.searchsorted(self.offsets, rows[:, 0], side="right") - 1
            accuracy[query] = 0.5 + 0.5 * _ratio(balance, differ)
            tied = np.where(differ > 0, 0.0, np.nan)
            tau[query] = np.where(ranked > 0, _ratio(balance, np.sqrt(differ.astype(np.float64) * ranked)), tied)
        return accuracy, tau

    def _ranked(self, relevant: np.ndarray) -> np.ndarray:
        return np.asarray(relevant, dtype=bool)[self._order].astype(np.float64)


def _equal_lengths(offsets: np.ndarray, *, square: bool = False) -> Iterator[np.ndarray]:
    """The indices of pairs, int64 [b, l], of b queries at a time that all have l pairs, so many that b * l (or, `square`,
    b * l * l) stays within `MAX_BLOCK_VALUES` where one query does. Queries without a pair are left out."""
    lengths = np.diff(offsets)
    by_length = np.argsort(lengths, kind="stable")
    sizes, starts = np.unique(lengths[by_length], return_index=True)
    for size, group in zip(sizes.tolist(), np.split(by_length, starts[1:]), strict=True):
        if not size:
            continue
        block = max(1, MAX_BLOCK_VALUES // (size * size if square else size))
        for begin in range(0, len(group), block):
            yield offsets[group[begin : begin + block], None] + np.arange(size)


def _agreement(gains: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of b queries of l pairs, gains and scores [b, l]: right minus wrong pairs, those that differ in gain, and those that
    differ in score, int64 [b] each, every pair counted twice. Some rows of the l x l at a time."""
    balance, differ, ranked = np.zeros((3, len(gains)), dtype=np.int64)
    size = gains.shape[1]
    step = max(1, MAX_BLOCK_VALUES // gains.size)
    for start in range(0, size, step):
        rows = slice(start, start + step)
        by_gain, by_score = _signs(gains[:, rows], gains), _signs(scores[:, rows], scores)
        balance += np.einsum("qij,qij->q", by_gain, by_score, dtype=np.int64)
        differ += np.count_nonzero(by_gain, axis=(1, 2))
        ranked += np.count_nonzero(by_score, axis=(1, 2))
    return balance, differ, ranked


def _signs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """int8 [b, r, l] of [b, r] and [b, l]: 1 where the first is greater, -1 where it is less, 0 where they are equal."""
    first, second = first[:, :, None], second[:, None, :]
    return (first > second).astype(np.int8) - (first < second).astype(np.int8)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole in float64, NaN where the whole is 0."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    out = np.full(np.broadcast_shapes(part.shape, whole.shape), np.nan)
    return np.divide(part, whole, out=out, where=whole > 0)


def ndcg(gains: np.ndarray, scores: np.ndarray, offsets: np.ndarray, k: int | None = None) -> np.ndarray:
    """`Ranking.ndcg`."""
    return Ranking(scores, offsets).ndcg(gains, k)


def reciprocal_rank(relevant: np.ndarray, scores: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """`Ranking.reciprocal_rank`."""
    return Ranking(scores, offsets).reciprocal_rank(relevant)


def pairwise_accuracy(gains: np.ndarray, scores: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The first of `Ranking.concordance`."""
    return Ranking(scores, offsets).concordance(gains)[0]


class Thresholds:
    """The pairs of all queries together, sorted by score once: what a threshold on the score would accept.

    Args:
        relevant: bool [n].
        scores: [n].
        max_bins: with more distinct scores than so many, neighbours share a bin: enough for the spread of a metric under
            resampling, where exact values would cost a sort each.

    Attributes:
        bin: int64 [n], the bin of each pair, 0 for the highest scores.
        num_bins: their number.
    """

    def __init__(self, relevant: np.ndarray, scores: np.ndarray, max_bins: int | None = None) -> None:
        self.relevant, scores = np.asarray(relevant, dtype=bool), np.asarray(scores, dtype=np.float64)
        if len(scores) != len(self.relevant):
            raise ValueError(f"{len(scores)} scores for {len(self.relevant)} judgments")
        if np.isnan(scores).any():
            raise ValueError("scores hold NaN; give -inf to a pair that could not be scored")
        order = np.argsort(-scores, kind="stable")
        ranked = scores[order]
        starts = np.concatenate([[True], ranked[1:] != ranked[:-1]]) if len(ranked) else np.zeros(0, dtype=bool)
        bins = np.cumsum(starts) - 1
        self.num_bins = int(bins[-1]) + 1 if len(bins) else 0
        if max_bins is not None and self.num_bins > max_bins:
            first = np.flatnonzero(starts)  # ties stay together: a bin is that of its ties' first pair
            bins = (first * max_bins // len(ranked))[bins]
            _, bins = np.unique(bins, return_inverse=True)
            self.num_bins = int(bins[-1]) + 1
        self.bin = np.empty(len(ranked), dtype=np.int64)
        self.bin[order] = bins

    def sums(self, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Weight of the relevant and of the other pairs in each bin, highest first: two float64 [..., t]; `weights` [..., n]
        are 1 by default."""
        weights = np.ones(len(self.bin)) if weights is None else np.asarray(weights, dtype=np.float64)
        if weights.shape[-1] != len(self.bin):
            raise ValueError(f"weights of {weights.shape[-1]} pairs for {len(self.bin)} judgments")
        flat = weights.reshape(-1, len(self.bin))
        out = np.zeros((2, len(flat), self.num_bins))
        for row, values in enumerate(flat):
            out[0, row] = np.bincount(self.bin, values * self.relevant, self.num_bins)
            out[1, row] = np.bincount(self.bin, values * ~self.relevant, self.num_bins)
        hits, misses = out.reshape(2, *weights.shape[:-1], self.num_bins)
        return hits, misses


def pooled_figures(hits: np.ndarray, misses: np.ndarray, precisions: Sequence[float] = ()) -> np.ndarray:
    """What thresholds over all pairs are worth, of `Thresholds.sums` [..., t] -> [..., 2 + len(precisions)].

    - Area under the ROC curve: the chance that a relevant pair scores above one that is not; a tie counts half. NaN without
      any of either.
    - Area under the precision-recall curve, as scikit-learn's `average_precision_score`: `sum over thresholds of (recall_t -
      recall_t-1) * precision_t`. NaN without a relevant pair.
    - For each of the precisions the largest recall at any threshold that is at least so precise: what share of the relevant
      products a shop may show if it accepts so few wrong ones. 0 where no threshold is, NaN without a relevant pair.
    """
    found, accepted = np.cumsum(hits, axis=-1), np.cumsum(misses, axis=-1)
    num_hits, num_misses = hits.sum(-1), misses.sum(-1)
    auc = _ratio((misses * (found - 0.5 * hits)).sum(-1), num_hits * num_misses)
    accepted += found
    # With nothing accepted there is no hit, so that its precision does not matter.
    figures = [auc, _ratio((hits * (found / np.maximum(accepted, 1e-300))).sum(-1), num_hits)]
    for precision in precisions:
        # a hair of slack, so that 9 of 10 is .9 whatever the rounding of weights
        precise = (found >= (precision - 1e-12) * accepted) & (accepted > 0)
        figures.append(_ratio(np.max(np.where(precise, found, 0.0), axis=-1, initial=0.0), num_hits))
    return np.stack(figures, axis=-1)


def roc_auc(relevant: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The first of `pooled_figures`; `weights` [..., n], for example the counts of bootstrap resamples, are 1 by default."""
    return pooled_figures(*Thresholds(relevant, scores).sums(weights))[..., 0]


def pr_auc(relevant: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The second of `pooled_figures`."""
    return pooled_figures(*Thresholds(relevant, scores).sums(weights))[..., 1]


def recall_at_precision(
    relevant: np.ndarray, scores: np.ndarray, precision: float = 0.9, weights: np.ndarray | None = None
) -> np.ndarray:
    """The third of `pooled_figures`."""
    return pooled_figures(*Thresholds(relevant, scores).sums(weights), [precision])[..., 2]


def confusion_by_query(
    true_class: np.ndarray, predicted_class: np.ndarray, num_classes: int, offsets: np.ndarray
) -> np.ndarray:
    """Counts, float64 [q, K, K]: of each query, its pairs of a true class (rows) given a predicted class (columns)."""
    cell = np.asarray(true_class) * num_classes + np.asarray(predicted_class)
    return count_by_query(cell, num_classes**2, offsets).reshape(-1, num_classes, num_classes)


def count_by_query(
    cell: np.ndarray, num_cells: int, offsets: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """float64 [q, num_cells]: how many pairs of each query, or how much `weights` [n] of them, fall into each cell [n]."""
    query = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    counted = np.bincount(query * num_cells + cell, weights, (len(offsets) - 1) * num_cells)
    return counted.astype(np.float64).reshape(-1, num_cells)


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """Mean F1 of the classes of confusion matrices [..., K, K] -> [...].

    As scikit-learn's `f1_score(average="macro")`: a class neither true nor predicted anywhere is left out, one that is
    never right counts 0.
    """
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    support = confusion.sum(-1) + confusion.sum(-2)
    f1 = np.divide(2.0 * right, support, out=np.zeros_like(support), where=support > 0)
    return _ratio(f1.sum(-1), (support > 0).sum(-1))


def micro_f1(confusion: np.ndarray) -> np.ndarray:
    """Micro F1 of confusion matrices [..., K, K] -> [...]: with one grade a pair, the share of right grades."""
    return _ratio(np.trace(confusion, axis1=-2, axis2=-1), confusion.sum((-2, -1)))


def calibration_sums(
    relevant: np.ndarray, probabilities: np.ndarray, offsets: np.ndarray, num_bins: int = NUM_BINS
) -> np.ndarray:
    """What calibration error and reliability diagram are made of, float64 [q, 3, num_bins]: of each query, its pairs in each
    of the equal bins of [0, 1], the sum of their probabilities, and how many of them are relevant."""
    cell = np.minimum((np.asarray(probabilities) * num_bins).astype(np.int64), num_bins - 1)
    counts = [count_by_query(cell, num_bins, offsets, weights) for weights in (None, probabilities, relevant)]
    return np.stack(counts, axis=1)


def calibration_error(sums: np.ndarray) -> np.ndarray:
    """Expected calibration error of `calibration_sums` [..., 3, bins], added up over queries -> [...]: the mean, over pairs,
    of how far its bin's mean probability is from the bin's share of relevant pairs (Guo et al., "On calibration of modern
    neural networks", ICML 2017, eq. 3). NaN without a pair."""
    count, probability, relevant = np.moveaxis(sums, -2, 0)
    return _ratio(np.abs(probability - relevant).sum(-1), count.sum(-1))


def brier_score(relevant: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Squared error of each pair's probability (Brier, 1950): float64 [n]; the score is its mean."""
    return (np.asarray(probabilities, dtype=np.float64) - np.asarray(relevant, dtype=np.float64)) ** 2
