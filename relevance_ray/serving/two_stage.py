"""Many candidates in two stages: a two-tower cuts them to the best few, and the served model scores these.

A two-tower whose vectors are remembered reads the query alone, so a thousand candidates cost little more than those that are
kept. What is cut stays in the answer, below all that is kept, in the first stage's order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from relevance_ray.errors import UserError
from relevance_ray.serving.scorer import Scorer, StrPath, read_calibrated_info
from relevance_ray.storage import localize

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class FirstStage:
    """A two-tower that cuts candidates to the best `keep`."""

    scorer: Scorer
    keep: int

    def kept(self, rows: Rows) -> list[int]:
        """Places of the best, in the order they came in."""
        order = np.argsort([-row["logit"] for row in rows], kind="stable")
        return sorted(order[: self.keep].tolist())


def check_first_stage(folder: StrPath, served: StrPath) -> None:
    """Raise `UserError` for a folder that holds no finished two-tower, or one that cannot read all that the served model
    can."""
    first, second = (read_calibrated_info(localize(str(each))) for each in (folder, served))
    if first.kind != "bi_encoder":
        raise UserError(f"serve.first_stage {folder} is a {first.kind}; give a student of student.kind=two_tower")
    if unread := [name for name in second.template.fields if name not in first.template.fields]:
        raise UserError(
            f"serve.first_stage {folder} does not read {', '.join(unread)}, which the served model does, so it could not "
            "judge products that have nothing else; train both with the same student.fields"
        )


def join_stages(first: Rows, kept: Sequence[int], second: Rows, scorer: Scorer) -> list[dict[str, Any]]:
    """The answer of all candidates, each with its `stage`.

    Kept ones have what the served model says. The logits of the others are the first stage's, lowered by as much as puts the
    best of them below the worst kept one, and read by the served model's calibration.

    Args:
        first: the first stage's rows of n products.
        kept: places of those that the served model scored, rising.
        second: its rows of these.
        scorer: the served model.
    """
    cut = sorted(set(range(len(first))) - set(kept))
    logits = np.asarray([first[place]["logit"] for place in cut], dtype=np.float64)
    lowest = min(row["logit"] for row in second)
    if len(cut):
        # Where it needs lowering, by a trifle more than to the same.
        logits -= max(0.0, float(logits.max()) - lowest + 1e-4 * max(1.0, abs(lowest)))
    below = scorer.rows_of_logits(logits.astype(np.float32), [None] * len(cut))  # the served model never read them
    found = dict(zip(kept, [{**row, "stage": 2} for row in second], strict=True))
    found |= dict(zip(cut, [{**row, "stage": 1} for row in below], strict=True))
    return [found[place] for place in range(len(first))]
