"""A language model that was never trained on this shop's judgments, asked for a grade.

The answer is one letter a grade, so that the classes' logits are those of single tokens, all at one place and comparable.
What the model is worth is for the evaluation to say; as a first teacher, or beside a trained one, it costs no training.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from relevance_ray.engines.base import Labels, Pair, row_error
from relevance_ray.engines.generation import Message, Sampling, TextGenerator
from relevance_ray.errors import UserError
from relevance_ray.schema import LabelScale
from relevance_ray.templates import Template

_SYSTEM = """You judge how well a product of an online shop fits what a shopper searched for.{guidelines}
Answer with one letter only:
{grades}"""

_USER = """Search: {query}
Product: {product}
Grade:"""


_MAX_GRADES = 20
"""As many alternatives of a token as endpoints give."""

_ALL_WRONG = 8
"""Where at least so many answers of a call hold no grade and none does, it is not the rows."""


class GradingEngine:
    """Labels pairs with the log probabilities of the scale's letters.

    Args:
        generator: the language model.
        scale: the grades, worst first; its names are what the model is told.
        fields: what it reads of a product.
        guidelines: the shop's own rules for judging.

    Raises:
        UserError: a scale with more grades than an endpoint gives log probabilities of.
    """

    def __init__(
        self, generator: TextGenerator, scale: LabelScale, fields: Sequence[str], guidelines: str = ""
    ) -> None:
        if scale.num_classes > len(string.ascii_uppercase):
            raise UserError(
                f"label scale {scale.name!r} has {scale.num_classes} grades; a grading model takes 26 at most"
            )
        self.gains = scale.gains
        self.num_tokens = 0
        self._generator = generator
        self._template = Template(fields=tuple(fields))
        self._letters = tuple(string.ascii_uppercase[: scale.num_classes])
        named = [f"{letter}: {grade}" for letter, grade in zip(self._letters, scale.grades, strict=True)]
        named[0] += " (worst)"
        named[-1] += " (best)"
        rules = f" {' '.join(guidelines.split())}" if guidelines.strip() else ""
        self._system = _SYSTEM.format(guidelines=rules, grades="\n".join(named))

    def conversation(self, query: str, product: Mapping[str, Any]) -> list[Message]:
        """What the model reads of a pair. The instructions come first, the same for all, then the query: an engine that
        keeps prefixes reads both once."""
        user = _USER.format(query=query, product=self._template.render_product(product))
        return [{"role": "system", "content": self._system}, {"role": "user", "content": user}]

    def guess_tokens(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Tokens of each pair's conversation and answer, int64 [n], at four characters a token: the model's own tokenizer
        is not known here."""
        lengths = [
            sum(len(message["content"]) for message in self.conversation(pair.query, pair.product)) for pair in pairs
        ]
        return np.asarray(lengths, dtype=np.int64) // 4 + 1

    def label(self, pairs: Sequence[Pair]) -> Labels:
        """Labels of n pairs: a grade whose letter the engine gives no probability of makes its row an error.

        Raises:
            UserError: no answer at all holds the probabilities of the grades; each would be paid for nothing.
        """
        errors = [row_error(pair.query, pair.product) for pair in pairs]
        for row, pair in enumerate(pairs):
            if errors[row] is None and not self._template.render_product(pair.product):
                errors[row] = f"the product has no text in its fields {', '.join(self._template.fields)}"
        fit = [row for row, error in enumerate(errors) if error is None]
        class_logits = np.full((len(pairs), len(self.gains)), np.nan, dtype=np.float32)
        conversations = [self.conversation(pairs[row].query, pairs[row].product) for row in fit]
        answers = self._generator.generate(conversations, Sampling(max_tokens=1, choices=self._letters))
        without: list[str] = []
        for row, answer in zip(fit, answers, strict=True):
            self.num_tokens += answer.prompt_tokens + answer.completion_tokens
            if answer.error is not None:
                errors[row] = answer.error
            elif answer.choice_logits is None or not np.isfinite(answer.choice_logits).all():
                errors[row] = f"the model gave no probability of some grade (it wrote {answer.text[:40]!r})"
                without.append(answer.text[:40])
            else:
                class_logits[row] = answer.choice_logits
        if len(without) >= _ALL_WRONG and not np.isfinite(class_logits).any():
            raise UserError(
                f"the grading model never answers with a grade (it wrote {without[-1]!r}); switch its thinking off, or take "
                "one whose endpoint gives log probabilities"
            )
        return Labels(class_logits, errors, [None] * len(pairs))
