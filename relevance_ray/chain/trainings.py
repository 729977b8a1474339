"""The trainings of a configuration: its teacher, its student, the students that it is compared with, and their folders."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relevance_ray.chain.folders import VERSIONS
from relevance_ray.chain.tools import StepTools
from relevance_ray.options import semantic
from relevance_ray.progress import Progress
from relevance_ray.storage import (
    CommitLog,
    absolute,
    exists,
    fingerprint,
    is_remote,
    join,
    localize,
    publish_folder,
    write_json,
)
from relevance_ray.training.options import StudentOptions

if TYPE_CHECKING:
    from relevance_ray.training.fit import OnProgress
    from relevance_ray.training.runners import Runner
    from relevance_ray.training.student import StudentRequest

FILES_FOR_ACTORS = 200
"""Fewer files of labels are tokenised sooner by this process than actors start."""


class TrainingWork:
    """Trains what a configuration asks for."""

    def __init__(self, tools: StepTools) -> None:
        self.tools, self.config, self.at = tools, tools.config, tools.at

    def _runner(self, name: str) -> Runner:
        resources = self.config.resources
        if not resources.train_workers:
            from relevance_ray.training.runners import local_runner

            return local_runner
        from relevance_ray.training.ray_train import ray_runner

        self.tools.ray("train-student")
        return ray_runner(resources.trainers, name)

    def train_teacher(self, folder: str) -> dict[str, Any]:
        from relevance_ray.data.prepare import iter_products, read_scale
        from relevance_ray.training.teacher import train_teacher

        prepared = self.tools.prepared()
        with self.tools.progress("train-teacher", None, "steps") as progress, self._tracking(folder) as track:
            return train_teacher(
                self.config.teacher,
                read_scale(prepared),
                self._judged(),
                partial(iter_products, prepared),
                join(folder, "model"),
                join(folder, "work"),
                self._runner("train-teacher"),
                on_progress=partial(show_training, progress, track),
                label_smoothing=self.config.data.label_smoothing,
            )

    def train_student(self, folder: str) -> dict[str, Any]:
        request = self._request(self.config.student, self._label_files(), folder)
        [summary] = self._train("train-student", {folder: request}, folder)
        return summary

    def _judged(self) -> str:
        """The file of judged groups, where all workers see it."""
        return absolute(join(self.at.folder("prepare"), "judged_groups.parquet"))

    def _label_files(self, max_pairs: int | None = None) -> list[str]:
        """The files of the labels, or those that hold the first of them."""
        log, names = CommitLog(self.at.folder("label")), self.at.labeled_shards()
        if max_pairs is not None:
            records = log.committed()
            before = itertools.accumulate((records[name]["pairs"] for name in names), initial=0)
            names = [name for name, start in zip(names, before, strict=False) if start < max_pairs]
        return [absolute(log.path(name)) for name in names]

    def _request(
        self, options: StudentOptions, files: Sequence[str] | None, folder: str, **of_a_curve: Any
    ) -> StudentRequest:
        from relevance_ray.data.prepare import read_scale
        from relevance_ray.training.student import StudentRequest

        return StudentRequest(
            options,
            read_scale(self.tools.prepared()),
            files,
            self._judged(),
            join(folder, "model"),
            join(folder, "work"),
            label_smoothing=self.config.data.label_smoothing,
            **of_a_curve,
        )

    def _train(self, name: str, requests: Mapping[str, StudentRequest], tracked: str) -> list[dict[str, Any]]:
        """Train students by one group of workers, each into a folder of its own; TensorBoard's events go to one."""
        from relevance_ray.training.ingest import in_turn
        from relevance_ray.training.ray_ingest import ray_ingest
        from relevance_ray.training.student import train_students

        resources = self.config.resources
        num_files = max(len(request.train_files or ()) for request in requests.values())
        spread = resources.train_workers and num_files >= FILES_FOR_ACTORS
        with self.tools.progress(name, None, "steps") as progress, self._tracking(tracked) as track:
            return train_students(
                list(requests.values()),
                self._runner(name),
                on_progress=partial(show_training, progress, track),
                run_ingest=ray_ingest(resources.trainers) if spread else in_turn,
                on_ingest=lambda done, of: progress.update(part=f"tokens {done}/{of}"),
            )

    def students_of(self, num_pairs: Sequence[int], seeds: Sequence[int]) -> list[list[Path]]:
        """Model folders of the run's student taught by the first of its labels alone, for each number of pairs one a
        seed; kept under `scaling/`."""
        inputs = [self.at.key("prepare"), self.at.key("label")]
        shared = join(self.at.root, "scaling")
        tokens = join(shared, "work", fingerprint(inputs, semantic(self.config.student)))
        requests: dict[str, StudentRequest] = {}
        folders: list[list[str]] = []
        for size in num_pairs:
            files = self._label_files(size)
            folders.append([])
            for seed in seeds:
                if size == num_pairs[-1] and seed == self.config.student.fit.seed and self.at.is_done("train-student"):
                    folders[-1].append(self.at.folder("train-student"))  # the run's own is this student
                    continue
                options = replace(self.config.student, fit=replace(self.config.student.fit, seed=seed))
                key = fingerprint("scaling", VERSIONS["train-student"], [*inputs, semantic(options), files, size])
                folder = join(shared, f"student-{key}")
                folders[-1].append(folder)
                if not exists(join(folder, "step.json")):
                    part = f"{size} pairs, seed {seed}"
                    requests[folder] = self._request(
                        options, files, folder, max_pairs=size, part=part, tokens_dir=tokens
                    )
        if requests:
            self.tools.say(f"scaling: training {len(requests)} students of {num_pairs[0]:,} to {num_pairs[-1]:,} pairs")
            for folder, summary in zip(requests, self._train("scaling", requests, shared), strict=True):
                write_json(join(folder, "step.json"), {"summary": summary})
        return [[localize(join(folder, "model")) for folder in found] for found in folders]

    @contextlib.contextmanager
    def _tracking(self, folder: str) -> Iterator[OnProgress]:
        """TensorBoard's events of a training, in `tensorboard/` of its folder; on S3 by upload afterwards."""
        from relevance_ray.training.tracking import TensorBoard

        place = self.tools.work_folder("tensorboard", folder) if is_remote(folder) else Path(folder)
        with TensorBoard(place / "tensorboard") as board:
            yield board
        if is_remote(folder) and (place / "tensorboard").is_dir():
            publish_folder(place / "tensorboard", join(folder, "tensorboard"))

    def human_only(self, seeds: int = 1) -> list[Path]:
        """Model folders of the same student on human labels alone, one a seed: the first is the baseline of every
        evaluation, kept for all that share it."""
        config = self.config
        options = config.student.on_human_labels(config.evaluate.human_loss, config.evaluate.human_fit)
        folders: list[str] = []
        requests: dict[str, StudentRequest] = {}
        for seed in range(options.fit.seed, options.fit.seed + seeds):
            of_seed = replace(options, fit=replace(options.fit, seed=seed))
            key = fingerprint("human-only", VERSIONS["train-student"], self.at.judged_key(), semantic(of_seed))
            folders.append(join(self.at.root, "evaluate-baselines", f"human_only-{key}"))
            if not exists(join(folders[-1], "step.json")):
                self.tools.say(f"evaluate: training the same student on human labels alone ({folders[-1]})")
                part = f"seed {seed}" if seeds > 1 else ""
                requests[folders[-1]] = self._request(of_seed, None, folders[-1], part=part)
        if requests:
            summaries = self._train("human_only", requests, next(iter(requests)))
            for folder, summary in zip(requests, summaries, strict=True):
                write_json(join(folder, "step.json"), {"summary": summary})
        return [localize(join(folder, "model")) for folder in folders]

    def models(self, *, for_curve: bool = False) -> dict[str, Path]:
        """Model folders that `evaluate` compares, by name, in the order of the report; after a run all are there. Those
        `for_curve` are what students of many sizes are compared with: not the run's student, nor further models."""
        from relevance_ray.data.prepare import iter_products, read_judged, read_scale
        from relevance_ray.evaluation.baselines import build_baselines

        prepared = self.tools.prepared()
        folders: dict[str, Path] = {}
        if not for_curve:
            folders["student"] = localize(join(self.at.folder("train-student"), "model"))
        if (teacher := self.at.teacher()) is not None:
            folders["teacher"] = localize(teacher)
        folders["human_only"] = self.human_only()[0]
        if not for_curve:
            folders |= {name: localize(path) for name, path in self.config.evaluate.models.items()}
        return folders | build_baselines(
            self.config.evaluate,
            partial(iter_products, prepared),
            read_judged(prepared, "dev"),
            read_scale(prepared),
            self.config.student.template(),
            self.tools.work_folder("evaluate", self.at.folder("evaluate")),
            self.config.student.calibration,
        )


def show_training(progress: Progress, track: OnProgress, record: dict[str, Any]) -> None:
    """A line of the training log on the live line, and in TensorBoard."""
    track(record)
    progress.unit = record.get("unit", "steps")
    if not progress.done or record.get("part") != progress.extra.get("part"):
        # What the part before showed is not this one's, and what was done before a resume took none of this run's time.
        progress.update(**dict.fromkeys(("part", "loss", "dev_ndcg", "groups_per_second", "pairs_per_second")))
        progress.restart(record["step"])
    shown: dict[str, Any] = {
        key: record[key] for key in ("part", "loss", "groups_per_second", "pairs_per_second") if key in record
    }
    if "dev" in record:
        shown["dev_ndcg"] = record["dev"]["ndcg"]
    progress.update(record["step"], total=record["steps"], **shown)
