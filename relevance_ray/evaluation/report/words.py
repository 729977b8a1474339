"""What a report says in words, whatever it is written in.

The verdict sentences are computed from the intervals, so a report cannot claim more than its queries carry: where the
interval of a difference holds 0, the two models "cannot be told" apart, whichever way it points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from relevance_ray.evaluation.compare import LEVEL, difference, is_sure
from relevance_ray.evaluation.significance import MIN_QUERIES, holm

FEW_QUERIES = 50
CROSS_VALIDATE = "cross-validate over all judged ones (data.folds)"
MOST_FAILED = 0.02
"""A model that leaves out a larger share of the pairs is not held against another in words: it is measured by its gaps."""
_OF_RANKINGS = ("mrr", "map", "pairwise_accuracy", "kendall_tau")
SAME_SETTINGS = "The settings of the two are the same."
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
    "query_calibration_error": "calibration error by query (low is good)",
    "query_brier": "Brier score by query (low is good)",
}


def metric_title(metric: str) -> str:
    """How a metric is called in prose and tables."""
    if metric.startswith("recall@precision"):
        return f"recall at precision {metric.removeprefix('recall@precision')}"
    return _NAMES.get(metric, metric.replace("ndcg@", "nDCG@"))


def verdict(split_name: str, split: Mapping[str, Any], model: str, other: str, p: float | None = None) -> str | None:
    """One honest sentence on the nDCG of a model against another's; None where the two were not both measured.

    Args:
        p: to hold the claim against, in place of the comparison's own.
    """
    found = difference(split, "ndcg", model, other)
    if found is None or (value := found["difference"]) is None:
        return None
    p = found["p"] if p is None else p
    own, its = _called(model), _called(other)
    start = own[0].upper() + own[1:] if own.startswith("the ") else own
    for name in (model, other):
        if (failed := split["models"][name]["num_failed"]) > MOST_FAILED * split["num_pairs"]:
            return (
                f"{start} is not held against {its} on {split_name}: {_called(name)} scores all but {failed:,} of "
                f"{split['num_pairs']:,} pairs, and what it leaves out is ranked last."
            )
    judged = split["num_queries"] - split["num_queries_without_gain"]
    where = f"on {split_name} nDCG"
    if found["low"] is None or found["high"] is None:
        told = f"{judged} queries are too few to tell {own} from {its} {where}: {value:+.4f}"
        return f"{told}; {CROSS_VALIDATE}."
    if not is_sure(found, p):
        claim = f"{start} cannot be told from {its}"
    else:
        claim = f"{start} {'passes' if value > 0 else 'falls behind'} {its}"
    numbers = f"{value:+.4f}, 95% interval {found['low']:+.4f} to {found['high']:+.4f}"
    if p is not None:
        numbers += f", p {p_text(p)}"
    sentence = f"{claim} {where}: {numbers}, {judged} queries."
    if judged < FEW_QUERIES:
        sentence += f" So few queries show large differences only; {CROSS_VALIDATE}."
    return sentence


def p_text(p: float) -> str:
    """A p-value after the letter: "< .001", ".021"."""
    return "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def others_of(results: Mapping[str, Any], split: Mapping[str, Any]) -> list[str]:
    """The models that the report's own is held against, as far as they are measured in a split."""
    return [name for name in results["others"] if name in split["models"]]


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """The verdict on the report's own model against each other, on the part that chose nothing: test, where there is one.
    They were planned before anything was seen, so their p-values are corrected for each other alone."""
    model = results["model"]
    name, split = in_order(results["splits"])[0]
    found = {other: difference(split, "ndcg", model, other) for other in results["others"]}
    p_values = holm({other: row["p"] for other, row in found.items() if row is not None and row["p"] is not None})
    sentences = []
    for other in results["others"]:
        if said := verdict(name, split, model, other, p_values.get(other)):
            also = _other_metrics(split, results["metrics"], model, other, p_values.get(other))
            sentences.append(f"{said} {also}" if also else said)
    return sentences


def _other_metrics(split: Mapping[str, Any], metrics: Sequence[str], model: str, other: str, p: float | None) -> str:
    """What metrics of the rankings say for certain that the sentence on nDCG does not: their p-values are corrected for
    their number, too. Empty where they say the same, or where a model leaves out too much."""
    if any(split["models"][name]["num_failed"] > MOST_FAILED * split["num_pairs"] for name in (model, other)):
        return ""
    ndcg = difference(split, "ndcg", model, other)
    if ndcg is None or ndcg["low"] is None:
        return ""
    told = _sign(ndcg["difference"]) if is_sure(ndcg, p) else 0
    found = {metric: difference(split, metric, model, other) for metric in metrics if metric in _OF_RANKINGS}
    known = {metric: row for metric, row in found.items() if row is not None and row["p_holm"] is not None}
    corrected = holm({metric: float(row["p_holm"] or 0.0) for metric, row in known.items()})
    unlike = [
        f"{metric_title(metric)} {row['difference']:+.3f}, p {p_text(corrected[metric])}"
        for metric, row in known.items()
        if is_sure(row, corrected[metric]) and _sign(row["difference"]) != told
    ]
    if not unlike:
        return ""
    return f"By other metrics it {'is the other way' if told else 'can'}: {'; '.join(unlike)}."


def _sign(value: float | None) -> int:
    assert value is not None
    return (value > 0) - (value < 0)


def _called(model: str) -> str:
    """A model in a sentence: "the student", but "bm25"."""
    return f"the {model}" if model in ("student", "teacher") else model


