"""The demo market's truth: what a query asks for and how well a product answers, from their text and fields alone.

`parse_query` undoes typos against the market's vocabulary and reads phrases, longest first. Being a function of text, the
truth also holds for queries that nobody rendered: cut from titles, or written by a language model. A word outside the
vocabulary means nothing to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from relevance_ray.data.market_vocabulary import (
    AUDIENCES,
    BRANDS,
    FAMILIES,
    MATERIAL_KINDS,
    MATERIALS,
    SHADES,
    SIZES,
    STYLES,
    Family,
    ProductType,
)
from relevance_ray.schema import LabelScale, normalize_query

MARKET_SCALE = LabelScale("market", ("irrelevant", "related", "substitute", "exact"), (0.0, 0.1, 0.4, 1.0), "exact")

ASPECTS = ("type", "brand", "color", "material", "size", "audience", "price")
MATCH, MISMATCH, UNSPECIFIED = "match", "mismatch", "unspecified"

_TOKEN = re.compile(r"\d+(?:\.\d+)?|[a-z]+")
_PRICE_WORDS = (("under",), ("below",), ("max",), ("less", "than"), ("up", "to"))
_FILLERS = frozenset(
    "and by dollars for from goes in less made max of on our pack pairs size than the to under below with".split()  # noqa: SIM905
)
_MIN_FUZZY_CHARS = 4
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Intent:
    """What a query asks for, each value by its canonical name or None where it asks for nothing.

    `type` is a product type or a family of types, `color` a shade or a family of shades, `material` a kind or a family of
    kinds, `max_price` is in dollars.
    """

    type: str | None = None
    brand: str | None = None
    color: str | None = None
    material: str | None = None
    size: str | None = None
    audience: str | None = None
    max_price: float | None = None

    @property
    def is_empty(self) -> bool:
        return all(getattr(self, field.name) is None for field in fields(self))


TYPES: dict[str, tuple[ProductType, Family]] = {
    product_type.name: (product_type, family) for family in FAMILIES for product_type in family.types
}
_FAMILY_OF_NAME: dict[str, Family] = {f"any {family.name}": family for family in FAMILIES}
FAMILY_OF_SHADE: dict[str, str] = {shade: family for family, shades in SHADES.items() for shade in shades}
KINDS_OF_MATERIAL: dict[str, tuple[str, ...]] = {f"any {name}": kinds for name, (_, kinds) in MATERIALS.items()}


def tokens(text: str) -> list[str]:
    """The words and numbers of a text, lower case; an apostrophe joins ("women's" is "womens")."""
    return _TOKEN.findall(normalize_query(text).replace("'", "").replace("’", ""))


def _phrases() -> dict[tuple[str, ...], tuple[str, str]]:
    """Every phrase of the vocabulary to its (aspect, canonical value)."""
    out: dict[tuple[str, ...], tuple[str, str]] = {}

    def add(aspect: str, value: str, phrases: Iterable[str]) -> None:
        for phrase in phrases:
            found = out.setdefault(tuple(tokens(phrase)), (aspect, value))
            assert found == (aspect, value), f"{phrase!r} means both {found} and {(aspect, value)}"

    for name, (product_type, _) in TYPES.items():
        add("type", name, (name, *product_type.synonyms))
    for name, family in _FAMILY_OF_NAME.items():
        add("type", name, family.terms)
    for brands in BRANDS.values():
        for brand in brands:
            add("brand", brand, (brand,))
    for shade in FAMILY_OF_SHADE:
        add("color", shade, (shade,))
    for name, (synonym, _) in MATERIALS.items():
        plain = (name,) if name not in MATERIAL_KINDS else ()
        add("material", f"any {name}", (*plain, synonym))
    for kind in MATERIAL_KINDS:
        add("material", kind, (kind,))
    for sizes in SIZES.values():
        for canonical, *others in sizes:
            add("size", canonical, (canonical, *others))
    for name, synonyms in AUDIENCES.items():
        add("audience", name, (name, *synonyms))
    return out


PHRASES = _phrases()
_LONGEST = max(map(len, PHRASES))
WORDS: frozenset[str] = frozenset(word for phrase in PHRASES for word in phrase)
_KNOWN = WORDS | {token for style in STYLES for token in tokens(style)} | _FILLERS


def _one_edit_away(word: str) -> set[str]:
    """All strings at Damerau-Levenshtein distance 1 of a word."""
    splits = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    deleted = {left + right[1:] for left, right in splits if right}
    swapped = {left + right[1] + right[0] + right[2:] for left, right in splits if len(right) > 1}
    replaced = {left + letter + right[1:] for left, right in splits if right for letter in _LETTERS}
    inserted = {left + letter + right for left, right in splits for letter in _LETTERS}
    return (deleted | swapped | replaced | inserted) - {word}


@lru_cache(maxsize=200_000)
def correct(word: str) -> str:
    """The vocabulary's word that `word` is a typo of: the only one at distance 1; otherwise the word itself."""
    if word in _KNOWN or len(word) < _MIN_FUZZY_CHARS or not word.isalpha():
        return word
    near = {other for other in _one_edit_away(word) & WORDS if len(other) >= _MIN_FUZZY_CHARS}
    return near.pop() if len(near) == 1 else word


