"""Sequence-classification folders, BERT-like and causal, run over pairs.

One forward pass takes a fixed number of padded tokens, not of pairs, and rows of similar length share it, so that short
titles do not pay for long ones. Float32 on a CPU (bf16 is several times slower without native support), bf16 on a GPU.
Rows are tokenised a window at a time, the next one while the model is at work on this one: lengths are sorted within a
window only, which costs a few padded tokens and keeps a GPU from waiting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from relevance_ray.engines.base import SINGLE_LOGIT_GAINS, FolderModel
from relevance_ray.engines.encoding import EncodedPairs, PairEncoder, in_windows, token_batches
from relevance_ray.model_folder import ModelInfo, read_model_info

DEFAULT_BATCH_TOKENS = 8192
CPU_BATCH_TOKENS = 2048
"""Larger batches are slower there (benchmarks/batch_tokens.py)."""


class SequenceModel(FolderModel):
    """A cross-encoder or classifier: `num_labels` 1 gives class logits [0, logit], K gives K.

    Args:
        folder: a model folder of kind cross_encoder or classifier.
        device: a torch device, or "auto".
        max_batch_tokens: padded tokens of one forward pass (`batch_tokens`).
        compiled: run through `torch.compile`, which takes a minute to pay for itself.
    """

    def __init__(
        self,
        folder: str | Path,
        device: str = "auto",
        max_batch_tokens: int | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        self._num_tokens = 0
        self.info = read_model_info(folder)
        self.device = pick_device(device)
        self.max_batch_tokens = batch_tokens(max_batch_tokens, self.device)
        self.encoder = PairEncoder(AutoTokenizer.from_pretrained(folder), self.info.template)
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=pick_dtype(self.device))
        if model.config.pad_token_id is None:
            # A causal classifier finds its last token by looking for padding.
            model.config.pad_token_id = self.encoder.pad_token_id
        self.model = model.to(self.device).eval()
        self._run = torch.compile(self.model, dynamic=True) if compiled else self.model
        self.gains = gains_of(self.info, model.config.num_labels)

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    def _forward(
        self, queries: Sequence[str], products: Sequence[Mapping[str, Any]]
    ) -> tuple[np.ndarray, list[str | None]]:
        class_logits = np.full((len(queries), len(self.gains)), np.nan, dtype=np.float32)
        errors: list[str | None] = []
        for rows, encoded in in_windows(self.encoder.encode, queries, products):
            class_logits[rows] = self._class_logits(encoded)
            errors += encoded.errors
        return class_logits, errors

    def _class_logits(self, encoded: EncodedPairs) -> np.ndarray:
        class_logits = np.full((len(encoded.errors), len(self.gains)), np.nan, dtype=np.float32)
        with torch.inference_mode():
            for rows in token_batches(encoded.lengths, self.max_batch_tokens):
                batch = {key: torch.from_numpy(value) for key, value in self.encoder.pad(encoded, rows).items()}
                found = self._run(**{key: value.to(self.device) for key, value in batch.items()}).logits
                class_logits[rows] = as_class_logits(found.float().cpu().numpy())
        self._num_tokens += int(encoded.lengths.sum())
        return class_logits


def pick_device(device: str) -> torch.device:
    """The torch device of a name; "auto" is the GPU where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def pick_dtype(device: torch.device) -> torch.dtype:
    """Float32 on a CPU, bf16 on a GPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def batch_tokens(wanted: int | None, device: torch.device) -> int:
    """Tokens of one forward pass: those that are wanted, else what suits the device."""
    return wanted or (CPU_BATCH_TOKENS if device.type == "cpu" else DEFAULT_BATCH_TOKENS)


def gains_of(info: ModelInfo, num_labels: int) -> tuple[float, ...]:
    """The gains of a head: the scale's, or (0, 1) for a single output."""
    if num_labels == 1:
        return SINGLE_LOGIT_GAINS
    assert num_labels == info.scale.num_classes, (num_labels, info.scale)
    return info.scale.gains


def as_class_logits(outputs: np.ndarray) -> np.ndarray:
    """[n, K] as it is, [n, 1] as [0, logit]."""
    return np.concatenate([np.zeros_like(outputs), outputs], axis=1) if outputs.shape[1] == 1 else outputs