def in_order(splits: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The splits as they are shown: what chose nothing before what did."""
    last = ("dev", "train")
    return sorted(splits.items(), key=lambda item: last.index(item[0]) + 1 if item[0] in last else 0)


def split_notes(split: Mapping[str, Any]) -> list[str]:
    """What a split's figures leave out, or count as wrong."""
    notes = list(split.get("notes", []))
    for key, lacking in (("gain", "with any gain"), ("relevant", "that counts as relevant")):
        if count := split[f"num_queries_without_{key}"]:
            notes.append(f"{count:,} of {split['num_queries']:,} queries have no product {lacking}.")
    if count := split.get("num_queries_of_a_known_text"):
        notes.append(
            f"{count:,} of {split['num_queries']:,} queries have the text of another query_id; each counts as a query."
        )
    models = split["models"]
    if failed := [f"{name} {found['num_failed']:,}" for name, found in models.items() if found["num_failed"]]:
        first = [f"{name}: {error}" for name, found in models.items() for error in found["errors"]]
        told = f" The first: {'; '.join(first)}." if first else ""
        notes.append(f"Pairs that could not be scored, ranked last: {', '.join(failed)}.{told}")
    methods = {name: found.get("calibration", "") for name, found in models.items()}
    if bare := [name for name, method in methods.items() if method is None]:
        notes.append(
            f"Without grades and probabilities, for want of scored dev pairs to calibrate on: {', '.join(bare)}."
        )
    if any(method == "isotonic" for method in methods.values()):
        shown = ", ".join(f"{name} {method}" for name, method in methods.items() if method)
        notes.append(f"Calibration: {shown}.")
    return notes


def measured_slices(split: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [part for part in split.get("slices", []) if "models" in part]


def slice_notes(split: Mapping[str, Any]) -> list[str]:
    """The slices that were not measured, by name."""
    notes: dict[str, list[str]] = {
        "Of too few queries to measure": [],
        "All pairs fall into one slice": [],
        "Slices without a pair": [],
    }
    few, whole, empty = notes.values()
    for part in split.get("slices", []):
        name = f"{part['dimension']}: {part['slice']}"
        if not part["num_pairs"]:
            empty.append(name)
        elif part["num_pairs"] == split["num_pairs"]:
            whole.append(name)
        elif "models" not in part:
            few.append(f"{name} ({part['num_queries']})")
    return [f"{told}: {'; '.join(names)}." for told, names in notes.items() if names]


def reading(results: Mapping[str, Any]) -> list[str]:
    """How to read the figures."""
    scale = results["scale"]
    gains = ", ".join(f"{grade} {gain:g}" for grade, gain in zip(scale["grades"], scale["gains"], strict=True))
    return [
        f"Label scale {scale['name']}, gains: {gains}. A pair is relevant from grade {scale['relevant_from']} on.",
        "nDCG, recall@k, MRR, MAP, pairwise accuracy and Kendall's tau (b) are means over queries; ROC AUC, PR AUC, recall "
        "at a precision, F1, calibration error (15 equal bins) and Brier score pool all pairs. By query, the calibration "
        "error is how far the mean probability of a list is from its share of relevant products, beyond what chance leaves "
        "where the probabilities are right: 0 is right. Resampling adds noise that the pooled calibration error counts as "
        "error, so its interval lies high. In its plot a bar is the interval of the share that is relevant.",
        "Queries without any gain have no nDCG, those without a relevant product no recall, MRR and MAP, and they are left "
        "out of these means. Tied scores are worth the mean over their orders; random is exactly that, with everything "
        "tied.",
        *_flattered(results),
        "A slice cut by product (category, brand, price, missing fields) ranks each query's products of that slice alone. "
        "Queries that rank are those with products of different gain in it. Worst first is by the value, not by what its "
        "interval can tell; p is corrected for all slices.",
        f"Intervals: 95%, {results['num_resamples']} paired bootstrap resamples of whole queries, seed {results['seed']}; "
        f"none below {MIN_QUERIES} queries.",
        f"p: the randomization test over queries{_permutations(results)} for means over queries, the bootstrap for what "
        "pools all pairs. In tables it is corrected for the comparisons of all models by that metric (Holm), at the top for "
        f"those made there. What is bold, or claimed there, has an interval without 0 and a p below {LEVEL}.",
    ]


def _flattered(results: Mapping[str, Any]) -> list[str]:
    """Of which splits the figures flatter, and why."""
    names = [name for name, _ in in_order(results["splits"])]
    said = []
    if "dev" in names or names == ["test"]:
        said.append(
            "Dev chose among the checkpoints of trained models, and each model's calibration, where its grades and "
            "probabilities come from, was fitted on it: on dev itself the figures flatter."
        )
    if "train" in names:
        said.append("Models were trained on train: there the figures flatter most.")
    if len(names) > 1 or names[0] in ("dev", "train"):
        said.append(f"The sentences at the top are about {names[0]}.")
    return said


def _permutations(results: Mapping[str, Any]) -> str:
    """How many sign assignments are behind a p-value, and where there are fewer than asked for."""
    asked = results["num_permutations"]
    drawn = {name: split["num_permutations"] for name, split in results["splits"].items()}
    fewer = [f"{number:,} on {name}, for its many queries" for name, number in drawn.items() if number < asked]
    of_slices = {part["num_permutations"] for split in results["splits"].values() for part in measured_slices(split)}
    fewer += [f"{number:,} on slices" for number in of_slices if number < asked]
    return f" ({'; '.join([f'{asked:,} sign assignments', *fewer])})"
