"""The diversity report's figures as pictures, drawn without a display.

Names from the catalog may be of any script, and the font that comes with matplotlib has no Chinese, Japanese or Thai: a name
that it cannot draw is numbered, and the tables of the report hold it under the same number.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font

from relevance_ray.generate.diversity.query_figures import SHOWN_VIEWS
from relevance_ray.generate.diversity.query_text import TYPES

_FONT = "DejaVu Sans"
_LOG = "#555555"
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
"""Okabe and Ito's palette, told apart by the colour-blind too."""
_DPI = 130
_LONGEST = 34


def plots(report: Mapping[str, Any]) -> dict[str, bytes]:
    """File name -> PNG, of a report of `Diversity`; those without data are left out."""
    drawn: dict[str, Callable[[Mapping[str, Any]], Figure | None]] = {
        "lengths.png": _lengths,
        "types.png": _types,
        "categories.png": _categories,
        "origins.png": _origins,
        "grades.png": _grades,
    }
    out = {}
    for name, draw in drawn.items():
        if (figure := draw(report)) is not None:
            out[name] = _png(figure)
    return out


def drawable(name: str, number: int) -> str:
    """A name as a picture can show it: shortened, or its number where the font lacks one of its characters."""
    if any(ord(char) not in _glyphs() for char in name):
        return f"no. {number} of the table"
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(FT2Font(findfont(_FONT)).get_charmap())


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def _png(figure: Figure) -> bytes:
    for axis in figure.axes:
        for label in (*axis.get_xticklabels(), *axis.get_yticklabels()):
            label.set_parse_math(False)
            label.set_fontfamily(_FONT)
        axis.title.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _sources(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The streams of generated queries that are drawn: all, and each source where there are several."""
    found = dict(report["queries"])
    return found if len(found) > 2 else {"all": found["all"]}


def _lengths(report: Mapping[str, Any]) -> Figure | None:
    if not report["groups"]:
        return None
    figure, axes = _figure(10, 3.8, 2)
    for axis, unit, bin_width in zip(axes, ("words", "chars"), (1, 5), strict=True):
        for index, (name, found) in enumerate(_sources(report).items()):
            width = 2.2 if name == "all" else 1.3
            _density(
                axis,
                found["length"][unit]["histogram"],
                bin_width,
                f"generated, {name}",
                _COLORS[index % 6],
                "-",
                width,
            )
        if report["log"]["different"]:
            views = report["log"]["views"]
            for view, style in zip(SHOWN_VIEWS, ("--", ":"), strict=True):
                histogram = views[view]["length"][unit]["histogram"]
                _density(axis, histogram, bin_width, f"log, {view}", _LOG, style, 2.0)
        axis.set_xlabel("words in a query" if unit == "words" else "characters in a query (bins of 5)")
        axis.set_ylabel("share of queries")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.set_ylim(bottom=0)
    axes[1].legend(frameon=False, fontsize=8)
    figure.suptitle("Query length against the log")
    return figure


def _density(
    axis: Axes, histogram: Sequence[float], bin_width: int, label: str, color: str, style: str, width: float
) -> None:
    counts = np.asarray(histogram, dtype=np.float64)
    counts = np.append(counts, np.zeros(-len(counts) % bin_width)).reshape(-1, bin_width).sum(axis=1)
    counts /= max(counts.sum(), 1e-12)
    last = max(int(np.searchsorted(np.cumsum(counts), 0.995)), 3)
    x = np.arange(last + 1) * bin_width
    axis.plot(
        x, counts[: last + 1], style, color=color, label=label, linewidth=width, marker="." if bin_width == 1 else None
    )


def _types(report: Mapping[str, Any]) -> Figure | None:
    if not report["groups"]:
        return None
    bars = {f"generated, {name}": found["types"] for name, found in _sources(report).items()}
    colors = [_COLORS[index % 6] for index in range(len(bars))]
    if report["log"]["different"]:
        bars |= {f"log, {view}": report["log"]["views"][view]["types"] for view in SHOWN_VIEWS}
        colors += [_LOG, "#aaaaaa"]
    figure, (axis,) = _figure(8.5, 1.4 + 0.17 * len(TYPES) * (len(bars) + 1))
    _grouped(axis, list(TYPES), [list(shares.values()) for shares in bars.values()], list(bars), colors)
    axis.set_xlabel("share of queries (a query may be of several types)")
    axis.set_title("Types of queries against the log")
    return figure


def _grouped(axis: Axes, names: list[str], shares: list[list[float]], labels: list[str], colors: list[str]) -> None:
    """Horizontal bars side by side, the first name on top, each with its figure."""
    height = 0.85 / len(shares)
    for index, (values, label, color) in enumerate(zip(shares, labels, colors, strict=True)):
        y = np.arange(len(names)) + (index - (len(shares) - 1) / 2) * height
        bars = axis.barh(y, values, height * 0.92, label=label, color=color)
        axis.bar_label(bars, [_percent(value) for value in values], padding=2, fontsize=7)
    axis.set_yticks(np.arange(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlim(0, max(0.01, 1.12 * max(map(max, shares))))
    axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _percent(value: float) -> str:
    return f"{value:.0%}" if value >= 0.1 or not value else f"{value:.1%}"


def _categories(report: Mapping[str, Any]) -> Figure | None:
    found = report["categories"]["top"]["largest"]
    level = "top-level categories"
    if len(found) < 2:
        found, level = report["categories"]["leaf"]["largest"], "categories"
    if not found:
        return None
    names = [drawable(row["name"], number) for number, row in enumerate(found, start=1)]
    figure, (axis,) = _figure(8.5, 1.3 + 0.42 * len(names))
    shares = [[row["catalog"] for row in found], [row["candidates"] for row in found]]
    _grouped(axis, names, shares, ["products of the catalog", "candidates"], [_LOG, _COLORS[0]])
    axis.set_title(f"The largest {level}")
    axis.set_xlabel("share")
    return figure


def _origins(report: Mapping[str, Any]) -> Figure | None:
    first, found = report["origins"]["first"], report["origins"]["any"]
    if not first:
        return None
    names = sorted(first.keys() | found.keys(), key=lambda name: -first.get(name, 0))
    figure, (axis,) = _figure(8.5, 1.3 + 0.42 * len(names))
    shares = [[counts.get(name, 0) / report["pairs"] for name in names] for counts in (first, found)]
    _grouped(axis, names, shares, ["chosen for it", "found by it at all"], list(_COLORS[:2]))
    axis.set_title("Where candidates come from")
    axis.set_xlabel("share of pairs")
    return figure


def _grades(report: Mapping[str, Any]) -> Figure | None:
    grades = report["grades"]
    if grades is None:
        return None
    dimensions = {"origin": "origin", "rank": "rank at its origin", "source": "query source"}
    rows: list[tuple[str, Mapping[str, Any]]] = []
    breaks = []
    for dimension, title in dimensions.items():
        breaks.append((len(rows), title))
        rows += list(grades["by"][dimension].items())
    figure, (axis,) = _figure(8.5, 1.6 + 0.3 * (len(rows) + 2 * len(breaks)))
    places, y = [], 0.0
    for index in range(len(rows)):
        for start, title in breaks:
            if index == start:
                y += 0.9
                axis.text(-0.005, y, f"by {title}", ha="right", va="center", fontsize=9, weight="bold")
                y += 1.0
        places.append(y)
        y += 1.0
    left = np.zeros(len(rows))
    names = list(grades["grades"])
    for k, grade in enumerate(names):
        shares = np.array([found["grades"][grade] / found["pairs"] for _, found in rows])
        shade = 0.9 - 0.8 * k / max(len(names) - 1, 1)
        color = (0.85 * shade, 0.25 + 0.65 * shade, 0.45 + 0.5 * shade)
        bars = axis.barh(places, shares, 0.85, left=left, label=f"grade {grade}", color=color)
        texts = [f"{share:.0%}" if share >= 0.04 else "" for share in shares]
        axis.bar_label(bars, texts, label_type="center", fontsize=7, color="white" if shade < 0.5 else "black")
        left += shares
    for place, (_, found) in zip(places, rows, strict=True):
        axis.text(1.01, place, f"{found['pairs']:,}", va="center", fontsize=7)
    axis.set_yticks(places, [name for name, _ in rows])
    axis.set_ylim(y, 0.2)
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set_xlabel("share of labeled pairs; their number on the right")
    axis.legend(frameon=False, fontsize=8, ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, 1.0))
    figure.suptitle("The teacher's grades")
    return figure
