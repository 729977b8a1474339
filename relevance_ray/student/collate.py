"""Groups to tokens and targets: read once, tokenised once, kept flat.

The price is that a worker holds its whole training set: a hundred million tokens are 400 MB.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from relevance_ray import storage
from relevance_ray.errors import UserError
from relevance_ray.schema import LabelScale
from relevance_ray.student.reading import PairTokens, Reader

GROUPS_AT_ONCE = 1024
SOFT_TARGET_FLOOR = 1e-4


@dataclass(frozen=True)
class TrainingGroups:
    """Labeled groups, ready to train on.

    Attributes:
        pairs: tokens of all P pairs read.
        target: float32 [P], the logit to distill.
        classes: float32 [P, K], class logits to distill; None where they were not asked for.
        grade: int8 [P], the most probable of the classes, or the human's grade.
        rows: int64 [R], the pairs of the groups, one group after another.
        group_offsets: int64 [G + 1], where each group begins in `rows`.
    """

    pairs: PairTokens
    target: np.ndarray
    classes: np.ndarray | None
    grade: np.ndarray
    rows: np.ndarray
    group_offsets: np.ndarray

    @property
    def group_sizes(self) -> np.ndarray:
        return np.diff(self.group_offsets)

    @property
    def group_tokens(self) -> np.ndarray:
        """int64 [G]."""
        return np.add.reduceat(self.pairs.lengths[self.rows], self.group_offsets[:-1])

    def take(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows into `pairs` of some groups, and for each row the place of its group among them: two int64 [n]."""
        rows = [self.rows[self.group_offsets[group] : self.group_offsets[group + 1]] for group in groups]
        return np.concatenate(rows), np.repeat(np.arange(len(groups)), [len(part) for part in rows])


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
    tables: Iterable[pa.Table],
    reader: Reader[Any],
    scale: LabelScale,
    max_group_products: int,
    seed: int,
    *,
    max_groups: int | None = None,
    with_classes: bool = False,
    label_smoothing: float = 0.0,
) -> TrainingGroups:
    """Tokenise groups for a student.

    The target is the teacher's `logit`, or, for judged groups, the log-odds of the human `soft_target`. Pairs with an error,
    without a finite logit, or that cannot be encoded are left out, and so are groups of fewer than two pairs.

    Args:
        tables: LABELED_GROUP or JUDGED_GROUP tables.
        reader: the student's.
        scale: of the human grades.
        max_group_products: a larger group is cut, at random by `seed`, into parts of nearly equal size.
        max_groups: only the first so many groups are read.
        with_classes: keep class logits, too; those of a judged pair are the log of its soft distribution.
        label_smoothing: of that distribution.

    Raises:
        UserError: no group of two usable pairs, or class logits of differing numbers of classes.
    """
    packs, targets, classes, grades, groups = [], [], [], [], []
    num_pairs = num_read = 0
    for table in tables:
        if max_groups is not None:
            table = table.slice(0, max_groups - num_read)
        for start in range(0, table.num_rows, GROUPS_AT_ONCE):
            chunk = table.slice(start, GROUPS_AT_ONCE)
            flat = flatten_groups(chunk)
            target = _targets(flat)
            pack = reader.pack(flat.queries, flat.products, np.isfinite(target))
            usable = np.flatnonzero(pack.lengths)
            cuts = np.searchsorted(usable, flat.offsets)
            for number, (first, last) in enumerate(itertools.pairwise(cuts), start=num_read + start):
                rows = usable[first:last] + num_pairs
                if len(rows) >= 2:
                    groups += _cut(rows, max_group_products, [seed, number])
            packs.append(pack)
            targets.append(target)
            class_logits = _class_logits(chunk, flat, scale, label_smoothing)
            grades.append(class_logits.argmax(axis=1).astype(np.int8))
            if with_classes:
                classes.append(class_logits)
            num_pairs += len(target)
        num_read += table.num_rows
    if not groups:
        raise UserError("there is no group with two labeled products to train on; look at the errors of the label step")
    sizes = [len(rows) for rows in groups]
    return TrainingGroups(
        reader.concatenate(packs),
        np.concatenate(targets),
        _concatenate_classes(classes) if with_classes else None,
        np.concatenate(grades),
        np.concatenate(groups),
        np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]),
    )


def join_groups(parts: Sequence[TrainingGroups], reader: Reader[Any]) -> TrainingGroups:
    """Groups of several sources as one set, in order."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(part.target) for part in parts)])
    offsets = np.cumsum([0, *(len(part.rows) for part in parts)])
    return TrainingGroups(
        reader.concatenate([part.pairs for part in parts]),
        np.concatenate([part.target for part in parts]),
        None if parts[0].classes is None else _concatenate_classes([p.classes for p in parts if p.classes is not None]),
        np.concatenate([part.grade for part in parts]),
        np.concatenate([part.rows + start for part, start in zip(parts, starts, strict=False)]),
        np.concatenate([[0], *(part.group_offsets[1:] + offset for part, offset in zip(parts, offsets, strict=False))]),
    )


def encode_judged(judged: pa.Table, reader: Reader[Any], scale: LabelScale) -> JudgedPairs:
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


def read_training_tables(paths: Sequence[str]) -> Iterable[pa.Table]:
    """Tables of labeled groups one after another; of judged groups only the train split."""
    columns = ["query", "products"]
    for path in paths:
        table = storage.read_table(path)
        if "split" in table.column_names:
            table = table.filter(pc.equal(table["split"], "train"))
        yield table.select(columns)


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


def _concatenate_classes(parts: Sequence[np.ndarray]) -> np.ndarray:
    widths = sorted({part.shape[1] for part in parts})
    if len(widths) > 1:
        raise UserError(
            f"the labels have {' and '.join(map(str, widths))} classes, and student.kl_weight needs them to have as many; "
            "set it to 0, or train a teacher with the classes of the scale (teacher.num_classes)"
        )
    return np.concatenate(parts)


def _cut(rows: np.ndarray, max_rows: int, seed: list[int]) -> list[np.ndarray]:
    if len(rows) <= max_rows:
        return [rows]
    shuffled = np.random.default_rng(seed).permutation(rows)
    return np.array_split(shuffled, -(-len(rows) // max_rows))
