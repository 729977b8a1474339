"""Text from any causal language model of `transformers`, in a small decode loop of our own.

`model.generate` draws all rows of a batch from one stream of random numbers, so that a row's answer depends on its
neighbours, and it reads the same few-shot prompt anew for every row. Here each row has its own stream, and what
conversations share is read once and its keys and values handed to all. vLLM is faster on a GPU; this needs nothing more
than the teacher does.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from relevance_ray.engines.chat import ChatEncoder
from relevance_ray.engines.encoding import token_batches
from relevance_ray.engines.forward import DEFAULT_BATCH_TOKENS, pick_device, pick_dtype
from relevance_ray.engines.generation import Generated, Message, Sampling
from relevance_ray.engines.sequence import check_writes
from relevance_ray.errors import UserError
from relevance_ray.models import resolve_model

MIN_SHARED_TOKENS = 32
MIN_SHARED_ROWS = 4
"""Fewer conversations with the same beginning are not worth a batch of their own."""
_KEPT_PREFIXES = 8
"""Beginnings whose keys and values stay from call to call: the prompts of a handful of styles."""
_NEAR_ENOUGH = 0.9
"""A kept beginning serves where it holds so much of what a group shares; the rest is read with each row."""
_COMPACT_BELOW = 0.5
"""Finished rows ride along until no more than this share of a batch still writes: taking them out copies the others."""
_UNLIMITED = 1 << 30


class TransformersGenerator:
    """Writes answers with a causal language model: a `generation.TextGenerator`.

    Conversations become tokens as `chat.ChatEncoder` says. At temperature 0 the likeliest token is written. Above, the
    likeliest after noise (the Gumbel-max trick) that only the seed and the conversation decide; so an answer is the same
    whoever shares its call, unless rounding in the model turns two tokens that are as good as equal. For several samples
    of a conversation, vary the seed.

    With `choices` one token is written, of theirs alone, and `choice_logits` are the model's own log probabilities, from
    before that restriction.

    Args:
        model: a short name (`models.SHORT_NAMES`), a folder or a hub id.
        device: a torch device, or "auto".
        num_threads: CPU threads of torch in this process; 0 leaves them.
        max_batch_tokens: of one batch, prompts padded to the longest and room for the answers included.

    Raises:
        UserError: no such model, or none that writes text.
    """

    def __init__(
        self,
        model: str | Path,
        device: str = "auto",
        num_threads: int = 0,
        max_batch_tokens: int = DEFAULT_BATCH_TOKENS,
    ) -> None:
        folder = resolve_model(str(model))
        check_writes(str(model), folder)
        if num_threads:
            torch.set_num_threads(num_threads)
        self.device = pick_device(device)
        self.max_batch_tokens = max_batch_tokens
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=pick_dtype(self.device))
        self.model = self.model.to(self.device).eval()
        self._chat = ChatEncoder(self.tokenizer)
        self._takes = set(inspect.signature(self.model.forward).parameters)
        config = self.model.config.get_text_config(decoder=True)
        self.max_model_tokens = getattr(config, "max_position_embeddings", None) or _UNLIMITED
        # Layers that keep all keys and values. Windows and recurrent states are the library's to keep.
        layers = DynamicCache(config=self.model.config).layers
        self._num_plain_layers = len(layers) if all(type(layer) is DynamicLayer for layer in layers) else 0
        self._ends = _end_tokens(self.model, self.tokenizer)
        self._prefixes: list[_Prefix] = []

    def generate(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Generated]:
        """One answer a conversation, in their order; one that cannot be had carries an error.

        Raises:
            UserError: a JSON schema, which this engine cannot force.
            ValueError: a choice that is not a token of its own.
        """
        if sampling.json_schema is not None:
            raise UserError("the transformers engine cannot force JSON; take engine vllm or openai for it")
        choice_ids = self._chat.choice_ids(sampling.choices)
        encoded = [self._chat.encode(conversation, self.max_model_tokens - 1) for conversation in conversations]
        answers = [Generated(error=error, prompt_tokens=len(ids)) for ids, error in encoded]
        rows = [
            _Row(index, ids, 1 if choice_ids else min(sampling.max_tokens, self.max_model_tokens - len(ids)))
            for index, (ids, error) in enumerate(encoded)
            if error is None
        ]
        begun = [[tuple(sorted(message.items())) for message in conversations[row.index][:-1]] for row in rows]
        with torch.inference_mode():
            for group, num_shared in _groups(rows, [repr(key) for key in begun]):
                prefix = self._prefix(group[0].ids[:num_shared]) if self._num_plain_layers else _Prefix([])
                for places in token_batches([len(row.ids) + row.limit for row in group], self.max_batch_tokens):
                    self._write([group[place] for place in places], prefix, sampling, choice_ids)
        for row in rows:
            answers[row.index].error = row.error
            answers[row.index].completion_tokens = len(row.written)
            answers[row.index].choice_logits = row.choice_logits
            if row.error is None:
                text = self.tokenizer.decode([token for token in row.written if token not in self._ends])
                answers[row.index].text = sampling.cut(text)
                if row.choice_logits is not None:
                    answers[row.index].text = sampling.choices[choice_ids.index(row.written[0])]
        return answers

    def close(self) -> None:
        """Forget the kept keys and values; the model goes with this object."""
        self._prefixes.clear()

    def _prefix(self, ids: list[int]) -> _Prefix:
        """Keys and values of a beginning, or of most of it, run now or kept."""
        if not ids:
            return _Prefix([])
        for place, kept in enumerate(self._prefixes):
            num_common = _num_common(kept.ids, ids)
            if num_common >= _NEAR_ENOUGH * len(ids):
                self._prefixes.insert(0, self._prefixes.pop(place))
                return kept.first(num_common)
        cache = Cache(layers=[_RoomyLayer(len(ids)) for _ in range(self._num_plain_layers)])
        self._forward(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long), cache, 0)
        prefix = _Prefix(ids, [(layer.keys, layer.values) for layer in cache.layers])
        self._prefixes = [prefix, *self._prefixes[: _KEPT_PREFIXES - 1]]
        return prefix

    def _write(self, rows: list[_Row], prefix: _Prefix, sampling: Sampling, choice_ids: list[int]) -> None:
        """Write the answers of one batch: prompts padded on the left, after the prefix where there is one."""
        shared, room = len(prefix.ids), max(row.limit for row in rows)
        width = max(len(row.ids) for row in rows) - shared
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.ones(len(rows), shared + width + room, dtype=torch.long)
        for place, row in enumerate(rows):
            own = row.ids[shared:]
            ids[place, width - len(own) :] = torch.tensor(own)
            mask[place, shared : shared + width - len(own)] = 0
            if sampling.temperature > 0:
                row.noise_key = _noise_key(row.ids, sampling.seed)
        cache: Cache
        if self._num_plain_layers:
            kept = prefix.layers or [None] * self._num_plain_layers
            cache = Cache(layers=[_RoomyLayer(shared + width + room, len(rows), layer) for layer in kept])
        else:
            cache = DynamicCache(config=self.model.config)
        num_read = shared
        for step in range(room):
            num_read += ids.shape[1]
            logits = self._forward(ids, mask[:, :num_read], cache, num_read - ids.shape[1])
            tokens = self._pick(logits, rows, step, sampling, choice_ids)
            for row, token in zip(rows, tokens, strict=True):
                if not row.done:
                    row.written.append(token)
                    row.done = token in self._ends or len(row.written) >= row.limit or self._stops(row, sampling)
            going = [place for place, row in enumerate(rows) if not row.done]
            if not going:
                return
            ids = torch.tensor(tokens)[:, None]
            if self._num_plain_layers and len(going) <= _COMPACT_BELOW * len(rows):
                rows, ids, mask = [rows[place] for place in going], ids[going], mask[going]
                cache.batch_select_indices(torch.tensor(going, device=self.device))

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: Cache, start: int) -> torch.Tensor:
        """Float32 logits [rows, vocabulary] of the last of ids [rows, width], which stand at `start` of mask [rows,
        start + width]."""
        arguments: dict[str, Any] = {"attention_mask": mask.to(self.device)}
        if "position_ids" in self._takes:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, start:]
            arguments["position_ids"] = positions.to(self.device)
        if "logits_to_keep" in self._takes:
            arguments["logits_to_keep"] = 1
        found = self.model(input_ids=ids.to(self.device), past_key_values=cache, use_cache=True, **arguments)
        return found.logits[:, -1].float()

    def _pick(
        self, logits: torch.Tensor, rows: list[_Row], step: int, sampling: Sampling, choice_ids: list[int]
    ) -> list[int]:
        """The next token of each row."""
        finite = logits.isfinite().all(dim=1).tolist()
        for row, is_finite in zip(rows, finite, strict=True):
            if not is_finite and not row.done:
                row.error, row.done = "the model gave a logit that is not finite", True
        logits = logits.nan_to_num()
        if choice_ids:
            chosen = logits.log_softmax(dim=1)[:, choice_ids]
            for row, values in zip(rows, chosen.cpu().numpy(), strict=True):
                row.choice_logits = values if row.error is None else None
            logits = chosen
        if sampling.temperature > 0:
            noise = np.zeros(logits.shape, dtype=np.float32)
            for place, row in enumerate(rows):
                if not row.done:
                    noise[place] = _gumbel_noise(row.noise_key, step, logits.shape[1])
            logits = logits / sampling.temperature + torch.from_numpy(noise).to(logits.device)
        places = logits.argmax(dim=1)
        return [choice_ids[place] for place in places.tolist()] if choice_ids else places.tolist()

    def _stops(self, row: _Row, sampling: Sampling) -> bool:
        """Whether a stop string ends in the newest token. No token is less than a byte, so that a few are looked at."""
        if not sampling.stop:
            return False
        num_tokens = max(len(stop.encode()) for stop in sampling.stop) + 4
        text = self.tokenizer.decode(row.written[-num_tokens:])
        return any(stop in text for stop in sampling.stop)


@dataclass(slots=True)
class _Row:
    """A conversation on its way to an answer of at most `limit` tokens."""

    index: int
    ids: list[int]
    limit: int
    written: list[int] = field(default_factory=list)
    noise_key: int = 0
    choice_logits: np.ndarray | None = None
    error: str | None = None
    done: bool = False


@dataclass(frozen=True, slots=True)
class _Prefix:
    """A beginning, with each layer's keys and values [1, heads, tokens, size]."""

    ids: list[int]
    layers: list[Any] = field(default_factory=list)

    def first(self, num_tokens: int) -> _Prefix:
        layers = [(keys[:, :, :num_tokens], values[:, :, :num_tokens]) for keys, values in self.layers]
        return _Prefix(self.ids[:num_tokens], layers)


