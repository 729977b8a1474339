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
        offsets: int64 [n + 1]; an empty span is a text that could not be encoded.
        pad_token_id: what pads.
    """

    token_ids: np.ndarray
    token_types: np.ndarray | None
    offsets: np.ndarray
    pad_token_id: int

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, int64 [n]."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> PackedTokens:
        """Some texts, in the order of `rows`, as a pack of their own."""
        starts, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        at = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        types = None if self.token_types is None else self.token_types[at]
        return PackedTokens(self.token_ids[at], types, offsets, self.pad_token_id)

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


@dataclass(frozen=True)
class PairTokens:
    """Tokens of n pairs: of each pair one text that holds both sides, or one text a side.

    Attributes:
        texts: the texts, each distinct one once where the sides are apart.
        product: int64 [n], the row in `texts` of a pair's text, or of its product's; -1 for a pair that is not used or
            could not be encoded.
        query: int64 [n], the row of its query's text; None where the texts hold both sides.
    """

    texts: PackedTokens
    product: np.ndarray
    query: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each pair (of its product, where the sides are apart), int64 [n]; 0 for one that is not used."""
        if not len(self.texts.offsets) > 1:
            return np.zeros(len(self.product), dtype=np.int64)
        return np.where(self.product >= 0, self.texts.lengths[self.product], 0)

    def take(self, rows: np.ndarray) -> PairTokens:
        """Some pairs, all usable, in the order of `rows`, with the texts they need."""
        product, query = self.product[rows], None if self.query is None else self.query[rows]
        wanted = product if query is None else np.concatenate([query, product])
        distinct, place = np.unique(wanted, return_inverse=True)
        texts = self.texts.take(distinct)
        return PairTokens(texts, place[-len(rows) :], None if query is None else place[: len(rows)])


def pack_texts(rows: Sequence[np.ndarray], types: Sequence[np.ndarray] | None, pad_token_id: int) -> PackedTokens:
    """Token ids, one array a text, as one."""
    ids = np.concatenate([np.empty(0, np.int32), *rows]).astype(np.int32)
    packed_types = None if types is None else np.concatenate([np.empty(0, np.int8), *types]).astype(np.int8)
    lengths = np.asarray([len(row) for row in rows], dtype=np.int64)
    return PackedTokens(ids, packed_types, np.concatenate([[0], np.cumsum(lengths)]), pad_token_id)


def concatenate(parts: Sequence[PairTokens]) -> PairTokens:
    """Several packs as one, in order."""
    if len(parts) == 1:
        return parts[0]
    texts = [part.texts for part in parts]
    starts = np.cumsum([0, *(len(text.offsets) - 1 for text in texts)])[:-1]
    types = [text.token_types for text in texts if text.token_types is not None]
    together = PackedTokens(
        np.concatenate([text.token_ids for text in texts]),
        np.concatenate(types) if types else None,
        np.concatenate([[0], np.cumsum(np.concatenate([text.lengths for text in texts]))]),
        texts[0].pad_token_id,
    )

    def moved(rows: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.where(row >= 0, row + start, -1) for row, start in zip(rows, starts, strict=True)])

    queries = [part.query for part in parts if part.query is not None]
    return PairTokens(together, moved([part.product for part in parts]), moved(queries) if queries else None)
