"""The report as Markdown, for terminals, pull requests and diffs."""

from __future__ import annotations

from collections.abc import Mapping
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
from relevance_ray.evaluation.scaling import scaling_markdown
from relevance_ray.evaluation.slices import SLICE_METRIC


def render_markdown(
    results: Mapping[str, Any],
    *,
    title: str,
    about: Mapping[str, str],
) -> str:
    """The report as Markdown."""
    lines = [f"# {title}", ""]
    for sentence in verdicts(results):
        lines += [sentence, ""]
    if about:
        lines += ["## What was run", "", *(f"- **{key}**: {value}" for key, value in about.items()), ""]
    if settings := results.get("settings"):
        lines += [
            "Settings that are not the defaults: " + ", ".join(f"`{key}={text}`" for key, text in settings.items()),
            "",
        ]
    unlike = results.get("settings_that_differ")
    if unlike == {}:
        lines += [SAME_SETTINGS, ""]
    if unlike:
        header = ["setting", *next(iter(unlike.values()))]
        rows = [
            [key, *("default" if value is None else value for value in values.values())]
            for key, values in unlike.items()
        ]
        lines += ["## What differs", "", *_table(header, rows)]
    for name, split in in_order(results["splits"]):
        lines += _split_section(name, split, results)
    if results.get("scaling"):
        lines += ["## How many pairs it takes", "", scaling_markdown(results["scaling"])]
    if found := results.get("diversity"):
        lines += ["## The generated pairs", "", f"{found['groups']:,} queries, {found['pairs']:,} pairs.", ""]
        lines += [*(f"- {line}" for line in found["lines"]), ""]
    lines += ["## How to read this", "", *(f"- {line}" for line in reading(results)), ""]
    return "\n".join(lines)


def _split_section(name: str, split: Mapping[str, Any], results: Mapping[str, Any]) -> list[str]:
    lines = [f"## {name}: {split['num_queries']:,} queries, {split['num_pairs']:,} pairs", ""]
    for note in split_notes(split):
        lines += [note, ""]
    models, metrics, own = split["models"], results["metrics"], results["model"]
    rows = [
        [metric_title(metric), *(_interval(found["metrics"].get(metric)) for found in models.values())]
        for metric in metrics
    ]
    rows.append(["pairs scored a second", *(_rate(found["pairs_per_second"]) for found in models.values())])
    lines += _table(["", *models], rows)
    others = [model for model in models if model != own]
    if own in models and others:
        rows = [
            [metric_title(metric), *(_difference(difference(split, metric, own, other)) for other in others)]
            for metric in metrics
        ]
        lines += _table([f"{own} minus", *others], rows)
    return lines + _slices_section(split, own, others_of(results, split))


def _slices_section(split: Mapping[str, Any], model: str, others: list[str]) -> list[str]:
    """The slices as a table, the worst first; those that were not measured are named."""
    if not split.get("slices"):
        return []
    rows = []
    for part in measured_slices(split):
        own = part["models"].get(model, {"metrics": {}})["metrics"]
        found = [_difference(difference(part, SLICE_METRIC, model, other)) for other in others]
        cells = [_interval(own.get(SLICE_METRIC)), *found, _interval(own.get("ndcg"))]
        rows.append(
            [f"{part['dimension']}: {part['slice']}", f"{part['num_queries']:,}", f"{part['num_pairs']:,}", *cells]
        )
    lines = [f"### Slices, the worst for {model} first", ""]
    against = [f"minus {other}" for other in others]
    header = ["", "queries that rank", "pairs", f"{model}, {metric_title(SLICE_METRIC)}", *against, "nDCG"]
    lines += _table(header, rows) if rows else []
    for note in slice_notes(split):
        lines += [note, ""]
    return lines


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---"] * len(header)
    return [*("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [header, rule, *rows]), ""]


def _interval(found: Mapping[str, float | None] | None) -> str:
    if found is None or found["value"] is None:
        return "-"
    if found["low"] is None or found["high"] is None:
        return f"{found['value']:.3f}"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _difference(found: Mapping[str, float | None] | None) -> str:
    if found is None or found["difference"] is None:
        return "-"
    if found["low"] is None or found["high"] is None:
        return f"{found['difference']:+.3f}"
    text = f"{found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
    p = found.get("p_holm")
    text = f"**{text}**" if is_sure(found) else text
    return text if p is None else f"{text}, p {p_text(p)}"


def _rate(pairs_per_second: float | None) -> str:
    return "-" if pairs_per_second is None else f"{pairs_per_second:,.0f}"