class _RoomyLayer(DynamicLayer):
    """A layer's keys and values with room for the whole answer: the library's own copies all of them for each token.

    Args:
        room: tokens it will hold.
        num_rows: rows, where it begins with a prefix.
        prefix: keys and values [1, heads, tokens, size] that every row begins with.
    """

    def __init__(self, room: int, num_rows: int = 1, prefix: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        super().__init__()
        self._room, self._buffers = room, (torch.empty(0), torch.empty(0))
        if prefix is not None:
            self.update(*(part.expand(num_rows, -1, -1, -1) for part in prefix))

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._buffers = tuple(
            part.new_empty(*part.shape[:2], self._room, part.shape[3]) for part in (key_states, value_states)
        )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stop = start + key_states.shape[2]
        for buffer, part in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = part
        self._show(stop)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        num_tokens = self.get_seq_length()
        self._buffers = tuple(buffer[indices] for buffer in self._buffers)
        self._show(num_tokens)

    def _show(self, num_tokens: int) -> None:
        self.keys, self.values = (buffer[:, :, :num_tokens] for buffer in self._buffers)


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: the tokenizer's, and those that the model's author names beside it."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = {named} if isinstance(named, int) else set(named or ())
    return (ends | {tokenizer.eos_token_id}) - {None}


def _groups(rows: list[_Row], keys: Sequence[str]) -> list[tuple[list[_Row], int]]:
    """Rows that begin alike, and how many tokens they share. Rows of one key, what comes before their last message, are
    a group where they are enough; the others make up one together."""
    by_key: dict[str, list[_Row]] = {}
    for row, key in zip(rows, keys, strict=True):
        by_key.setdefault(key, []).append(row)
    groups: list[list[_Row]] = []
    rest: list[list[_Row]] = []
    for group in by_key.values():
        (groups if len(group) >= MIN_SHARED_ROWS else rest).append(group)
    if rest:
        groups.append([row for group in rest for row in group])
    out = []
    for group in groups:
        # Common to the first and the last in order is common to all; the last token is left for each to read.
        first, last = min(row.ids for row in group), max(row.ids for row in group)
        num_shared = min(_num_common(first, last), min(len(row.ids) for row in group) - 1)
        worth = len(group) >= MIN_SHARED_ROWS and num_shared >= MIN_SHARED_TOKENS
        out.append((group, num_shared if worth else 0))
    return out


def _num_common(first: Sequence[int], second: Sequence[int]) -> int:
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))


def _noise_key(ids: Sequence[int], seed: int) -> int:
    text = np.asarray([seed, *ids], dtype=np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")


def _gumbel_noise(key: int, step: int, count: int) -> np.ndarray:
    """Standard Gumbel numbers, float32 [count], that the key and the step decide. The token with the largest sum of
    logit and noise is a draw from the softmax; the inverse of the distribution function would be one too, but among
    50,000 tokens it turns with the last bit of a logit."""
    stream = np.random.Generator(np.random.Philox(key=key, counter=step << 128))
    # In float64: of float32 one in eight million is zero, whose noise would be infinite.
    return -np.log(stream.standard_exponential(count).astype(np.float32))
