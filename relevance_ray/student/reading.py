"""How a student reads pairs: text to tokens once, tokens to outputs in each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from relevance_ray.engines.base import row_error
from relevance_ray.engines.encoding import token_batches
from relevance_ray.sharding import equal_calls
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
    tokens: PackedTokens, rows: np.ndarray, model: nn.Module, forward: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """`forward` of some rows, float32 [len(rows), ...], in runs of rows of like length."""
    device = device_of(model)
    lengths = tokens.offsets[rows + 1] - tokens.offsets[rows]
    runs = token_batches(lengths, CPU_RUN_TOKENS if device.type == "cpu" else GPU_RUN_TOKENS)

    def run(some: np.ndarray) -> torch.Tensor:
        inputs = {name: torch.from_numpy(value).to(device) for name, value in tokens.pad(some).items()}
        return forward(**inputs).float()

    outputs = [run(rows[each]) for each in runs]
    num_empty = equal_calls(model, max(len(runs), 1)) - len(runs)
    for _ in range(num_empty):  # so that all workers of a model that is shared out make as many passes
        spare = run(np.argmax(tokens.lengths > 0, keepdims=True))
        outputs = [outputs[0] + 0 * spare.sum(), *outputs[1:]] if outputs else [spare[:0]]
    back = torch.from_numpy(np.argsort(np.concatenate([*runs, np.empty(0, np.int64)]))).to(device)
    return torch.cat(outputs)[back]


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
