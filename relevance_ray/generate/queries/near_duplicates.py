"""Queries that say almost the same as one already taken.

MinHash (Broder, 1997) over three-letter shingles, in bands (Leskovec, Rajaraman and Ullman, ch. 3): a query is a
near-duplicate where all hashes of one band agree with those of a query before it. At Jaccard similarity s that happens
with chance 1 - (1 - s^rows)^bands, which is a half at about the similarity asked for; queries are not kept, so it is not
looked up whether they are as similar as that. What is kept is one 64-bit key a band in a sorted array, where a Python
set of the same keys takes ten times as much.
"""

from __future__ import annotations

import hashlib

from datasketch import MinHash

from relevance_ray.generate.queries.keys import NumberSet
from relevance_ray.schema import normalize_query

NUM_HASHES = 64
_SHINGLE = 3


class NearDuplicates:
    """Remembers the queries it took.

    It takes 10 bytes a band for each query: at a similarity of 0.8, of 6 bands, 60 bytes, and twice that while keys are
    merged. A query takes some 80 microseconds. Keys are the same in every
    process.

    Args:
        max_similarity: Jaccard similarity in (0, 1] from which on a query is taken for another one; 1: only where the
            shingles are the same.
    """

    def __init__(self, max_similarity: float) -> None:
        if not 0 < max_similarity <= 1:
            raise ValueError(f"max_similarity {max_similarity} must be more than 0 and at most 1")
        shapes = [(NUM_HASHES // rows, rows) for rows in range(1, NUM_HASHES + 1)]
        self.num_bands, self.num_rows = min(shapes, key=lambda shape: abs(_even_chance(*shape) - max_similarity))
        self._sketch = MinHash(num_perm=NUM_HASHES, seed=1, scheme="affine32")
        self._salts = [bytes([band]) for band in range(self.num_bands)]
        self._taken = NumberSet()
        self._num_taken = 0

    def __len__(self) -> int:
        """Queries taken."""
        return self._num_taken

    @property
    def num_bytes(self) -> int:
        return self._taken.num_bytes

    def is_new(self, query: str) -> bool:
        """Whether no query like it was taken; if so, it is taken."""
        keys = self._keys(query)
        if self._taken.holds_any(keys):
            return False
        self._taken.update(keys)
        self._num_taken += 1
        return True

    def _keys(self, query: str) -> list[int]:
        """Of each band, its place and its hashes in one number of 64 bits."""
        text = f" {normalize_query(query)} "
        shingles = {text[at : at + _SHINGLE] for at in range(max(1, len(text) - _SHINGLE + 1))}
        self._sketch.clear()
        self._sketch.update_batch([shingle.encode("utf-8", "surrogatepass") for shingle in shingles])
        used = self._sketch.hashvalues[: self.num_bands * self.num_rows].astype("<u4").reshape(self.num_bands, -1)
        return [
            int.from_bytes(hashlib.blake2b(band.tobytes(), digest_size=8, salt=salt).digest(), "little")
            for band, salt in zip(used, self._salts, strict=True)
        ]


def _even_chance(bands: int, rows: int) -> float:
    """The similarity at which one of the bands agrees with a chance of a half."""
    return float((1 - 0.5 ** (1 / bands)) ** (1 / rows))
