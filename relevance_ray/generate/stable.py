"""Random choices that a growing catalog hardly changes.

A choice by row number would change with every product that comes or goes, and with it the pairs of every query: a nightly
run would label everything anew. Here a product is chosen by a hash of what it is and who asks, so a product more changes
the choices that it comes into, and few others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

_WINDOW = 16
"""Neighbours on the ring of which each draw takes one. With one alone, how often a product is drawn would follow its
distance to the next (variance 1 over the mean squared); with w it is a w-th of that."""

_DRAW = 0x9E3779B97F4A7C15


def hash_seed(seed: int, *parts: str) -> int:
    """A 64-bit seed of a number and texts."""
    text = "\x1f".join([str(seed), *parts]).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def scrambled(keys: np.ndarray, seed: int) -> np.ndarray:
    """uint64 [n] -> uint64 [n], evenly spread, and of no relation between two seeds: the finaliser of splitmix64
    (Steele, Lea and Flood, 2014)."""
    values = keys ^ np.uint64(seed & (2**64 - 1))
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def shuffled(keys: np.ndarray, seed: int) -> np.ndarray:
    """The order int64 [n] of keys uint64 [n] under a seed; one key more leaves that of the others as it was."""
    return np.argsort(scrambled(keys, seed), kind="stable")


def ring_window(sorted_keys: np.ndarray, seed: int, size: int) -> np.ndarray:
    """Places int64 [min(size, n)] of the keys that follow a point on the ring of all of them (consistent hashing, Karger
    et al., 1997)."""
    point = scrambled(np.zeros(1, dtype=np.uint64), seed)[0]
    start = int(np.searchsorted(sorted_keys, point))
    return (start + np.arange(min(size, len(sorted_keys)))) % len(sorted_keys)


def ring_draws(sorted_keys: np.ndarray, seed: int, count: int) -> Iterator[int]:
    """Places among sorted keys, `count` draws with replacement: of a window of the ring the one that hashes lowest
    (rendezvous hashing, Thaler and Ravishankar, 1998)."""
    for draw in range(1, count + 1):
        own = seed ^ (draw * _DRAW)
        window = ring_window(sorted_keys, own, _WINDOW)
        yield int(window[np.argmin(scrambled(sorted_keys[window], own))])
