"""The words of a text, in any script: what BM25 counts, and what queries are compared by.

Runs of letters, marks and digits are words, NFKC and casefolded, Latin letters without their accents, which shoppers leave
out. Scripts that put no spaces between words (Han, Kana, Thai and their like) give overlapping pairs of characters
instead, as Lucene's CJKAnalyzer does: no dictionary, and a query finds the titles that hold its characters side by side.
"""

from __future__ import annotations

import re
import unicodedata

import regex

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}々ー"
"""The inside of a character class of `regex`: scripts without spaces between words."""

_RUN = regex.compile(rf"(?P<unspaced>(?:[{UNSPACED}]\p{{M}}*)+)|(?:(?![{UNSPACED}])[\w\p{{M}}])+")
_ASCII_RUN = re.compile(r"\w+")
_ACCENTS = regex.compile(r"(?<=\p{Latin}\p{Mn}*)\p{Mn}")


def without_accents(text: str) -> str:
    """A text with its Latin letters bare, as shoppers type them; accents of other scripts make other letters, and stay."""
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", _ACCENTS.sub("", unicodedata.normalize("NFD", text)))


def tokenize(text: str) -> list[str]:
    """The words of a text in their order, repeated ones again."""
    normal = unicodedata.normalize("NFKC", text).casefold()
    if normal.isascii():
        return _ASCII_RUN.findall(normal)
    normal = without_accents(normal)
    out: list[str] = []
    for found in _RUN.finditer(normal):
        run = found[0]
        if found["unspaced"] and len(run) > 2:
            out += [run[i : i + 2] for i in range(len(run) - 1)]
        else:
            out.append(run)
    return out
