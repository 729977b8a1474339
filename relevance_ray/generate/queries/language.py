"""Whether a query is in its product's language, judged so that a brand name never counts against it.

The script is certain and judged for any text; the language within a script is a guess, and asked for only of several
words that the product itself does not use. Restricted to the languages of large shops, the guess is wrong for 2 of 1,000
English queries of three words and more (Best Buy's log); for a product of another language it finds a third of those of
four words (Best Buy) or four fifths (ESCI), which have fewer model names.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import Any

_LANGUAGES = ("en", "es", "fr", "de", "it", "pt", "nl", "sv", "da", "fi", "pl", "cs", "hu", "ro", "tr")
"""Of those written in Latin letters, the ones that shops sell in: with all 140, short texts are taken for rare ones."""
_SURE_OF_TITLE = 0.9
_SURE_OF_QUERY = 0.8
_NEW_WORDS = 3
"""Fewer words that are not the product's own say too little of their language."""
_HOME_SHARE = 0.3
"""Of a title's letters that another script than Latin must have to be the one its shoppers write in."""
_UNSPACED = frozenset(("CJK", "KANA", "THAI", "LAO", "KHMER", "MYANMAR"))
_CHARS_PER_WORD = 3
_ONE_SCRIPT = {"HIRAGANA": "KANA", "KATAKANA": "KANA", "IDEOGRAPHIC": "CJK"}  # the last: 々, which repeats a character

_WORD = re.compile(r"\w+")
_TYPED_WORD = re.compile(r"\w+(?:['’.]\w+)*")


@functools.lru_cache(maxsize=100_000)
def script_of(char: str) -> str | None:
    """The script of a letter by its Unicode name, such as "LATIN" or "CJK" (Hiragana and Katakana are both "KANA"); None
    for what is no letter."""
    if not char.isalpha():
        return None
    name = unicodedata.name(char, "").replace("-", " ").split(" ", 1)[0]
    return _ONE_SCRIPT.get(name, name)


def scripts_of(text: str) -> Counter[str]:
    """How many letters of each script a text has."""
    found = (script_of(char) for char in unicodedata.normalize("NFKC", text))
    return Counter(script for script in found if script is not None)


def count_words(text: str) -> int:
    """Words; where a script has no spaces between them (Han, Kana, Thai), every three characters begun are one."""
    total = 0
    for word in _TYPED_WORD.findall(unicodedata.normalize("NFKC", text)):
        num_unspaced = sum(script_of(char) in _UNSPACED for char in word)
        total += -(-num_unspaced // _CHARS_PER_WORD) + (num_unspaced < len(word))
    return total


def folded_words(text: str) -> list[str]:
    """The words of a text without case or accents, so that "montana" is "Montaña"."""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    return _WORD.findall("".join(char for char in plain if not unicodedata.combining(char)))


def same_language(query: str, title: str, texts: Iterable[str]) -> bool:
    """Whether a query can be what a shopper writes who reads this title.

    Args:
        query: to be judged.
        title: of the product; decides script and language.
        texts: the product's others, brand and description among them: their words are nobody's language.
    """
    found, there = scripts_of(query), scripts_of(title)
    num_letters = sum(there.values())
    if not found or not num_letters:
        return True
    own = {*folded_words(title), *(word for text in texts for word in folded_words(text))}
    new = [word for word in _WORD.findall(query) if not set(folded_words(word)) <= own]
    allowed = {"LATIN", *there, *(("CJK",) if "KANA" in there else ())}
    if any(script not in allowed for word in new for script in scripts_of(word)):
        return False
    home = {script for script, count in there.items() if script != "LATIN" and count >= _HOME_SHARE * num_letters}
    if home:
        home |= {"CJK"} if "KANA" in home else set()
        return not new or any(script in home for script in found)
    latin = [word for word in new if not word.isnumeric()]
    if len(latin) < _NEW_WORDS:
        return True
    language, sure = _classify(title)
    other, also_sure = _classify(" ".join(latin))
    return language == other or sure < _SURE_OF_TITLE or also_sure < _SURE_OF_QUERY


def language_of(text: str) -> str:
    """The language that a text of several words (titles, say) is in, such as "en"; that of its script, such as "kana", where
    it is not Latin; "" where neither can be told."""
    there = scripts_of(text)
    num_letters = sum(there.values())
    home = [name for name, count in there.most_common() if name != "LATIN" and count >= _HOME_SHARE * num_letters]
    if home:
        return "kana" if "KANA" in there and "CJK" in home else home[0].lower()
    language, sure = _classify(text) if num_letters else ("", 0.0)
    return language if sure >= _SURE_OF_TITLE else ""


def _classify(text: str) -> tuple[str, float]:
    language, probability = _identifier().classify(text.lower())
    return str(language), float(probability)


@functools.cache
def _identifier() -> Any:
    """Loaded when first asked for: it takes a second."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(_LANGUAGES)
    return identifier
