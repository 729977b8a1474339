"""Distilling a student: from labeled groups to a finished model folder.

The same function trains the baseline that the distilled student is measured against, on human judgments alone: same model,
same loop, other labels.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from relevance_ray.calibration import logit_of_classes
from relevance_ray.engines.base import SINGLE_LOGIT_GAINS
from relevance_ray.schema import LabelScale
from relevance_ray.student.cross_encoder import build_cross_encoder
from relevance_ray.student.two_tower import build_two_tower
from relevance_ray.training.finish import calibrate, check_dev_queries, finished_summary, publish_fit
from relevance_ray.training.fit import OnProgress
from relevance_ray.training.ingest import IngestSpec, RunItems, in_turn, ingest
from relevance_ray.training.options import StudentOptions
from relevance_ray.training.runners import Job, Runner, local_runner
from relevance_ray.training.student_task import StudentTaskSpec


def train_student(
    options: StudentOptions,
    scale: LabelScale,
    train_files: Sequence[str] | None,
    judged_file: str,
    out_dir: Path,
    work_dir: Path,
    runner: Runner = local_runner,
    on_progress: OnProgress | None = None,
    max_groups: int | None = None,
    label_smoothing: float = 0.0,
    run_ingest: RunItems = in_turn,
    on_ingest: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train, calibrate on the dev queries, and put the model folder in place.

    Args:
        options: the student's.
        scale: of the human grades.
        train_files: Parquet files of labeled groups; None trains on the human judgments alone.
        judged_file: judged groups: split dev chooses the weights and calibrates, split train is the baseline's data.
        out_dir: the model folder; it appears whole. One that is there already is left as it is.
        work_dir: checkpoints and log, on a file system that all workers see. A killed run continues from it.
        runner: `local_runner`, or one from `ray_runner`.
        on_progress: called with lines of the log.
        max_groups: only the first so many groups, for a scaling curve.
        run_ingest: tokenises files, `in_turn` or one from `ray_ingest`.
        on_ingest: told how many files are tokenised, and of how many.
        label_smoothing: mass of a human grade that leaks to its neighbours, where classes are distilled.

    Returns:
        The summary that also stands in the folder's `relevance.json` under `extra.training`.

    Raises:
        UserError: no group with two labeled products, no dev query, or a model that does not resolve.
    """
    if (summary := finished_summary(out_dir)) is not None:
        return summary
    check_dev_queries(judged_file)
    start = work_dir / "start"
    build = build_two_tower if options.kind == "two_tower" else build_cross_encoder
    build(options, scale, start, options.fit.seed)
    how = IngestSpec(str(start.absolute()), options, label_smoothing)
    sources = [
        [judged_file] if train_files is None else list(train_files),
        [judged_file] if options.human_share else [],
    ]
    tokens, human = (
        ingest(how, files, work_dir.absolute() / "tokens", run_ingest, on_ingest) if files else [] for files in sources
    )
    spec = StudentTaskSpec(how.start, tokens, judged_file, options, human, max_groups)
    [result] = runner([Job(spec, options.fit, work_dir / "fit")], on_progress)
    calibration = calibrate(logit_of_classes(result.predictions(), SINGLE_LOGIT_GAINS), judged_file, scale)
    labels = "human judgments" if train_files is None else "teacher"
    summary = publish_fit(result, start, out_dir, calibration, labels)
    shutil.rmtree(work_dir / "tokens")
    return summary
