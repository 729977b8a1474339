"""Every model on every judged query of a data set, by K-fold cross-validation with paired intervals.

The test split of a small judged set holds too few queries to tell two good models apart. Here each fold runs the whole
chain of `--config` on the other folds' queries (teacher, generated pairs, labels, student), trains the same student on
those human labels alone, and scores the fold's own queries. Joined, each judged query is scored once, by models that
never saw it nor a near-duplicate of it, and the bootstrap draws from all of them.

With `--rounds 2` a fold's student labels the same pairs again, and a second student learns from those labels
(self-distillation); the report's teacher is then the student before the last.

    python benchmarks/cross_validation.py [--config jobs/esci.yaml|jobs/chorus.yaml] --data FOLDER [--work FOLDER]
        [--set KEY=VALUE ...] [--folds N] [--rounds N] [--quick]

Killed and started again it goes on where it was: a fold with predictions is skipped, a half-done one resumes its chain.
Trained models enter pooled metrics (AUC, recall at a precision) by their calibrated log-odds, since raw logits of
different folds' models share no level; BM25 and the cosine keep their logits, which mean the same in every fold.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from relevance_ray import storage
from relevance_ray.calibration import OrdinalCalibration
from relevance_ray.chain.folders import VERSIONS, StepFolders
from relevance_ray.chain.tools import StepTools
from relevance_ray.chain.trainings import TrainingWork
from relevance_ray.config import Config, load_config
from relevance_ray.data.prepare import read_judged, read_scale
from relevance_ray.evaluation.ask import random_predictions
from relevance_ray.evaluation.compare import compare_predictions, difference
from relevance_ray.evaluation.evaluate import as_results
from relevance_ray.evaluation.judged import JudgedPairs, flatten
from relevance_ray.evaluation.measure import Predictions
from relevance_ray.evaluation.options import Baseline
from relevance_ray.evaluation.report.words import metric_title
from relevance_ray.evaluation.report.write import write_report
from relevance_ray.evaluation.runs import read_predictions
from relevance_ray.model_folder import read_model_info
from relevance_ray.options import semantic
from relevance_ray.quiet import quiet_libraries
from relevance_ray.schema import LabelScale
from relevance_ray.steps import Chain

ROOT = Path(__file__).resolve().parents[1]
BASELINES: tuple[Baseline, ...] = ("cosine", "bm25")
UNTRAINED = (*BASELINES, "random")

QUICK = [
    "teacher={kind: ensemble, members: [{kind: bi_encoder, max_tokens: 32}, {kind: bm25}]}",
    "generate={num_pairs: 1200, quotas: {bm25: 2, bm25_middle: 2, category: 2, random: 2}}",
    "student.num_layers=2",
    "student.max_tokens=32",
    "student.fit.batch_size=8",
    "evaluate={num_resamples: 500, splits: [test], human_fit: {epochs: 1, batch_size: 8}}",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the official files")
    parser.add_argument("--config", default=str(ROOT / "jobs" / "esci.yaml"), help="the chain that each fold runs")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the configuration")
    parser.add_argument("--work", default="runs/cross_validation", help="where folds are kept, and resumed from")
    parser.add_argument("--folds", type=int, help="number of folds (5; 2 with --quick)")
    parser.add_argument("--rounds", type=int, default=1, help="students in turn, each labels what the next learns from")
    parser.add_argument("--quick", action="store_true", help="2 folds, untrained teacher, 2-layer student, few labels")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds} must be at least 1")
    arguments.folds = arguments.folds or (2 if arguments.quick else 5)
    data_format = load_config(arguments.config).data.format
    data = arguments.data or f"{os.environ.get('RELEVANCE_RAY_TEST_DATA', 'data')}/{data_format}"
    work = Path(arguments.work).absolute() / data_format / ("quick" if arguments.quick else "full")

    quiet_libraries()
    folds: list[tuple[JudgedPairs, dict[str, Predictions]]] = []
    judged, seconds = [], 0.0
    for fold in range(arguments.folds):
        settings = [
            *(QUICK if arguments.quick else []),
            *arguments.set,
            f"evaluate.baselines={json.dumps(list(BASELINES))}",
            f"data.path={json.dumps(str(Path(data).resolve()))}",
            f"data.folds={arguments.folds}",
            f"data.fold={fold}",
            f"storage.root={json.dumps(str(work / f'fold-{fold}'))}",
        ]
        print(f"fold {fold + 1} of {arguments.folds}", flush=True)
        config = load_config(arguments.config, settings)
        table = fold_predictions(config, arguments.config, settings, arguments.rounds)
        prepared = StepFolders(config).folder("prepare")
        scale = read_scale(prepared)
        judged.append(read_judged(prepared, "test"))
        folds.append((flatten(judged[-1], scale), {name: read_predictions(table, name) for name in names_of(table)}))
        seconds += float(table.schema.metadata[b"seconds"])

    pairs, predictions = join_folds(folds, pa.concat_tables(judged), scale)
    split = compare_predictions(pairs, predictions, scale, config.evaluate)
    about = {
        "command": shlex.join(["python", "benchmarks/cross_validation.py", *sys.argv[1:]]),
        "folds": f"{arguments.folds}, by query; near-duplicate queries in one fold",
        "pairs labeled in each fold": f"{config.generate.num_pairs:,}",
        "rounds": f"{arguments.rounds}"
        + (", the teacher is the student of the round before" if arguments.rounds > 1 else ""),
        "hardware": f"{os.cpu_count()} CPUs {platform.machine()}, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "time": f"{seconds / 60:.0f} minutes over all folds, each in its last attempt",
    }
    results = as_results({f"{arguments.folds}-fold cross-validation": split}, scale, config.evaluate)
    write_report(results, str(work), title=f"{data_format}, cross-validated", about=about)
    print((work / "report.md").read_text())
    print(json.dumps(last_line(split, scale, seconds, arguments)))


def fold_predictions(config: Config, config_file: str, settings: list[str], rounds: int) -> pa.Table:
    """Predictions of all models for the test queries of a fold, made once for a configuration.

    The columns of the evaluation's `predictions.parquet`, a trained model's logits calibrated; the fold's `seconds` lie
    in the schema's metadata. After more than one round `first_teacher` is the one that learnt from people.
    """
    given: list[object] = [storage.content_id(path) for path in (config.label.model, config.label.path) if path]
    given += [[name, storage.content_id(path)] for name, path in config.evaluate.models.items()]
    identity = storage.fingerprint(
        StepFolders(config).key("generate"), VERSIONS, semantic(config), config.generate.num_pairs, given, rounds
    )
    path = f"{config.storage.root}/predictions-{identity}.parquet"
    if storage.exists(path):
        print(f"predictions are there, skipped ({path})", flush=True)
        return storage.read_table(path)
    started = time.monotonic()
    for number in range(rounds - 1):
        student = storage.localize(Chain(config).student())
        if number == 0 and (teacher := StepFolders(config).teacher()):
            settings = [*settings, f"evaluate.models.first_teacher={teacher}"]
        config = load_config(config_file, [*settings, f"label.model={student}"])
    chain = Chain(config)
    folders_of_steps = chain.run().folders
    scale = read_scale(folders_of_steps["prepare"])
    table = storage.read_table(f"{folders_of_steps['evaluate']}/predictions.parquet")
    table = table.filter(pc.equal(table["split"], "test"))
    with contextlib.ExitStack() as stack:
        models = TrainingWork(StepTools(config, chain.at, print, stack)).models()
    for name in names_of(table):
        if name in UNTRAINED:
            continue
        calibration = read_model_info(models[name]).calibration
        assert isinstance(calibration, OrdinalCalibration), "folds are joined on the scale of the log-odds"
        logits = pc.add(
            pc.multiply(table[f"{name}.logit"], calibration.slope), -calibration.thresholds[scale.relevant_index - 1]
        )
        table = table.set_column(table.schema.get_field_index(f"{name}.logit"), f"{name}.logit", logits)
    table = table.replace_schema_metadata({"seconds": f"{time.monotonic() - started:.1f}"})
    storage.write_table(path, table)
    return table


def names_of(table: pa.Table) -> list[str]:
    """The models of a fold's table, without random order, which has no scores."""
    names = [name.removesuffix(".logit") for name in table.column_names if name.endswith(".logit")]
    return [name for name in names if name != "random"]


