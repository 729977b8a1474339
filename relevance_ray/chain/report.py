"""A run's report: its evaluation, with the scaling curve and the diversity of its pairs where these were measured.

It is written by `evaluate`, and again by `forecast` and `diversity`, from what lies at the root; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from relevance_ray.chain.diversity import FOLDER as DIVERSITY
from relevance_ray.chain.folders import StepFolders
from relevance_ray.chain.scaling import FOLDER as SCALING
from relevance_ray.chain.scaling import curve_key
from relevance_ray.evaluation.report.write import write_report
from relevance_ray.generate.diversity.report import PICTURES, warning_lines
from relevance_ray.storage import exists, join, read_bytes, read_json


def write_run_report(at: StepFolders, results: Mapping[str, Any], about: Mapping[str, str]) -> str:
    """Write the report of an evaluation's results into its folder; the path of its page."""
    scaling, diversity = join(at.root, SCALING, "scaling.json"), join(at.folder("generate"), DIVERSITY)
    curve = read_json(scaling) if exists(scaling) else None
    own = curve is not None and curve.get("of") == curve_key(at)  # and not of another configuration at this root
    found: dict[str, Any] = {"scaling": curve if own else None, "diversity": None}
    pictures: dict[str, bytes] = {}
    if exists(join(diversity, "diversity.json")):
        report = read_json(join(diversity, "diversity.json"))
        told = [f"{key}: {report['about'][key]}" for key in ("read", "labels") if key in report["about"]]
        found["diversity"] = {key: report[key] for key in ("groups", "pairs")} | {
            "lines": [*told, *warning_lines(report)]
        }
        drawn = {title: join(diversity, name) for name, title in PICTURES.items()}
        pictures = {title: read_bytes(path) for title, path in drawn.items() if exists(path)}
    folder = at.folder("evaluate")
    write_report({**results, **found}, folder, title="Evaluation", about=about, pictures=pictures)
    return join(folder, "report.html")


def refresh_run_report(at: StepFolders) -> str | None:
    """Write the report of a finished evaluation anew; None where there is none."""
    if not all(at.is_done(step) for step in at.steps):
        return None
    stored = read_json(join(at.folder("evaluate"), "report.json"))
    return write_run_report(at, {key: stored[key] for key in stored if key not in ("title", "about")}, stored["about"])
