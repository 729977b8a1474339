"""Arrays in files, mapped into memory: all workers of a machine share one copy, and open it at once."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np


def mapped(path: Path) -> np.ndarray:
    """An array of a `.npy` file, read as it is touched. A plain array: slicing numpy's memmap costs microseconds more."""
    return np.asarray(np.load(path, mmap_mode="r"))


def npy_bytes(array: np.ndarray) -> bytes:
    """What a `.npy` file of an array holds."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