def join_folds(
    folds: list[tuple[JudgedPairs, dict[str, Predictions]]], judged: pa.Table, scale: LabelScale
) -> tuple[JudgedPairs, dict[str, Predictions]]:
    """All folds' pairs and predictions in one, each judged query once."""
    pairs = flatten(judged, scale)
    assert len(set(pairs.query_ids)) == pairs.num_queries, "a query is in two folds"
    joined = {}
    for name in folds[0][1]:
        parts = [predictions[name] for _, predictions in folds]
        classes = [part.classes for part in parts if part.classes is not None]
        probabilities = [part.probabilities for part in parts if part.probabilities is not None]
        joined[name] = Predictions(
            np.concatenate([part.logits for part in parts]),
            np.concatenate(classes) if len(classes) == len(parts) else None,
            np.concatenate(probabilities) if len(probabilities) == len(parts) else None,
        )
    return pairs, joined | {"random": random_predictions(pairs.num_pairs)}


def last_line(
    split: dict[str, Any], scale: LabelScale, seconds: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The figures, and the student against each other model: what the line of JSON says."""
    names = list(split["models"]["student"]["metrics"])
    figures = {
        model: {
            metric: round(value["value"], 4) for metric, value in found["metrics"].items() if value["value"] is not None
        }
        for model, found in split["models"].items()
    }
    comparisons = []
    for other in (name for name in split["models"] if name != "student"):
        for metric in names:
            found = difference(split, metric, "student", other)
            if found is not None and found["difference"] is not None:
                comparisons.append(
                    {
                        "what": f"student against {other}, {metric_title(metric)}",
                        "ours": figures["student"][metric],
                        "peer": figures[other][metric],
                        **{key: None if value is None else round(value, 4) for key, value in found.items()},
                        "rows": split["num_pairs"],
                        "seconds": round(seconds, 1),
                    }
                )
    return {
        "benchmark": "cross_validation",
        "quick": arguments.quick,
        "folds": arguments.folds,
        "rounds": arguments.rounds,
        "scale": scale.name,
        "queries": split["num_queries"],
        "rows": split["num_pairs"],
        "seconds": round(seconds, 1),
        "figures": figures,
        "comparisons": comparisons,
    }


if __name__ == "__main__":
    main()
