"""A language model behind an endpoint that speaks OpenAI's chat protocol.

Whatever serves it (OpenAI, vLLM, any other), the client is OpenAI's own: it retries with growing pauses what was refused
for load or lost on the way, and heeds Retry-After. What still fails is an error of its row, so that no paid answer is
lost with it; an endpoint that is gone ends the job, to be resumed.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from relevance_ray.engines.generation import Generated, Message, Sampling
from relevance_ray.engines.options import EndpointOptions
from relevance_ray.errors import UserError

_TOP_LOGPROBS = 20
"""As many alternatives as OpenAI and vLLM give for a token."""

_GONE_AFTER = 2
"""So many times `concurrency` requests lost in a row, with all their retries: the endpoint is gone."""

_ALL_REFUSED = 8
"""Where at least so many requests of a call are refused as wrong and none is answered, it is not the rows."""


def check_endpoint(options: EndpointOptions, section: str = "label.openai") -> None:
    """Raise `UserError` where the client is not installed, or there is no key for OpenAI; nothing is sent."""
    if find_spec("openai") is None:
        raise UserError(
            "engine openai needs the client of that name; pip install 'relevance-ray[openai]', on every node"
        )
    if not os.environ.get(options.api_key_env) and not options.base_url:
        raise UserError(
            f"the environment variable {options.api_key_env} holds no key for OpenAI; set it on every node, or "
            f"{section}.base_url for an endpoint of your own"
        )


class OpenAIGenerator:
    """Answers of a model at an endpoint.

    Args:
        options: where it is, and how hard it may be asked.
        section: where the configuration has these options, for what a user is told to mend.

    Raises:
        UserError: the client is not installed, or there is no key.
    """

    def __init__(self, options: EndpointOptions, section: str = "label.openai") -> None:
        check_endpoint(options, section)
        import openai

        self._openai = openai
        self.options = options
        self.section = section
        # The client wants a key; an endpoint of one's own need not.
        self._key = os.environ.get(options.api_key_env) or "none"

    def generate(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Generated]:
        """One answer a conversation, in their order.

        Raises:
            UserError: the endpoint refuses the key or the model, or every request as wrong; or it is gone, or overloaded
                for longer than the retries last.
        """
        return asyncio.run(self._generate(conversations, sampling)) if conversations else []

    def close(self) -> None:
        """Nothing is held between calls."""

    async def _generate(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Generated]:
        client = self._openai.AsyncOpenAI(
            api_key=self._key,
            base_url=self.options.base_url or None,
            timeout=self.options.timeout_seconds,
            max_retries=self.options.max_retries,
        )
        call = _Call(self, client, sampling)
        async with client:
            tasks = [asyncio.create_task(call.answer(messages)) for messages in conversations]
            try:
                answers = await asyncio.gather(*tasks)
            except BaseException:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                raise
        if call.last_loss is not None and call.lost == len(conversations) >= _ALL_REFUSED:
            raise self.gone(call.last_loss) from call.last_loss
        if call.refused == len(conversations) >= _ALL_REFUSED:
            raise UserError(f"the endpoint refuses every request: {answers[-1].error}; mend {self.section}")
        return answers

    def gone(self, error: Exception) -> UserError:
        """What to tell of an endpoint that answers nothing any more."""
        where = self.options.base_url or "OpenAI's endpoint"
        return UserError(
            f"{where} gives no answer, each request tried {self.options.max_retries} times again ({_said(error)}); mend "
            f"{self.section} or the endpoint, and the same command goes on"
        )

    def request(self, messages: Sequence[Message], sampling: Sampling) -> dict[str, Any]:
        """What a request says."""
        body: dict[str, Any] = {
            "model": self.options.model,
            "messages": [dict(message) for message in messages],
            "max_completion_tokens": 1 if sampling.choices else sampling.max_tokens,
            "temperature": sampling.temperature,
            "seed": sampling.seed,
        }
        if sampling.choices:
            body |= {"logprobs": True, "top_logprobs": _TOP_LOGPROBS}
        if sampling.json_schema is not None:
            schema = {"name": "answer", "schema": dict(sampling.json_schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if self.options.extra_body:
            body["extra_body"] = self.options.extra_body
        return body


class _Call:
    """The requests of one call, so many at once and no faster than allowed."""

    def __init__(self, generator: OpenAIGenerator, client: Any, sampling: Sampling) -> None:
        self.refused = self.lost = 0
        self.last_loss: Exception | None = None
        self._generator, self._client, self._sampling = generator, client, sampling
        self._openai = generator._openai
        self._free = asyncio.Semaphore(generator.options.concurrency)
        per_minute = generator.options.requests_per_minute
        self._interval = 60.0 / per_minute if per_minute else 0.0
        self._next = time.monotonic()
        self._lost_in_row = 0

    async def answer(self, messages: Sequence[Message]) -> Generated:
        openai, options, section = self._openai, self._generator.options, self._generator.section
        async with self._free:
            await self._turn()
            try:
                found = await self._client.chat.completions.create(**self._generator.request(messages, self._sampling))
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                raise UserError(
                    f"the endpoint refuses the key in {options.api_key_env} ({_said(error)}); set the right one"
                ) from error
            except openai.NotFoundError as error:
                raise UserError(
                    f"the endpoint knows no model {options.model!r} ({_said(error)}); mend {section}.model or base_url"
                ) from error
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                self.refused += 1
                return Generated(error=f"the endpoint refused the request: {_said(error)}")
            except openai.APIError as error:
                self.lost, self.last_loss = self.lost + 1, error
                self._lost_in_row += 1
                if self._lost_in_row >= max(_ALL_REFUSED, _GONE_AFTER * options.concurrency):
                    raise self._generator.gone(error) from error
                return Generated(error=f"no answer after {options.max_retries + 1} tries: {_said(error)}")
        self._lost_in_row = 0
        return self._read(found)

    async def _turn(self) -> None:
        """Wait until the next request may be sent."""
        if self._interval:
            now = time.monotonic()
            self._next = max(self._next, now) + self._interval
            await asyncio.sleep(self._next - self._interval - now)

    def _read(self, found: Any) -> Generated:
        if not found.choices:
            return Generated(error="the endpoint gave no answer")
        first = found.choices[0]
        written = first.message.content or ""
        # Cut here too: not every endpoint heeds `stop`.
        out = Generated(text=self._sampling.cut(written))
        if found.usage is not None:
            out.prompt_tokens, out.completion_tokens = found.usage.prompt_tokens, found.usage.completion_tokens
        if self._sampling.choices:
            content = first.logprobs.content if first.logprobs is not None else None
            if not content or not content[0].top_logprobs:
                out.error = "the endpoint gave no log probabilities"
                return out
            top = {entry.token: entry.logprob for entry in content[0].top_logprobs}
            out.choice_logits = _choice_logits(self._sampling.choices, top)
            if np.isfinite(out.choice_logits).any():
                out.text = self._sampling.choices[int(np.nanargmax(out.choice_logits))]
        elif first.finish_reason == "length" and out.text == written:
            out.error = f"the answer was longer than {self._sampling.max_tokens} tokens"
        return out


def _choice_logits(choices: Sequence[str], top: dict[str, float]) -> np.ndarray:
    """float32 [n]: the log probability of each choice, spelled with and without space around it; NaN where none is among
    the alternatives given."""
    out = np.full(len(choices), np.nan, dtype=np.float32)
    for index, choice in enumerate(choices):
        spellings = [logprob for token, logprob in top.items() if token.strip() == choice]
        if spellings:
            out[index] = np.logaddexp.reduce(spellings)
    return out


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
