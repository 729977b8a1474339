"""Distilling a student: from labeled groups to a finished model folder.

The same function trains the baseline that the distilled student is measured against, on human judgments alone: same model,
same loop, other labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from relevance_ray.calibration import logit_of_classes
from relevance_ray.engines.base import SINGLE_LOGIT_GAINS
from relevance_ray.schema import LabelScale
from relevance_ray.storage import absolute, join, remove_tree
from relevance_ray.student.cross_encoder import build_cross_encoder
from relevance_ray.student.two_tower import build_two_tower
from relevance_ray.training.finish import calibrate, check_dev_queries, finished_summary, publish_fit
from relevance_ray.training.fit import FitResult, OnProgress
from relevance_ray.training.ingest import IngestSpec, RunItems, in_turn, ingest
from relevance_ray.training.options import StudentOptions
from relevance_ray.training.runners import Job, Runner, local_runner
from relevance_ray.training.student_task import StudentTaskSpec


@dataclass(frozen=True)
class StudentRequest:
    """A student to train.

    Attributes:
        options: the student's.
        scale: of the human grades.
        train_files: Parquet files of labeled groups; None trains on the human judgments alone.
        judged_file: judged groups: split dev chooses the weights and calibrates, split train is the baseline's data.
        out_dir: the model folder; it appears whole. One that is there already is left as it is.
        work_dir: checkpoints and log. A killed run continues from it. These places are local, on a file system that all
            workers see, or s3://.
        max_pairs: only the first groups, of so many pairs together at most, for a scaling curve.
        label_smoothing: mass of a human grade that leaks to its neighbours, where classes are distilled.
        part: what it is of several, for the live line.
        tokens_dir: keeps token files while students train that differ in seed and `max_pairs` alone; in `work_dir` where
            none is named.
    """

    options: StudentOptions
    scale: LabelScale
    train_files: Sequence[str] | None
    judged_file: str
    out_dir: str
    work_dir: str
    max_pairs: int | None = None
    label_smoothing: float = 0.0
    part: str = ""
    tokens_dir: str = ""

    @property
    def token_folder(self) -> str:
        return absolute(self.tokens_dir or join(self.work_dir, "tokens"))


def train_students(
    requests: Sequence[StudentRequest],
    runner: Runner = local_runner,
    on_progress: OnProgress | None = None,
    run_ingest: RunItems = in_turn,
    on_ingest: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Train students by one group of workers; calibrate each on the dev queries, and put its model folder in place.

    Args:
        requests: what to train; those whose folder is there are left as they are.
        runner: `local_runner`, or one from `ray_runner`.
        on_progress: called with lines of the log.
        run_ingest: tokenises files, `in_turn` or one from `ray_ingest`.
        on_ingest: told how many files are tokenised, and of how many.

    Returns:
        The summaries, which also stand in the folders' `relevance.json` under `extra.training`.

    Raises:
        UserError: no group with two labeled products, no dev query, or a model that does not resolve.
    """
    missing = [request for request in requests if finished_summary(request.out_dir) is None]
    jobs = [student_job(request, run_ingest, on_ingest) for request in missing]
    for request, result in zip(missing, runner(jobs, on_progress) if jobs else (), strict=True):
        finish_student(request, result)
    for folder in {request.token_folder for request in requests}:
        remove_tree(folder)
    summaries = [finished_summary(request.out_dir) for request in requests]
    return [summary for summary in summaries if summary is not None]


def train_student(request: StudentRequest, *arguments: Any, **named: Any) -> dict[str, Any]:
    """One student; the arguments are those of `train_students`."""
    [summary] = train_students([request], *arguments, **named)
    return summary


def student_job(
    request: StudentRequest, run_ingest: RunItems = in_turn, on_ingest: Callable[[int, int], None] | None = None
) -> Job:
    """What workers are given: the start folder and the token files are made where they are missing."""
    options, judged_file = request.options, request.judged_file
    check_dev_queries(judged_file, options.calibration)
    start = absolute(join(request.work_dir, "start"))
    build = build_two_tower if options.kind == "two_tower" else build_cross_encoder
    build(options, request.scale, start, options.fit.seed)
    how = IngestSpec(start, options, request.label_smoothing)
    sources = [judged_file] if request.train_files is None else list(request.train_files)
    tokens = ingest(how, sources, request.token_folder, run_ingest, on_ingest)
    human = ingest(how, [judged_file], request.token_folder) if options.human_share else []
    spec = StudentTaskSpec(how.start, tokens, judged_file, options, human, request.max_pairs)
    return Job(spec, options.fit, absolute(join(request.work_dir, "fit")), request.part)


def finish_student(request: StudentRequest, result: FitResult) -> None:
    """Calibrate what workers left, and put the model folder in place."""
    logits = logit_of_classes(result.predictions(), SINGLE_LOGIT_GAINS)
    calibration = calibrate(logits, request.judged_file, request.scale, request.options.calibration)
    labels = "human judgments" if request.train_files is None else "teacher"
    publish_fit(result, join(request.work_dir, "start"), request.out_dir, calibration, labels)
