"""The report of an evaluation: `report.json` for programs, `report.md` for people, from the same numbers.

The verdict sentences are computed from the intervals, so a report cannot claim more than its queries carry: where the
interval of a difference holds 0, the two models "cannot be told" apart, whichever way it points.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from relevance_ray import storage
from relevance_ray.evaluation.compare import difference
from relevance_ray.evaluation.slices import SLICE_METRIC

FEW_QUERIES = 50
_NAMES = {
    "ndcg": "nDCG",
    "mrr": "MRR",
    "map": "MAP",
    "kendall_tau": "Kendall's tau",
    "pairwise_accuracy": "pairwise accuracy",
    "roc_auc": "ROC AUC",
    "pr_auc": "PR AUC",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "calibration_error": "calibration error (low is good)",
    "brier": "Brier score (low is good)",
}


def write_report(
    results: Mapping[str, Any],
    out_dir: str,
    *,
    title: str = "Evaluation",
    about: Mapping[str, str] | None = None,
    student: str = "student",
    teacher: str = "teacher",
) -> None:
    """Write `report.json` and `report.md` into a folder (local or s3://), each whole or not at all.

    Args:
        results: what `compare.evaluate_models` returns.
        about: what was run, shown as a list ("teacher": "classifier from minilm, ..."); also kept in the JSON.
        student: the model that the others are compared with.
        teacher: the model that the verdict is about, where it was measured.
    """
    storage.write_json(storage.join(out_dir, "report.json"), {"title": title, "about": dict(about or {}), **results})
    markdown = render_markdown(results, title=title, about=about or {}, student=student, teacher=teacher)
    storage.write_bytes(storage.join(out_dir, "report.md"), markdown.encode())


def metric_title(metric: str) -> str:
    """How a metric is called in prose and tables."""
    if metric.startswith("recall@precision"):
        return f"recall at precision {metric.removeprefix('recall@precision')}"
    return _NAMES.get(metric, metric.replace("ndcg@", "nDCG@"))


def verdict(split_name: str, split: Mapping[str, Any], student: str, other: str, metric: str = "ndcg") -> str | None:
    """One honest sentence on the student against another model; None where the two were not both measured."""
    found = difference(split, metric, student, other)
    if found is None or found["difference"] is None or found["low"] is None or found["high"] is None:
        return None
    if found["low"] > 0:
        claim = f"The {student} passes the {other}"
    elif found["high"] < 0:
        claim = f"The {student} falls behind the {other}"
    else:
        claim = f"The {student} cannot be told from the {other}"
    numbers = f"{found['difference']:+.4f}, 95% interval {found['low']:+.4f} to {found['high']:+.4f}"
    judged = split["num_queries"] - split["num_queries_without_gain"]
    sentence = f"{claim} on {split_name} {metric_title(metric)}: {numbers}, {judged} queries."
    if judged < FEW_QUERIES:
        sentence += " So few queries show large differences only; cross-validate over all judged ones (data.folds)."
    return sentence


def render_markdown(
    results: Mapping[str, Any],
    *,
    title: str,
    about: Mapping[str, str],
    student: str = "student",
    teacher: str = "teacher",
) -> str:
    """The report as Markdown."""
    lines = [f"# {title}", ""]
    sentences = [verdict(name, split, student, teacher) for name, split in reversed(list(results["splits"].items()))]
    for sentence in filter(None, sentences):
        lines += [sentence, ""]
    if about:
        lines += ["## What was run", "", *(f"- **{key}**: {value}" for key, value in about.items()), ""]
    for name, split in reversed(list(results["splits"].items())):
        lines += _split_section(name, split, results["metrics"], student, teacher)
    scale = results["scale"]
    gains = ", ".join(f"{grade} {gain:g}" for grade, gain in zip(scale["grades"], scale["gains"], strict=True))
    lines += [
        "## How to read this",
        "",
        f"- Label scale {scale['name']}, gains: {gains}. A pair is relevant from grade {scale['relevant_from']} on.",
        "- nDCG, recall@k, MRR, MAP, pairwise accuracy and Kendall's tau (b) are means over queries; ROC AUC, PR AUC, "
        "recall at a precision, F1, calibration error (15 equal bins) and Brier score pool all pairs.",
        "- Queries without any gain have no nDCG, those without a relevant product no recall, MRR and MAP, and they are "
        "left out of these means. Tied scores are worth the mean over their orders; random is exactly that, with "
        "everything tied.",
        "- Grades for F1, and probabilities, come from each model's calibration, which was fitted on dev: on dev itself "
        "they flatter.",
        "- A slice cut by product (category, brand, price, missing fields) ranks each query's products of that slice alone. "
        "Worst first is by the value, not by what its interval can tell: of many slices some look bad by chance.",
        f"- Intervals: 95%, {results['num_resamples']} paired bootstrap resamples of whole queries, "
        f"seed {results['seed']}. A difference in bold has an interval without 0; p is the randomization test's over "
        "queries, corrected for the comparisons of all models by that metric (Holm).",
        "",
    ]
    return "\n".join(lines)


def _split_section(name: str, split: Mapping[str, Any], metrics: list[str], student: str, teacher: str) -> list[str]:
    lines = [f"## {name}: {split['num_queries']:,} queries, {split['num_pairs']:,} pairs", ""]
    if split["num_queries_without_gain"]:
        lines += [f"{split['num_queries_without_gain']:,} queries have no product with any gain.", ""]
    models = split["models"]
    rows = [
        [metric_title(metric), *(_interval(found["metrics"].get(metric)) for found in models.values())]
        for metric in metrics
    ]
    rows.append(["pairs scored a second", *(_rate(found["pairs_per_second"]) for found in models.values())])
    lines += _table(["", *models], rows)
    failed = [f"{model} {found['num_failed']:,}" for model, found in models.items() if found["num_failed"]]
    if failed:
        lines += [f"Pairs that could not be scored, ranked last: {', '.join(failed)}. The first:", ""]
        lines += [f"- {model}: {error}" for model, found in models.items() for error in found["errors"]] + [""]
    others = [model for model in models if model != student]
    if student in models and others:
        rows = [
            [metric_title(metric), *(_difference(difference(split, metric, student, other)) for other in others)]
            for metric in metrics
        ]
        lines += _table([f"{student} minus", *others], rows)
    return lines + _slices_section(split, student, teacher)


def _slices_section(split: Mapping[str, Any], student: str, teacher: str) -> list[str]:
    """The slices as a table, the worst first; those that were not measured are named."""
    slices = split.get("slices", [])
    rows: list[list[str]] = []
    small: list[str] = []
    whole: list[str] = []
    for part in slices:
        name = f"{part['dimension']}: {part['slice']}"
        if "models" not in part:
            is_whole = part["num_pairs"] == split["num_pairs"]
            (whole if is_whole else small).append(name if is_whole else f"{name} ({part['num_queries']})")
            continue
        own = part["models"].get(student, {"metrics": {}})["metrics"]
        found = difference(part, SLICE_METRIC, student, teacher)
        cells = [_interval(own.get(SLICE_METRIC)), _difference(found), _interval(own.get("ndcg"))]
        rows.append([name, f"{part['num_queries']:,}", f"{part['num_pairs']:,}", *cells])
    if not slices:
        return []
    title = metric_title(SLICE_METRIC)
    lines = [f"### Slices, the worst for the {student} first", ""]
    header = ["", "queries", "pairs", f"{student}, {title}", f"minus {teacher}", "nDCG"]
    lines += _table(header, rows) if rows else []
    if small:
        lines += [f"Of too few queries to measure: {'; '.join(small)}.", ""]
    if whole:
        lines += [f"All pairs fall into one slice: {'; '.join(whole)}.", ""]
    return lines


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---"] * len(header)
    return [*("| " + " | ".join(row) + " |" for row in [header, rule, *rows]), ""]


def _interval(found: Mapping[str, float | None] | None) -> str:
    if found is None or found["value"] is None:
        return "-"
    if found["low"] is None or found["high"] is None:
        return f"{found['value']:.3f}"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _difference(found: Mapping[str, float | None] | None) -> str:
    if found is None or found["difference"] is None or found["low"] is None or found["high"] is None:
        return "-"
    text = f"{found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
    text = f"**{text}**" if found["low"] > 0 or found["high"] < 0 else text
    p = found.get("p_holm")
    return text if p is None else f"{text}, p {p:.3f}" if p >= 0.001 else f"{text}, p < .001"


def _rate(pairs_per_second: float | None) -> str:
    return "-" if pairs_per_second is None else f"{pairs_per_second:,.0f}"
