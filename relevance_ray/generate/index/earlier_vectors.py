"""Vectors of an earlier index of the same catalog: a nightly run embeds what is new, not a million products again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from relevance_ray.generate.index.arrays import mapped
from relevance_ray.generate.index.dense import part_name


class EarlierVectors:
    """Looks vectors up by the key of their product's text.

    Args:
        text_ids: int64 [products] of the earlier catalog.
        shards: for each shard of it the folder of its vectors.
    """

    def __init__(self, text_ids: np.ndarray, shards: Sequence[Path]) -> None:
        self._parts: list[np.ndarray] = []
        keys, places = [], []
        for folder in shards:
            rows = mapped(folder / "rows.npy")
            start = 0
            for part in range(len(list(folder.glob("part-*.npy")))):
                vectors = mapped(folder / part_name(part))
                keys.append(text_ids[rows[start : start + len(vectors)]])
                places.append((len(self._parts) << 32) + np.arange(len(vectors), dtype=np.int64))
                self._parts.append(vectors)
                start += len(vectors)
        found = np.concatenate(keys) if keys else np.empty(0, dtype=np.int64)
        self._keys, first = np.unique(found, return_index=True)
        self._places = np.concatenate(places)[first] if keys else np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._keys)

    def complete(
        self, text_ids: np.ndarray, texts: Sequence[str], embed: Callable[[list[str]], np.ndarray]
    ) -> np.ndarray:
        """Vectors float32 [n, d] of products, given by the keys and texts: known ones taken over, the others embedded."""
        at = np.minimum(np.searchsorted(self._keys, text_ids), max(len(self._keys) - 1, 0))
        known = self._keys[at] == text_ids if len(self._keys) else np.zeros(len(text_ids), dtype=bool)
        new = embed([text for text, is_known in zip(texts, known, strict=True) if not is_known])
        if not known.any():
            return new
        out = np.empty((len(texts), self._parts[0].shape[1]), dtype=np.float32)
        if not known.all():
            out[~known] = new
        for row in np.flatnonzero(known):
            place = int(self._places[at[row]])
            out[row] = self._parts[place >> 32][place & 0xFFFFFFFF]
        return out
