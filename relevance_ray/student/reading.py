"""How a student reads pairs: text to tokens once, tokens to outputs in each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from relevance_ray.engines.base import row_error
from relevance_ray.engines.encoding import token_batches
from relevance_ray.student.packed import PackedTokens, PairTokens

CPU_RUN_TOKENS = 1024
GPU_RUN_TOKENS = 16384
"""Padded tokens of one forward pass. Not fewer: each costs the embedding table one dense gradient."""


class Reader(Protocol):
    """A kind of model's way from text to outputs."""

    def pack(
        self, queries: Sequence[str], products: Sequence[Mapping[str, Any]], wanted: np.ndarray | None = None
    ) -> PairTokens:
        """Tokenise n pairs; those not `wanted` (bool [n]), or unfit for the model, are left out."""

    def outputs(self, model: Any, tokens: PairTokens, rows: np.ndarray) -> torch.Tensor:
        """The model's outputs for some rows, float32 [len(rows), num_labels]."""


def usable_rows(queries: Sequence[str], products: Sequence[Mapping[str, Any]], wanted: np.ndarray | None) -> list[int]:
    """Rows that are wanted and fit for a model."""
    return [
        row
        for row in range(len(queries))
        if (wanted is None or wanted[row]) and row_error(queries[row], products[row]) is None
    ]


def in_runs(
    tokens: PackedTokens, rows: np.ndarray, device: torch.device, forward: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """`forward` of some rows, float32 [len(rows), ...], in runs of rows of like length."""
    lengths = tokens.offsets[rows + 1] - tokens.offsets[rows]
    runs = token_batches(lengths, CPU_RUN_TOKENS if device.type == "cpu" else GPU_RUN_TOKENS)
    outputs = []
    for run in runs:
        inputs = {name: torch.from_numpy(value).to(device) for name, value in tokens.pad(rows[run]).items()}
        outputs.append(forward(**inputs).float())
    back = torch.from_numpy(np.argsort(np.concatenate(runs))).to(device)
    return torch.cat(outputs)[back]


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
