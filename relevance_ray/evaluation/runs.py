"""Two runs side by side: the predictions that their evaluations left, on the pairs that both judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from relevance_ray.errors import UserError
from relevance_ray.evaluation.evaluate import as_results, report_split
from relevance_ray.evaluation.judged import JudgedPairs
from relevance_ray.evaluation.measure import Predictions
from relevance_ray.evaluation.options import EvaluateOptions
from relevance_ray.evaluation.slices import read_slices
from relevance_ray.metrics import group_offsets
from relevance_ray.schema import LabelScale
from relevance_ray.storage import absolute, exists, join, read_json, read_table


@dataclass(frozen=True)
class EvaluatedRun:
    """What an evaluation left.

    Attributes:
        name: of the run: the last part of its root.
        folder: of the evaluation.
        scale: of its grades.
        settings: of the run, by dotted key, those that were not at their default; None where an earlier version kept none.
        ks: cutoffs that it was measured at.
        precisions: at which recall was measured.
        table: `ask.predictions_table` of all its splits.
    """

    name: str
    folder: str
    scale: LabelScale
    settings: Mapping[str, str] | None
    ks: list[int]
    precisions: list[float]
    table: pa.Table


def read_run(path: str) -> EvaluatedRun:
    """The evaluation in a folder, or the latest one of a run's root; local or s3://.

    Raises:
        UserError: nothing was evaluated there, or by a version that kept too little.
    """
    folder = path.rstrip("/")
    if not exists(join(folder, "report.json")):
        latest = read_json(join(folder, "latest.json")) if exists(join(folder, "latest.json")) else {}
        if "evaluate" not in latest:
            raise UserError(
                f"{path} holds no evaluation; give the root of a run that was evaluated, or its evaluate folder"
            )
        folder = latest["evaluate"]
        here = join(path.rstrip("/"), folder.rstrip("/").rsplit("/", 1)[-1])
        folder = here if exists(here) else folder  # a run may have been moved, or copied
    if not exists(join(folder, "predictions.parquet")):
        raise UserError(f"{folder} holds no predictions of models; give the root of a run that was evaluated")
    table = read_table(join(folder, "predictions.parquet"))
    report = read_json(join(folder, "report.json"))
    if "title" not in table.column_names or "ks" not in report:
        raise UserError(f"{folder} was evaluated by an earlier version, which kept too little; evaluate the run again")
    return EvaluatedRun(
        name=absolute(folder).rstrip("/").split("/")[-2],
        folder=folder,
        scale=LabelScale.from_dict(report["scale"]),
        settings=report.get("settings"),
        ks=report["ks"],
        precisions=report["precisions"],
        table=table,
    )


def compare_runs(
    first: EvaluatedRun, second: EvaluatedRun, model: str = "student", options: EvaluateOptions | None = None
) -> dict[str, Any]:
    """One model of two runs, measured on the pairs that both judged.

    Returns:
        What `evaluate.evaluate_models` does, of the two runs' names, the slices being those of the first one; `notes` of a
        split say what only one of them judged; and, where both kept their settings, `settings_that_differ`, key -> the
        value of each, None for a default.

    Raises:
        UserError: the model is not in both, other scales, no pair in common, or a pair that is graded differently.
    """
    options = options or EvaluateOptions(ks=first.ks, precisions=first.precisions)
    for run in (first, second):
        if f"{model}.logit" not in run.table.column_names:
            known = [name.removesuffix(".logit") for name in run.table.column_names if name.endswith(".logit")]
            raise UserError(f"{run.folder} measured no model {model}; name one of {', '.join(known)}")
    if replace(first.scale, name="") != replace(second.scale, name=""):
        raise UserError(
            f"{first.folder} and {second.folder} have other grades, gains or another relevant_from; compare runs of the "
            "same judgments"
        )
    names = names_of(first, second)
    splits: dict[str, Any] = {}
    alone: list[str] = []
    for split in dict.fromkeys(name for run in (first, second) for name in run.table["split"].unique().to_pylist()):
        tables = [run.table.filter(pc.equal(run.table["split"], split)) for run in (first, second)]
        if (found := _compare(split, tables, first, second, model, options)) is not None:
            splits[split] = found
        else:
            of = [name for name, table in zip(names, tables, strict=True) if table.num_rows]
            alone.append(
                f"Split {split} is left out: {f'{of[0]} alone has it' if len(of) == 1 else 'no pair is in both'}."
            )
    if not splits:
        raise UserError(
            f"{first.folder} and {second.folder} judged no pair in the same split; compare runs of the same data"
        )
    for found in splits.values():
        found["notes"] += alone
    results = as_results(splits, first.scale, options, names[0], names[1:])
    if first.settings is None or second.settings is None:
        return results
    own, other = first.settings, second.settings
    unlike = {key: dict(zip(names, (own.get(key), other.get(key)), strict=True)) for key in sorted({*own, *other})}
    return {
        **results,
        "settings_that_differ": {key: pair for key, pair in unlike.items() if len(set(pair.values())) > 1},
    }


def names_of(first: EvaluatedRun, second: EvaluatedRun) -> tuple[str, str]:
    """What the two are called beside each other."""
    return (first.name, second.name if second.name != first.name else f"{second.name} (second)")


def _compare(
    split: str,
    tables: list[pa.Table],
    first: EvaluatedRun,
    second: EvaluatedRun,
    model: str,
    options: EvaluateOptions,
) -> dict[str, Any] | None:
    keys = [list(zip(t["query_id"].to_pylist(), t["product_id"].to_pylist(), strict=True)) for t in tables]
    place = {key: row for row, key in enumerate(keys[1])}
    rows = [row for row, key in enumerate(keys[0]) if key in place]
    if not rows:
        return None
    own, other = tables[0].take(rows), tables[1].take([place[keys[0][row]] for row in rows])
    renamed = np.flatnonzero(pc.not_equal(own["query"], other["query"]).to_numpy())
    if len(renamed):
        texts = [table["query"][renamed[0]].as_py() for table in (own, other)]
        raise UserError(
            f"{split} query_id {own['query_id'][renamed[0]].as_py()!r} is {texts[0]!r} in {first.folder} and {texts[1]!r} "
            f"in {second.folder}; compare runs of the same judgments"
        )
    unlike = np.flatnonzero(own["gain"].to_numpy() != other["gain"].to_numpy())
    if len(unlike):
        query, product = own["query"][unlike[0]].as_py(), own["product_id"][unlike[0]].as_py()
        raise UserError(
            f"{split} query {query!r}, product {product!r} is graded differently in {first.folder} and {second.folder}; "
            "compare runs of the same judgments"
        )
    classes = own["true_class"].to_numpy()
    query_ids = own["query_id"].to_numpy(zero_copy_only=False)
    starts = np.flatnonzero(np.concatenate([[True], query_ids[1:] != query_ids[:-1]]))
    pairs = JudgedPairs(
        query_ids=query_ids[starts].tolist(),
        queries=own["query"].to_pylist(),
        product_ids=own["product_id"].to_pylist(),
        products=[{"title": title} for title in own["title"].to_pylist()],
        offsets=group_offsets(np.diff(np.append(starts, len(query_ids)))),
        gains=own["gain"].to_numpy(),
        classes=classes,
        relevant=classes >= first.scale.relevant_index,
    )
    names = names_of(first, second)
    predictions = {name: read_predictions(table, model) for name, table in zip(names, (own, other), strict=True)}
    found = report_split(pairs, predictions, read_slices(own), first.scale, options, names[0], names[1:])
    left_out = {name: len(each) - len(rows) for name, each in zip(names, keys, strict=True)}
    found["notes"] = [
        f"{count:,} pairs that {name} alone has in this split are left out."
        for name, count in left_out.items()
        if count
    ]
    if found["slices"]:
        found["notes"].append(f"Slices are those of {names[0]}: its query log, and the brands judged in its training.")
    return found


def read_predictions(table: pa.Table, model: str) -> Predictions:
    """One model's columns of a `predictions_table`."""
    columns: Mapping[str, pa.ChunkedArray] = {name: table[f"{model}.{name}"] for name in ("class", "probability")}
    classes, probabilities = (None if column.null_count else column.to_numpy() for column in columns.values())
    return Predictions(pc.fill_null(table[f"{model}.logit"], -np.inf).to_numpy(), classes, probabilities)
