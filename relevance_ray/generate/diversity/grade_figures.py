"""What the teacher said of generated pairs: its grades by origin, by query source and by rank."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.special import softmax

from relevance_ray.errors import UserError
from relevance_ray.schema import LabelScale

RANKS = ("no rank", "1", "2-3", "4-10", "11-30", "31-100", "over 100")
_RANK_STARTS = np.array([1, 2, 4, 11, 31, 101])


def rank_buckets(ranks: np.ndarray) -> np.ndarray:
    """Indices into `RANKS` of ranks; 0 is that of an origin without ranks."""
    return np.searchsorted(_RANK_STARTS, ranks, side="right")


class GradeStats:
    """Counts the teacher's grades.

    A pair's grade is the likeliest class, its gain the expectation over all classes. Pairs that failed are counted and left
    out.

    Args:
        scale: names and gains of the classes. A teacher of two classes on a longer scale is read as "0" and "1".
    """

    def __init__(self, scale: LabelScale) -> None:
        self._scale = scale
        self.grades: list[str] = []
        self._gains = np.empty(0)
        self._counts: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
        self._gain_sums: dict[str, Counter[str]] = defaultdict(Counter)
        self._groups: Counter[str] = Counter()
        self._one_grade: Counter[str] = Counter()
        self._logit_range = 0.0
        self.failed = 0

    def add(self, products: pa.StructArray, group: np.ndarray, keys: dict[str, np.ndarray]) -> None:
        """Count the pairs of a table.

        Args:
            products: [n], with `class_logits`, `logit` and `error`.
            group: int64 [n], which of the table's groups each belongs to.
            keys: "origin", "source", "rank" -> [n] names to count by.
        """
        good = pc.and_(pc.is_null(products.field("error")), pc.is_valid(products.field("class_logits")))
        kept = np.flatnonzero(good.to_numpy(zero_copy_only=False))
        self.failed += len(products) - len(kept)
        if not len(kept):
            return
        labeled = products.take(pa.array(kept))
        logits = labeled.field("class_logits").flatten().to_numpy(zero_copy_only=False).reshape(len(kept), -1)
        self._set_classes(logits.shape[1])
        grades = logits.argmax(axis=1)
        gains = softmax(logits.astype(np.float64), axis=1) @ self._gains
        for dimension, names in keys.items():
            own = names[kept]
            for name in np.unique(own):
                found = own == name
                counted = self._counts[dimension].setdefault(str(name), np.zeros(len(self.grades), dtype=np.int64))
                counted += np.bincount(grades[found], minlength=len(self.grades))
                self._gain_sums[dimension][str(name)] += gains[found].sum()
        self._add_groups(
            grades, labeled.field("logit").to_numpy(zero_copy_only=False), group[kept], keys["source"][kept]
        )

    def _set_classes(self, width: int) -> None:
        if self.grades and width != len(self.grades):
            raise UserError(f"labels of {width} and of {len(self.grades)} classes cannot be counted together")
        if width == self._scale.num_classes:
            self.grades, self._gains = list(self._scale.grades), np.array(self._scale.gains)
        elif width == 2:
            self.grades, self._gains = ["0", "1"], np.array([0.0, 1.0])
        else:
            raise UserError(f"labels have {width} classes, and the scale {self._scale.name} {self._scale.num_classes}")

    def _add_groups(self, grades: np.ndarray, logits: np.ndarray, group: np.ndarray, sources: np.ndarray) -> None:
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        sizes = np.diff(starts, append=len(group))
        one = np.minimum.reduceat(grades, starts) == np.maximum.reduceat(grades, starts)
        ranges = np.maximum.reduceat(logits, starts) - np.minimum.reduceat(logits, starts)
        several = sizes > 1
        self._logit_range += float(ranges[several].sum())
        self._groups.update(sources[starts][several].tolist())
        self._one_grade.update(sources[starts][several & one].tolist())

    def figures(self) -> dict[str, Any] | None:
        """None where no pair was labeled, else counts and shares of grades by each key, and of groups of one grade."""
        if not self.grades:
            return None
        by: dict[str, Any] = {}
        for dimension, names in self._counts.items():
            order = [name for name in RANKS if name in names] if dimension == "rank" else sorted(names)
            by[dimension] = {
                name: {
                    "pairs": int(names[name].sum()),
                    "grades": dict(zip(self.grades, names[name].tolist(), strict=True)),
                    "mean_gain": float(self._gain_sums[dimension][name] / names[name].sum()),
                }
                for name in order
            }
        total = sum(self._counts["source"].values(), np.zeros(len(self.grades), dtype=np.int64))
        groups = sum(self._groups.values())
        return {
            "scale": self._scale.name,
            "labeled": int(total.sum()),
            "failed": self.failed,
            "grades": dict(zip(self.grades, total.tolist(), strict=True)),
            "by": by,
            "groups": groups,
            "one_grade_share": sum(self._one_grade.values()) / groups if groups else 0.0,
            "one_grade_share_by_source": {
                name: self._one_grade[name] / count for name, count in sorted(self._groups.items())
            },
            "mean_logit_range": self._logit_range / groups if groups else 0.0,
        }
