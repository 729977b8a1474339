"""Token ids of many texts in one array, four bytes a token: an epoch is array arithmetic and touches no Python object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PackedTokens:
    """Token ids of n texts (or pairs of texts) in one array.

    Attributes:
        token_ids: int32 [total tokens].
        token_types: int8 [total tokens], or None for a model without them.
        offsets: int64 [n + 1]; an empty span is a row that is not used or could not be encoded.
        pad_token_id: what pads.
    """

    token_ids: np.ndarray
    token_types: np.ndarray | None
    offsets: np.ndarray
    pad_token_id: int

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [n]."""
        return np.diff(self.offsets)

    def pad(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The model's inputs for some rows, each int64 [len(rows), longest], padded on the right. `attention_mask` is
        left out where nothing is padded, which spares the attention its mask."""
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        columns = np.arange(lengths.max())
        mask = columns < lengths[:, None]
        at = np.minimum(self.offsets[rows][:, None] + columns, len(self.token_ids) - 1)
        out = {"input_ids": np.where(mask, self.token_ids[at], self.pad_token_id).astype(np.int64)}
        if self.token_types is not None:
            out["token_type_ids"] = np.where(mask, self.token_types[at], 0).astype(np.int64)
        if not mask.all():
            out["attention_mask"] = mask.astype(np.int64)
        return out


def pack(
    rows: Sequence[np.ndarray], types: Sequence[np.ndarray] | None, lengths: np.ndarray, pad_token_id: int
) -> PackedTokens:
    """Token ids, one array a row that has any, as one; `lengths` int64 [n] has the rows without any, too."""
    ids = np.concatenate([np.empty(0, np.int32), *rows]).astype(np.int32)
    packed_types = None if types is None else np.concatenate([np.empty(0, np.int8), *types]).astype(np.int8)
    return PackedTokens(ids, packed_types, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), pad_token_id)


def concatenate(parts: Sequence[PackedTokens]) -> PackedTokens:
    """Several packs as one, in order."""
    types = [part.token_types for part in parts if part.token_types is not None]
    return PackedTokens(
        np.concatenate([part.token_ids for part in parts]),
        np.concatenate(types) if types else None,
        np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in parts]))]),
        parts[0].pad_token_id,
    )
