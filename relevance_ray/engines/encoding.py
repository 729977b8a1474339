"""Pairs to token ids, and token ids to batches.

Both input forms, an encoder's text pair and a causal model's prompt, are five pieces: head, query, middle, product,
tail. Three are fixed and tokenised once; a query once however many candidates it has; the product alone is cut to fit.
So the query and the question are always whole. The price of tokenising pieces apart: a prompt may differ by a merge at
a seam from tokenising its whole text, the same way in training as in serving.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from relevance_ray.templates import Template

WINDOW_ROWS = 4096
Item = TypeVar("Item")
Made = TypeVar("Made")


class KnownTokens(Protocol):
    """Token ids of texts seen before, such as a cache's: int32 arrays that nobody changes."""

    def get(self, text: str) -> np.ndarray | None: ...

    def put(self, text: str, ids: np.ndarray) -> None: ...


@dataclass(slots=True)
class EncodedTexts:
    """Token ids of n inputs of a model (pairs, or texts of one side), unpadded.

    Attributes:
        input_ids: one int32 array an input; empty where it failed.
        token_type_ids: the same shapes, or None for a model without them.
        errors: why an input cannot be encoded, else None.
        truncated: whether its text was cut, bool [n].
        pad_token_id: what fills a shorter row of a batch.
    """

    input_ids: list[np.ndarray]
    token_type_ids: list[np.ndarray] | None
    errors: list[str | None]
    truncated: np.ndarray
    pad_token_id: int

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each input, int64 [n]; 0 where it failed."""
        return np.fromiter((len(ids) for ids in self.input_ids), dtype=np.int64, count=len(self.input_ids))

    def pad(self, rows: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """The model's inputs for some rows: `input_ids`, `attention_mask` and, where the model has them,
        `token_type_ids`, each int64 [len(rows), longest], padded on the right."""
        lengths = np.asarray([len(self.input_ids[row]) for row in rows])
        mask = np.arange(lengths.max()) < lengths[:, None]
        ids = np.full(mask.shape, self.pad_token_id, dtype=np.int64)
        ids[mask] = np.concatenate([self.input_ids[row] for row in rows])
        batch = {"input_ids": ids, "attention_mask": mask.astype(np.int64)}
        if self.token_type_ids is not None:
            types = np.zeros(mask.shape, dtype=np.int64)
            types[mask] = np.concatenate([self.token_type_ids[row] for row in rows])
            batch["token_type_ids"] = types
        return batch

    def take(self, rows: Sequence[int] | np.ndarray) -> EncodedTexts:
        """Some of them, in the order of `rows`."""
        types = self.token_type_ids
        return EncodedTexts(
            [self.input_ids[row] for row in rows],
            None if types is None else [types[row] for row in rows],
            [self.errors[row] for row in rows],
            self.truncated[rows],
            self.pad_token_id,
        )


def join_texts(parts: Sequence[EncodedTexts]) -> EncodedTexts:
    """Inputs of one model, from several, in order."""
    if len(parts) == 1:
        return parts[0]
    types = [part.token_type_ids for part in parts if part.token_type_ids is not None]
    return EncodedTexts(
        [ids for part in parts for ids in part.input_ids],
        [each for part in types for each in part] if types else None,
        [error for part in parts for error in part.errors],
        np.concatenate([part.truncated for part in parts]),
        parts[0].pad_token_id,
    )


class PairEncoder:
    """Encodes (query, product) for one model, as `tokenizer(query, text, truncation="only_second")` would.

    Args:
        tokenizer: a transformers tokenizer (fast).
        template: the model's template; with a `prompt`, the causal form.

    Literal special tokens inside a query or product ("<|im_end|>") are plain text in a prompt, so that a shop's data
    cannot end the turn of a chat model.
    """

    def __init__(self, tokenizer: Any, template: Template) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.pad_token_id = int(
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
        if template.prompt is None:
            self._probe_pair()
        else:
            self._split_prompt(template.prompt)
        fixed = len(self._head) + len(self._middle) + len(self._tail)
        self._max_tokens = template.max_tokens
        self._room = self._max_tokens - fixed

    def encode(self, queries: Sequence[str], products: Sequence[Mapping[str, Any]]) -> EncodedTexts:
        """Encode n pairs of valid text. A query that leaves no room for its product, or a product without any text, is
        an error of its row."""
        return self.encode_texts(queries, [self.template.render_product(product) for product in products])

    def encode_texts(
        self, queries: Sequence[str], texts: Sequence[str], known: KnownTokens | None = None
    ) -> EncodedTexts:
        """The same for products that are text already; tokens of those that are `known` are taken from there."""
        assert len(queries) == len(texts), (len(queries), len(texts))
        query_index: dict[str, int] = {}
        which = [query_index.setdefault(query, len(query_index)) for query in queries]
        query_ids = self._tokenize([self._query_lead + query for query in query_index])
        product_ids = self._product_tokens(texts, known)
        heads = [np.concatenate([self._head, ids, self._middle]) for ids in query_ids]

        input_ids, token_types, errors = [], [], []
        truncated = np.zeros(len(texts), dtype=bool)
        for row, (query, ids) in enumerate(zip(which, product_ids, strict=True)):
            room = self._room - len(query_ids[query])
            error = self._problem(room, texts[row])
            errors.append(error)
            if error is not None:
                input_ids.append(np.empty(0, dtype=np.int32))
                token_types.append(np.empty(0, dtype=np.int32))
                continue
            truncated[row] = len(ids) > room
            kept = ids[:room]
            input_ids.append(np.concatenate([heads[query], kept, self._tail]))
            if self._types is not None:
                counts = (len(heads[query]), len(kept) + len(self._tail))
                token_types.append(np.repeat(np.asarray(self._types, dtype=np.int32), counts))
        types = None if self._types is None else token_types
        return EncodedTexts(input_ids, types, errors, truncated, self.pad_token_id)

    def _product_tokens(self, texts: Sequence[str], known: KnownTokens | None) -> list[np.ndarray]:
        if known is None:
            return self._tokenize([self._product_lead + text for text in texts])
        found = [known.get(text) for text in texts]
        new = [row for row, ids in enumerate(found) if ids is None]
        for row, ids in zip(new, self._tokenize([self._product_lead + texts[row] for row in new]), strict=True):
            known.put(texts[row], ids)
            found[row] = ids
        return [ids for ids in found if ids is not None]

    def _problem(self, room: int, text: str) -> str | None:
        if room < 1:
            fits = max(self._room - 1, 0)
            return (
                f"the query has more than the {fits} tokens that fit beside a product (max_tokens {self._max_tokens})"
            )
        if not text:
            return f"the product has no text in its fields {', '.join(self.template.fields)}"
        return None

    def _tokenize(self, texts: Sequence[str]) -> list[np.ndarray]:
        return tokenize(self.tokenizer, texts, self._max_tokens, literal=self.template.prompt is not None)

    def _literal(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)

    def _probe_pair(self) -> None:
        """Read the special tokens off a probe pair, whatever the model family puts around its two texts."""
        first, second = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "b"))
        whole = self.tokenizer("a", "b", return_token_type_ids=True)
        ids, types = whole["input_ids"], whole["token_type_ids"]
        start = _find(ids, first, 0)
        end = _find(ids, second, start + len(first))
        self._head = np.asarray(ids[:start], dtype=np.int32)
        self._middle = np.asarray(ids[start + len(first) : end], dtype=np.int32)
        self._tail = np.asarray(ids[end + len(second) :], dtype=np.int32)
        self._query_lead = self._product_lead = ""
        has_types = "token_type_ids" in self.tokenizer.model_input_names
        self._types = (types[start], types[end]) if has_types else None

    def _split_prompt(self, prompt: str) -> None:
        """Cut a prompt at its two places; a space before a place moves into the text after it, where byte-pair
        tokenizers expect it."""
        before, rest = prompt.split("{query}")
        between, after = rest.split("{product}")
        self._query_lead = " " if before.endswith(" ") else ""
        self._product_lead = " " if between.endswith(" ") else ""
        self._head = np.concatenate([start_tokens(self.tokenizer), self._literal(before.removesuffix(" "))])
        self._middle = self._literal(between.removesuffix(" "))
        self._tail = self._literal(after)
        has_types = "token_type_ids" in self.tokenizer.model_input_names
        self._types = (0, 0) if has_types else None


def tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int, *, literal: bool) -> list[np.ndarray]:
    """int32 ids of each text without special tokens, cut to one more than `max_tokens`, so that "cut" and "just fits" stay
    apart; with `literal`, what looks like a special token inside a text is text."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        truncation=True,
        max_length=max_tokens + 1,
        padding=False,
        split_special_tokens=literal,
    )["input_ids"]
    return [np.asarray(ids, dtype=np.int32) for ids in encoded]


