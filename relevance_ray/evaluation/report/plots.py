"""The report's figures as SVG, for a page that holds them itself; drawn without a display."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from relevance_ray.evaluation.scaling import draw_scaling

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
"""Okabe and Ito's palette, told apart by the colour-blind too; the models take them in the order of the report."""
_STYLE = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "svg.hashsalt": "relevance_ray"}


def interval_plot(split: Mapping[str, Any], metric: str, title: str) -> str:
    """A metric of every model with its interval, one line each."""
    models = {name: found["metrics"].get(metric) for name, found in split["models"].items()}
    known = {name: found for name, found in models.items() if found and found["value"] is not None}
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(6.4, 0.6 + 0.32 * max(len(known), 1))
        for row, (name, found) in enumerate(known.items()):
            color = _color(split, name)
            if found["low"] is not None:
                axes.plot([found["low"], found["high"]], [row, row], color=color, linewidth=2)
            axes.plot([found["value"]], [row], "o", color=color)
        axes.set_yticks(range(len(known)), [_label(name) for name in known])
        axes.invert_yaxis()
        axes.set_xlabel(f"{title}, 95% interval")
        axes.grid(axis="x", color="#dddddd")
        return _svg(figure)


def pr_plot(split: Mapping[str, Any]) -> str:
    """Precision over recall, one line a model; "" without a relevant pair."""
    if not any(found.get("pr_curve") for name, found in split["models"].items() if name != "random"):
        return ""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(4.6, 3.6)
        for name, found in split["models"].items():
            if (curve := found.get("pr_curve")) and name != "random":
                axes.plot(curve["recall"], curve["precision"], color=_color(split, name), label=_label(name))
        axes.set_xlabel("recall of relevant pairs")
        axes.set_ylabel("precision")
        axes.set_ylim(0, 1.02)
        axes.legend(fontsize=8)
        return _svg(figure)


def reliability_plot(split: Mapping[str, Any]) -> str:
    """How many of the pairs given a probability are relevant, one line a model; "" where none has probabilities."""
    if not any(found.get("reliability") for found in split["models"].values()):
        return ""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(4.6, 3.6)
        axes.plot([0, 1], [0, 1], color="#999999", linestyle=":", linewidth=1)
        for name, found in split["models"].items():
            if bins := found.get("reliability"):
                color, share = _color(split, name), np.asarray(bins["pairs"]) / sum(bins["pairs"])
                axes.plot(bins["probability"], bins["relevant"], "-", color=color, linewidth=1, label=_label(name))
                axes.scatter(bins["probability"], bins["relevant"], s=4 + 200 * share, color=color)  # by its pairs
                if "low" in bins:  # else of an earlier version
                    low, high = (np.array(bins[end], dtype=float) for end in ("low", "high"))
                    axes.vlines(bins["probability"], low, high, color=color, linewidth=1, alpha=0.5)
        axes.set_xlabel("probability that was said")
        axes.set_ylabel("share that is relevant")
        axes.legend(fontsize=8)
        return _svg(figure)


def scaling_svg(report: Mapping[str, Any]) -> str:
    """The scaling curve."""
    with mpl.rc_context(_STYLE):
        return _svg(draw_scaling(report))


def _label(name: str) -> str:
    """A name as matplotlib shows it as it is: no mathematics, and not hidden for its first character."""
    shown = name.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _color(split: Mapping[str, Any], model: str) -> str:
    return COLORS[list(split["models"]).index(model) % len(COLORS)]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
