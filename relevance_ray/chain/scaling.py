"""The scaling curve of a run: students of parts of its labels, measured on held-out human judgments.

Each size doubles the one before, up to all labels; the students are kept under `scaling/` at the root, so a killed run goes
on, and a larger one adds to what is there. It changes nothing of a run: no step reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from relevance_ray.chain.folders import StepFolders
from relevance_ray.chain.trainings import TrainingWork
from relevance_ray.data.prepare import read_judged, read_scale
from relevance_ray.engines.registry import load_pair_model
from relevance_ray.errors import UserError
from relevance_ray.evaluation.ask import predict
from relevance_ray.evaluation.judged import JudgedPairs, flatten
from relevance_ray.evaluation.scaling import scaling_markdown, scaling_plot, scaling_report
from relevance_ray.metrics import ndcg
from relevance_ray.progress import Progress
from relevance_ray.storage import CommitLog, fingerprint, join, localize, read_json, write_bytes, write_json

FOLDER = "scaling"
_LEAST_PAIRS = 64
"""Fewer teach nothing that could be measured."""


def measure_scaling(
    work: TrainingWork, *, seeds: int = 1, num_sizes: int = 5, held_out: pa.Table | None = None
) -> tuple[dict[str, Any], str]:
    """Train what is missing of the curve, measure it, and write `scaling.json`, `.md` and `.png` under the root.

    Args:
        work: of a configuration whose labels are there.
        seeds: students of each size, from the seed of the configuration on, and as many on human labels alone.
        num_sizes: sizes, each half of the next.
        held_out: JUDGED_GROUP rows to measure on in place of the run's own; none of their queries may be of split train or
            dev.

    Returns:
        The report (`scaling_report`), and the path of its Markdown.

    Raises:
        UserError: no teacher to measure against, or too few labels.
    """
    at = work.at
    if at.teacher() is None:
        raise UserError(
            "these labels come from no model, so there is no teacher to pass; label with one (label.engine)"
        )
    records = CommitLog(at.folder("label")).committed()
    num_pairs = sum(records[name]["pairs"] for name in at.labeled_shards())
    sizes = sorted({size for halvings in range(num_sizes) if (size := num_pairs >> halvings) >= _LEAST_PAIRS})
    if len(sizes) < 3:
        raise UserError(f"{num_pairs} labeled pairs are too few for a curve of three sizes; raise generate.num_pairs")
    prepared = localize(at.folder("prepare"))
    scale = read_scale(prepared)
    split = "further judgments" if held_out is not None else "test" if read_judged(prepared, "test").num_rows else "dev"
    judged = flatten(read_judged(prepared, split) if held_out is None else held_out, scale)
    human_only = work.human_only(seeds)
    models = work.models(for_curve=True)
    first = work.config.student.fit.seed
    folders = work.students_of(sizes, range(first, first + seeds))
    key = fingerprint(judged.queries, judged.product_ids, judged.gains.tolist())
    num_models = sum(map(len, folders)) + len(models) + len(human_only) - 1
    with work.tools.progress("score", num_models * judged.num_pairs, "pairs") as progress:
        measure = partial(_per_query, at.root, key, judged, progress)
        by_size = {size: np.stack([*map(measure, found)]) for size, found in zip(sizes, folders, strict=True)}
        lines = {name: measure(folder) for name, folder in models.items() if name != "human_only"}
        lines["human_only"] = np.stack([*map(measure, human_only)])
    report = scaling_report(by_size, {name: lines[name] for name in models}, "teacher") | {
        "split": split,
        "seeds": seeds,
        "judged_pairs": judged.num_pairs,
        "of": curve_key(at) if held_out is None else None,
    }
    return report, _write(join(at.root, FOLDER), report)


def curve_key(at: StepFolders) -> str:
    """What a curve is of: the judgments, the labels that are there, and the student."""
    return at.key("train-student")


def _per_query(root: str, pairs: str, judged: JudgedPairs, progress: Progress, folder: Path) -> np.ndarray:
    """nDCG of each query, float64 [q], as the model of a folder ranks them; remembered under the root."""
    info = (folder / "relevance.json").read_text(encoding="utf-8")
    key = fingerprint(pairs, str(folder), info, judged.num_pairs)
    place = join(root, FOLDER, "ndcg", f"{key}.json")
    try:
        known = read_json(place)
        progress.restart(progress.done + judged.num_pairs)
    except FileNotFoundError:
        logits = predict(load_pair_model(folder), judged, progress.advance).logits
        known = [None if np.isnan(value) else float(value) for value in ndcg(judged.gains, logits, judged.offsets)]
        write_json(place, known)
    return np.asarray([np.nan if value is None else value for value in known], dtype=np.float64)


def _write(folder: str, report: Mapping[str, Any]) -> str:
    write_json(join(folder, "scaling.json"), report)
    write_bytes(join(folder, "scaling.png"), scaling_plot(report))
    text = f"# Scaling curve\n\n{_about(report)}\n\n{scaling_markdown(report)}\n![curve](scaling.png)\n"
    path = join(folder, "scaling.md")
    write_bytes(path, text.encode("utf-8"))
    return path


def _about(report: Mapping[str, Any]) -> str:
    return (
        f"Mean nDCG over {report['queries']:,} held-out queries (split {report['split']}), of students taught by parts of "
        f"the labels, {report['seeds']} of each size. Intervals: 95%, queries resampled, paired."
    )
