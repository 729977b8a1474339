"""The report of an evaluation, from the same numbers: `report.json` for programs, `report.html` for people, `report.md` for
terminals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from relevance_ray import storage
from relevance_ray.evaluation.report.markdown import render_markdown
from relevance_ray.evaluation.report.page import render_html


def write_report(
    results: Mapping[str, Any],
    out_dir: str,
    *,
    title: str = "Evaluation",
    about: Mapping[str, str] | None = None,
    pictures: Mapping[str, bytes] | None = None,
) -> None:
    """Write `report.json`, `report.md` and `report.html` into a folder (local or s3://), each whole or not at all.

    Args:
        results: what `evaluate.evaluate_models` or `runs.compare_runs` returns; with `scaling` (`scaling.scaling_report`),
            `diversity` ("groups", "pairs", "lines" of text) and `settings` (key -> text) where there are some.
        about: what was run, shown as a list ("teacher": "classifier from minilm, ..."); also kept in the JSON.
        pictures: of the pairs' diversity, title -> PNG, for the page.
    """
    markdown = render_markdown(results, title=title, about=about or {})
    page = render_html(results, title=title, about=about or {}, pictures=pictures or {})
    storage.write_json(storage.join(out_dir, "report.json"), {"title": title, "about": dict(about or {}), **results})
    for name, text in (("report.md", markdown), ("report.html", page)):
        storage.write_bytes(storage.join(out_dir, name), text.encode())
