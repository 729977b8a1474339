"""From conversations to the token ids that a causal language model reads: the same for whichever engine runs it.

What a shop's data says must stay data: a special token within a message ("<|im_end|>") is written apart, so that it
cannot end a turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from relevance_ray.engines.base import text_problem
from relevance_ray.engines.generation import Message


class ChatEncoder:
    """Renders conversations with a tokenizer's chat template; where it has none, each message is a paragraph under its
    role.

    Args:
        tokenizer: of `transformers`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._special = sorted(
            {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}, key=len, reverse=True
        )

    def encode(self, conversation: Sequence[Message], max_tokens: int) -> tuple[list[int], str | None]:
        """Token ids, and why there are none or more than `max_tokens`."""
        messages = []
        for message in conversation:
            for key in ("role", "content"):
                if (problem := text_problem(message.get(key))) is not None:
                    return [], f"the {key} of a message {problem}"
            messages.append({"role": message["role"], "content": self._apart(message["content"])})
        if not messages:
            return [], "the conversation has no messages"
        if self.tokenizer.chat_template is None:
            paragraphs = [f"{message['role'].capitalize()}:\n{message['content']}\n\n" for message in messages]
            ids = self.tokenizer.encode("".join(paragraphs) + "Assistant:\n")
            # What a tokenizer puts at the end of a text would end the answer before it began.
            ids = ids[:-1] if ids[-1] in (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id) else ids
        else:
            try:
                text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except TemplateError as error:
                return [], f"the model's chat template refuses the conversation ({error})"
            ids = self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) > max_tokens:
            return (
                ids,
                f"the conversation has {len(ids)} tokens, more than the {max_tokens} that leave room for an answer",
            )
        return ids, None

    def choice_ids(self, choices: Sequence[str]) -> list[int]:
        """The token of each choice.

        Raises:
            ValueError: a choice that is not one token, or the same as another.
        """
        ids = []
        for choice in choices:
            tokens = self.tokenizer.encode(choice, add_special_tokens=False)
            if len(tokens) != 1:
                raise ValueError(f"choice {choice!r} is {len(tokens)} tokens of this model; it must be one")
            ids.append(int(tokens[0]))
        if len(set(ids)) < len(ids):
            raise ValueError(f"the choices {', '.join(choices)} are not all different tokens of this model")
        return ids

    def _apart(self, text: str) -> str:
        for token in self._special:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text
