"""The representation-based student: query and product each to one unit vector, the logit from their cosine.

Vectors of a whole catalog are computed once and searched by any index; the price is that no word of the query can look at
a word of the product. Its folder is one of kind bi_encoder: a plain encoder, and two numbers in `relevance.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModel

from relevance_ray.engines.bi_encoder import LOGIT_SCALE
from relevance_ray.engines.sequence import build_start_folder
from relevance_ray.model_folder import ModelInfo, read_model_info, write_model_info
from relevance_ray.schema import LabelScale
from relevance_ray.student.cross_encoder import encoder_of
from relevance_ray.student.options import EncoderOptions
from relevance_ray.student.packed import PairTokens, pack_texts
from relevance_ray.student.reading import in_runs, usable_rows
from relevance_ray.templates import Template

START_BIAS = 0.4
"""The cosine whose logit is 0 before training: about that of a related, not a matching, product."""
_STRIDE = 30.0
# AdamW moves each parameter by about the learning rate a step, which is too little for these two numbers: they are kept as
# small multiples of this.


def build_two_tower(options: EncoderOptions, scale: LabelScale, out: str | Path, seed: int) -> None:
    """Write the folder a student starts from: pretrained layers, without a head.

    Raises:
        UserError: the model does not resolve, is no encoder, or has fewer layers than asked for.
    """
    source = encoder_of(options)
    extra = {"logit_scale": LOGIT_SCALE, "bias": START_BIAS}
    info = ModelInfo(kind="bi_encoder", scale=scale, template=options.template(), extra=extra)
    build_start_folder(
        source, info, out, num_labels=None, num_layers=options.num_layers, dropout=options.dropout, seed=seed
    )


class TwoTower(nn.Module):
    """One encoder for both sides, the mean of its token vectors, and a line from cosine to logit.

    `logit = logit_scale * (cosine - bias)`, with both numbers trained.

    Args:
        folder: of kind bi_encoder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(folder, dtype=torch.float32)
        for name, parameter in self.encoder.named_parameters():
            parameter.requires_grad_(not name.startswith("pooler."))
        self._start = read_model_info(folder)
        self.scale_step, self.bias_step = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    @property
    def logit_scale(self) -> torch.Tensor:
        return float(self._start.extra["logit_scale"]) * torch.exp(_STRIDE * self.scale_step)

    @property
    def bias(self) -> torch.Tensor:
        return float(self._start.extra["bias"]) + _STRIDE * self.bias_step

    def vectors(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Unit vectors float32 [n, d] of padded inputs: the mean over tokens of the last hidden state, normalised."""
        hidden = self.encoder(**inputs).last_hidden_state.float()
        mask = inputs.get("attention_mask")
        if mask is None:
            mean = hidden.mean(dim=1)
        else:
            weights = mask.unsqueeze(-1).float()
            mean = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        return functional.normalize(mean, dim=1)

    def logits(self, queries: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
        """Of n pairs of unit vectors [n, d]: [n]."""
        return self.logit_scale * ((queries * products).sum(dim=1) - self.bias)

    def save_pretrained(self, folder: Path) -> None:
        self.encoder.save_pretrained(folder)
        extra = {"logit_scale": self.logit_scale.item(), "bias": self.bias.item()}
        write_model_info(folder, replace(self._start, extra=extra))


class TowerReader:
    """Reads query and product apart.

    Args:
        tokenizer: of the encoder.
        template: `max_tokens` is for each of the two.
    """

    def __init__(self, tokenizer: Any, template: Template) -> None:
        self.tokenizer, self.template = tokenizer, template

    def pack(
        self, queries: Sequence[str], products: Sequence[Mapping[str, Any]], wanted: np.ndarray | None = None
    ) -> PairTokens:
        """Tokenise n pairs; those not `wanted` (bool [n]), unfit for any model, or without text are left out."""
        index: dict[str, int] = {}
        query, product = np.full(len(queries), -1, dtype=np.int64), np.full(len(queries), -1, dtype=np.int64)
        for row in usable_rows(queries, products, wanted):
            if text := self.template.render_product(products[row]):
                query[row] = index.setdefault(queries[row], len(index))
                product[row] = index.setdefault(text, len(index))
        # Encoders read a text without types as one of type 0.
        texts = pack_texts(self._tokenize(list(index)), None, int(self.tokenizer.pad_token_id))
        return PairTokens(texts, product, query)

    def outputs(self, model: TwoTower, tokens: PairTokens, rows: np.ndarray) -> torch.Tensor:
        """Logits of some rows, float32 [len(rows), 1]."""
        return model.logits(*self.vectors(model, tokens, rows))[:, None]

    def vectors(self, model: TwoTower, tokens: PairTokens, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit vectors of query and product of some rows, two float32 [len(rows), d]; each distinct text is encoded once."""
        assert tokens.query is not None
        wanted = np.concatenate([tokens.query[rows], tokens.product[rows]])
        distinct, place = np.unique(wanted, return_inverse=True)
        found = in_runs(tokens.texts, distinct, model, lambda **inputs: model.vectors(inputs))
        found = found[torch.from_numpy(place).to(found.device)]
        return found[: len(rows)], found[len(rows) :]

    def _tokenize(self, texts: list[str]) -> list[np.ndarray]:
        if not texts:
            return []
        encoded = self.tokenizer(
            texts,
            truncation=True,
            max_length=self.template.max_tokens,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        return [np.asarray(ids, dtype=np.int32) for ids in encoded]
