"""What a report says in words, whatever it is written in.

The verdict sentences are computed from the intervals, so a report cannot claim more than its queries carry: where the
interval of a difference holds 0, the two models "cannot be told" apart, whichever way it points.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from relevance_ray.evaluation.compare import difference

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


def verdicts(results: Mapping[str, Any], student: str, teacher: str) -> list[str]:
    """The verdict of each split that has one, test before dev."""
    splits = reversed(list(results["splits"].items()))
    return [sentence for name, split in splits if (sentence := verdict(name, split, student, teacher))]


def split_notes(split: Mapping[str, Any]) -> list[str]:
    """What a split's figures leave out, or count as wrong."""
    notes = list(split.get("notes", []))
    for key, lacking in (("gain", "with any gain"), ("relevant", "that counts as relevant")):
        if count := split[f"num_queries_without_{key}"]:
            notes.append(f"{count:,} of {split['num_queries']:,} queries have no product {lacking}.")
    models = split["models"]
    if failed := [f"{name} {found['num_failed']:,}" for name, found in models.items() if found["num_failed"]]:
        first = [f"{name}: {error}" for name, found in models.items() for error in found["errors"]]
        told = f" The first: {'; '.join(first)}." if first else ""
        notes.append(f"Pairs that could not be scored, ranked last: {', '.join(failed)}.{told}")
    return notes


def measured_slices(split: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [part for part in split.get("slices", []) if "models" in part]


def slice_notes(split: Mapping[str, Any]) -> list[str]:
    """The slices that were not measured, by name."""
    skipped = [part for part in split.get("slices", []) if "models" not in part]
    whole = [part for part in skipped if part["num_pairs"] == split["num_pairs"]]
    small = [f"{part['dimension']}: {part['slice']} ({part['num_queries']})" for part in skipped if part not in whole]
    notes = []
    if small:
        notes.append(f"Of too few queries to measure: {'; '.join(small)}.")
    if whole:
        named = "; ".join(f"{part['dimension']}: {part['slice']}" for part in whole)
        notes.append(f"All pairs fall into one slice: {named}.")
    return notes


def reading(results: Mapping[str, Any]) -> list[str]:
    """How to read the figures."""
    scale = results["scale"]
    gains = ", ".join(f"{grade} {gain:g}" for grade, gain in zip(scale["grades"], scale["gains"], strict=True))
    return [
        f"Label scale {scale['name']}, gains: {gains}. A pair is relevant from grade {scale['relevant_from']} on.",
        "nDCG, recall@k, MRR, MAP, pairwise accuracy and Kendall's tau (b) are means over queries; ROC AUC, PR AUC, recall "
        "at a precision, F1, calibration error (15 equal bins) and Brier score pool all pairs.",
        "Queries without any gain have no nDCG, those without a relevant product no recall, MRR and MAP, and they are left "
        "out of these means. Tied scores are worth the mean over their orders; random is exactly that, with everything "
        "tied.",
        "Grades for F1, and probabilities, come from each model's calibration, which was fitted on dev: on dev itself they "
        "flatter.",
        "A slice cut by product (category, brand, price, missing fields) ranks each query's products of that slice alone. "
        "Worst first is by the value, not by what its interval can tell: of many slices some look bad by chance.",
        f"Intervals: 95%, {results['num_resamples']} paired bootstrap resamples of whole queries, seed {results['seed']}. A "
        "difference in bold has an interval without 0 and, where there is one, a p below .05: that of the randomization "
        "test over queries, corrected for the comparisons of all models by that metric (Holm).",
    ]
