"""What a server remembers: query logs are Zipf-shaped, and a product stands in many requests.

Each cache belongs to one loaded model and dies with it, so a key need not name the model. Bounded in memory; what was
not asked for since the hand passed it last is forgotten first (the clock, or second-chance, policy).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

_KEY_BYTES = 16
_ENTRY_BYTES = 160
"""Of a key and its place in the index, by measurement."""


def text_key(*texts: str) -> bytes:
    """128 bits of texts; which text ends where is part of them."""
    joined = texts[0] if len(texts) == 1 else "".join(f"{len(text)}:{text}" for text in texts)
    return blake2b(joined.encode("utf-8"), digest_size=_KEY_BYTES).digest()


@dataclass
class _Clock:
    """Which of `size` places holds which key, and whose turn it is to go."""

    size: int
    places: dict[bytes, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.keys: list[bytes | None] = [None] * self.size
        self.asked = bytearray(self.size)
        self.hand = 0

    def find(self, key: bytes) -> int | None:
        place = self.places.get(key)
        if place is not None:
            self.asked[place] = 1
        return place

    def claim(self, key: bytes) -> int:
        """A place for a key, its own where it has one."""
        if (place := self.places.get(key)) is not None:
            return place
        while self.asked[self.hand]:
            self.asked[self.hand] = 0
            self.hand = (self.hand + 1) % self.size
        place, self.hand = self.hand, (self.hand + 1) % self.size
        if (old := self.keys[place]) is not None:
            del self.places[old]
        self.keys[place], self.places[key] = key, place
        return place


class OutputCache:
    """Outputs of a model by its input: of a cross-encoder the logits of (query, product), of a two-tower a text's vector.

    Args:
        megabytes: that it takes at most.
        width: float32 numbers of an output.

    Attributes:
        hits, misses: inputs asked for so far.
    """

    def __init__(self, megabytes: float, width: int) -> None:
        self.size = max(1, int(megabytes * 1e6 / (4 * width + _ENTRY_BYTES)))
        self.hits = self.misses = 0
        self._clock = _Clock(self.size)
        self._outputs = np.empty((self.size, width), dtype=np.float32)
        self._truncated = np.zeros(self.size, dtype=bool)
        self._lock = threading.Lock()

    def get(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which are known, bool [n]; their outputs float32 [n, width] and whether their text was cut, bool [n] (of the
        others, anything)."""
        with self._lock:
            find = self._clock.find
            places = np.asarray([-1 if (place := find(key)) is None else place for key in keys], dtype=np.int64)
            known = places >= 0
            self.hits += (hits := int(known.sum()))
            self.misses += len(keys) - hits
            return known, self._outputs[places], self._truncated[places]

    def put(self, keys: Sequence[bytes], outputs: np.ndarray, truncated: np.ndarray) -> None:
        with self._lock:
            for key, output, cut in zip(keys, outputs, truncated, strict=True):
                place = self._clock.claim(key)
                self._outputs[place], self._truncated[place] = output, cut


class TokenCache:
    """Token ids of products' texts: an `encoding.KnownTokens`.

    Args:
        megabytes: that it takes at most.
        max_tokens: of a text.

    Attributes:
        hits, misses: texts asked for so far.
    """

    def __init__(self, megabytes: float, max_tokens: int) -> None:
        self.size = max(1, int(megabytes * 1e6 / (4 * max_tokens + 120 + _ENTRY_BYTES)))
        self.hits = self.misses = 0
        self._clock = _Clock(self.size)
        self._ids: list[np.ndarray | None] = [None] * self.size
        self._lock = threading.Lock()

    def get(self, text: str) -> np.ndarray | None:
        with self._lock:
            place = self._clock.find(text_key(text))
            if place is None:
                self.misses += 1
                return None
            self.hits += 1
            return self._ids[place]

    def put(self, text: str, ids: np.ndarray) -> None:
        with self._lock:
            self._ids[self._clock.claim(text_key(text))] = ids
