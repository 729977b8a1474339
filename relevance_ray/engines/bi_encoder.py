"""Cosine of mean-pooled vectors: the zero-shot baseline, the dense candidates, a member of an ensemble.

An untrained sentence encoder times a constant is a surprisingly good first teacher. Query and product are read apart,
so a query with a thousand candidates is encoded once; the price is that no word of the one can look at the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from relevance_ray.engines.base import SINGLE_LOGIT_GAINS
from relevance_ray.engines.encoding import EncodedTexts
from relevance_ray.engines.forward import Forward, batch_tokens, pick_device, run_texts
from relevance_ray.engines.runtimes import open_forward
from relevance_ray.engines.token_model import PairInputs, TokenModel, distinct_places
from relevance_ray.engines.transformers import as_class_logits
from relevance_ray.model_folder import ModelInfo, finish_folder, read_model_info, staged_folder
from relevance_ray.schema import LabelScale
from relevance_ray.templates import Template

LOGIT_SCALE = 20.0
_ROWS_AT_ONCE = 16_384


class TextEncoder:
    """Texts to unit vectors: mean over tokens of the last hidden state, normalised (Reimers and Gurevych, 2019).

    Args:
        folder: any `save_pretrained` folder of an encoder.
        max_tokens: a longer text is cut.
        num_threads: of a runtime other than torch; None for all cores.
    """

    def __init__(
        self,
        folder: str | Path,
        device: str = "auto",
        max_batch_tokens: int | None = None,
        max_tokens: int = 128,
        num_threads: int | None = None,
    ) -> None:
        self.device = pick_device(device)
        self.max_batch_tokens = batch_tokens(max_batch_tokens, self.device)
        self.max_tokens = max_tokens
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.forward: Forward = open_forward(folder, self.device, pooled=True, num_threads=num_threads)

    @property
    def dimension(self) -> int:
        return self.forward.width

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, d], each row of length 1. Equal texts are encoded once."""
        distinct, places = distinct_places(texts)
        vectors = np.zeros((len(distinct), self.dimension), dtype=np.float32)
        for start in range(0, len(distinct), _ROWS_AT_ONCE):
            encoded = self.tokenize(distinct[start : start + _ROWS_AT_ONCE])
            vectors[start : start + _ROWS_AT_ONCE] = run_texts(self.forward, encoded, self.max_batch_tokens)
        return vectors[places]

    def tokenize(self, texts: Sequence[str]) -> EncodedTexts:
        """Token ids of texts, special tokens included."""
        if not texts:
            return EncodedTexts([], None, [], np.zeros(0, dtype=bool), 0)
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens, padding=False)
        types = encoded.get("token_type_ids")
        return EncodedTexts(
            [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]],
            None if types is None else [np.asarray(each, dtype=np.int32) for each in types],
            [None] * len(texts),
            np.asarray([bool(each.overflowing) for each in encoded.encodings], dtype=bool),
            int(self.tokenizer.pad_token_id),
        )


class BiEncoderModel(TokenModel[str]):
    """A model folder of kind bi_encoder: class logits [0, logit_scale * (cosine - bias)]."""

    gains = SINGLE_LOGIT_GAINS
    window_rows = _ROWS_AT_ONCE

    def __init__(
        self,
        folder: str | Path,
        device: str = "auto",
        max_batch_tokens: int | None = None,
        *,
        num_threads: int | None = None,
    ) -> None:
        self.info = read_model_info(folder)
        max_tokens = self.info.template.max_tokens
        self.encoder = TextEncoder(folder, device, max_batch_tokens, max_tokens, num_threads)
        self.forward, self.max_batch_tokens = self.encoder.forward, self.encoder.max_batch_tokens
        self.logit_scale = float(self.info.extra["logit_scale"])
        self.bias = float(self.info.extra["bias"])

    def inputs(self, queries: Sequence[str], texts: Sequence[str]) -> PairInputs[str]:
        distinct, places = distinct_places([*queries, *texts])
        return PairInputs(distinct, places[len(queries) :], places[: len(queries)])

    def tokenize(self, distinct: Sequence[str]) -> EncodedTexts:
        encoded = self.encoder.tokenize(distinct)
        for place, text in enumerate(distinct):
            if not text:  # of a product: a query is never empty
                fields = ", ".join(self.info.template.fields)
                encoded.errors[place] = f"the product has no text in its fields {fields}"
                encoded.input_ids[place] = encoded.input_ids[place][:0]
                if encoded.token_type_ids is not None:
                    encoded.token_type_ids[place] = encoded.token_type_ids[place][:0]
        return encoded

    def finish(self, inputs: PairInputs[str], outputs: np.ndarray) -> np.ndarray:
        assert inputs.query is not None
        cosines = np.einsum("nd,nd->n", outputs[inputs.query], outputs[inputs.product])
        return as_class_logits((self.logit_scale * (cosines - self.bias)).astype(np.float32)[:, None])


def build_bi_encoder_folder(
    model: str | Path,
    scale: LabelScale,
    out: str | Path,
    template: Template | None = None,
    logit_scale: float = LOGIT_SCALE,
    bias: float = 0.0,
) -> Path:
    """Make a model folder of kind bi_encoder of any encoder folder, untrained and not calibrated; `out` appears whole.

    Args:
        model: a local folder (`models.resolve_model`).
        bias: the cosine whose logit is 0.
    """
    info = ModelInfo(
        "bi_encoder", scale, template or Template(), extra={"logit_scale": float(logit_scale), "bias": float(bias)}
    )
    with staged_folder(out) as partial:
        AutoModel.from_pretrained(model, dtype=torch.float32).save_pretrained(partial)
        AutoTokenizer.from_pretrained(model).save_pretrained(partial)
        finish_folder(partial, info)
    return Path(out)
