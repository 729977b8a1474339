"""Paired bootstrap over queries: how sure a figure, and a difference of two figures, is.

The queries are the sample (their products are not independent), so each resample draws whole queries with replacement
(Sakai, "Evaluating evaluation metrics based on the bootstrap", SIGIR 2006). All models are measured on the same
resamples, which is what makes a difference paired: the hardness of the queries drawn cancels out.

A statistic here is a function of how often each query was drawn. Means over queries are then one matrix product and
pooled figures (AUC, F1) one weighted pass, at the price of a [resamples, pairs] matrix, built in bounded blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]
"""counts [b, q], how often each of q queries is drawn -> values [b], NaN where the draw leaves it undefined."""

MAX_BLOCK_VALUES = 4_000_000


def resample_counts(num_queries: int, num_resamples: int, seed: int) -> np.ndarray:
    """Counts float64 [num_resamples, num_queries] of queries drawn with replacement; each row sums to num_queries."""
    if num_queries < 1 or num_resamples < 1:
        raise ValueError(f"a bootstrap needs queries and resamples; got {num_queries} and {num_resamples}")
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_queries, np.full(num_queries, 1.0 / num_queries), size=num_resamples).astype(np.float64)


def mean_over_queries(values: np.ndarray) -> Statistic:
    """The mean of per-query values [q]; queries whose value is NaN are left out."""
    values = np.asarray(values, dtype=np.float64)
    defined = ~np.isnan(values)
    filled = np.where(defined, values, 0.0)

    def statistic(counts: np.ndarray) -> np.ndarray:
        drawn = counts @ defined
        return np.divide(counts @ filled, drawn, out=np.full(len(counts), np.nan), where=drawn > 0)

    return statistic


def over_pairs(metric: Callable[[np.ndarray], np.ndarray], offsets: np.ndarray) -> Statistic:
    """A pooled metric of pair weights [b, n] -> [b], each pair weighing as often as its query was drawn."""
    lengths = np.diff(offsets)
    block = max(1, MAX_BLOCK_VALUES // max(int(offsets[-1]), 1))

    def statistic(counts: np.ndarray) -> np.ndarray:
        parts = [metric(np.repeat(counts[i : i + block], lengths, axis=1)) for i in range(0, len(counts), block)]
        return np.concatenate(parts)

    return statistic


def over_confusion(metric: Callable[[np.ndarray], np.ndarray], confusion: np.ndarray) -> Statistic:
    """A metric of confusion matrices [b, K, K] -> [b], from the matrix of each query, `confusion` [q, K, K]."""
    flat = confusion.reshape(len(confusion), -1)

    def statistic(counts: np.ndarray) -> np.ndarray:
        return metric((counts @ flat).reshape(len(counts), *confusion.shape[1:]))

    return statistic


def value_of(statistic: Statistic, num_queries: int) -> float:
    """The statistic on the queries as they are."""
    return float(statistic(np.ones((1, num_queries)))[0])


def percentile_interval(samples: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of resampled values [b]; undefined draws (NaN) are left out, (NaN, NaN) if all are."""
    samples = samples[~np.isnan(samples)]
    if not len(samples):
        return float("nan"), float("nan")
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
