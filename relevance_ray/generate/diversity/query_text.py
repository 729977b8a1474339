"""What can be told of a query's text in any language: its words, its n-grams, and a few types.

Rules are simple on purpose: they stand beside the same rules applied to the log, so a query that one of them misjudges is
misjudged on both sides. No model, no language detection, no list of words but that of question and purpose.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import regex

from relevance_ray.schema import normalize_query
from relevance_ray.tokens import UNSPACED

TYPES = {
    "single word": "one word, or one run of a script that is written without spaces",
    "brand": "contains a brand of the catalog as whole words; in scripts without spaces, anywhere",
    "category": 'contains the name of a category of the catalog, of any level; "A & B" is two names',
    "number or size": "contains a number, alone or with a unit or sizes (42, 1/2, 500ml, 60x40, 13 inch, xxl)",
    "model code": "contains a word of letters and digits that is no number with a unit (wh-1000xm4, e27)",
    "question or use": "contains a question mark, or a word of asking or purpose (for, how, para, für, pour, 用)",
}
"""The types, which may overlap, and the rule of each."""

_RUN = regex.compile(
    rf"[{UNSPACED}]\p{{M}}*(?:[{UNSPACED}]\p{{M}}*)*"
    rf"|(?:(?![{UNSPACED}])[\p{{L}}\p{{M}}\p{{N}}]|(?<=\p{{L}})['’](?=\p{{L}}))+"
)
_IS_UNSPACED = regex.compile(rf"[{UNSPACED}]")
_SPLIT = regex.compile(rf"[\s{UNSPACED}]+")
_NUMBER = regex.compile(r"[#$€£¥]?\d+(?:[.,/⁄:x×*-]\d+)*([^\d\s]*)")
_NUMBER_UNSPACED = regex.compile(rf"\d[{UNSPACED}]")
_UNIT_WORDS = """
mm cm m km in inch inches ft yd mg g kg lb lbs oz ml cl dl l gal qt w kw wh kwh v kv a ah mah hz khz mhz ghz kb mb gb tb
mp k p x h st nd rd th er ct pk pc pcs % " ' '' ′ ′′ ° °c °f c f € $ £ ¥
"""
_UNITS = frozenset(_UNIT_WORDS.split()) | {""}
_SIZES = frozenset({"xs", "xl", "xxl", "xxxl", "2xl", "3xl", "4xl", "5xl"})
_MODEL = regex.compile(r"(?=\S*\p{L})(?=\S*\d)[\p{L}\p{N}][\p{L}\p{N}./+_-]*")
_ASKING_WORDS = """
for how what which who why where when para cómo como qué cuál pour comment quel quelle für wie welche welcher per come
quale voor hoe welke qual для как için nasıl
"""
_ASKING = frozenset(_ASKING_WORDS.split())
_ASKING_UNSPACED = ("用", "向け", "ため", "とは", "おすすめ", "どう", "适合", "怎么", "什么", "如何", "สำหรับ")
_MAX_NAME_WORDS = 4
_MAX_NAME_CHARS = 12
_KANA = regex.compile(r"[\p{Hiragana}\p{Katakana}ー]+")


def words(query: str) -> list[str]:
    """Maximal runs of letters and digits of the normalised query; a run of a script without spaces is one word."""
    return _RUN.findall(normalize_query(query))


def ngrams(items: list[str], n: int) -> Iterator[str]:
    """The n-grams of a list of tokens, joined by spaces."""
    for start in range(len(items) - n + 1):
        yield " ".join(items[start : start + n])


def name_key(name: str) -> str:
    """How a brand or a category's name is looked up in a query: its words."""
    return " ".join(words(name))


def category_names(path: str) -> Iterator[str]:
    """The names in a category path: "Home > Beds & Sofas" holds Home, Beds and Sofas."""
    for name in regex.split(r"\s*[>&,;/|]\s*", path):
        if key := name_key(name):
            yield key


class TypeRules:
    """Tells a query's types.

    Args:
        brands: `name_key` of the catalog's brands.
        categories: names of its categories, as `category_names` gives them.
    """

    def __init__(self, brands: Collection[str], categories: Collection[str]) -> None:
        self._brands = frozenset(filter(_tells, brands))
        self._categories = frozenset(filter(_tells, categories))

    def types(self, query: str) -> set[str]:
        """The types of a query, a subset of `TYPES`."""
        normal = normalize_query(query)
        found = _RUN.findall(normal)
        out = {"single word"} if len(found) == 1 else set()
        phrases = set(_phrases(found))
        if phrases & self._brands:
            out.add("brand")
        if phrases & self._categories:
            out.add("category")
        chunks = [part.strip("()[],;:!?.") for part in _SPLIT.split(normal)]
        if _NUMBER_UNSPACED.search(normal) or any(chunk in _SIZES or _is_number(chunk) for chunk in chunks):
            out.add("number or size")
        if any(_MODEL.fullmatch(chunk) and chunk not in _SIZES and not _is_number(chunk) for chunk in chunks):
            out.add("model code")
        asked = normal.endswith(("?", "؟")) or "?" in chunks or not _ASKING.isdisjoint(found)
        if asked or any(mark in normal for mark in _ASKING_UNSPACED):
            out.add("question or use")
        return out


def _is_number(chunk: str) -> bool:
    found = _NUMBER.fullmatch(chunk)
    return found is not None and found[1] in _UNITS


def _tells(name: str) -> bool:
    """Whether a name is long enough to be more than chance: two letters, in kana three."""
    return len(name) >= (3 if _KANA.fullmatch(name) else 2) and not name.isdigit()


def _phrases(found: list[str]) -> Iterator[str]:
    """Runs of up to four words, and every piece of a run that is written without spaces."""
    for n in range(1, _MAX_NAME_WORDS + 1):
        yield from ngrams(found, n)
    for word in found:
        if _IS_UNSPACED.match(word):
            for start in range(len(word)):
                for stop in range(start + 2, min(len(word), start + _MAX_NAME_CHARS) + 1):
                    yield word[start:stop]
