"""Training groups in files that are mapped into memory: all workers of a machine share one copy, and open it at once.

A file is Arrow's, of one row, each array a list in it: mapped, not read, so a training set may be larger than memory.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from relevance_ray.student.collate import TrainingGroups, join_groups
from relevance_ray.student.packed import PackedTokens, PairTokens


def groups_bytes(groups: TrainingGroups) -> bytes:
    """What the file of some groups holds."""
    texts, classes = groups.pairs.texts, groups.classes
    arrays = {
        "token_ids": texts.token_ids,
        "token_types": texts.token_types,
        "text_offsets": texts.offsets,
        "product": groups.pairs.product,
        "query": groups.pairs.query,
        "target": groups.target,
        "classes": None if classes is None else classes.reshape(-1),
        "grade": groups.grade,
        "offsets": groups.offsets,
    }
    columns = {
        name: pa.LargeListArray.from_arrays(pa.array([0, len(array)], pa.int64()), pa.array(array))
        for name, array in arrays.items()
        if array is not None
    }
    table = pa.table(columns).replace_schema_metadata({"pad_token_id": str(texts.pad_token_id)})
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


def read_groups(path: Path) -> TrainingGroups:
    """The groups of a file, its arrays mapped."""
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    arrays = {name: table[name].chunk(0).values.to_numpy() for name in table.column_names}
    texts = PackedTokens(
        arrays["token_ids"],
        arrays.get("token_types"),
        arrays["text_offsets"],
        int(table.schema.metadata[b"pad_token_id"]),
    )
    classes = arrays.get("classes")
    return TrainingGroups(
        PairTokens(texts, arrays["product"], arrays.get("query")),
        arrays["target"],
        None if classes is None else classes.reshape(len(arrays["target"]), -1),
        arrays["grade"],
        arrays["offsets"],
    )


class GroupFiles:
    """Groups of several files as one set, of which a batch is taken at a time.

    Args:
        files: of `groups_bytes`.
        max_pairs: only the first groups, of so many pairs together at most, though never none.

    Attributes:
        sizes: int64 [G], pairs of each group.
        num_tokens: int64 [G], tokens of each.
    """

    def __init__(self, files: Sequence[Path], max_pairs: int | None = None) -> None:
        self._parts = [read_groups(path) for path in files]
        self._starts = np.cumsum([0, *(len(part.offsets) - 1 for part in self._parts)])
        sizes = _joined([part.sizes for part in self._parts])
        num_groups = None
        if max_pairs is not None:
            num_groups = max(1, int(np.searchsorted(np.cumsum(sizes), max_pairs, side="right")))
        self.sizes = sizes[:num_groups]
        self.num_tokens = _joined([part.num_tokens for part in self._parts])[:num_groups]

    @property
    def num_classes(self) -> int:
        """Of the class logits; 0 where there are none."""
        classes = self._parts[0].classes if self._parts else None
        return 0 if classes is None else int(classes.shape[1])

    def take(self, groups: np.ndarray) -> TrainingGroups:
        """Some groups, in the order asked for, in memory. Raises `UserError` for labels of differing classes."""
        owners = np.searchsorted(self._starts, groups, side="right") - 1
        runs = np.split(np.arange(len(groups)), np.flatnonzero(np.diff(owners)) + 1)
        return join_groups(
            [self._parts[owners[run[0]]].take(groups[run] - self._starts[owners[run[0]]]) for run in runs]
        )


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])
