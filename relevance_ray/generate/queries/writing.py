"""Queries that a language model writes from a product: what it is asked, and which answers are queries at all.

A small model copies its prompt, copies the title, answers in English or goes round in circles; a large one does so
seldom. Whatever writes, an answer is refused with a named reason or becomes a query. What cannot be told from the
query and its product alone, whether a search finds the product and whether the query is a new one, is for the caller.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from relevance_ray.engines.generation import Message, Sampling, TextGenerator
from relevance_ray.generate.queries.language import count_words, folded_words, same_language
from relevance_ray.generate.queries.titles import draws
from relevance_ray.generate.writer_options import WriterOptions
from relevance_ray.schema import normalize_query
from relevance_ray.templates import attribute_pairs

PROMPTS = "queries_v1"
"""The file of prompts, part of what decides the data."""
REASONS = ("error", "cut", "empty", "echo", "length", "repeats", "verbatim", "language", "unrelated", "style")
"""Why an answer is no query, in the order in which they are looked for."""

_TITLE_CHARS = 120
_SHINGLE = 3
_VERBATIM = 0.8
_VERBATIM_WORDS = 7
_ECHO_WORDS = 4
_ECHO_SHINGLES = 0.5
_BROAD_WORDS = 4
_WORD_CHARS = 30
_NAMING = ("plain", "attribute_dropped", "misspelled")
_OWN_SHINGLES = 0.4
"""Queries of these styles name the product: so many of their shingles at least must be its own, its synonyms aside."""

_LABEL = re.compile(
    r"^(?:(?:the |a )?(?:search(?: query| term)?|query|shopper(?: types)?|answer|output|consulta|búsqueda|検索(?:クエリ)?)"
    r"\s*[:：]|\d{1,2}\s*[.)](?=\s)|[-*•>]+\s)\s*",
    re.IGNORECASE,
)
_EDGE = " \t\"'`*_“”„‘’«»「」『』"
_END = ".,;:!。、，；：！"


@dataclass(frozen=True, slots=True)
class Written:
    """What became of one product.

    Attributes:
        query: "" where the answer was refused.
        style: that was asked for.
        reason: one of `REASONS`, else None.
        answer: as the model wrote it, or the generator's error where the reason is "error".
    """

    query: str
    style: str
    reason: str | None
    answer: str


def style_of(product_key: str, round_index: int, weights: Mapping[str, float], seed: int) -> str | None:
    """The kind of query that a product is asked for in a round, or None where it was asked for each.

    Each product has all styles of positive weight in an order of its own, drawn by their weights without replacement
    (exponential keys: Efraimidis and Spirakis, 2006), a pure function of the arguments.
    """
    keyed = []
    for style, weight in sorted(weights.items()):
        if weight > 0:
            uniform = (draws(seed, "style", style, product_key)[0] + 0.5) / 2**32
            keyed.append((-math.log(uniform) / weight, style))
    return sorted(keyed)[round_index][1] if round_index < len(keyed) else None


def conversation(product: Mapping[str, Any], style: str, description_chars: int) -> list[Message]:
    """What the model is asked: an instruction and worked examples, the same for all products of a style, so that an engine
    can keep them, then the product.

    Args:
        product: a mapping with some keys of `schema.FIELDS`.
        style: a key of `WriterOptions.styles`.
        description_chars: of the description, and of the attributes together.
    """
    prompts = _prompts()
    messages: list[Message] = [{"role": "system", "content": prompts.instructions[style]}]
    for example, query in prompts.examples[style]:
        messages += [
            {"role": "user", "content": describe(example, description_chars)},
            {"role": "assistant", "content": query},
        ]
    return [*messages, {"role": "user", "content": describe(product, description_chars)}]


def describe(product: Mapping[str, Any], description_chars: int) -> str:
    """The text of a product: its title, and what else is there on a line each."""
    title = _squeeze(product.get("title"))[:_TITLE_CHARS]
    lines = [f"Product: {title}"]
    for name in ("brand", "color"):
        text = _squeeze(product.get(name))
        if text and f" {text.casefold()} " not in f" {title.casefold()} ":
            lines.append(f"{name.capitalize()}: {text[:100]}")
    if category := _squeeze(product.get("category")):
        lines.append(f"Category: {category.rsplit(' > ', 1)[-1][:100]}")
    pairs = [
        f"{_squeeze(key)}: {_squeeze(value)}" for key, value in attribute_pairs(product.get("attributes")) if value
    ]
    for name, text in (("Details", "; ".join(pairs)), ("Description", _squeeze(product.get("description")))):
        if cut := _cut(text, description_chars):
            lines.append(f"{name}: {cut}")
    return "\n".join(lines)


def clean(answer: str) -> str:
    """The query within an answer: its first line without numbers, labels, quotes and a full stop."""
    line = next((line for line in answer.splitlines() if line.strip()), "")
    text, before = _squeeze(line), None
    while text != before:
        before = text
        text = _LABEL.sub("", text.strip(_EDGE))
    return text.rstrip(_END).strip(_EDGE)


def refusal(query: str, product: Mapping[str, Any], style: str, options: WriterOptions) -> str | None:
    """Why a cleaned answer is no query of that style for that product, one of `REASONS`, or None.

    "echo": a piece of the prompt that is not the product's. "repeats": one word three times, twice in a row, or without
    an end. "verbatim": the title, most of it, or seven words as they stand there. "language": see
    `language.same_language`. "unrelated": a query that should name the product and shares little with its words.
    "style": the brand where none is wanted, no spelling that the product does not have where one is, too many words for
    a broader one.
    """
    words = folded_words(query)
    if not any(char.isalpha() for char in query):
        return "empty"
    texts = [_squeeze(product.get(name)) for name in ("brand", "color", "category", "description")]
    texts += [_squeeze(text) for pair in attribute_pairs(product.get("attributes")) for text in pair]
    title = _squeeze(product.get("title"))
    own = {word for text in (title, *texts) for word in folded_words(text)}
    normal, normal_title = normalize_query(query), normalize_query(title)
    own_text = normalize_query(" ".join((title, *texts)))
    if _is_echo(normal, words, own, own_text):
        return "echo"
    num_words = count_words(query)
    if not options.min_words <= num_words <= options.max_words:
        return "length"
    if any(len(word) > _WORD_CHARS and count_words(word) == 1 for word in words):
        return "repeats"
    if any(words.count(word) > 2 for word in words) or any(map(str.__eq__, words, words[1:])):
        return "repeats"
    if (num_words >= _VERBATIM_WORDS and normal in normal_title) or _similarity(normal, normal_title) >= _VERBATIM:
        return "verbatim"
    if options.check_language and not same_language(query, title, texts):
        return "language"
    if style in _NAMING and _share_within(normal, own_text) < _OWN_SHINGLES:
        return "unrelated"
    return None if _has_style(words, num_words, own, product, style) else "style"


def write_queries(
    generator: TextGenerator,
    products: Sequence[Mapping[str, Any]],
    styles: Sequence[str],
    options: WriterOptions,
    seed: int = 0,
) -> list[Written]:
    """A query, or why there is none, for each product, in their order.

    Args:
        generator: opened by `engines.registry.open_generator`.
        products: mappings with some keys of `schema.FIELDS`.
        styles: what each is asked for.
        options: `generate.llm`.
        seed: of the sampling; the same gives the same query for a product and style.

    Raises:
        UserError: what the generator cannot go on with.
    """
    conversations = [
        conversation(product, style, options.description_chars) for product, style in zip(products, styles, strict=True)
    ]
    sampling = Sampling(options.max_tokens, options.temperature, seed, stop=("\n",))
    out = []
    for product, style, answer in zip(products, styles, generator.generate(conversations, sampling), strict=True):
        if answer.error is not None:
            out.append(Written("", style, "error", answer.error))
            continue
        query = clean(answer.text)
        # Where the tokens ran out, a query may lack its end, even half a character.
        is_cut = answer.completion_tokens >= options.max_tokens
        reason = "cut" if is_cut else refusal(query, product, style, options)
        out.append(Written("" if reason else query, style, reason, answer.text))
    return out


@dataclass(frozen=True)
class _Prompts:
    """A file of prompts, by style; and what of it must not come back."""

    instructions: dict[str, str]
    examples: dict[str, list[tuple[Mapping[str, Any], str]]]
    queries: frozenset[str] = field(default_factory=frozenset)
    brand_words: frozenset[str] = field(default_factory=frozenset)
    runs: frozenset[tuple[str, ...]] = field(default_factory=frozenset)


@functools.cache
def _prompts(name: str = PROMPTS) -> _Prompts:
    text = (Path(__file__).parent / "prompts" / f"{name}.yaml").read_text(encoding="utf-8")
    found = yaml.safe_load(text)
    products, styles = found["products"], found["styles"]
    instructions = {style: " ".join(part["instruction"].split()) for style, part in styles.items()}
    examples = {
        style: [(products[key], query) for key, query in part["queries"].items()] for style, part in styles.items()
    }
    brands = [word for product in products.values() for word in folded_words(product.get("brand", ""))]
    return _Prompts(
        instructions,
        examples,
        frozenset(normalize_query(query) for pairs in examples.values() for _, query in pairs),
        frozenset(word for word in brands if len(word) > 2),
        frozenset(run for text in instructions.values() for run in _runs(folded_words(text))),
    )


def _is_echo(query: str, words: list[str], own: set[str], own_text: str) -> bool:
    """Whether a query repeats the prompt. What a shopper of this product would type too is none: a drill is a drill."""
    if set(words) <= own:
        return False
    prompts = _prompts()
    if (set(words) - own) & prompts.brand_words or not prompts.runs.isdisjoint(_runs(words)):
        return True
    return query in prompts.queries and _share_within(query, own_text) < _ECHO_SHINGLES


def _runs(words: list[str]) -> list[tuple[str, ...]]:
    return [tuple(words[at : at + _ECHO_WORDS]) for at in range(len(words) - _ECHO_WORDS + 1)]


def _has_style(words: list[str], num_words: int, own: set[str], product: Mapping[str, Any], style: str) -> bool:
    if style == "misspelled":
        return not set(words) <= own
    if style == "plain":
        return True
    if style == "broader" and num_words > _BROAD_WORDS:
        return False
    brand = folded_words(_squeeze(product.get("brand")))
    return not brand or not set(brand) <= set(words)


def _similarity(one: str, other: str) -> float:
    """Jaccard similarity of the three-letter shingles of two texts."""
    first, second = ({text[at : at + _SHINGLE] for at in range(max(1, len(text) - 2))} for text in (one, other))
    return len(first & second) / len(first | second)


def _share_within(query: str, text: str) -> float:
    """Of a query's three-letter shingles, those that a text has."""
    shingles = {query[at : at + _SHINGLE] for at in range(max(1, len(query) - 2))}
    return sum(shingle in text for shingle in shingles) / len(shingles)


def _cut(text: str, num_chars: int) -> str:
    """At most so many characters, whole words where there are spaces."""
    if len(text) <= num_chars:
        return text
    head = text[: num_chars + 1].rsplit(" ", 1)[0] if " " in text[: num_chars + 1] else text[:num_chars]
    return head.rstrip(" ;,")


def _squeeze(text: Any) -> str:
    return " ".join(str(text).split()) if text else ""