@lru_cache(maxsize=10_000)
def typos(word: str) -> tuple[str, ...]:
    """Misspellings of a vocabulary word that `correct` undoes: letters swapped, dropped or doubled, the first one kept."""
    if len(word) <= _MIN_FUZZY_CHARS or not word.isalpha():
        return ()
    swapped = [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(1, len(word) - 1)]
    dropped = [word[:i] + word[i + 1 :] for i in range(1, len(word))]
    doubled = [word[: i + 1] + word[i:] for i in range(1, len(word))]
    return tuple(typo for typo in dict.fromkeys(swapped + dropped + doubled) if typo != word and correct(typo) == word)


@lru_cache(maxsize=100_000)
def parse_query(text: str) -> Intent:
    """What a text asks for. Where it names an aspect twice, the first counts."""
    words = [correct(token) for token in tokens(text)]
    found: dict[str, Any] = {}
    position = 0
    while position < len(words):
        price, used = _price(words, position)
        if used:
            found.setdefault("max_price", price)
            position += used
            continue
        for length in range(min(_LONGEST, len(words) - position), 0, -1):
            meaning = PHRASES.get(tuple(words[position : position + length]))
            if meaning is not None:
                found.setdefault(*meaning)
                position += length
                break
        else:
            position += 1
    return Intent(**found)


def _price(words: list[str], position: int) -> tuple[float, int]:
    for phrase in _PRICE_WORDS:
        end = position + len(phrase)
        if tuple(words[position:end]) == phrase and end < len(words) and words[end][0].isdigit():
            return float(words[end]), len(phrase) + 1
    return 0.0, 0


def _attributes(product: Mapping[str, Any]) -> dict[str, str]:
    value = product.get("attributes")
    return dict(value.items() if isinstance(value, Mapping) else value or ())


def _product_type(product: Mapping[str, Any]) -> str:
    """The type: the leaf of the category path, or, for a product from elsewhere, what its title names."""
    leaf = (product.get("category") or "").rsplit(" > ", 1)[-1]
    return leaf if leaf in TYPES else parse_query(product.get("title") or "").type or ""


def true_verdicts(query: str, product: Mapping[str, Any]) -> dict[str, str]:
    """For each of `ASPECTS` "match", "mismatch", or "unspecified" where the query does not ask for it.

    Args:
        query: any text.
        product: the keys of `schema.FIELDS`; `attributes` a mapping or (key, value) pairs.
    """
    intent = parse_query(query)
    attributes = _attributes(product)
    color, material, audience = product.get("color"), attributes.get("Material"), attributes.get("Audience")
    price = product.get("price")
    type_name = _product_type(product)
    family = _FAMILY_OF_NAME.get(intent.type or "")
    in_family = family is not None and any(member.name == type_name for member in family.types)
    matches = {
        "type": type_name == intent.type or in_family,
        "brand": product.get("brand") == intent.brand,
        "color": color == intent.color or (color is not None and FAMILY_OF_SHADE.get(color) == intent.color),
        "material": material == intent.material or material in KINDS_OF_MATERIAL.get(intent.material or "", ()),
        "size": attributes.get("Size") == intent.size,
        "audience": audience == intent.audience or (audience == "Unisex" and intent.audience in ("Women", "Men")),
        "price": price is not None and intent.max_price is not None and price <= intent.max_price,
    }
    asked = {aspect: getattr(intent, "max_price" if aspect == "price" else aspect) is not None for aspect in ASPECTS}
    return {aspect: UNSPECIFIED if not asked[aspect] else MATCH if matches[aspect] else MISMATCH for aspect in ASPECTS}


def _relation(asked: str, given: str) -> str:
    """How a product's type relates to the asked one (or family): substitute, sibling, complement or none."""
    family = _FAMILY_OF_NAME.get(asked)
    members = {member.name for member in family.types} if family else {asked}
    if given not in TYPES:
        return "none"
    given_type, given_family = TYPES[given]
    if given_type.accessory_of in members:
        return "complement"
    if asked in TYPES:
        asked_type, asked_family = TYPES[asked]
        if asked_type.accessory_of == given:
            return "complement"
        plain = not asked_type.accessory_of and not given_type.accessory_of
        if asked_family is given_family and plain:
            return "substitute" if asked_family.interchangeable else "sibling"
    return "none"


def true_grade(query: str, product: Mapping[str, Any]) -> str:
    """The true grade, one of `MARKET_SCALE.grades`.

    Of the asked type: exact with every constraint met, substitute with one missed, related with more. An interchangeable
    type: substitute if every constraint is met, else related. A type of the same shelf with every constraint met, an
    accessory of the asked type and what an asked accessory is for: related. All else, and a query that says nothing
    in the market's words: irrelevant.
    """
    intent = parse_query(query)
    if intent.is_empty:
        return "irrelevant"
    verdicts = true_verdicts(query, product)
    missed = sum(verdicts[aspect] == MISMATCH for aspect in ASPECTS if aspect != "type")
    if verdicts["type"] != MISMATCH:
        return ("exact", "substitute", "related")[min(missed, 2)]
    relation = _relation(intent.type or "", _product_type(product))
    if relation == "substitute":
        return "substitute" if missed == 0 else "related"
    if relation == "complement" or (relation == "sibling" and missed == 0):
        return "related"
    return "irrelevant"
