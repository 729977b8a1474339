"""A causal language model, untrained, as a scorer: how much more likely a query is once the product is known.

The logit is `(log p(query | product) - log p(query)) / tokens of the query`, the pointwise mutual information per token. The
first term is the query likelihood model (Ponte and Croft, SIGIR 1998; with a pretrained language model: Sachan et al.,
UPR, arXiv 2204.07496). The second changes no order within a query; it takes away what makes a query likely by itself, so
that logits of different queries can be compared.

The end of the line counts as the query's last token: a query that is only begun is not as good as a whole one. The product
comes first, so there is no prefix that a query's candidates share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from relevance_ray.engines.base import SINGLE_LOGIT_GAINS, FolderModel
from relevance_ray.engines.encoding import in_windows, start_tokens, token_batches, tokenize
from relevance_ray.engines.forward import batch_tokens, pick_device, pick_dtype
from relevance_ray.engines.sequence import check_positions, check_writes
from relevance_ray.engines.transformers import as_class_logits
from relevance_ray.model_folder import ModelInfo, finish_folder, read_model_info, staged_folder
from relevance_ray.schema import LabelScale
from relevance_ray.templates import Template

PROMPT = ("Product:", "A customer found this product with the search query:")
"""What stands before the product, and between it and the query."""
_END = "\n"
_MAX_LOGITS = 1 << 26
"""Logits made at once, whatever the size of the vocabulary: half a gigabyte, with what they are summed through."""


@dataclass(slots=True)
class EncodedQueries:
    """Token ids of n texts that end with a query.

    Attributes:
        input_ids: one int32 array a text; empty where the pair failed.
        num_predicted: how many of its last tokens are the query's, int64 [n].
        errors: why a pair cannot be encoded, else None.
    """

    input_ids: list[np.ndarray]
    num_predicted: np.ndarray
    errors: list[str | None]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, int64 [n]; 0 where it failed."""
        return np.fromiter((len(ids) for ids in self.input_ids), dtype=np.int64, count=len(self.input_ids))


class QueryEncoder:
    """Product, question and query as tokens; the product is cut to fit, never the query.

    Something has to stand before the first token that is predicted, so the question stands there without a product, too.

    Args:
        tokenizer: a transformers tokenizer (fast).
        template: fields of the product, and tokens of the whole.
        prompt: as `PROMPT`; a model folder keeps its own.
    """

    def __init__(self, tokenizer: Any, template: Template, prompt: Sequence[str] = PROMPT) -> None:
        self.tokenizer, self.template = tokenizer, template
        lead, ask = prompt
        lead_ids, ask_after, ask_alone = self._tokens([lead, f"\n{ask}", ask])
        start = start_tokens(tokenizer)
        self._before, self._after = np.concatenate([start, lead_ids]), ask_after
        self._alone = np.concatenate([start, ask_alone])

    def encode(self, queries: Sequence[str], products: Sequence[Mapping[str, Any]]) -> EncodedQueries:
        """Each query after its product. A query that leaves no room for its product, or a product without any text, is an
        error of its row."""
        texts = [self.template.render_product(product) for product in products]
        fixed = len(self._before) + len(self._after)
        found = EncodedQueries([], np.empty(len(queries), dtype=np.int64), [])
        tokens = zip(self._query_tokens(queries), self._tokens([f" {text}" for text in texts]), strict=True)
        for row, (query_ids, product_ids) in enumerate(tokens):
            room = self.template.max_tokens - fixed - len(query_ids)
            error = self._problem(room, texts[row])
            pieces = [self._before, product_ids[: max(room, 0)], self._after, query_ids]
            found.input_ids.append(np.concatenate(pieces) if error is None else np.empty(0, dtype=np.int32))
            found.num_predicted[row] = len(query_ids)
            found.errors.append(error)
        return found

    def encode_alone(self, queries: Sequence[str]) -> EncodedQueries:
        """Each query after the question alone."""
        query_ids = self._query_tokens(queries)
        return EncodedQueries(
            [np.concatenate([self._alone, ids]) for ids in query_ids],
            np.asarray([len(ids) for ids in query_ids], dtype=np.int64),
            [None] * len(queries),
        )

    def _query_tokens(self, queries: Sequence[str]) -> list[np.ndarray]:
        return self._tokens([f" {query}{_END}" for query in queries])

    def _problem(self, room: int, text: str) -> str | None:
        if room < 1:
            return f"the query leaves no room for a product (max_tokens {self.template.max_tokens})"
        if not text:
            return f"the product has no text in its fields {', '.join(self.template.fields)}"
        return None

    def _tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        return tokenize(self.tokenizer, texts, self.template.max_tokens, literal=True)


