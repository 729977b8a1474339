"""From class logits to one logit, and from a logit to probabilities.

A model is trained on margins within a query, which leave the level of its logits free; what a threshold or a price
decision needs is a probability. `OrdinalCalibration` gives all K of them from one slope and K-1 ordered thresholds
fitted on held-out judgments: K-2 numbers more than Platt scaling, and the order of products never changes.
`IsotonicCalibration` assumes no shape, and needs more judgments for it.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit

PROBABILITY_FLOOR = 1e-4


def logit_of_classes(class_logits: np.ndarray, gains: Sequence[float]) -> np.ndarray:
    """The log-odds of the expected gain: `logsumexp(l + log gain) - logsumexp(l + log(1 - gain))`.

    Args:
        class_logits: [n, K], unnormalised; the softmax's constant cancels, so it is never taken.
        gains: K gains in [0, 1]. A class of zero weight is left out of its sum.

    Returns:
        float32 [n]. With gains (0, 1) it is exactly `class_logits[:, 1] - class_logits[:, 0]`. A row with NaN gives
        NaN; a row whose whole mass lies on gain 0 gives -inf, on gain 1 +inf.
    """
    logits = np.asarray(class_logits, dtype=np.float32)
    weights = np.asarray(gains, dtype=np.float32)
    assert logits.ndim == 2, logits.shape
    assert logits.shape[1] == len(weights), (logits.shape, len(weights))
    return _weighted_logsumexp(logits, weights) - _weighted_logsumexp(logits, np.float32(1.0) - weights)


def _weighted_logsumexp(logits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    kept = weights > 0
    terms = logits[:, kept] + np.log(weights[kept])
    top = terms.max(axis=1)
    safe_top = np.where(np.isneginf(top), np.float32(0.0), top)
    with np.errstate(divide="ignore"):
        return safe_top + np.log(np.exp(terms - safe_top[:, None]).sum(axis=1))


def class_logits_of_distribution(distributions: np.ndarray, floor: float = PROBABILITY_FLOOR) -> np.ndarray:
    """Class logits of known distributions [n, K]: the log of each, floored at `floor` so that the logit stays finite.

    This is how a grade (from a file, or from the demo market's truth) enters the chain. Returns float32 [n, K].
    """
    floored = np.maximum(np.asarray(distributions, dtype=np.float64), floor)
    return np.log(floored / floored.sum(axis=1, keepdims=True)).astype(np.float32)


class Calibration(abc.ABC):
    """From a logit to the probabilities of K ordered classes; a higher logit never means a lower probability."""

    method: ClassVar[str]

    @classmethod
    @abc.abstractmethod
    def fit(cls, logits: np.ndarray, distributions: np.ndarray) -> Self:
        """The calibration of held-out judgments.

        Args:
            logits: [n], finite.
            distributions: [n, K], rows summing to 1.

        Raises:
            ValueError: no rows, or logits that are not finite.
        """

    @property
    @abc.abstractmethod
    def num_classes(self) -> int: ...

    @abc.abstractmethod
    def at_least(self, logits: np.ndarray) -> np.ndarray:
        """P(class >= k) for k = 1 .. K-1: float64 [n, K-1]."""

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]: ...

    def class_probabilities(self, logits: np.ndarray) -> np.ndarray:
        """float64 [n, K], rows summing to 1."""
        at_least = self.at_least(logits)
        n = len(at_least)
        return -np.diff(np.concatenate([np.ones((n, 1)), at_least, np.zeros((n, 1))], axis=1), axis=1)

    def probability(self, logits: np.ndarray, relevant_index: int) -> np.ndarray:
        """P(grade >= relevant_from): float64 [n], for `scale.relevant_index`."""
        assert 1 <= relevant_index < self.num_classes, relevant_index
        return self.at_least(logits)[:, relevant_index - 1]

    def score(self, logits: np.ndarray, gains: Sequence[float]) -> np.ndarray:
        """The expected gain: float64 [n]."""
        return self.class_probabilities(logits) @ np.asarray(gains, dtype=np.float64)

    def grade_index(self, logits: np.ndarray) -> np.ndarray:
        """The most probable class: int64 [n]."""
        return self.class_probabilities(logits).argmax(axis=1)


@dataclass(frozen=True)
class OrdinalCalibration(Calibration):
    """`P(class >= k) = sigmoid(slope * logit - thresholds[k - 1])`, the proportional-odds model (McCullagh, 1980): one
    temperature, 1 / slope, for all classes.

    Attributes:
        slope: positive.
        thresholds: K-1 numbers that never fall.
    """

    method = "ordinal"
    slope: float
    thresholds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.slope > 0 or list(self.thresholds) != sorted(self.thresholds) or not self.thresholds:
            raise ValueError(f"calibration needs a positive slope and rising thresholds; got {self}")

    @classmethod
    def fit(cls, logits: np.ndarray, distributions: np.ndarray, ridge: float = 1e-4) -> OrdinalCalibration:
        """Maximum likelihood against soft distributions.

        Minimises the mean cross-entropy over (slope, thresholds) of standardised logits in float64 by L-BFGS, with
        `ridge / 2 * (slope^2 + sum thresholds^2)` added, so that separable judgments give a steep slope and no infinite
        one. Order is kept by positive increments.
        """
        x, target = _checked(logits, distributions)
        center, spread = x.mean(), max(x.std(), 1e-6)
        z = (x - center) / spread

        at_least = target[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:].mean(axis=0).clip(1e-3, 1 - 1e-3)
        start_thresholds = np.log((1 - at_least) / at_least)
        gaps = np.maximum(np.diff(start_thresholds), 1e-2)
        start = np.concatenate([[0.0], start_thresholds[:1], np.log(gaps)])

        def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
            slope, thresholds = np.exp(parameters[0]), _ordered(parameters[1:])
            value, slope_gradient, threshold_gradient = _ordinal_loss(z, target, slope, thresholds)
            value += 0.5 * ridge * (slope**2 + (thresholds**2).sum())
            slope_gradient += ridge * slope
            threshold_gradient = threshold_gradient + ridge * thresholds
            # thresholds[k] = first + sum of the first k increments, so an increment moves every later threshold.
            suffix = threshold_gradient[::-1].cumsum()[::-1]
            gradient = np.concatenate([[slope_gradient * slope], suffix[:1], suffix[1:] * np.exp(parameters[2:])])
            return value, gradient

        bounds = [(-12.0, 12.0), (None, None), *[(-20.0, 8.0)] * (len(start) - 2)]
        found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 500})
        slope = float(np.exp(found.x[0]) / spread)
        thresholds = _ordered(found.x[1:]) + slope * center
        return cls(slope, tuple(float(value) for value in thresholds))

    @property
    def num_classes(self) -> int:
        return len(self.thresholds) + 1

    def at_least(self, logits: np.ndarray) -> np.ndarray:
        x = np.asarray(logits, dtype=np.float64)
        return expit(self.slope * x[:, None] - np.asarray(self.thresholds))

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.method, "slope": self.slope, "thresholds": list(self.thresholds)}


@dataclass(frozen=True)
class IsotonicCalibration(Calibration):
    """P(class >= k) as the rising function of the logit that fits best (Zadrozny & Elkan, "Transforming classifier scores
    into accurate multiclass probability estimates", KDD 2002), linear between its knots.

    No shape is assumed, so it needs many judgments: with a few hundred it follows their noise. The K-1 functions never
    cross, since each is the isotonic regression of an indicator that is at least the next one's.

    Attributes:
        knots: m rising logits.
        values: of each knot its K-1 probabilities; along the knots none falls, along the classes none rises.
    """

    method = "isotonic"
    knots: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        values = np.asarray(self.values, dtype=np.float64)
        if values.ndim != 2 or not values.size or len(values) != len(self.knots):
            raise ValueError(f"calibration needs a row of probabilities for each of its {len(self.knots)} knots")
        if not np.isfinite(self.knots).all() or not np.isfinite(values).all():
            raise ValueError("calibration needs finite knots and probabilities")
        falls = (np.diff(self.knots) <= 0).any() or (np.diff(values, axis=0) < 0).any()
        if falls or (np.diff(values, axis=1) > 0).any() or values.min() < 0 or values.max() > 1:
            raise ValueError(
                "calibration needs rising knots, and probabilities that never fall with them nor rise with the class"
            )

    @classmethod
    def fit(cls, logits: np.ndarray, distributions: np.ndarray) -> IsotonicCalibration:
        """Least squares against soft distributions, by pooling adjacent violators; equal logits share one value.
        Probabilities stay 1 / (n + 2) away from 0 and 1: n judgments cannot tell more."""
        x, target = _checked(logits, distributions)
        knots, place = np.unique(x, return_inverse=True)
        weight = np.bincount(place).astype(np.float64)
        at_least = target[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
        means = np.stack([np.bincount(place, column) / weight for column in at_least.T], axis=1)
        fitted = np.stack([isotonic_regression(column, weights=weight).x for column in means.T], axis=1)
        least = 1.0 / (len(x) + 2)
        # Rounding may turn equal values by their last bit, along the knots and between the classes.
        values = np.minimum.accumulate(np.maximum.accumulate(fitted.clip(least, 1.0 - least), axis=0), axis=1)
        turns = (np.diff(values, axis=0) > 0).any(axis=1)
        kept = np.concatenate([[True], turns]) | np.concatenate([turns, [True]])
        return cls(tuple(knots[kept].tolist()), tuple(map(tuple, values[kept].tolist())))

    @property
    def num_classes(self) -> int:
        return len(self.values[0]) + 1

    def at_least(self, logits: np.ndarray) -> np.ndarray:
        x = np.asarray(logits, dtype=np.float64)
        knots, columns = self._arrays
        return np.stack([np.interp(x, knots, column) for column in columns], axis=1)

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(self.knots), np.ascontiguousarray(np.asarray(self.values).T)

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.method, "knots": list(self.knots), "values": [list(row) for row in self.values]}


CALIBRATIONS: Mapping[str, type[Calibration]] = {"ordinal": OrdinalCalibration, "isotonic": IsotonicCalibration}


MIN_ISOTONIC = 1000
"""Of fewer judgments an isotonic calibration learns their noise: of 500, its error on others is a third above the
ordinal's."""


def fit_calibration(method: str, logits: np.ndarray, distributions: np.ndarray) -> Calibration | None:
    """A calibration by the name of its method, of the logits [n] that are finite; None where none is."""
    scored = np.isfinite(logits)
    return CALIBRATIONS[method].fit(logits[scored], distributions[scored]) if scored.any() else None


def calibration_of(value: Mapping[str, Any]) -> Calibration:
    """A calibration from its `to_dict`; one that names no method is ordinal."""
    if value.get("method", "ordinal") == "ordinal":
        return OrdinalCalibration(float(value["slope"]), tuple(map(float, value["thresholds"])))
    if value["method"] != "isotonic":
        raise ValueError(f"calibration method {value['method']!r}")
    return IsotonicCalibration(
        tuple(map(float, value["knots"])), tuple(tuple(map(float, row)) for row in value["values"])
    )


def _checked(logits: np.ndarray, distributions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, target = np.asarray(logits, dtype=np.float64), np.asarray(distributions, dtype=np.float64)
    if len(x) == 0 or not np.isfinite(x).all():
        raise ValueError(f"calibration needs at least one row and finite logits; got {len(x)} rows")
    assert target.shape[0] == x.shape[0], (target.shape, x.shape)
    return x, target


def _ordered(parameters: np.ndarray) -> np.ndarray:
    """Rising thresholds of a first one and the logs of K-2 increments."""
    return parameters[0] + np.concatenate([[0.0], np.exp(parameters[1:]).cumsum()])


def _ordinal_loss(
    z: np.ndarray, target: np.ndarray, slope: float, thresholds: np.ndarray
) -> tuple[float, float, np.ndarray]:
    """Mean cross-entropy and its gradient in (slope, thresholds): with F_k = P(class >= k) and p_k = F_k - F_{k+1},
    dL/dF_k = -(y_k / p_k - y_{k-1} / p_{k-1})."""
    n = len(z)
    at_least = expit(slope * z[:, None] - thresholds)
    edges = np.concatenate([np.ones((n, 1)), at_least, np.zeros((n, 1))], axis=1)
    p = np.maximum(-np.diff(edges, axis=1), 1e-12)
    ratio = target / p
    by_eta = -(ratio[:, 1:] - ratio[:, :-1]) * at_least * (1 - at_least)
    value = -(target * np.log(p)).sum() / n
    return float(value), float((by_eta * z[:, None]).sum() / n), -by_eta.sum(axis=0) / n
