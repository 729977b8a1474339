"""What each step does in its folder: the options and folders of a configuration, given to the part that does the work."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relevance_ray.actor_pool import Workers
from relevance_ray.config import Config
from relevance_ray.errors import UserError
from relevance_ray.model_folder import read_model_info
from relevance_ray.object_log import ObjectLog
from relevance_ray.options import semantic
from relevance_ray.progress import Progress
from relevance_ray.ray_session import check_resources, ray_session
from relevance_ray.schema import LabelScale
from relevance_ray.step_folders import VERSIONS, StepFolders
from relevance_ray.storage import (
    CommitLog,
    cache_folder,
    exists,
    fingerprint,
    is_remote,
    join,
    localize,
    makedirs,
    publish_folder,
    read_json,
    write_json,
    write_table,
)
from relevance_ray.training.options import StudentOptions

if TYPE_CHECKING:
    from relevance_ray.training.fit import OnProgress
    from relevance_ray.training.student import StudentRequest

Say = Callable[[str], None]

FILES_FOR_ACTORS = 200
"""Fewer files of labels are tokenised sooner by this process than actors start."""


class StepWork:
    """Does the steps of one configuration.

    Args:
        at: where each step is kept.
        say: told what takes long and has no line of its own.
        stack: closed when the run ends; Ray is opened on it by the first step that needs it.
    """

    def __init__(self, config: Config, at: StepFolders, say: Say, stack: contextlib.ExitStack) -> None:
        self.config, self.at, self.say, self._stack = config, at, say, stack
        self._log = ObjectLog(at.root) if is_remote(at.root) else f"{at.root}/log.jsonl"

    def run(self, step: str, folder: str, retry: bool = False) -> dict[str, Any]:
        """Do a step, and mark it done by its `step.json`; the summary that stands there."""
        makedirs(folder)
        started = time.monotonic()
        runners: dict[str, Callable[[str], dict[str, Any]]] = {
            "prepare": self._prepare,
            "train-teacher": self._train_teacher,
            "generate": self._generate,
            "label": partial(self._label, retry=retry),
            "train-student": self._train_student,
            "evaluate": self._evaluate,
            "compact": self._compact,
            "embed": self._embed,
        }
        summary = runners[step](folder)
        marker = {
            "step": step,
            "fingerprint": self.at.key(step),
            "target": self.at.target(step),
            "summary": summary,
            "seconds": round(time.monotonic() - started, 1),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        write_json(join(folder, "step.json"), marker)
        return summary

    def _ray(self, step: str) -> None:
        """Ray from here to the end of the run, which must be able to hold what a step wants at once."""
        self._stack.enter_context(ray_session(self.config.resources.num_cpus))
        for demand in self.config.resources.needed(step, self.config.generate.uses_llm):
            check_resources(demand)

    def _progress(self, description: str, total: int | None, unit: str) -> Progress:
        return Progress(description, total, unit, log=self._log)

    def _work(self, step: str, folder: str) -> Path:
        """A local folder for checkpoints: within the step on disk, in the cache where the root is on S3."""
        cached = cache_folder() / "work" / f"{step}-{fingerprint(folder)}"
        work = cached if is_remote(folder) else Path(folder) / "work"
        work.mkdir(parents=True, exist_ok=True)
        return work

    def _prepare(self, folder: str) -> dict[str, Any]:
        from relevance_ray.data.prepare import prepare

        local = self._work("prepare", folder) if is_remote(folder) else Path(folder)
        with self._progress("prepare", None, "products") as progress:
            summary = prepare(self.config.data, local, progress)
        if is_remote(folder):
            publish_folder(local, folder)
        return summary

    def _prepared(self) -> Path:
        return localize(self.at.folder("prepare"))

    def _runner(self, name: str) -> Any:
        from relevance_ray.training.ray_train import ray_runner

        resources = self.config.resources
        self._ray("train-student")
        return ray_runner(
            num_workers=resources.train_workers,
            cpus_per_worker=resources.cpus_per_train_worker,
            use_gpu=resources.train_on_gpu,
            name=name,
        )

    def _train_teacher(self, folder: str) -> dict[str, Any]:
        from relevance_ray.data.prepare import iter_products, read_scale
        from relevance_ray.training.teacher import train_teacher

        prepared, work = self._prepared(), self._work("train-teacher", folder)
        with (
            self._progress("train-teacher", None, "steps") as progress,
            _tracking(folder, work) as track,
            _model_in(folder, work) as model,
        ):
            return train_teacher(
                self.config.teacher,
                read_scale(prepared),
                str(prepared / "judged_groups.parquet"),
                partial(iter_products, prepared),
                model,
                work,
                self._runner("train-teacher"),
                on_progress=partial(_show_training, progress, track),
                label_smoothing=self.config.data.label_smoothing,
            )

    def _generate(self, folder: str) -> dict[str, Any]:
        from relevance_ray.generate.index.catalog_index import latest_vectors
        from relevance_ray.generate.pipeline import generate

        resources, index = self.config.resources, self.at.index()
        self._ray("generate")
        with self._progress("generate", self.config.generate.num_pairs, "pairs") as progress:
            summary = generate(
                self.config.generate,
                self.at.folder("prepare"),
                folder,
                index_dir=index,
                earlier_index=latest_vectors(self.at.root, index, self.config.generate),
                num_workers=resources.generate_workers,
                search_actors=resources.search_actors,
                writers=Workers(resources.write_actors, resources.cpus_per_write_actor, resources.gpus_per_write_actor),
                progress=progress,
            )
        if refused := summary["left_out"]["refused"]:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in Counter(refused).most_common())
            self.say(f"generate: {sum(refused.values()):,} answers of the language model were refused ({reasons})")
        return summary

    def _label(self, folder: str, retry: bool) -> dict[str, Any]:
        from relevance_ray.data.prepare import read_scale
        from relevance_ray.engines.registry import open_engine
        from relevance_ray.labeling.pipeline import label

        shards = self.at.shards()
        model = self.at.teacher()
        resources = self.config.resources
        scale, smoothing = read_scale(self._prepared()), self.config.data.label_smoothing
        if self.config.label.model:
            _check_scale(self.config.label.model, scale)
        factory = partial(open_engine, self.config.label, model, scale, smoothing)
        if model is None:
            factory()  # out of an actor, what the user must mend in a file of labels would be no `UserError` any more
        self._ray("label")
        with self._progress("label", sum(shard.num_pairs for shard in shards), "pairs") as progress:
            summary = label(
                shards,
                folder,
                self.at.key("label"),
                factory,
                num_actors=resources.label_actors,
                num_cpus=resources.cpus_per_label_actor,
                num_gpus=resources.gpus_per_label_actor,
                progress=progress,
                retry=retry,
                no_progress_seconds=60 * resources.no_progress_minutes,
            )
        if summary["skipped"]:
            self.say(f"label: {summary['skipped']} of {summary['shards']} shards were labeled before and were skipped")
        if summary["reused"]:
            self.say(f"label: {summary['reused']:,} pairs were labeled in earlier shards, and their labels taken over")
        return summary

    def _compact(self, folder: str) -> dict[str, Any]:
        from relevance_ray.labeling.compact_pipeline import in_ray_tasks
        from relevance_ray.labeling.compaction import Do, Part, compact, in_turn

        def run(do: Do, parts: Sequence[Part]) -> Iterator[int]:
            if len(parts) < 2:
                return in_turn(do, parts)
            self._ray("compact")
            return in_ray_tasks(do, parts)

        with self._progress("compact", None, "pairs") as progress:
            return compact(
                CommitLog(self.at.folder("label")),
                self.at.labeled_shards(),
                folder,
                self.at.key("compact"),
                target_bytes=int(self.config.label.compact_mb * 2**20),
                run=run,
                progress=progress,
            )

    def _embed(self, folder: str) -> dict[str, Any]:
        from relevance_ray.student.export_pipeline import export_vectors

        resources = self.config.resources
        self._ray("embed")
        with self._progress("embed", None, "products") as progress:
            return export_vectors(
                join(self.at.folder("train-student"), "model"),
                self.at.folder("prepare"),
                folder,
                self.at.key("embed"),
                Workers(resources.label_actors, resources.cpus_per_label_actor, resources.gpus_per_label_actor),
                progress,
            )

    def _train_student(self, folder: str) -> dict[str, Any]:
        request = self._labels_of(self.config.student, folder, self._work("train-student", folder))
        [summary] = self._train("train-student", {folder: request})
        return summary

    def _labels_of(
        self, options: StudentOptions, folder: str, work: Path, max_groups: int | None = None
    ) -> StudentRequest:
        """A student of the labels, or of the shards that hold its first groups."""
        log, names = CommitLog(self.at.folder("label")), self.at.labeled_shards()
        records = log.committed()
        if max_groups is not None:
            before = itertools.accumulate((records[name]["rows"] for name in names), initial=0)
            names = [name for name, start in zip(names, before, strict=False) if start < max_groups]
        return self._request(options, [log.path(name) for name in names], folder, work, max_groups)

    def _request(
        self,
        options: StudentOptions,
        files: Sequence[str] | None,
        folder: str,
        work: Path,
        max_groups: int | None = None,
        part: str = "",
    ) -> StudentRequest:
        from relevance_ray.data.prepare import read_scale
        from relevance_ray.training.student import StudentRequest

        prepared = self._prepared()
        return StudentRequest(
            options,
            read_scale(prepared),
            files,
            str(prepared / "judged_groups.parquet"),
            _local_model(folder, work),
            work,
            max_groups,
            self.config.data.label_smoothing,
            part,
        )

    def _train(self, name: str, requests: Mapping[str, StudentRequest]) -> list[dict[str, Any]]:
        """Train students by one group of workers, each into a folder of its own."""
        from relevance_ray.training.ingest import in_turn
        from relevance_ray.training.ray_ingest import ray_ingest
        from relevance_ray.training.student import train_students

        resources = self.config.resources
        num_files = max(len(request.train_files or ()) for request in requests.values())
        spread = ray_ingest(Workers(resources.train_workers, resources.cpus_per_train_worker))
        folder, request = next(iter(requests.items()))
        with self._progress(name, None, "steps") as progress, _tracking(folder, request.work_dir) as track:
            summaries = train_students(
                list(requests.values()),
                self._runner(name),
                on_progress=partial(_show_training, progress, track),
                run_ingest=in_turn if num_files < FILES_FOR_ACTORS else spread,
                on_ingest=lambda done, of: progress.update(part=f"tokens {done}/{of}"),
            )
        for folder, request in requests.items():
            _publish_model(folder, request.out_dir)
        return summaries

    def students_of(self, num_groups: Sequence[int], seeds: Sequence[int]) -> list[list[Path]]:
        """Model folders of the run's student taught by its first labeled groups alone, for each number of groups one a
        seed; kept under `scaling/`."""
        requests: dict[str, StudentRequest] = {}
        folders: list[list[str]] = []
        for size in num_groups:
            folders.append([])
            for seed in seeds:
                options = replace(self.config.student, fit=replace(self.config.student.fit, seed=seed))
                request = self._labels_of(options, "", Path(), size)
                inputs = [self.at.key("prepare"), semantic(options), self.at.key("label"), request.train_files, size]
                key = fingerprint("scaling", VERSIONS["train-student"], inputs)
                folder = join(self.at.root, "scaling", f"student-{key}")
                folders[-1].append(folder)
                if not exists(join(folder, "step.json")):
                    work = self._work("scaling", folder)
                    part = f"{size} groups, seed {seed}"
                    requests[folder] = self._request(options, request.train_files, folder, work, size, part)
        if requests:
            self.say(f"scaling: training {len(requests)} students of {num_groups[0]:,} to {num_groups[-1]:,} groups")
            for folder, summary in zip(requests, self._train("scaling", requests), strict=True):
                write_json(join(folder, "step.json"), {"summary": summary})
        return [[localize(join(folder, "model")) for folder in found] for found in folders]

    def _human_only(self) -> Path:
        """The model folder of the same student on human labels alone: the baseline of every evaluation, kept for all
        that share it."""
        config = self.config
        options = config.student.on_human_labels(config.evaluate.human_loss, config.evaluate.human_fit)
        key = fingerprint("human-only", VERSIONS["train-student"], self.at.judged_key(), semantic(options))
        folder = join(self.at.root, "evaluate-baselines", f"human_only-{key}")
        if not exists(join(folder, "step.json")):
            self.say(f"evaluate: training the same student on human labels alone ({folder})")
            request = self._request(options, None, folder, self._work("human_only", folder))
            [summary] = self._train("human-only student", {folder: request})
            write_json(join(folder, "step.json"), {"fingerprint": key, "summary": summary})
        return localize(join(folder, "model"))

    def models(self) -> dict[str, Path]:
        """Model folders that `evaluate` compares, by name, in the order of the report; after a run all are there."""
        from relevance_ray.data.prepare import iter_products, read_judged, read_scale
        from relevance_ray.evaluation.baselines import build_baselines

        prepared = self._prepared()
        folders = {"student": localize(join(self.at.folder("train-student"), "model"))}
        if (teacher := self.at.teacher()) is not None:
            folders["teacher"] = localize(teacher)
        folders["human_only"] = self._human_only()
        return folders | build_baselines(
            self.config.evaluate,
            partial(iter_products, prepared),
            read_judged(prepared, "dev"),
            read_scale(prepared),
            read_model_info(folders["student"]).template,
            self._work("evaluate", self.at.folder("evaluate")),
        )

    def _evaluate(self, folder: str) -> dict[str, Any]:
        from relevance_ray.data.prepare import read_judged, read_scale
        from relevance_ray.engines.registry import load_pair_model
        from relevance_ray.evaluation.compare import evaluate_models
        from relevance_ray.evaluation.report import write_report

        models = {name: load_pair_model(path) for name, path in self.models().items()}
        judged, scale = read_judged(self._prepared()), read_scale(self._prepared())
        with self._progress("evaluate", None, "pairs") as progress:
            results = evaluate_models(
                judged,
                models,
                scale,
                self.config.evaluate,
                on_progress=progress.advance,
                on_predictions=partial(write_table, join(folder, "predictions.parquet")),
            )
        write_report(results, folder, title="Evaluation", about=self._about())
        return {
            "report": join(folder, "report.md"),
            "splits": {
                split: {name: model["metrics"] for name, model in found["models"].items()}
                for split, found in results["splits"].items()
            },
        }

    def _about(self) -> dict[str, str]:
        config = self.config
        labels = read_json(join(self.at.folder("label"), "step.json"))["summary"]
        return {
            "data": f"{config.data.format} {config.data.path or config.data.market_size}",
            "teacher": self._about_teacher(),
            "labeled pairs": f"{labels['pairs']:,} ({labels['errors']:,} failed)",
            "student": f"{config.student.kind} {config.student.model}, level weight {config.student.level_weight}",
            "root": self.at.root,
        }

    def _about_teacher(self) -> str:
        config, teacher = self.config, self.config.teacher
        if not self.at.trains_teacher:
            return config.label.model or f"none: labels from engine {config.label.engine}"
        if teacher.kind != "ensemble":
            return f"{teacher.kind} {teacher.model}"
        members = (
            member.kind if member.kind == "bm25" else f"{member.kind} {member.model}" for member in teacher.members
        )
        return f"ensemble of {', '.join(members)}"


@contextlib.contextmanager
def _model_in(folder: str, work: Path) -> Iterator[Path]:
    """Where training puts the model of a step folder: there at once on disk, by upload afterwards on S3."""
    yield _local_model(folder, work)
    _publish_model(folder, _local_model(folder, work))


def _local_model(folder: str, work: Path) -> Path:
    return work / "model" if is_remote(folder) else Path(folder) / "model"


def _publish_model(folder: str, model: Path) -> None:
    if is_remote(folder):
        publish_folder(model, join(folder, "model"))


def _check_scale(model: str, scale: LabelScale) -> None:
    """Refuse a teacher whose classes are others than the data's."""
    given = read_model_info(localize(model)).scale
    if (given.grades, given.gains) != (scale.grades, scale.gains):
        raise UserError(
            f"label.model {model} grades {', '.join(given.grades)} with gains {list(given.gains)}, the data "
            f"{', '.join(scale.grades)} with {list(scale.gains)}; give a teacher of the same scale"
        )


@contextlib.contextmanager
def _tracking(folder: str, work: Path) -> Iterator[OnProgress]:
    """TensorBoard's events of a training, in `tensorboard/` of its folder; on S3 by upload afterwards."""
    from relevance_ray.training.tracking import TensorBoard

    events = (work if is_remote(folder) else Path(folder)) / "tensorboard"
    with TensorBoard(events) as board:
        yield board
    if is_remote(folder) and events.is_dir():
        publish_folder(events, join(folder, "tensorboard"))


def _show_training(progress: Progress, track: OnProgress, record: dict[str, Any]) -> None:
    """A line of the training log on the live line, and in TensorBoard."""
    track(record)
    if record.get("part") != progress.extra.get("part"):
        progress.update(part=record.get("part"))
        progress.restart(record["step"])
    shown: dict[str, Any] = {key: record[key] for key in ("part", "loss", "pairs_per_second") if key in record}
    if "dev" in record:
        shown["dev_ndcg"] = record["dev"]["ndcg"]
    progress.update(record["step"], total=record["steps"], **shown)
