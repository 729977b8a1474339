"""Cosine of mean-pooled vectors: the zero-shot baseline, the dense candidates, a member of an ensemble.

An untrained sentence encoder times a constant is a surprisingly good first teacher. Query and product are read apart,
so a query with a thousand candidates is encoded once; the price is that no word of the one can look at the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from relevance_ray.engines.base import SINGLE_LOGIT_GAINS, FolderModel
from relevance_ray.engines.encoding import token_batches
from relevance_ray.engines.transformers import as_class_logits, batch_tokens, pick_device, pick_dtype
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

    Attributes:
        num_tokens: read so far.
    """

    def __init__(
        self,
        folder: str | Path,
        device: str = "auto",
        max_batch_tokens: int | None = None,
        max_tokens: int = 128,
    ) -> None:
        self.num_tokens = 0
        self.device = pick_device(device)
        self.max_batch_tokens = batch_tokens(max_batch_tokens, self.device)
        self.max_tokens = max_tokens
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=pick_dtype(self.device)).to(self.device).eval()

    @property
    def dimension(self) -> int:
        return int(self.model.config.hidden_size)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, d], each row of length 1. Equal texts are encoded once."""
        index: dict[str, int] = {}
        which = np.asarray([index.setdefault(text, len(index)) for text in texts], dtype=np.int64)
        distinct = list(index)
        vectors = np.zeros((len(distinct), self.dimension), dtype=np.float32)
        for start in range(0, len(distinct), _ROWS_AT_ONCE):
            vectors[start : start + _ROWS_AT_ONCE] = self._embed_distinct(distinct[start : start + _ROWS_AT_ONCE])
        return vectors[which]

    def are_cut(self, texts: Sequence[str]) -> list[bool]:
        """Of each text whether it has more tokens than are read."""
        encoded = self.tokenizer(list(texts), truncation=False, padding=False, verbose=False)
        return [len(ids) > self.max_tokens for ids in encoded["input_ids"]]

    def _embed_distinct(self, texts: list[str]) -> np.ndarray:
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_tokens, padding=False)
        lengths = np.asarray([len(ids) for ids in encoded["input_ids"]])
        self.num_tokens += int(lengths.sum())
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        with torch.inference_mode():
            for rows in token_batches(lengths, self.max_batch_tokens):
                picked = {key: [values[row] for row in rows] for key, values in encoded.items()}
                batch = self.tokenizer.pad(picked, padding_side="right", return_tensors="pt").to(self.device)
                hidden = self.model(**batch).last_hidden_state.float()
                mask = batch["attention_mask"].unsqueeze(-1).float()
                mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
                vectors[rows] = torch.nn.functional.normalize(mean, dim=1).cpu().numpy()
        return vectors


def embed_texts(
    folder: str | Path, texts: Sequence[str], max_batch_tokens: int | None = None, device: str = "auto"
) -> np.ndarray:
    """Unit vectors float32 [n, d] of texts, by a model loaded for this call; hold a `TextEncoder` for several."""
    return TextEncoder(folder, device, max_batch_tokens).embed(texts)


class BiEncoderModel(FolderModel):
    """A model folder of kind bi_encoder: class logits [0, logit_scale * (cosine - bias)]."""

    gains = SINGLE_LOGIT_GAINS

    def __init__(self, folder: str | Path, device: str = "auto", max_batch_tokens: int | None = None) -> None:
        self.info = read_model_info(folder)
        self.encoder = TextEncoder(folder, device, max_batch_tokens, self.info.template.max_tokens)
        self.logit_scale = float(self.info.extra["logit_scale"])
        self.bias = float(self.info.extra["bias"])

    @property
    def num_tokens(self) -> int:
        return self.encoder.num_tokens

    def _forward(
        self, queries: Sequence[str], products: Sequence[Mapping[str, Any]]
    ) -> tuple[np.ndarray, list[str | None]]:
        texts = [self.info.template.render_product(product) for product in products]
        fields = ", ".join(self.info.template.fields)
        errors = [None if text else f"the product has no text in its fields {fields}" for text in texts]
        vectors = self.encoder.embed([*queries, *texts])
        cosines = np.einsum("nd,nd->n", vectors[: len(queries)], vectors[len(queries) :])
        return as_class_logits((self.logit_scale * (cosines - self.bias)).astype(np.float32)[:, None]), errors


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
