"""The report of an evaluation, from the same numbers: `report.json` for programs, `report.html` for people, `report.md` for
terminals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from relevance_ray import storage
from relevance_ray.evaluation.report_html import render_html
from relevance_ray.evaluation.report_markdown import render_markdown


def write_report(
    results: Mapping[str, Any],
    out_dir: str,
    *,
    title: str = "Evaluation",
    about: Mapping[str, str] | None = None,
    student: str = "student",
    teacher: str = "teacher",
) -> None:
    """Write `report.json`, `report.md` and `report.html` into a folder (local or s3://), each whole or not at all.

    Args:
        results: what `compare.evaluate_models` returns.
        about: what was run, shown as a list ("teacher": "classifier from minilm, ..."); also kept in the JSON.
        student: the model that the others are compared with.
        teacher: the model that the verdict is about, where it was measured.
    """
    storage.write_json(storage.join(out_dir, "report.json"), {"title": title, "about": dict(about or {}), **results})
    for name, render in (("report.md", render_markdown), ("report.html", render_html)):
        text = render(results, title=title, about=about or {}, student=student, teacher=teacher)
        storage.write_bytes(storage.join(out_dir, name), text.encode())
