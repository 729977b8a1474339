"""From a model folder to scores: what HTTP, the `score` command and a Python program share.

A request is scored in three parts, so that a server can do each where and with whom it wants: `prepare` (text to token
ids, what a cache knows left out), `run` (ids to outputs, of several requests together), and the end of its `Work`
(outputs to answers). `score` does all three. Each part is for one thread at a time, behind a lock: the tokenizers library
refuses concurrent use of one tokenizer, and on a CPU two forward passes at once only share the cores; more copies are
replicas, each with a scorer of its own.
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
from relevance_ray.engines.encoding import EncodedTexts
from relevance_ray.engines.forward import TorchForward
from relevance_ray.engines.registry import load_pair_model
from relevance_ray.engines.runtimes import TORCH, read_runtime
from relevance_ray.engines.token_model import TokenModel, distinct_places
from relevance_ray.errors import UserError
from relevance_ray.model_folder import ModelInfo, read_model_info
from relevance_ray.serving.cache import OutputCache, TokenCache, text_key
from relevance_ray.serving.turns import Work
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
        score_cache_mb: of outputs that `prepare` keeps (`OutputCache`); 0 for none.
        token_cache_mb: of products' tokens that it keeps (`TokenCache`), for models that read query and product together.

    Attributes:
        caches: what is kept, by name: "scores" and "tokens", where there are such.
    """

    def __init__(
        self,
        folder: StrPath,
        device: str = "auto",
        num_threads: int | None = None,
        name: str | None = None,
        *,
        score_cache_mb: float = 0.0,
        token_cache_mb: float = 0.0,
    ) -> None:
        self.folder = Path(folder)
        self.name = name or name_of(str(self.folder.resolve()))
        self.info = read_calibrated_info(self.folder)
        assert self.info.calibration is not None
        self._calibration = self.info.calibration
        self._model = load_pair_model(self.folder, device=device, num_threads=num_threads)
        self._tokenizing, self._running = threading.Lock(), threading.Lock()
        self.caches: dict[str, OutputCache | TokenCache] = {}
        self._outputs = None
        if isinstance(self._model, TokenModel):
            if score_cache_mb:
                self._outputs = self.caches["scores"] = OutputCache(score_cache_mb, self._model.forward.width)
            if token_cache_mb and not isinstance(self._model, BiEncoderModel):
                self._model.known_tokens = self.caches["tokens"] = TokenCache(
                    token_cache_mb, self.info.template.max_tokens
                )

    @cached_property
    def model_id(self) -> str:
        """12 hex digits over the content of the folder: a model that took the place of another differs from it."""
        return content_id(str(self.folder))[:12]

    def describe(self) -> dict[str, Any]:
        """The model in plain values: folder name, identity, kind, the library that runs it, label scale, fields read and the
        token limit; of a two-tower also the dimension of its vectors, and how a cosine becomes a logit."""
        torch_runs = not isinstance(self._model, TokenModel) or isinstance(self._model.forward, TorchForward)
        exported = None if torch_runs else read_runtime(self.folder)
        vectors = {"dimension": self._model.encoder.dimension} if isinstance(self._model, BiEncoderModel) else {}
        return {
            "model": self.name,
            "model_id": self.model_id,
            "kind": self.info.kind,
            "runtime": exported[0] if exported else TORCH,
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
            return self._no_text()
        return None

    def score_pairs(self, queries: Sequence[str], products: Sequence[Mapping[str, Any]]) -> Scores:
        """Score n pairs of a query and a product mapping with keys of `schema.FIELDS`. Uses no score of before."""
        with self._tokenizing, self._running:
            labels = self._model.label_rows(queries, products)
        return self._scores(labels.class_logits, labels.errors)

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
        work = self.prepare(query, products)
        return work.finish(work.run(work.texts))

    def prepare(
        self, query: str, products: Sequence[str | Mapping[str, Any]], places: Sequence[int] | None = None
    ) -> Work[list[dict[str, Any]]]:
        """The first part of `score`: checks and tokenises, and leaves out what a cache knows.

        Args:
            places: by what number an error names each product; by default as they stand.

        Raises:
            UnscorableError: as `score`.
        """
        fields = [{"title": product} if isinstance(product, str) else product for product in products]
        places = range(len(fields)) if places is None else places
        texts = self._checked_texts(query, fields, places)
        model = self._model
        if not isinstance(model, TokenModel):
            return Work(
                lambda _: self.score_pairs([query] * len(fields), fields),
                lambda scores: _rows(scores, None, places),
                num_pairs=len(fields),
            )
        inputs = model.inputs([query] * len(texts), texts)
        asked = self._ask(inputs.distinct)
        errors = asked.errors
        for place, which in zip(places, inputs.product.tolist(), strict=True):
            if (error := errors.get(which)) is not None:
                raise UnscorableError(f"product {place}: {error}")

        def finish(outputs: np.ndarray | None) -> list[dict[str, Any]]:
            logits = model.finish(inputs, asked.completed(outputs))
            wrong = np.flatnonzero(~np.isfinite(logits).all(axis=1))
            if len(wrong):
                raise UnscorableError(f"product {places[wrong[0]]}: the model gave a logit that is not finite")
            return _rows(self._scores(logits, [None] * len(logits)), asked.truncated[inputs.product].tolist(), places)

        return Work(self.run, finish, asked.texts, model.max_batch_tokens, len(fields))

    def run(self, texts: EncodedTexts) -> np.ndarray:
        """The second part: outputs of token ids, float32 [m, width]."""
        assert isinstance(self._model, TokenModel)
        with self._running:
            return self._model.run(texts)

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
        work = self.prepare_embed(inputs)
        return work.finish(work.run(work.texts))

    def prepare_embed(self, inputs: Sequence[str | Mapping[str, Any]]) -> Work[tuple[np.ndarray, list[bool]]]:
        """The first part of `embed`; errors as there."""
        model = self._model
        if not isinstance(model, BiEncoderModel):
            raise UnscorableError(f"this model is a {self.info.kind}, which has no vectors; serve a two-tower")
        template = self.info.template
        texts = [each if isinstance(each, str) else template.render_product(each) for each in inputs]
        for place, (given, text) in enumerate(zip(inputs, texts, strict=True)):
            problem = row_error("query", {"title": given} if isinstance(given, str) else given)
            if problem is None and not text.strip():
                problem = f"there is no text in the fields this model reads ({', '.join(template.fields)})"
            if problem is not None:
                raise UnscorableError(f"input {place}: {problem}")
        distinct, which = distinct_places(texts)
        asked = self._ask(distinct)
        return Work(
            self.run,
            lambda outputs: (asked.completed(outputs)[which], asked.truncated[which].tolist()),
            asked.texts,
            model.max_batch_tokens,
            len(texts),
        )

    def rows_of_logits(self, logit: np.ndarray, truncated: Sequence[bool | None]) -> list[dict[str, Any]]:
        """What `score` would say of products whose logits are given, float32 [n]."""
        return _rows(self._scores_of(logit, [None] * len(logit)), truncated)

    def _checked_texts(self, query: str, products: Sequence[Mapping[str, Any]], places: Sequence[int]) -> list[str]:
        """The products as text."""
        texts = []
        for place, product in zip(places, products, strict=True):
            if (problem := row_error(query, product)) is None:
                text = self.info.template.render_product(product)
                problem = None if text else self._no_text()
            if problem is not None:
                raise UnscorableError(f"product {place}: {problem}" if row_error(query, {}) is None else problem)
            texts.append(text)
        return texts

    def _ask(self, distinct: Sequence[Any]) -> _Asked:
        """What a cache knows of a model's inputs, and tokens of the others."""
        model, cache, count = self._model, self._outputs, len(distinct)
        assert isinstance(model, TokenModel)
        if cache is None:
            with self._tokenizing:
                texts = model.tokenize(distinct)
            return _Asked(texts, np.zeros((count, 0)), texts.truncated, np.arange(count), None, [])
        keys = [text_key(*each) if isinstance(each, tuple) else text_key(each) for each in distinct]
        known, outputs, truncated = cache.get(keys)
        new = np.flatnonzero(~known)
        with self._tokenizing:
            texts = model.tokenize([distinct[place] for place in new.tolist()])
        truncated[new] = texts.truncated
        return _Asked(texts, outputs, truncated, new, cache, [keys[place] for place in new])

    def _scores(self, class_logits: np.ndarray, errors: list[str | None]) -> Scores:
        return self._scores_of(logit_of_classes(class_logits, self._model.gains), errors)

    def _scores_of(self, logit: np.ndarray, errors: list[str | None]) -> Scores:
        scale = self.info.scale
        probability = self._calibration.probability(logit, scale.relevant_index).astype(np.float32)
        score = self._calibration.score(logit, scale.gains).astype(np.float32)
        classes = self._calibration.grade_index(logit)
        failed = np.isnan(logit)
        grade = [None if bad else scale.grades[k] for bad, k in zip(failed, classes, strict=True)]
        return Scores(logit, probability, score, grade, errors)

    def _no_text(self) -> str:
        return f"the product has no text in the fields this model reads ({', '.join(self.info.template.fields)})"


@dataclass(frozen=True)
class _Asked:
    """Inputs of a model, some of which a cache knew.

    Attributes:
        texts: tokens of those it did not know.
        outputs: float32 [n, width], of those it knew.
        truncated: bool [n].
        new: int64, the places of those it did not know.
        cache: to be told of them, under `keys`.
    """

    texts: EncodedTexts
    outputs: np.ndarray
    truncated: np.ndarray
    new: np.ndarray
    cache: OutputCache | None
    keys: list[bytes]

    @property
    def errors(self) -> dict[int, str]:
        """By place, why an input cannot be read."""
        found = zip(self.new.tolist(), self.texts.errors, strict=True)
        return {place: error for place, error in found if error is not None}

    def completed(self, outputs: np.ndarray | None) -> np.ndarray:
        """Outputs of all n, given those of `texts`."""
        if self.cache is None:
            assert outputs is not None
            return outputs
        if outputs is not None:
            self.outputs[self.new] = outputs
            sound = np.flatnonzero(np.isfinite(outputs).all(axis=1))  # a fault that passes is not remembered
            self.cache.put([self.keys[row] for row in sound], outputs[sound], self.texts.truncated[sound])
        return self.outputs


def _rows(
    scores: Scores, truncated: Sequence[bool | None] | None, places: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    for place, error in zip(places or range(len(scores.errors)), scores.errors, strict=True):
        if error is not None:
            raise UnscorableError(f"product {place}: {error}")
    cut = truncated or [None] * len(scores.grade)
    numbers = (scores.logit.tolist(), scores.probability.tolist(), scores.score.tolist())
    names = ("logit", "probability", "score", "grade", "truncated")
    return [dict(zip(names, row, strict=True)) for row in zip(*numbers, scores.grade, cut, strict=True)]


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
