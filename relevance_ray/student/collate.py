"""Groups to tokens and targets, tokenised once and kept flat."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from relevance_ray import storage
from relevance_ray.errors import UserError
from relevance_ray.schema import LabelScale
from relevance_ray.student.packed import PairTokens, concatenate
from relevance_ray.student.reading import Reader

GROUPS_AT_ONCE = 1024
SOFT_TARGET_FLOOR = 1e-4


@dataclass(frozen=True)
class TrainingGroups:
    """Labeled groups, ready to train on: their pairs in order, group after group.

    Attributes:
        pairs: tokens of all n pairs.
        target: float32 [n], the logit to distill.
        classes: float32 [n, K], class logits to distill; None where they were not asked for.
        grade: int8 [n], the most probable of the classes, or the human's grade.
        offsets: int64 [G + 1], where each group begins.
    """

    pairs: PairTokens
    target: np.ndarray
    classes: np.ndarray | None
    grade: np.ndarray
    offsets: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Pairs of each group, int64 [G]."""
        return np.diff(self.offsets)

    @property
    def num_tokens(self) -> np.ndarray:
        """Tokens of each group, int64 [G]."""
        return np.add.reduceat(self.pairs.lengths, self.offsets[:-1])

    @property
    def place(self) -> np.ndarray:
        """The group of each pair, int64 [n]."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def take(self, groups: np.ndarray) -> TrainingGroups:
        """Some groups, in the order asked for, as a set of their own."""
        sizes = self.offsets[groups + 1] - self.offsets[groups]
        offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        rows = np.arange(offsets[-1]) + np.repeat(self.offsets[groups] - offsets[:-1], sizes)
        classes = None if self.classes is None else self.classes[rows]
        return TrainingGroups(self.pairs.take(rows), self.target[rows], classes, self.grade[rows], offsets)


def join_groups(parts: Sequence[TrainingGroups]) -> TrainingGroups:
    """Groups of several sets as one, in order.

    Raises:
        UserError: class logits of differing numbers of classes.
    """
    if len(parts) == 1:
        return parts[0]
    widths = sorted({part.classes.shape[1] for part in parts if part.classes is not None})
    if len(widths) > 1:
        raise UserError(
            f"the labels have {' and '.join(map(str, widths))} classes, and student.kl_weight needs them to have as many; "
            "set it to 0, or train a teacher with the classes of the scale (teacher.num_classes)"
        )
    starts = np.cumsum([0, *(len(part.target) for part in parts)])[:-1]
    return TrainingGroups(
        concatenate([part.pairs for part in parts]),
        np.concatenate([part.target for part in parts]),
        np.concatenate([part.classes for part in parts if part.classes is not None]) if widths else None,
        np.concatenate([part.grade for part in parts]),
        np.concatenate([[0], *(part.offsets[1:] + start for part, start in zip(parts, starts, strict=True))]),
    )


@dataclass(frozen=True)
class JudgedPairs:
    """Human judgments of n pairs, in the order of the table they came from.

    Attributes:
        pairs: their tokens.
        gains: float64 [n], of the published grades.
        offsets: int64 [queries + 1], where each query's pairs begin.
    """

    pairs: PairTokens
    gains: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True)
class FlatGroups:
    """A table of groups as flat lists over its n pairs. `candidates` is the struct of each product."""

    queries: list[str]
    products: list[Mapping[str, Any]]
    offsets: np.ndarray
    candidates: pa.StructArray

    def floats(self, name: str) -> np.ndarray:
        """A number of each product, float32 [n], NaN where it is null."""
        column = pc.cast(pc.struct_field(self.candidates, name), pa.float32())
        return column.fill_null(np.nan).to_numpy(zero_copy_only=False)

    def values(self, name: str) -> list[Any]:
        return list(pc.struct_field(self.candidates, name).to_pylist())


def flatten_groups(groups: pa.Table) -> FlatGroups:
    """A table of groups (labeled or judged) as flat lists."""
    column = groups["products"].combine_chunks()
    sizes = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    candidates = column.flatten()
    queries = np.repeat(np.asarray(groups["query"].to_pylist(), dtype=object), sizes).tolist()
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    return FlatGroups(queries, pc.struct_field(candidates, "fields").to_pylist(), offsets, candidates)


def encode_groups(
    table: pa.Table,
    reader: Reader,
    scale: LabelScale,
    max_group_products: int,
    *,
    with_classes: bool = False,
    label_smoothing: float = 0.0,
) -> TrainingGroups | None:
    """Tokenise groups for a student.

    The target is the teacher's `logit`, or, for judged groups, the log-odds of the human `soft_target`. Pairs with an error,
    without a finite logit, or that cannot be encoded are left out, and so are groups of fewer than two pairs.

    Args:
        table: LABELED_GROUP or JUDGED_GROUP.
        reader: the student's.
        scale: of the human grades.
        max_group_products: a larger group is cut, at random by its place in the table, into parts of nearly equal size.
        with_classes: keep class logits, too; those of a judged pair are the log of its soft distribution.
        label_smoothing: of that distribution.

    Returns:
        None where no group has two usable pairs.
    """
    found = []
    for start in range(0, table.num_rows, GROUPS_AT_ONCE):
        chunk = table.slice(start, GROUPS_AT_ONCE)
        flat = flatten_groups(chunk)
        target = _targets(flat)
        tokens = reader.pack(flat.queries, flat.products, np.isfinite(target))
        usable = np.flatnonzero(tokens.lengths)
        groups: list[np.ndarray] = []
        for number, (first, last) in enumerate(itertools.pairwise(np.searchsorted(usable, flat.offsets)), start=start):
            if last - first >= 2:
                groups += _cut(usable[first:last], max_group_products, number)
        if not groups:
            continue
        rows = np.concatenate(groups)
        class_logits = _class_logits(chunk, flat, scale, label_smoothing)[rows]
        found.append(
            TrainingGroups(
                tokens.take(rows),
                target[rows],
                class_logits if with_classes else None,
                class_logits.argmax(axis=1).astype(np.int8),
                np.concatenate([[0], np.cumsum([len(group) for group in groups], dtype=np.int64)]),
            )
        )
    return join_groups(found) if found else None


def encode_judged(judged: pa.Table, reader: Reader, scale: LabelScale) -> JudgedPairs:
    """Tokenise judged groups for evaluation; every pair keeps its row, encoded or not."""
    flat = flatten_groups(judged)
    gains = np.asarray([scale.gain(grade) for grade in flat.values("grade")], dtype=np.float64)
    return JudgedPairs(reader.pack(flat.queries, flat.products), gains, flat.offsets)


def grade_distributions(judged: pa.Table, scale: LabelScale, label_smoothing: float) -> np.ndarray:
    """Soft class distributions of all pairs of judged groups, float64 [n, K], in the order of the table."""
    flat = flatten_groups(judged)
    votes = flat.values("rater_grades")
    rows = [
        scale.distribution(grade, raters, label_smoothing)
        for grade, raters in zip(flat.values("grade"), votes, strict=True)
    ]
    return np.asarray(rows, dtype=np.float64).reshape(len(rows), scale.num_classes)


def read_judged_split(path: str, split: str) -> pa.Table:
    """The judged groups of one split."""
    table = storage.read_table(path)
    return table.filter(pc.equal(table["split"], split))


def read_training_table(path: str) -> pa.Table:
    """Labeled groups of a file; of judged groups only the train split."""
    table = storage.read_table(path)
    if "split" in table.column_names:
        table = table.filter(pc.equal(table["split"], "train"))
    return table.select(["query", "products"])


def _targets(flat: FlatGroups) -> np.ndarray:
    """float32 [n] logits; NaN where a pair has none."""
    names = {field.name for field in flat.candidates.type}
    if "soft_target" in names:
        p = np.clip(flat.floats("soft_target"), SOFT_TARGET_FLOOR, 1 - SOFT_TARGET_FLOOR).astype(np.float64)
        return (np.log(p) - np.log1p(-p)).astype(np.float32)
    failed = pc.is_valid(pc.struct_field(flat.candidates, "error")).to_numpy(zero_copy_only=False)
    return np.where(failed, np.float32(np.nan), flat.floats("logit"))


def _class_logits(groups: pa.Table, flat: FlatGroups, scale: LabelScale, label_smoothing: float) -> np.ndarray:
    """float32 [n, K]: the teacher's, or the log of a human's soft distribution; zeros where a pair has none."""
    if "soft_target" in {field.name for field in flat.candidates.type}:
        p = grade_distributions(groups, scale, label_smoothing)
        return np.log(np.clip(p, SOFT_TARGET_FLOOR, None)).astype(np.float32)
    column = pc.struct_field(flat.candidates, "class_logits")
    sizes = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    num_classes = int(sizes.max(initial=1))
    out = np.zeros((len(sizes), num_classes), dtype=np.float32)
    assert set(np.unique(sizes)) <= {0, num_classes}, np.unique(sizes)  # one engine labeled them all
    found = column.flatten().fill_null(0.0).to_numpy(zero_copy_only=False)
    out[sizes > 0] = found.reshape(-1, num_classes)
    return out


def _cut(rows: np.ndarray, max_rows: int, seed: int) -> list[np.ndarray]:
    if len(rows) <= max_rows:
        return [rows]
    shuffled = np.random.default_rng(seed).permutation(rows)
    parts = np.array_split(shuffled, -(-len(rows) // max_rows))
    return [part for part in parts if len(part) >= 2]  # one alone has no margin
