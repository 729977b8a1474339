"""Training a teacher on human judgments: one classifier, one model as it comes, or an ensemble of several.

The stack of an ensemble is fitted on out-of-fold logits, so each trained member is trained `folds + 1` times: once without
each fold, to predict it, and once on everything, to be used. That is the price of weights that do not reward memorising.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from relevance_ray.calibration import Calibration, logit_of_classes
from relevance_ray.engines.base import SINGLE_LOGIT_GAINS, FolderModel
from relevance_ray.engines.bi_encoder import build_bi_encoder_folder
from relevance_ray.engines.bm25 import build_bm25_folder
from relevance_ray.engines.ensemble import build_ensemble_folder, fit_stack, stack_logits
from relevance_ray.engines.query_likelihood import build_query_likelihood_folder
from relevance_ray.engines.registry import load_pair_model
from relevance_ray.model_folder import ModelInfo, read_model_info, staged_folder, write_model_info
from relevance_ray.models import resolve_model
from relevance_ray.schema import LabelScale
from relevance_ray.storage import absolute, exists, join, localize, read_bytes, remove_tree, write_bytes
from relevance_ray.student.collate import FlatGroups, flatten_groups, grade_distributions, read_judged_split
from relevance_ray.teacher.classifier import build_classifier
from relevance_ray.teacher.options import ClassifierOptions
from relevance_ray.training.finish import calibrate, check_dev_queries, finished_summary, publish_fit
from relevance_ray.training.fit import FitResult, OnProgress, read_result
from relevance_ray.training.options import TeacherMemberOptions, TeacherOptions
from relevance_ray.training.runners import Job, Runner, local_runner
from relevance_ray.training.teacher_task import TeacherTaskSpec, query_folds

_PAIRS_AT_ONCE, _PAIRS_KEPT = 64, 1024
"""Scored between two lines of the log; kept at once for a run that is killed."""
Products = Callable[[], Iterable[pa.Table]]


def train_teacher(
    options: TeacherOptions,
    scale: LabelScale,
    judged_file: str,
    products: Products,
    out_dir: str,
    work_dir: str,
    runner: Runner = local_runner,
    on_progress: OnProgress | None = None,
    label_smoothing: float = 0.1,
) -> dict[str, Any]:
    """Train, calibrate on the dev queries, and put the model folder in place.

    Args:
        options: the teacher's.
        scale: of the human grades.
        judged_file: judged groups: split train is learnt, split dev chooses the weights and calibrates.
        products: gives the catalog in blocks of the PRODUCT schema; asked for only where a member is BM25.
        out_dir: the model folder; it appears whole. One that is there already is left as it is.
        work_dir: what an ended fold or member leaves is kept here, so that a killed run continues at the next. Both are
            local, on a file system that all workers see, or s3://.
        runner: `local_runner`, or one from `ray_runner`.
        on_progress: called with lines of the log; in an ensemble each has a `part` ("member 0, fold 1 of 2").
        label_smoothing: mass of a grade that leaks to its neighbours where a single rater gave it.

    Returns:
        The summary that also stands in the folder's `relevance.json` under `extra.training`.

    Raises:
        UserError: no train or dev query, fewer train queries than folds, or a model that does not resolve.
    """
    if (summary := finished_summary(out_dir)) is not None:
        return summary
    check_dev_queries(judged_file)
    trainer = _Trainer(scale, judged_file, products, runner, on_progress, label_smoothing)
    if options.kind == "ensemble":
        return trainer.ensemble(options, out_dir, work_dir)
    if options.kind == "classifier":
        return trainer.classifier(options, out_dir, work_dir)
    return trainer.untrained(options, options.kind, out_dir, work_dir)


def build_untrained(options: TeacherOptions, scale: LabelScale, products: Products, out_dir: Path) -> Path:
    """A teacher that reads what the trained one will and takes as long, for a plan; its labels mean nothing.

    Args:
        products: gives some products, for the words of a BM25 member.
        out_dir: a folder that is not there yet; the model folder is returned.
    """
    if options.kind != "ensemble":
        return _untrained_member(options, options.kind, scale, products, out_dir / "model")
    members = [
        _untrained_member(member, member.kind, scale, products, out_dir / str(number))
        for number, member in enumerate(options.members)
    ]
    equal = {"mean": [0.0], "spread": [1.0], "weights": [1.0]}
    stack = {name: value * len(members) for name, value in equal.items()}
    return build_ensemble_folder(
        members, {**stack, "slope": 1.0, "bias": [0.0] * scale.num_classes}, scale, out_dir / "model"
    )


def _untrained_member(
    member: TeacherMemberOptions, kind: str, scale: LabelScale, products: Products, folder: Path
) -> Path:
    if kind == "classifier":
        build_classifier(member, scale, folder, member.fit.seed)
    elif kind == "bi_encoder":
        build_bi_encoder_folder(resolve_model(member.model), scale, folder, member.template(causal=False))
    elif kind == "query_likelihood":
        template = member.template(causal=False)
        build_query_likelihood_folder(member.model, resolve_model(member.model), scale, template, folder)
    else:
        build_bm25_folder(products(), member.template(causal=False), scale, folder)
    return folder


class _Trainer:
    """What all kinds of teacher need at hand."""

    def __init__(
        self,
        scale: LabelScale,
        judged_file: str,
        products: Products,
        runner: Runner,
        on_progress: OnProgress | None,
        label_smoothing: float,
    ) -> None:
        self.scale, self.judged_file, self.products = scale, judged_file, products
        self.runner, self.on_progress, self.label_smoothing = runner, on_progress, label_smoothing

    def classifier(self, member: TeacherMemberOptions, out_dir: str, work_dir: str) -> dict[str, Any]:
        """Train one classifier on all train judgments and calibrate it."""
        [result] = self.runner([self._full_job(member, work_dir)], self.on_progress)
        return self._publish_classifier(member, result, out_dir, work_dir)

    def _full_job(self, member: TeacherMemberOptions, work_dir: str, part: str = "") -> Job:
        start, fit = join(work_dir, "start"), join(work_dir, "fit")
        if read_result(fit) is None:
            build_classifier(member, self.scale, start, member.fit.seed)
        return Job(self._spec(member, start), member.fit, fit, part)

    def _publish_classifier(
        self, member: TeacherMemberOptions, result: FitResult, out_dir: str, work_dir: str
    ) -> dict[str, Any]:
        logits = logit_of_classes(result.predictions(), self._gains(member))
        calibration = calibrate(logits, self.judged_file, self.scale)
        return publish_fit(result, join(work_dir, "start"), out_dir, calibration, labels="human judgments")

    def untrained(
        self, options: TeacherMemberOptions, kind: str, out_dir: str, work_dir: str, part: str = ""
    ) -> dict[str, Any]:
        """A model that needs no training, calibrated."""
        if (summary := finished_summary(out_dir)) is not None:
            return summary
        summary = {"labels": "none", "kind": kind}
        with tempfile.TemporaryDirectory() as scratch:
            plain = _untrained_member(options, kind, self.scale, self.products, Path(scratch) / "model")
            calibration = calibrate(self._logits(plain, "dev", work_dir, part), self.judged_file, self.scale)
            _publish(plain, out_dir, calibration, summary)
        return summary

    def ensemble(self, options: TeacherOptions, out_dir: str, work_dir: str) -> dict[str, Any]:
        """Members, their out-of-fold logits, the stack, its calibration."""
        places = [join(work_dir, f"member-{number}") for number in range(len(options.members))]
        judged = read_judged_split(self.judged_file, "train")
        flat = flatten_groups(judged)
        trained = self._train_members(options, places)
        train_logits, dev_logits, summaries = [], [], []
        for number, (member, place) in enumerate(zip(options.members, places, strict=True)):
            folder = join(place, "model")
            if member.kind == "classifier":
                *folds, full = trained[number]
                fold_of_pair = query_folds(flat.queries, options.folds)
                logits = np.full(len(flat.queries), np.nan, dtype=np.float32)
                for fold, result in enumerate(folds):
                    held_out = fold_of_pair == fold
                    logits[held_out] = logit_of_classes(result.predictions()[held_out], self._gains(member))
                train_logits.append(logits)
                summary = finished_summary(folder) or self._publish_classifier(
                    member, full, folder, join(place, "full")
                )
                summaries.append(summary)
                dev_logits.append(self._logits(localize(folder), "dev", place, f"member {number}"))
            else:
                part = f"member {number}"
                summaries.append(self.untrained(member, member.kind, folder, place, part))
                train_logits.append(self._logits(localize(folder), "train", place, part))
                dev_logits.append(self._logits(localize(folder), "dev", place, part))
        features = np.stack(train_logits, axis=1)
        target = grade_distributions(judged, self.scale, self.label_smoothing)
        groups = np.repeat(np.arange(judged.num_rows), np.diff(flat.offsets))
        usable = np.isfinite(features).all(axis=1)
        stack = fit_stack(features[usable], target[usable], groups[usable], options.stack_l2)
        dev = logit_of_classes(stack_logits(np.stack(dev_logits, axis=1), stack), self.scale.gains)
        calibration = calibrate(dev, self.judged_file, self.scale)
        summary = {"labels": "human judgments", "kind": "ensemble", "folds": options.folds, "members": summaries}
        with tempfile.TemporaryDirectory() as scratch:
            members = [localize(join(place, "model")) for place in places]
            plain = build_ensemble_folder(members, stack, self.scale, Path(scratch) / "model")
            _publish(plain, out_dir, calibration, summary)
        for place in places:  # the members lie in the ensemble's folder now
            for left in (join(place, "model"), join(place, "full", "start")):
                remove_tree(left)
        return summary

    def _train_members(self, options: TeacherOptions, places: Sequence[str]) -> dict[int, list[FitResult]]:
        """Results of each classifier among the members: without fold 0, without fold 1, ..., and on everything."""
        jobs: dict[int, list[Job]] = {}
        for number, (member, place) in enumerate(zip(options.members, places, strict=True)):
            if member.kind != "classifier":
                continue
            whole = self._full_job(member, join(place, "full"), f"member {number}, all folds")
            start = join(place, "full", "start")
            without = [
                Job(
                    self._spec(member, start, options.folds, fold),
                    member.fit,
                    join(place, f"fold-{fold}"),
                    f"member {number}, fold {fold + 1} of {options.folds}",
                    keep_model=False,
                )
                for fold in range(options.folds)
            ]
            jobs[number] = [*without, whole]
        results = iter(self.runner([job for member_jobs in jobs.values() for job in member_jobs], self.on_progress))
        return {number: [next(results) for _ in member_jobs] for number, member_jobs in jobs.items()}

    def _spec(
        self, member: TeacherMemberOptions, start: str, folds: int = 1, held_out: int | None = None
    ) -> TeacherTaskSpec:
        return TeacherTaskSpec(
            start=absolute(start),
            judged_file=self.judged_file,
            lora=member.lora,
            label_smoothing=self.label_smoothing,
            seed=member.fit.seed,
            folds=folds,
            held_out=held_out,
        )

    def _gains(self, member: ClassifierOptions) -> tuple[float, ...]:
        return SINGLE_LOGIT_GAINS if member.num_classes == "single" else self.scale.gains

    def _logits(self, folder: Path, split: str, work_dir: str, part: str) -> np.ndarray:
        """float32 [n] of the pairs of a split, NaN where one cannot be scored; kept in pieces for a run that is killed."""
        model: FolderModel | None = None
        flat = flatten_groups(read_judged_split(self.judged_file, split))
        pieces = []
        for start in range(0, len(flat.queries), _PAIRS_KEPT):
            stop = min(start + _PAIRS_KEPT, len(flat.queries))
            kept = join(work_dir, f"{split}-logits-{start}-{stop}.npy")
            if not exists(kept):
                model = model or load_pair_model(folder)
                buffer = io.BytesIO()
                np.save(buffer, self._scored(model, flat, start, stop, f"{part}, {split} pairs".lstrip(", ")))
                write_bytes(kept, buffer.getvalue())
            pieces.append(np.load(io.BytesIO(read_bytes(kept))))
        return np.concatenate(pieces)

    def _scored(self, model: FolderModel, flat: FlatGroups, start: int, stop: int, part: str) -> np.ndarray:
        """float32 of the pairs from `start` to `stop`, told to the log as they are done."""
        say = self.on_progress or (lambda record: None)
        progress = {"part": part, "unit": "pairs", "steps": len(flat.queries)}
        logits = []
        for first in range(start, stop, _PAIRS_AT_ONCE):
            say(progress | {"step": first})
            rows = slice(first, min(first + _PAIRS_AT_ONCE, stop))
            labels = model.label_rows(flat.queries[rows], flat.products[rows])
            logits.append(logit_of_classes(labels.class_logits, model.gains).astype(np.float32))
        say(progress | {"step": stop})
        return np.concatenate(logits)


def _publish(plain: Path, out_dir: str, calibration: Calibration, summary: dict[str, Any]) -> None:
    """Put a finished but uncalibrated folder in its place, with what was still missing."""
    info = read_model_info(plain)
    extra = {**info.extra, "training": summary}
    with staged_folder(out_dir) as partial:
        shutil.copytree(plain, partial, dirs_exist_ok=True)
        write_model_info(partial, ModelInfo(info.kind, info.scale, info.template, calibration, extra))
