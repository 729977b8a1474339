"""The middle of a model's three parts: padded token ids in, one vector a row out, whatever library computes it.

What stands before (text to ids) and after (vectors to logits) is the same for all of them, so a runtime is one small
class, and a model exported for another library gives the same scores up to that library's arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch

from relevance_ray.engines.encoding import EncodedTexts, token_batches

DEFAULT_BATCH_TOKENS = 8192
CPU_BATCH_TOKENS = 2048
"""Larger batches are slower there (benchmarks/batch_tokens.py)."""

Batch = Mapping[str, np.ndarray]
"""`input_ids`, `attention_mask` and, where the model has them, `token_type_ids`: int64 [rows, tokens]."""


class Forward(Protocol):
    """Runs a loaded model: a batch to float32 [rows, width]."""

    width: int

    def __call__(self, batch: Batch) -> np.ndarray: ...


class TorchForward:
    """A transformers model in torch.

    Args:
        model: on its device, in eval mode.
        pooled: give unit vectors (`mean_pooled`) of an encoder; else the logits of a sequence classifier.
        compiled: run through `torch.compile`, which takes a minute to pay for itself.
    """

    def __init__(self, model: Any, *, pooled: bool, compiled: bool = False) -> None:
        self.model, self.pooled = model, pooled
        self.device = next(model.parameters()).device
        self.width = int(model.config.hidden_size if pooled else model.config.num_labels)
        self._run = torch.compile(model, dynamic=True) if compiled else model

    def __call__(self, batch: Batch) -> np.ndarray:
        inputs = {name: torch.from_numpy(value).to(self.device) for name, value in batch.items()}
        if batch["attention_mask"].all():
            del inputs["attention_mask"]  # nothing is padded, and attention is spared its mask
        with torch.inference_mode():
            found = self._run(**inputs)
            out = mean_pooled(found.last_hidden_state, inputs.get("attention_mask")) if self.pooled else found.logits
            return out.float().cpu().numpy()


def mean_pooled(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Unit vectors float32 [rows, d]: the mean over tokens of the last hidden state [rows, tokens, d], normalised (Reimers
    and Gurevych, 2019)."""
    hidden = hidden.float()
    if mask is None:
        mean = hidden.mean(dim=1)
    else:
        weight = mask.unsqueeze(-1).float()
        mean = (hidden * weight).sum(dim=1) / weight.sum(dim=1)
    return torch.nn.functional.normalize(mean, dim=1)


def run_texts(forward: Forward, texts: EncodedTexts, max_batch_tokens: int) -> np.ndarray:
    """float32 [n, width] of all inputs, those of like length together; rows that failed are NaN."""
    outputs = np.full((len(texts.input_ids), forward.width), np.nan, dtype=np.float32)
    for rows in token_batches(texts.lengths, max_batch_tokens):
        outputs[rows] = forward(texts.pad(rows))
    return outputs


def pick_device(device: str) -> torch.device:
    """The torch device of a name; "auto" is the GPU where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def pick_dtype(device: torch.device) -> torch.dtype:
    """Float32 on a CPU, bf16 on a GPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def batch_tokens(wanted: int | None, device: torch.device) -> int:
    """Tokens of one forward pass: those that are wanted, else what suits the device."""
    return wanted or (CPU_BATCH_TOKENS if device.type == "cpu" else DEFAULT_BATCH_TOKENS)
