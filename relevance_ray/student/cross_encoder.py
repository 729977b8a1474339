"""The interaction-based student: any encoder, query and product in one input, one logit out.

It is a plain sequence-classification model of `num_labels=1`, so everything that loads those loads it. A shallower student
keeps the first layers of its parent, which is where its attention has learnt words; the last ones have learnt its old task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from relevance_ray.engines.encoding import PairEncoder
from relevance_ray.engines.sequence import build_start_folder, is_causal
from relevance_ray.errors import UserError
from relevance_ray.model_folder import ModelInfo
from relevance_ray.models import resolve_model
from relevance_ray.schema import LabelScale
from relevance_ray.student.options import EncoderOptions
from relevance_ray.student.packed import PairTokens, pack_texts
from relevance_ray.student.reading import in_runs, usable_rows


def build_cross_encoder(options: EncoderOptions, scale: LabelScale, out: str | Path, seed: int) -> None:
    """Write the folder a student starts from: pretrained layers and a fresh head, decided by `seed`.

    Raises:
        UserError: the model does not resolve, is no encoder, or has fewer layers than asked for.
    """
    info = ModelInfo(kind="cross_encoder", scale=scale, template=options.template())
    source = encoder_of(options)
    build_start_folder(
        source, info, out, num_labels=1, num_layers=options.num_layers, dropout=options.dropout, seed=seed
    )


def encoder_of(options: EncoderOptions) -> Path:
    """The folder of the model that a student starts from. Raises `UserError` for one that is no encoder."""
    source = resolve_model(options.model)
    if is_causal(source):
        raise UserError(f"student.model {options.model} is a causal language model; give an encoder, such as minilm")
    return source


class CrossReader:
    """Reads pairs as one input each: the reader of cross-encoders, and of classifiers."""

    def __init__(self, encoder: PairEncoder) -> None:
        self.encoder = encoder

    def pack(
        self, queries: Sequence[str], products: Sequence[Mapping[str, Any]], wanted: np.ndarray | None = None
    ) -> PairTokens:
        """Tokenise n pairs; those not `wanted` (bool [n]), unfit for any model, or without room are left out."""
        keep = usable_rows(queries, products, wanted)
        encoded = self.encoder.encode([queries[row] for row in keep], [products[row] for row in keep])
        texts = pack_texts(encoded.input_ids, encoded.token_type_ids, self.encoder.pad_token_id)
        product = np.full(len(queries), -1, dtype=np.int64)
        product[keep] = np.where(texts.lengths > 0, np.arange(len(keep)), -1)
        return PairTokens(texts, product)

    def outputs(self, model: nn.Module, tokens: PairTokens, rows: np.ndarray) -> torch.Tensor:
        """Outputs of a sequence classifier for some rows, float32 [len(rows), num_labels]: rows of like length in one
        pass, so that hardly any token is padding."""
        return in_runs(tokens.texts, tokens.product[rows], model, lambda **inputs: model(**inputs).logits)
