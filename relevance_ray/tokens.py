"""The words of a text, in any script: what BM25 counts, and what queries are compared and cut by.

Runs of letters and digits are words, NFKC and casefolded. Scripts that put no spaces between words (Han, Kana, Thai and
their like) give overlapping pairs of characters instead, as Lucene's CJKAnalyzer does: no dictionary, and a query finds
the titles that hold its characters side by side.
"""

from __future__ import annotations

import re
import unicodedata

SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
"""The inside of a character class: Thai, Lao, Burmese, Khmer, Kana, Han."""

_RUN = re.compile(rf"[{SPACELESS}]+|[^\W{SPACELESS}]+")
_FIRST_SPACELESS = "\u0e00"


def words(text: str) -> list[str]:
    """The words of a text in their order, repeated ones again."""
    normal = unicodedata.normalize("NFKC", text).casefold()
    runs = _RUN.findall(normal)
    if normal.isascii() or max(normal) < _FIRST_SPACELESS:
        return runs
    out: list[str] = []
    for run in runs:
        if is_spaceless(run) and len(run) > 1:
            out += [run[i : i + 2] for i in range(len(run) - 1)]
        else:
            out.append(run)
    return out


def is_spaceless(run: str) -> bool:
    """Whether a run of one kind of characters is of a script without spaces between words."""
    return re.match(f"[{SPACELESS}]", run) is not None
