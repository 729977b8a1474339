"""Queries cut from product titles.

What shoppers type looks like a few words of a title: its head ("nike air max"), a stretch of it, some of its words in
order, or the kind of thing with one property ("red running shoes"). A cut is a pure function of (seed, round, product,
title word counts), so a pool of any length starts with the same queries. The trade-off: no language model, hence no
synonyms and no words that the catalog does not use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import regex

from relevance_ray.schema import normalize_query
from relevance_ray.tokens import UNSPACED

MAX_ROUNDS = 16
"""Cuts tried per title. Later rounds of one title repeat earlier queries more and more."""

_WORD = regex.compile(
    rf"(?:(?![_{UNSPACED}])[\w\p{{M}}])+(?:['’.\-/&](?:(?![_{UNSPACED}])[\w\p{{M}}])+)*"
    r"|[\p{Katakana}ー]+|\p{Hiragana}+|[\p{Han}々]+|[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{M}]+"
)
"""Words with spaces between them; without spaces, runs of one script: where Japanese changes from Kanji to Katakana to
Hiragana, a word mostly ends."""

_PARTICLE_CHARS = 2
_FUNCTION_WORDS = frozenset(
    "a an and at by de des du et for from in la le les mit of on or par per pour so the to und von with w".split()  # noqa: SIM905
)
_MAX_WORD_CHARS = 20
_FIRST_WORDS = 12
"""Titles tail off into pack sizes and keywords: words are picked among the first ones."""


@dataclass(frozen=True, slots=True)
class TitleProduct:
    """The texts of a product that queries are cut from."""

    product_id: str
    title: str
    brand: str | None = None
    color: str | None = None
    category: str | None = None


def draws(*key: object) -> list[int]:
    """Eight uniform 32-bit integers, a pure function of the key."""
    text = "\x1f".join(str(part) for part in key)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=32).digest()
    return [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 32, 4)]


def words(text: str | None) -> list[str]:
    """The lowercased words of a text: no bare punctuation, no strings of more than 20 characters (codes, URLs)."""
    return [word for word in _WORD.findall(normalize_query(text or "")) if len(word) <= _MAX_WORD_CHARS]


def cut_query(
    product: TitleProduct,
    is_shared: Callable[[str], bool],
    *,
    seed: int,
    round_index: int,
    min_words: int,
    max_words: int,
) -> str | None:
    """One query from a product, or None where its title gives none of `min_words` to `max_words` words.

    Four styles by a hash of (seed, round, product id): leading words (35%), a stretch (25%), scattered words that
    `is_shared` finds in other products too (25%), the last part of the category with a property (15%).
    """
    style, length, start, pick, extra, *_ = draws(seed, "title", round_index, product.product_id)
    pool = words(product.title)[:_FIRST_WORDS]
    if len(pool) < min_words:
        return None
    # The sum of two draws: middle lengths are the most common, as in real logs.
    span = max_words - min_words
    num_words = min_words + (length % (span + 1) + (length >> 16) % (span + 1)) // 2
    share = style / 2**32
    cut: list[str] = []
    if share >= 0.85:
        cut = _category_with_property(product, pool, pick, extra)[:max_words]
    elif share >= 0.60:
        known = [word for word in pool if is_shared(word)]
        cut = _scattered(known, num_words, pick)
    elif share >= 0.35:
        first = start % max(1, len(pool) - num_words + 1)
        cut = pool[first : first + num_words]
    cut = _trim(cut)
    if not min_words <= len(cut) <= max_words:
        cut = _trim(pool[:num_words])
    return " ".join(cut) if min_words <= len(cut) <= max_words else None


def _scattered(pool: list[str], num_words: int, pick: int) -> list[str]:
    """`num_words` of the pool in their order, chosen by the hash."""
    by_hash = sorted(range(len(pool)), key=lambda i: draws(pick, i)[0])
    return [pool[i] for i in sorted(by_hash[:num_words])]


def _category_with_property(product: TitleProduct, pool: list[str], pick: int, extra: int) -> list[str]:
    """The category's last part after one property: brand, color or a word of the title."""
    leaf = words((product.category or "").rsplit(">", 1)[-1])
    if not leaf:
        return []
    properties = [part for part in (words(product.brand), words(product.color), [pool[extra % len(pool)]]) if part]
    chosen = properties[pick % len(properties)]
    return [word for word in chosen if word not in leaf] + leaf


def _trim(cut: list[str]) -> list[str]:
    """Without function words at either end and without a word said twice running."""
    out = [word for i, word in enumerate(cut) if i == 0 or word != cut[i - 1]]
    while out and _says_nothing(out[-1]):
        out.pop()
    while out and _says_nothing(out[0]):
        out.pop(0)
    return out


def _says_nothing(word: str) -> bool:
    return word in _FUNCTION_WORDS or (len(word) <= _PARTICLE_CHARS and "\u3040" <= word[0] <= "\u309f")
