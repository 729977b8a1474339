"""The demo market's truth as an engine, for tests and scale runs only.

It costs microseconds a pair and is never wrong unless asked to be, so whole pipelines can be run at size without a model.
It knows the market's vocabulary alone: on any other catalog its labels would be nonsense, and it refuses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from relevance_ray.data.market_truth import MARKET_SCALE, true_grade
from relevance_ray.engines.base import Labels, Pair, row_error
from relevance_ray.errors import UserError
from relevance_ray.schema import LabelScale

LABEL_SMOOTHING = 0.1
_FLOOR = 1e-3
"""Probability mixed in evenly over the classes, so that every class logit is finite."""


class OracleEngine:
    """Labels pairs of the demo market with the log of the true grade's smoothed distribution.

    Args:
        scale: must be the market's.
        noise: chance that a pair is labeled with a neighbouring grade; which pairs those are depends on `pair_id` alone.

    Raises:
        UserError: for another scale than the market's.
    """

    num_tokens = 0

    def __init__(self, scale: LabelScale, noise: float = 0.0) -> None:
        if scale != MARKET_SCALE:
            raise UserError(
                f"the oracle engine knows the demo market only, not {scale.name!r} data; set another label engine"
            )
        self.gains = scale.gains
        self.noise = noise
        smoothed = np.stack([scale.distribution(grade, label_smoothing=LABEL_SMOOTHING) for grade in scale.grades])
        self._log_probabilities = np.log((1 - _FLOOR) * smoothed + _FLOOR / scale.num_classes).astype(np.float32)

    def label(self, pairs: Sequence[Pair]) -> Labels:
        """Class logits float32 [n, 4]; a pair that no engine could read (empty query, wrong types) is an error row."""
        errors = [row_error(pair.query, pair.product) for pair in pairs]
        class_logits = np.full((len(pairs), len(self.gains)), np.nan, dtype=np.float32)
        for index, (pair, error) in enumerate(zip(pairs, errors, strict=True)):
            if error is None:
                class_logits[index] = self._log_probabilities[self._grade_index(pair)]
        return Labels(class_logits, errors, [None] * len(pairs))

    def _grade_index(self, pair: Pair) -> int:
        index = MARKET_SCALE.grades.index(true_grade(pair.query, pair.product))
        rng = np.random.default_rng(pair.pair_id % 2**64) if self.noise else None
        if rng is None or rng.random() >= self.noise:
            return index
        step = 1 if rng.random() < 0.5 else -1
        return index + step if 0 <= index + step < MARKET_SCALE.num_classes else index - step