def start_tokens(tokenizer: Any) -> np.ndarray:
    """int32: whatever begins every input of this model (a start token), which begins a prompt too. An end token does not
    end a prompt, because the last token is the one that is read."""
    single, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return np.asarray(single[: _find(single, plain, 0)], dtype=np.int32)


def ahead(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """`make(item)` of each item in turn, each made by a thread while the caller is at work on the one before."""
    with ThreadPoolExecutor(1) as pool:
        waiting = deque[Future[Made]]()
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def in_windows(
    encode: Callable[[Sequence[str], Sequence[Mapping[str, Any]]], Made],
    queries: Sequence[str],
    products: Sequence[Mapping[str, Any]],
    window_rows: int = WINDOW_ROWS,
) -> Iterator[tuple[slice, Made]]:
    """Pairs encoded a window of rows at a time, each while the caller is at work on the one before."""
    windows = [slice(start, start + window_rows) for start in range(0, len(queries), window_rows)]
    yield from zip(windows, ahead(lambda rows: encode(queries[rows], products[rows]), windows), strict=True)


def token_batches(lengths: Sequence[int] | np.ndarray, max_batch_tokens: int) -> list[np.ndarray]:
    """Cut rows into batches of similar length.

    Rows are sorted by length, longest first (so that memory runs out at once or never), and cut so that
    `longest * rows <= max_batch_tokens`; a row longer than that is a batch of its own. Rows of length 0 are left out.

    Returns:
        Index arrays, int64, that together hold every row of positive length once.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    batches, start = [], 0
    while start < len(order):
        stop = start + max(1, int(max_batch_tokens // lengths[order[start]]))
        batches.append(order[start:stop])
        start = stop
    return batches


def _find(ids: list[int], part: list[int], start: int) -> int:
    for index in range(start, len(ids) - len(part) + 1):
        if ids[index : index + len(part)] == part:
            return index
    raise AssertionError(f"tokens {part} are not in {ids} from {start}")
