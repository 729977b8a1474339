"""What every engine takes and gives, and what makes a row unfit to be labeled.

Two protocols. A `PairModel` is a loaded model folder: texts in, class logits out; evaluation and serving hold one. An
`Engine` labels the pairs of groups and may be no model at all (a file, the demo market's truth). A row that cannot be
scored never takes its neighbours with it: its logits are NaN and its `error` says why.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from relevance_ray.calibration import Calibration, logit_of_classes
from relevance_ray.model_folder import ModelInfo
from relevance_ray.schema import LabelScale
from relevance_ray.templates import TEXT_FIELDS, attribute_pairs

SINGLE_LOGIT_GAINS = (0.0, 1.0)
MAX_TEXT_CHARS = 100_000
"""A longer field is a broken export, and would cost more to tokenise than its shard to label."""

Device = str
"""A torch device name, or "auto": the GPU where there is one."""


@dataclass(slots=True)
class Pair:
    """One (query, product) to label; `product` has the keys of `schema.FIELDS`."""

    pair_id: int
    query: str
    product_id: str
    product: Mapping[str, Any]


@dataclass(slots=True)
class Labels:
    """Labels of n pairs, in their order.

    Attributes:
        class_logits: float32 [n, K]; a failed row is NaN.
        errors: one sentence a failed row, else None.
        rationales: the reasoning of an engine that reasons, else None.
    """

    class_logits: np.ndarray
    errors: list[str | None]
    rationales: list[str | None]


class Engine(Protocol):
    """Labels pairs.

    Attributes:
        gains: of its K class logits; (0, 1) for models of one logit.
        num_tokens: tokens it has read and written so far; 0 for one that knows none.
    """

    gains: tuple[float, ...]

    @property
    def num_tokens(self) -> int: ...

    def label(self, pairs: Sequence[Pair]) -> Labels: ...


class PairModel(Protocol):
    """A loaded model: `class_logits` float32 [n, K], `logits` float32 [n]. Both raise `ValueError` for a row that
    cannot be scored."""

    info: ModelInfo
    gains: tuple[float, ...]

    def class_logits(self, queries: Sequence[str], products: Sequence[Mapping[str, Any]]) -> np.ndarray: ...

    def logits(self, queries: Sequence[str], products: Sequence[Mapping[str, Any]]) -> np.ndarray: ...


class FolderModel(ABC):
    """What the kinds of model folder share: checks first, then `_forward` on the rows that passed.

    Attributes:
        info: the folder's `relevance.json`.
        gains: gains of its K class logits.
    """

    info: ModelInfo
    gains: tuple[float, ...]

    @property
    def scale(self) -> LabelScale:
        return self.info.scale

    @property
    def calibration(self) -> Calibration | None:
        return self.info.calibration

    @property
    def num_tokens(self) -> int:
        """Tokens it has read so far, padding not counted."""
        return 0

    def close(self) -> None:  # noqa: B027 (not abstract: there is mostly nothing to do)
        """Give back what the model holds outside of this process; it labels no more."""

    @abstractmethod
    def _forward(
        self, queries: Sequence[str], products: Sequence[Mapping[str, Any]]
    ) -> tuple[np.ndarray, list[str | None]]:
        """float32 [n, K] of rows that passed `row_error`, and what still went wrong with each."""

    def label_rows(self, queries: Sequence[str], products: Sequence[Mapping[str, Any]]) -> Labels:
        """Labels of n pairs; a row that cannot be scored carries an error and does not disturb the others."""
        assert len(queries) == len(products), (len(queries), len(products))
        errors = [row_error(query, product) for query, product in zip(queries, products, strict=True)]
        fit = [index for index, error in enumerate(errors) if error is None]
        class_logits = np.full((len(errors), len(self.gains)), np.nan, dtype=np.float32)
        if fit:
            found, problems = self._forward([queries[i] for i in fit], [products[i] for i in fit])
            for index, row, problem in zip(fit, found, problems, strict=True):
                if problem is None and not np.isfinite(row).all():
                    problem = "the model gave a logit that is not finite"
                errors[index] = problem
                if problem is None:
                    class_logits[index] = row
        return Labels(class_logits, errors, [None] * len(errors))

    def class_logits(self, queries: Sequence[str], products: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """float32 [n, K]. Raises `ValueError` naming the first row that cannot be scored."""
        labels = self.label_rows(queries, products)
        for index, error in enumerate(labels.errors):
            if error is not None:
                raise ValueError(f"row {index}: {error}")
        return labels.class_logits

    def logits(self, queries: Sequence[str], products: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """float32 [n]: `logit_of_classes` of the class logits."""
        return logit_of_classes(self.class_logits(queries, products), self.gains)


class ModelEngine:
    """A loaded model folder as an engine."""

    def __init__(self, model: FolderModel) -> None:
        self.model = model
        self.gains = model.gains

    @property
    def num_tokens(self) -> int:
        return self.model.num_tokens

    def label(self, pairs: Sequence[Pair]) -> Labels:
        return self.model.label_rows([pair.query for pair in pairs], [pair.product for pair in pairs])

    def close(self) -> None:
        self.model.close()


def row_error(query: Any, product: Any) -> str | None:
    """Why a pair cannot be labeled by any model, or None: empty, of a wrong type, not valid text, or absurdly long."""
    if (problem := text_problem(query)) is not None:
        return f"the query {problem}"
    if not query or query.isspace():
        return "the query is empty"
    if not isinstance(product, Mapping):
        return f"the product is a {type(product).__name__}, not a mapping of fields"
    for name in TEXT_FIELDS:
        value = product.get(name)
        if value is not None and (problem := text_problem(value)) is not None:
            return f"the product's {name} {problem}"
    price = product.get("price")
    if price is not None and (isinstance(price, bool) or not isinstance(price, int | float | np.number)):
        return f"the product's price is a {type(price).__name__}, not a number"
    return _attributes_error(product.get("attributes"))


def _attributes_error(attributes: Any) -> str | None:
    if attributes is not None and not isinstance(attributes, Mapping | list | tuple | np.ndarray):
        return f"the product's attributes are a {type(attributes).__name__}, not names and values"
    for pair in attribute_pairs(attributes):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            return "the product's attributes are not pairs of name and value"
        for text in pair:
            if text is not None and (problem := text_problem(text)) is not None:
                return f"one of the product's attributes {problem}"
    return None


def text_problem(text: Any) -> str | None:
    if not isinstance(text, str):
        return f"is a {type(text).__name__}, not text"
    if len(text) > MAX_TEXT_CHARS:
        return f"has {len(text)} characters, more than {MAX_TEXT_CHARS}"
    if "\x00" in text:
        return "holds a NUL character"
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return "holds a lone surrogate, so it is no valid Unicode"
    return None
