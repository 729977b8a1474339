"""Scores from elsewhere beside the models: the shop's own ranker, an LLM that was asked once, another team's model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from relevance_ray.calibration import Calibration
from relevance_ray.engines.base import Labels, Pair
from relevance_ray.engines.file import FileEngine
from relevance_ray.errors import UserError
from relevance_ray.evaluation.ask import predict
from relevance_ray.evaluation.baselines import calibration_on
from relevance_ray.evaluation.judged import flatten
from relevance_ray.schema import LabelScale, pair_id
from relevance_ray.training.options import CalibrationMethod


class GivenScores:
    """A file of scores, asked as a model is, and calibrated on the dev judgments as the baselines are.

    Args:
        path: Parquet, CSV or JSON lines with columns query, product_id, and `logit` (any number, higher is better) or
            `grade`. A pair that it lacks could not be scored: it is ranked last, and counted.
        scale: of the judgments.
        dev: JUDGED_GROUP rows to calibrate on; with none there are no grades and no probabilities.
        method: of that calibration.

    Raises:
        UserError: what `FileEngine` refuses: no such column, an empty cell, NaN, two different scores of one pair.
    """

    def __init__(
        self, path: str | Path, scale: LabelScale, dev: pa.Table | None = None, method: CalibrationMethod = "ordinal"
    ) -> None:
        self._engine = FileEngine(path, scale, label_smoothing=0.0, by_rank=True)
        self.gains, self.scale = self._engine.gains, scale
        self.calibration: Calibration | None = None
        self.calibration = calibration_on(self, dev, scale, method) if dev is not None and dev.num_rows else None

    def check(self, judged: Sequence[pa.Table], what: str) -> None:
        """Raise `UserError` where none of the judged pairs has a score; `what` names the file."""
        asked = [flatten(table, self.scale) for table in judged]
        if all(predict(self, pairs).num_failed == pairs.num_pairs for pairs in asked):
            raise UserError(
                f"{what} scores none of the judged pairs; its query and product_id must be spelled as in the judgments"
            )

    def label_rows(self, queries: Sequence[str], products: Sequence[Mapping[str, Any]]) -> Labels:
        """Labels of n pairs; one that the file does not hold is an error of its row."""
        ids = [str(product["product_id"]) for product in products]
        return self._engine.label(
            [
                Pair(pair_id(query, product_id), query, product_id, product)
                for query, product_id, product in zip(queries, ids, products, strict=True)
            ]
        )
