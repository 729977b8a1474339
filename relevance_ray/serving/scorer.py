"""From a model folder to scores: what HTTP, the `score` command and a Python program share.

A scorer answers one call at a time behind a lock. The tokenizers library refuses concurrent use of one tokenizer, and
on a CPU two forward passes at once only share the cores; more copies are replicas, each with a scorer of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from relevance_ray.calibration import logit_of_classes
from relevance_ray.engines.base import row_error
from relevance_ray.engines.bi_encoder import BiEncoderModel
from relevance_ray.engines.registry import load_pair_model
from relevance_ray.engines.transformers import SequenceModel
from relevance_ray.errors import UserError
from relevance_ray.model_folder import ModelInfo, read_model_info
from relevance_ray.storage import content_id

StrPath = str | Path


class UnscorableError(ValueError):
    """A query or product that cannot be scored as given; the message is one sentence that says why."""


@dataclass(frozen=True)
class Scores:
    """What a model says of n pairs; numbers are NaN and the grade None where `errors` says why a pair was left out.

    Attributes:
        logit: float32 [n], the model's output, unbounded.
        probability: float32 [n], calibrated P(grade >= the scale's `relevant_from`).
        score: float32 [n], expected gain under the calibrated class distribution, in [0, 1].
        grade: n names of the most probable grade.
        errors: n reasons, None for a scored pair.
    """

    logit: np.ndarray
    probability: np.ndarray
    score: np.ndarray
    grade: list[str | None]
    errors: list[str | None]


class Scorer:
    """A loaded student or teacher.

    Args:
        folder: a finished model folder (`UserError` where it is none, or was never calibrated).
        device: "auto", or a torch device.
        num_threads: torch threads; None leaves torch's own choice.
        name: what the model is called; by default after its folder.
    """

    def __init__(
        self, folder: StrPath, device: str = "auto", num_threads: int | None = None, name: str | None = None
    ) -> None:
        self.folder = Path(folder)
        self.name = name or name_of(str(self.folder.resolve()))
        self.info = read_calibrated_info(self.folder)
        assert self.info.calibration is not None
        self._calibration = self.info.calibration
        self._model = load_pair_model(self.folder, device=device, num_threads=num_threads)
        self._lock = threading.Lock()

    @cached_property
    def model_id(self) -> str:
        """12 hex digits over the content of the folder: a model that took the place of another differs from it."""
        return content_id(str(self.folder))[:12]

    def describe(self) -> dict[str, Any]:
        """The model in plain values: folder name, identity, kind, label scale, fields read and the token limit; of a
        two-tower also the dimension of its vectors, and how a cosine becomes a logit."""
        vectors = {"dimension": self._model.encoder.dimension} if isinstance(self._model, BiEncoderModel) else {}
        return {
            "model": self.name,
            "model_id": self.model_id,
            "kind": self.info.kind,
            "scale": self.info.scale.to_dict(),
            "fields": list(self.info.template.fields),
            "max_tokens": self.info.template.max_tokens,
            **vectors,
            **{key: self.info.extra[key] for key in ("logit_scale", "bias") if key in self.info.extra},
        }

    def problem(self, query: Any, product: Any) -> str | None:
        """Why this pair cannot be scored, as far as its text tells without a tokenizer; None where nothing is wrong."""
        if (error := row_error(query, product)) is not None:
            return error
        if not self.info.template.render_product(product):
            return f"the product has no text in the fields this model reads ({', '.join(self.info.template.fields)})"
        return None

    def score_pairs(self, queries: Sequence[str], products: Sequence[Mapping[str, Any]]) -> Scores:
        """Score n pairs of a query and a product mapping with keys of `schema.FIELDS`."""
        with self._lock:
            labels = self._model.label_rows(queries, products)
        logit = logit_of_classes(labels.class_logits, self._model.gains)
        scale = self.info.scale
        probability = self._calibration.probability(logit, scale.relevant_index).astype(np.float32)
        score = self._calibration.score(logit, scale.gains).astype(np.float32)
        classes = self._calibration.grade_index(logit)
        failed = np.isnan(logit)
        grade = [None if bad else scale.grades[k] for bad, k in zip(failed, classes, strict=True)]
        return Scores(logit, probability, score, grade, labels.errors)

    def score(self, query: str, products: Sequence[str | Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Score products for one query, in their order.

        Args:
            query: the query as typed.
            products: each a text (taken as the title) or a mapping with keys of `schema.FIELDS`.

        Returns:
            A dict a product: logit, probability, score (floats), grade (its name), truncated (its text was cut; None
            from a kind of model that does not tell).

        Raises:
            UnscorableError: the query, or a product (named by its place, from 0), cannot be scored.
        """
        fields = [{"title": product} if isinstance(product, str) else product for product in products]
        for place, product in enumerate(fields):
            if (problem := self.problem(query, product)) is not None:
                raise UnscorableError(f"product {place}: {problem}" if row_error(query, {}) is None else problem)
        scores = self.score_pairs([query] * len(fields), fields)
        for place, error in enumerate(scores.errors):
            if error is not None:
                raise UnscorableError(f"product {place}: {error}")
        truncated = self._truncated(query, fields)
        return [
            {
                "logit": float(scores.logit[place]),
                "probability": float(scores.probability[place]),
                "score": float(scores.score[place]),
                "grade": scores.grade[place],
                "truncated": truncated[place],
            }
            for place in range(len(fields))
        ]

    def embed(self, inputs: Sequence[str | Mapping[str, Any]]) -> tuple[np.ndarray, list[bool]]:
        """Vectors of a two-tower.

        Args:
            inputs: each a text (a query, or a product's title) or a product mapping with keys of `schema.FIELDS`.

        Returns:
            Unit vectors, float32 [n, d], and of each input whether it was longer than the model reads, and cut. The logit of
            a query and a product is `logit_scale * (cosine - bias)`, with both numbers in `describe()`.

        Raises:
            UnscorableError: the model has no vectors, or an input (named by its place, from 0) holds no text.
        """
        if not isinstance(self._model, BiEncoderModel):
            raise UnscorableError(f"this model is a {self.info.kind}, which has no vectors; serve a two-tower")
        template = self.info.template
        texts = [each if isinstance(each, str) else template.render_product(each) for each in inputs]
        for place, (given, text) in enumerate(zip(inputs, texts, strict=True)):
            problem = row_error("query", {"title": given} if isinstance(given, str) else given)
            if problem is None and not text.strip():
                problem = f"there is no text in the fields this model reads ({', '.join(template.fields)})"
            if problem is not None:
                raise UnscorableError(f"input {place}: {problem}")
        with self._lock:
            return self._model.encoder.embed(texts), self._model.encoder.are_cut(texts)

    def _truncated(self, query: str, products: Sequence[Mapping[str, Any]]) -> Sequence[bool | None]:
        """Tokenises once more: far cheaper than scoring, and engines need not carry what only serving tells."""
        if isinstance(self._model, BiEncoderModel):
            with self._lock:
                return self._model.encoder.are_cut(list(map(self.info.template.render_product, products)))
        if not isinstance(self._model, SequenceModel):
            return [None] * len(products)
        with self._lock:
            return self._model.encoder.encode([query] * len(products), products).truncated.tolist()


def name_of(folder: str) -> str:
    """What a model folder is called: its name, or that of the step that made it, which calls all of its own `model`."""
    parts = folder.rstrip("/").split("/")
    return parts[-2] if parts[-1] == "model" and len(parts) > 1 else parts[-1]


def read_calibrated_info(folder: Path) -> ModelInfo:
    """The `ModelInfo` of a folder that can give probabilities; `UserError` for one that is no model or has none."""
    info = read_model_info(folder)
    if info.calibration is None:
        raise UserError(
            f"{folder} has no calibration, so its logits mean no probability; "
            "give the folder that train-student or train-teacher finished"
        )
    return info
