"""Models that read token ids, in three parts: text to ids, ids to vectors, vectors to logits.

Labeling and evaluation go through all three at once (`label_rows`). A server takes them apart: ids of several requests
share a forward pass, and what a cache knows is neither tokenised nor run again.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from relevance_ray.engines.base import FolderModel
from relevance_ray.engines.encoding import WINDOW_ROWS, EncodedTexts, KnownTokens, in_windows
from relevance_ray.engines.forward import Forward, run_texts

Input = TypeVar("Input", tuple[str, str], str)


@dataclass(frozen=True)
class PairInputs(Generic[Input]):
    """What a model reads for n pairs, each distinct input once.

    Attributes:
        distinct: the inputs: (query, product text) for a model that reads both at once, else single texts.
        product: int64 [n], the place in `distinct` of a pair's input, or of its product's.
        query: int64 [n], the place of its query's; None where an input holds both.
    """

    distinct: list[Input]
    product: np.ndarray
    query: np.ndarray | None


class TokenModel(FolderModel, Generic[Input]):
    """A model folder whose weights read token ids.

    Attributes:
        forward: the middle part, float32 [rows, width].
        max_batch_tokens: padded tokens of one forward pass.
        known_tokens: token ids of product texts seen before, where somebody keeps them.
    """

    forward: Forward
    max_batch_tokens: int
    known_tokens: KnownTokens | None = None
    window_rows = WINDOW_ROWS
    _num_tokens = 0

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    @abstractmethod
    def inputs(self, queries: Sequence[str], texts: Sequence[str]) -> PairInputs[Input]:
        """The distinct inputs of n pairs of a query and a product's text."""

    @abstractmethod
    def tokenize(self, distinct: Sequence[Input]) -> EncodedTexts:
        """Token ids of inputs. Not for two threads at once: tokenizers refuse that."""

    @abstractmethod
    def finish(self, inputs: PairInputs[Input], outputs: np.ndarray) -> np.ndarray:
        """Class logits float32 [n, K] of pairs, from the outputs of their distinct inputs, float32 [m, width]."""

    def run(self, texts: EncodedTexts) -> np.ndarray:
        """Outputs float32 [m, width]; NaN for an input that failed."""
        self._num_tokens += int(texts.lengths.sum())
        return run_texts(self.forward, texts, self.max_batch_tokens)

    def render(self, product: Mapping[str, Any]) -> str:
        """The text that stands for a product."""
        return self.info.template.render_product(product)

    def _prepare(
        self, queries: Sequence[str], products: Sequence[Mapping[str, Any]]
    ) -> tuple[PairInputs[Input], EncodedTexts]:
        inputs = self.inputs(queries, [self.render(product) for product in products])
        return inputs, self.tokenize(inputs.distinct)

    def _forward(
        self, queries: Sequence[str], products: Sequence[Mapping[str, Any]]
    ) -> tuple[np.ndarray, list[str | None]]:
        class_logits = np.full((len(queries), len(self.gains)), np.nan, dtype=np.float32)
        errors: list[str | None] = []
        for rows, (inputs, texts) in in_windows(self._prepare, queries, products, self.window_rows):
            class_logits[rows] = self.finish(inputs, self.run(texts))
            errors += [texts.errors[place] for place in inputs.product]
        return class_logits, errors


def distinct_places(items: Sequence[Input]) -> tuple[list[Input], np.ndarray]:
    """The distinct items, in order of first sight, and int64 [n]: where each item stands among them."""
    index: dict[Input, int] = {}
    places = np.asarray([index.setdefault(item, len(index)) for item in items], dtype=np.int64)
    return list(index), places
