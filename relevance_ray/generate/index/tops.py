"""The best products of a query, and how the lists of several shards become the list of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Top(NamedTuple):
    """Catalog rows int64 [k], best first, and their scores float64 [k]; of equal scores the lower row comes first."""

    rows: np.ndarray
    scores: np.ndarray


NOTHING = Top(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float64))


def best(rows: np.ndarray, scores: np.ndarray, depth: int) -> Top:
    """The `depth` highest of scores [n] with their rows [n]."""
    if len(scores) > depth:
        threshold = np.partition(scores, len(scores) - depth)[len(scores) - depth]
        kept = np.flatnonzero(scores >= threshold)
        rows, scores = rows[kept], scores[kept]
    order = np.lexsort((rows, -scores))[:depth]
    return Top(rows[order].astype(np.int64), scores[order].astype(np.float64))


def merge(tops: Sequence[Top], depth: int) -> Top:
    """The list of all from the lists of parts that share no row, each at least `depth` long or complete."""
    if len(tops) == 1:
        return Top(tops[0].rows[:depth], tops[0].scores[:depth])
    return best(np.concatenate([top.rows for top in tops]), np.concatenate([top.scores for top in tops]), depth)
