"""The report as one HTML file that needs nothing else: no network, no script; read on a phone, in print, or forwarded."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from importlib import resources
from typing import Any

from relevance_ray.evaluation.compare import difference, is_sure
from relevance_ray.evaluation.report.words import (
    SAME_SETTINGS,
    in_order,
    measured_slices,
    metric_title,
    others_of,
    p_text,
    reading,
    slice_notes,
    split_notes,
    verdicts,
)
from relevance_ray.evaluation.scaling import sentence_of
from relevance_ray.evaluation.slices import SLICE_METRIC

HEADLINE = ("ndcg", "mrr", "roc_auc", "calibration_error", "query_calibration_error")
"""The metrics that are shown at once, beside nDCG at the first k; the others are unfolded."""
Cell = dict[str, Any]


def render_html(
    results: Mapping[str, Any],
    *,
    title: str,
    about: Mapping[str, str],
    pictures: Mapping[str, bytes] | None = None,
) -> str:
    """The report as a page; the arguments are those of `report.write_report`."""
    from jinja2 import Environment

    template = resources.files("relevance_ray.evaluation.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True, trim_blocks=True).from_string(template)
    splits = in_order(results["splits"])
    return page.render(
        title=title,
        about=about,
        verdicts=verdicts(results),
        settings=results.get("settings"),
        unlike=results.get("settings_that_differ"),
        splits=[_split(name, split, results) for name, split in splits],
        model=results["model"],
        same_settings=SAME_SETTINGS,
        slice_title=metric_title(SLICE_METRIC),
        scaling=_scaling(results.get("scaling")),
        diversity=results.get("diversity"),
        pictures={name: base64.b64encode(png).decode("ascii") for name, png in (pictures or {}).items()},
        reading=reading(results),
    )


def _split(name: str, split: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    from relevance_ray.evaluation.report.plots import interval_plot, pr_plot, reliability_plot

    models, metrics, own = split["models"], results["metrics"], results["model"]
    held_against = others_of(results, split)
    at_k = [metric for metric in metrics if metric.startswith("ndcg@")]
    headline = [metric for metric in ("ndcg", *at_k[:1], *HEADLINE[1:]) if metric in metrics]
    others = [model for model in models if model != own] if own in models else []
    return {
        "name": name,
        "num_queries": split["num_queries"],
        "num_pairs": split["num_pairs"],
        "notes": split_notes(split),
        "headline": [metric_title(metric) for metric in headline],
        "models": [
            {
                "name": model,
                "headline": [_cell(found["metrics"].get(metric), "value", "{:.3f}") for metric in headline],
                "rate": "" if found["pairs_per_second"] is None else f"{found['pairs_per_second']:,.0f}",
            }
            for model, found in models.items()
        ],
        "metrics": [
            {
                "name": metric_title(metric),
                "cells": [_cell(found["metrics"].get(metric), "value", "{:.3f}") for found in models.values()],
            }
            for metric in metrics
        ],
        "differences": [
            {"name": other, "cells": [_difference(split, metric, own, other) for metric in headline]}
            for other in others
        ],
        "others_of_all": others,
        "all_differences": [
            {"name": metric_title(metric), "cells": [_difference(split, metric, own, other) for other in others]}
            for metric in metrics
        ],
        "slices": [
            {
                "dimension": part["dimension"],
                "name": part["slice"],
                "queries": part["num_queries"],
                "pairs": part["num_pairs"],
                "own": _cell(part["models"].get(own, {"metrics": {}})["metrics"].get(SLICE_METRIC), "value", "{:.3f}"),
                "differences": [_difference(part, SLICE_METRIC, own, other) for other in held_against],
            }
            for part in measured_slices(split)
        ],
        "slice_notes": slice_notes(split),
        "others": held_against,
        "examples": split.get("examples", []),
        "interval_plot": interval_plot(split, "ndcg", metric_title("ndcg")),
        "pr_plot": pr_plot(split),
        "reliability_plot": reliability_plot(split),
    }


def _scaling(report: Mapping[str, Any] | None) -> dict[str, Any] | None:
    from relevance_ray.evaluation.report.plots import scaling_svg

    if report is None:
        return None
    rows = [
        {
            "name": f"{row['pairs']:,} pairs",
            "value": f"{row['ndcg']:.4f}",
            "interval": "{:.4f} to {:.4f}".format(*row["interval"]),
            "difference": _cell(
                {**row["to_teacher"], "difference": row["to_teacher"]["value"]}, "difference", "{:+.4f}"
            ),
        }
        for row in report["sizes"]
    ]
    sentence = sentence_of(report["forecast"]) if report["forecast"] else ""
    return {"plot": scaling_svg(report), "rows": rows, "sentence": sentence}


def _difference(split: Mapping[str, Any], metric: str, model: str, other: str) -> Cell:
    found = difference(split, metric, model, other)
    cell = _cell(found, "difference", "{:+.3f}")
    if found is not None and found["p_holm"] is not None:
        cell["sure"] = is_sure(found)
        cell["interval"] += f" p {p_text(found['p_holm'])}"
    return cell


def _cell(found: Mapping[str, Any] | None, key: str, form: str) -> Cell:
    """A value and its interval as text, and whether the interval is `sure` to leave out 0."""
    if found is None or found[key] is None:
        return {"value": "–", "interval": "", "sure": False}
    if found["low"] is None or found["high"] is None:
        return {"value": form.format(found[key]), "interval": "", "sure": False}
    interval = f"{form} to {form}".format(found["low"], found["high"])
    return {"value": form.format(found[key]), "interval": interval, "sure": found["low"] > 0 or found["high"] < 0}