class QueryLikelihoodModel(FolderModel):
    """A model folder of kind query_likelihood: class logits [0, logit]."""

    gains = SINGLE_LOGIT_GAINS

    def __init__(self, folder: str | Path, device: str = "auto", max_batch_tokens: int | None = None) -> None:
        self.info = read_model_info(folder)
        self.device = pick_device(device)
        self.max_batch_tokens = batch_tokens(max_batch_tokens, self.device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.encoder = QueryEncoder(tokenizer, self.info.template, self.info.extra["prompt"])
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=pick_dtype(self.device)).to(self.device).eval()
        self._num_tokens = 0

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    def _forward(
        self, queries: Sequence[str], products: Sequence[Mapping[str, Any]]
    ) -> tuple[np.ndarray, list[str | None]]:
        after_product = np.full(len(queries), np.nan)
        errors: list[str | None] = []
        for rows, encoded in in_windows(self.encoder.encode, queries, products):
            after_product[rows] = self._mean_log_likelihood(encoded)
            errors += encoded.errors
        known = list(dict.fromkeys(query for query, error in zip(queries, errors, strict=True) if error is None))
        alone = dict(zip(known, self._mean_log_likelihood(self.encoder.encode_alone(known)).tolist(), strict=True))
        information = after_product - np.asarray([alone.get(query, np.nan) for query in queries])
        return as_class_logits(information.astype(np.float32)[:, None]), errors

    def _mean_log_likelihood(self, encoded: EncodedQueries) -> np.ndarray:
        """float64 [n], of the query's tokens; NaN where the pair failed."""
        out = np.full(len(encoded.errors), np.nan)
        vocabulary = self.model.config.get_text_config().vocab_size
        with torch.inference_mode():
            for batch in token_batches(encoded.lengths, self.max_batch_tokens):
                longest = int(encoded.num_predicted[batch].max())
                rows_at_once = max(1, _MAX_LOGITS // ((longest + 1) * vocabulary))
                for start in range(0, len(batch), rows_at_once):
                    rows = batch[start : start + rows_at_once]
                    out[rows] = self._of_batch([encoded.input_ids[row] for row in rows], encoded.num_predicted[rows])
        self._num_tokens += int(encoded.lengths.sum())
        return out

    def _of_batch(self, texts: Sequence[np.ndarray], num_predicted: np.ndarray) -> np.ndarray:
        """Padded on the left, so that the queries end together and only their logits are made."""
        lengths = np.asarray([len(ids) for ids in texts])
        longest = int(num_predicted.max())
        mask = np.arange(lengths.max()) >= lengths.max() - lengths[:, None]
        ids = np.zeros(mask.shape, dtype=np.int64)
        ids[mask] = np.concatenate(texts)
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        inputs = {"input_ids": ids, "attention_mask": mask.astype(np.int64), "position_ids": positions}
        on_device = {name: torch.from_numpy(value).to(self.device) for name, value in inputs.items()}
        logits = self.model(**on_device, logits_to_keep=longest + 1, use_cache=False).logits[:, :-1].float()
        target = on_device["input_ids"][:, -longest:]
        log_p = logits.gather(2, target[..., None]).squeeze(2) - logits.logsumexp(2)
        predicted = torch.from_numpy(np.arange(longest) >= longest - num_predicted[:, None]).to(self.device)
        sums = torch.where(predicted, log_p, 0.0).double().sum(1).cpu().numpy()
        return np.asarray(sums / num_predicted)


def check_query_likelihood(name: str, model: str | Path, max_tokens: int) -> None:
    """Raise `UserError` for a model that writes no text, or reads fewer tokens than asked for."""
    check_writes(name, model)
    check_positions(name, model, max_tokens)


def build_query_likelihood_folder(
    name: str, model: str | Path, scale: LabelScale, template: Template, out: str | Path
) -> Path:
    """Make a model folder of kind query_likelihood of a causal language model, not calibrated; `out` appears whole.

    Args:
        name: what the user calls the model, for errors.
        model: a local folder (`models.resolve_model`).

    Raises:
        UserError: as `check_query_likelihood`.
    """
    check_query_likelihood(name, model, template.max_tokens)
    info = ModelInfo("query_likelihood", scale, template, extra={"prompt": list(PROMPT)})
    with staged_folder(out) as partial:
        AutoModelForCausalLM.from_pretrained(model, dtype="auto").save_pretrained(partial)
        AutoTokenizer.from_pretrained(model).save_pretrained(partial)
        finish_folder(partial, info)
    return Path(out)
