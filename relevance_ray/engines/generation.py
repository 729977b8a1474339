"""Text from a language model: what graded answers, written queries and rationales ask of an engine.

One protocol, whoever runs the model: conversations in, one answer each out, in their order. An answer that could not be
had carries an `error` and takes no other with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Message = Mapping[str, str]
"""`role` ("system", "user" or "assistant") and `content`, as chat templates and OpenAI-compatible endpoints have them."""

MAX_STOPS = 4
"""As many as OpenAI takes."""


@dataclass(frozen=True)
class Sampling:
    """How answers are written.

    Attributes:
        max_tokens: of one answer.
        temperature: 0 is greedy.
        seed: of the sampling, where the engine takes one.
        json_schema: forces answers that parse under this JSON schema.
        choices: forces one of these answers, and asks for the log probability of each. Each must be a single token.
        stop: the answer ends before the first of these strings; at most `MAX_STOPS`.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    json_schema: Mapping[str, Any] | None = None
    choices: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.json_schema is not None and self.choices:
            raise ValueError("give a JSON schema or choices, not both")
        if len(self.stop) > MAX_STOPS or not all(self.stop):
            raise ValueError(f"stop {list(self.stop)} must be at most {MAX_STOPS} strings, none of them empty")

    def cut(self, text: str) -> str:
        """The text before the first of `stop`."""
        return text[: min((text.find(stop) for stop in self.stop if stop in text), default=len(text))]


@dataclass(slots=True)
class Generated:
    """One answer.

    Attributes:
        text: what was written; "" where it failed.
        error: one sentence, else None.
        choice_logits: with `choices`, float32 [len(choices)] log probabilities, up to a constant; NaN where the engine
            did not return one.
        prompt_tokens: tokens read.
        completion_tokens: tokens written.
    """

    text: str = ""
    error: str | None = None
    choice_logits: np.ndarray | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


class TextGenerator(Protocol):
    """Writes answers, one for each conversation, in their order."""

    def generate(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Generated]: ...

    def close(self) -> None:
        """Give back what it holds outside of this process; nothing can be generated any more."""
