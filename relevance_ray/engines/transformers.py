"""Sequence-classification folders, BERT-like and causal, run over pairs.

One forward pass takes a fixed number of padded tokens, not of pairs, and rows of similar length share it, so that short
titles do not pay for long ones. Float32 on a CPU (bf16 is several times slower without native support), bf16 on a GPU.
Rows are tokenised a window at a time, the next one while the model is at work on this one: lengths are sorted within a
window only, which costs a few padded tokens and keeps a GPU from waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import AutoConfig, AutoTokenizer

from relevance_ray.engines.base import SINGLE_LOGIT_GAINS
from relevance_ray.engines.encoding import EncodedTexts, PairEncoder
from relevance_ray.engines.forward import batch_tokens, pick_device
from relevance_ray.engines.runtimes import open_forward
from relevance_ray.engines.token_model import PairInputs, TokenModel, distinct_places
from relevance_ray.model_folder import ModelInfo, read_model_info


class SequenceModel(TokenModel[tuple[str, str]]):
    """A cross-encoder or classifier: `num_labels` 1 gives class logits [0, logit], K gives K.

    Args:
        folder: a model folder of kind cross_encoder or classifier.
        device: a torch device, or "auto".
        max_batch_tokens: padded tokens of one forward pass (`batch_tokens`).
        num_threads: of a runtime other than torch, which has its own setting; None for all cores.
        compiled: run torch through `torch.compile`, which takes a minute to pay for itself.
    """

    def __init__(
        self,
        folder: str | Path,
        device: str = "auto",
        max_batch_tokens: int | None = None,
        *,
        num_threads: int | None = None,
        compiled: bool = False,
    ) -> None:
        self.info = read_model_info(folder)
        self.device = pick_device(device)
        self.max_batch_tokens = batch_tokens(max_batch_tokens, self.device)
        self.encoder = PairEncoder(AutoTokenizer.from_pretrained(folder), self.info.template)
        self.forward = open_forward(
            folder,
            self.device,
            pooled=False,
            pad_token_id=self.encoder.pad_token_id,
            num_threads=num_threads,
            compiled=compiled,
        )
        self.gains = gains_of(self.info, AutoConfig.from_pretrained(folder).num_labels)

    def inputs(self, queries: Sequence[str], texts: Sequence[str]) -> PairInputs[tuple[str, str]]:
        distinct, places = distinct_places(list(zip(queries, texts, strict=True)))
        return PairInputs(distinct, places, None)

    def tokenize(self, distinct: Sequence[tuple[str, str]]) -> EncodedTexts:
        queries, texts = [query for query, _ in distinct], [text for _, text in distinct]
        return self.encoder.encode_texts(queries, texts, self.known_tokens)

    def finish(self, inputs: PairInputs[tuple[str, str]], outputs: np.ndarray) -> np.ndarray:
        return as_class_logits(outputs)[inputs.product]


def gains_of(info: ModelInfo, num_labels: int) -> tuple[float, ...]:
    """The gains of a head: the scale's, or (0, 1) for a single output."""
    if num_labels == 1:
        return SINGLE_LOGIT_GAINS
    assert num_labels == info.scale.num_classes, (num_labels, info.scale)
    return info.scale.gains


def as_class_logits(outputs: np.ndarray) -> np.ndarray:
    """[n, K] as it is, [n, 1] as [0, logit]."""
    return np.concatenate([np.zeros_like(outputs), outputs], axis=1) if outputs.shape[1] == 1 else outputs
