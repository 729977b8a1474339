"""Groups to tokens: read once, tokenised once, kept flat.

All tokens of all pairs lie in one int32 array with offsets, four bytes a token, so a worker's epoch is array arithmetic
and touches no Python object per pair. The price is that a worker holds its whole training set: a hundred million tokens
are 400 MB.
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
from relevance_ray.engines.base import row_error
from relevance_ray.engines.encoding import PairEncoder
from relevance_ray.errors import UserError
from relevance_ray.schema import LabelScale

GROUPS_AT_ONCE = 1024
SOFT_TARGET_FLOOR = 1e-4


@dataclass(frozen=True)
class PackedPairs:
    """Token ids of n pairs in one array.

    Attributes:
        token_ids: int32 [total tokens].
        token_types: int8 [total tokens], or None for a model without them.
        offsets: int64 [n + 1]; an empty span is a pair that is not used or could not be encoded.
        pad_token_id: what pads.
    """

    token_ids: np.ndarray
    token_types: np.ndarray | None
    offsets: np.ndarray
    pad_token_id: int

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each pair, int64 [n]."""
        return np.diff(self.offsets)

    def pad(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The model's inputs for some rows, each int64 [len(rows), longest], padded on the right. `attention_mask` is
        left out where nothing is padded, which spares the attention its mask."""
        lengths = self.lengths[rows]
        columns = np.arange(lengths.max())
        mask = columns < lengths[:, None]
        at = np.minimum(self.offsets[rows][:, None] + columns, len(self.token_ids) - 1)
        out = {"input_ids": np.where(mask, self.token_ids[at], self.pad_token_id).astype(np.int64)}
        if self.token_types is not None:
            out["token_type_ids"] = np.where(mask, self.token_types[at], 0).astype(np.int64)
        if not mask.all():
            out["attention_mask"] = mask.astype(np.int64)
        return out


@dataclass(frozen=True)
class TrainingGroups:
    """Labeled groups, ready to train on.

    Attributes:
        pairs: tokens of all P pairs read.
        target: float32 [P], the logit to distill.
        rows: int64 [R], the pairs of the groups, one group after another.
        group_offsets: int64 [G + 1], where each group begins in `rows`.
    """

    pairs: PackedPairs
    target: np.ndarray
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

    pairs: PackedPairs
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


def pack_pairs(
    encoder: PairEncoder,
    queries: Sequence[str],
    products: Sequence[Mapping[str, Any]],
    wanted: np.ndarray | None = None,
) -> PackedPairs:
    """Tokenise n pairs; those not `wanted` (bool [n]), unfit for any model, or without room are left empty."""
    keep = [
        row
        for row in range(len(queries))
        if (wanted is None or wanted[row]) and row_error(queries[row], products[row]) is None
    ]
    encoded = encoder.encode([queries[row] for row in keep], [products[row] for row in keep])
    lengths = np.zeros(len(queries), dtype=np.int64)
    lengths[keep] = encoded.lengths
    ids = np.concatenate([np.empty(0, np.int32), *encoded.input_ids]).astype(np.int32)
    types = None
    if encoded.token_type_ids is not None:
        types = np.concatenate([np.empty(0, np.int8), *encoded.token_type_ids]).astype(np.int8)
    return PackedPairs(ids, types, np.concatenate([[0], np.cumsum(lengths)]), encoder.pad_token_id)


def concatenate_pairs(parts: Sequence[PackedPairs]) -> PackedPairs:
    """Several packs as one, in order."""
    types = [part.token_types for part in parts if part.token_types is not None]
    return PackedPairs(
        np.concatenate([part.token_ids for part in parts]),
        np.concatenate(types) if types else None,
        np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in parts]))]),
        parts[0].pad_token_id,
    )


def encode_groups(
    tables: Iterable[pa.Table], encoder: PairEncoder, max_group_products: int, seed: int, max_groups: int | None = None
) -> TrainingGroups:
    """Tokenise groups for a student.

    The target is the teacher's `logit`, or, for judged groups, the log-odds of the human `soft_target`. Pairs with an error,
    without a finite logit, or that cannot be encoded are left out, and so are groups of fewer than two pairs.

    Args:
        tables: LABELED_GROUP or JUDGED_GROUP tables.
        encoder: the student's.
        max_group_products: a larger group is cut, at random by `seed`, into parts of nearly equal size.
        max_groups: only the first so many groups are read.

    Raises:
        UserError: no group of two usable pairs.
    """
    packs, targets, groups = [], [], []
    num_pairs = num_read = 0
    for table in tables:
        if max_groups is not None:
            table = table.slice(0, max_groups - num_read)
        for start in range(0, table.num_rows, GROUPS_AT_ONCE):
            flat = flatten_groups(table.slice(start, GROUPS_AT_ONCE))
            target = _targets(flat)
            pack = pack_pairs(encoder, flat.queries, flat.products, np.isfinite(target))
            usable = np.flatnonzero(pack.lengths)
            cuts = np.searchsorted(usable, flat.offsets)
            for number, (first, last) in enumerate(itertools.pairwise(cuts), start=num_read + start):
                rows = usable[first:last] + num_pairs
                if len(rows) >= 2:
                    groups += _cut(rows, max_group_products, [seed, number])
            packs.append(pack)
            targets.append(target)
            num_pairs += len(target)
        num_read += table.num_rows
    if not groups:
        raise UserError("there is no group with two labeled products to train on; look at the errors of the label step")
    sizes = [len(rows) for rows in groups]
    return TrainingGroups(
        concatenate_pairs(packs),
        np.concatenate(targets),
        np.concatenate(groups),
        np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]),
    )


def encode_judged(judged: pa.Table, encoder: PairEncoder, scale: LabelScale) -> JudgedPairs:
    """Tokenise judged groups for evaluation; every pair keeps its row, encoded or not."""
    flat = flatten_groups(judged)
    gains = np.asarray([scale.gain(grade) for grade in flat.values("grade")], dtype=np.float64)
    return JudgedPairs(pack_pairs(encoder, flat.queries, flat.products), gains, flat.offsets)


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


def _cut(rows: np.ndarray, max_rows: int, seed: list[int]) -> list[np.ndarray]:
    if len(rows) <= max_rows:
        return [rows]
    shuffled = np.random.default_rng(seed).permutation(rows)
    return np.array_split(shuffled, -(-len(rows) // max_rows))
