"""The chain of steps of a run: what each one needs, the fingerprint it is kept under, and what it leaves.

A step's folder is named after everything that decides its result, so that a finished step is skipped, a half-done one
resumes in its folder, and a changed one is redone beside the old. Generation and labeling grow instead: how many pairs
are asked for is no part of their fingerprint, and what is there is kept.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from relevance_ray.config import Config
from relevance_ray.errors import UserError
from relevance_ray.models import resolve_model
from relevance_ray.options import semantic
from relevance_ray.progress import Progress
from relevance_ray.ray_session import ray_session
from relevance_ray.storage import (
    CommitLog,
    Lease,
    cache_folder,
    content_id,
    exists,
    fingerprint,
    is_remote,
    join,
    listdir,
    localize,
    makedirs,
    publish_folder,
    read_json,
    write_json,
)
from relevance_ray.training.options import StudentOptions

VERSIONS = {"prepare": 1, "train-teacher": 1, "generate": 1, "label": 1, "train-student": 1, "evaluate": 1}
"""Raised when a step's code comes to give other results from the same input."""

STEPS = tuple(VERSIONS)

NEEDS = {
    "prepare": (),
    "train-teacher": ("prepare",),
    "generate": ("prepare",),
    "label": ("train-teacher", "generate"),
    "train-student": ("label",),
    "evaluate": ("train-student",),
}
"""What must be there before a step; without a teacher to train, `train-teacher` falls out."""

Say = Callable[[str], None]


@dataclass
class Outcome:
    """What a run of the chain left: each step's folder and summary, and how many rows failed."""

    folders: dict[str, str] = field(default_factory=dict)
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed_rows: int = 0


class Chain:
    """The steps of one configuration at its root."""

    def __init__(self, config: Config, say: Say = print) -> None:
        self.config = config
        self.root = config.storage.root.rstrip("/")
        if not is_remote(self.root):
            self.root = str(Path(self.root).absolute())
        self.say = say
        self.steps = tuple(step for step in STEPS if step != "train-teacher" or self._trains_teacher)
        self._keys: dict[str, str] = {}

    @property
    def _trains_teacher(self) -> bool:
        return self.config.label.engine == "transformers"

    # What a step is kept under

    def key(self, step: str) -> str:
        """The fingerprint of a step. That of `train-student` is known once its labels are there."""
        if step not in self._keys:
            self._keys[step] = fingerprint(step, VERSIONS[step], *self._inputs(step))
        return self._keys[step]

    def _inputs(self, step: str) -> list[Any]:
        config = self.config
        if step == "prepare":
            data = config.data
            files = [str(Path(data.path, name)) for name in (data.products, data.judgments) if name]
            inputs = [data.path, *files]
            return [semantic(data), [content_id(path) for path in (*inputs, data.queries) if path]]
        if step == "train-teacher":
            return [self.key("prepare"), semantic(config.teacher)]
        if step == "generate":
            pairs_file = config.generate.pairs_file
            return [self.key("prepare"), semantic(config.generate), content_id(pairs_file) if pairs_file else ""]
        if step == "label":
            if self._trains_teacher:
                return [self.key("train-teacher"), semantic(config.label)]
            return [semantic(config.label), content_id(config.label.path) if config.label.path else ""]
        if step == "train-student":
            records = CommitLog(self.folder("label")).committed()
            labels = [records[shard.label_name]["checksum"] for shard in self._shards()]
            return [self.key("prepare"), semantic(config.student), labels]
        teacher = self.key("train-teacher") if self._trains_teacher else ""
        return [self.key("prepare"), self.key("train-student"), teacher, semantic(config.evaluate)]

    def folder(self, step: str) -> str:
        return join(self.root, f"{step}-{self.key(step)}")

    def _target(self, step: str) -> dict[str, Any]:
        """How much of a growing step is asked for; a finished step that reached less goes on."""
        if step == "generate":
            return {"num_pairs": self.config.generate.num_pairs}
        if step == "label":
            return {"shards": fingerprint([shard.label_name for shard in self._shards()])}
        return {}

    def is_done(self, step: str) -> bool:
        marker = join(self.folder(step), "step.json")
        return exists(marker) and read_json(marker)["target"] == self._target(step)

    def plan(self, until: str | None = None) -> Iterator[tuple[str, str, str]]:
        """(step, "done" | "resume" | "run", folder) for each step, nothing changed. Where the folder of a step depends
        on what an unfinished one will give, it says after which."""
        unfinished = ""
        for step in self._until(until):
            if unfinished and step in ("label", "train-student", "evaluate"):
                yield step, "run", f"(known after {unfinished})"
                continue
            state = "done" if self.is_done(step) else "resume" if listdir(self.folder(step)) else "run"
            yield step, state, self.folder(step)
            if state != "done" and step in ("generate", "label", "train-student"):
                unfinished = step

    def _until(self, until: str | None) -> tuple[str, ...]:
        """A step and all that it needs, in order; everything without one."""
        if until is None:
            return self.steps
        if until not in STEPS:
            raise UserError(f"--until {until} is none of {', '.join(STEPS)}")
        if until not in self.steps:
            raise UserError(
                f"with label.engine={self.config.label.engine} no teacher is trained; set label.engine=transformers"
            )
        wanted = {until}
        for step in reversed(STEPS):
            if step in wanted:
                wanted.update(NEEDS[step])
        return tuple(step for step in self.steps if step in wanted)

    # Running

    def run(self, until: str | None = None) -> Outcome:
        """Run what is not done yet, up to a step. One driver at a time: the root is leased for as long as it takes."""
        steps = self._until(until)
        self._preflight(steps)
        outcome = Outcome()
        with Lease(self.root), contextlib.ExitStack() as stack:
            self._stack = stack
            for step in steps:
                folder = self.folder(step)
                if self.is_done(step):
                    summary = read_json(join(folder, "step.json"))["summary"]
                    self.say(f"{step}: done already, skipped ({folder})")
                else:
                    self.say(f"{step}: {'resuming' if listdir(folder) else 'running'} ({folder})")
                    summary = self._execute(step, folder)
                outcome.folders[step], outcome.summaries[step] = folder, summary
                outcome.failed_rows += int(summary.get("errors", 0))
                self._write_latest(outcome)
        return outcome

    def student(self) -> Path:
        """The student's model folder, as a local path; what it needs is run first."""
        outcome = self.run("train-student")
        return localize(join(outcome.folders["train-student"], "model"))

    def _preflight(self, steps: tuple[str, ...]) -> None:
        """Refuse what can be known to fail before hours are spent: a model name that does not resolve."""
        config = self.config
        names = [config.student.model] if "train-student" in steps else []
        if "train-teacher" in steps:
            members = config.teacher.members if config.teacher.kind == "ensemble" else [config.teacher]
            names += [member.model for member in members if member.kind != "bm25"]
        if "generate" in steps and config.generate.uses_dense:
            names.append(config.generate.dense_model)
        if "evaluate" in steps and "cosine" in config.evaluate.baselines:
            names.append(config.evaluate.cosine_model)
        for name in dict.fromkeys(names):
            resolve_model(name)

    def _execute(self, step: str, folder: str) -> dict[str, Any]:
        makedirs(folder)
        started = time.monotonic()
        runners: dict[str, Callable[[str], dict[str, Any]]] = {
            "prepare": self._prepare,
            "train-teacher": self._train_teacher,
            "generate": self._generate,
            "label": self._label,
            "train-student": self._train_student,
            "evaluate": self._evaluate,
        }
        summary = runners[step](folder)
        marker = {
            "step": step,
            "fingerprint": self.key(step),
            "target": self._target(step),
            "summary": summary,
            "seconds": round(time.monotonic() - started, 1),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        write_json(join(folder, "step.json"), marker)
        return summary

    def _write_latest(self, outcome: Outcome) -> None:
        latest: dict[str, str] = dict(outcome.folders)
        if "train-teacher" in latest:
            latest["teacher"] = join(latest["train-teacher"], "model")
        if "train-student" in latest:
            latest["student"] = join(latest["train-student"], "model")
        path = join(self.root, "latest.json")
        known = read_json(path) if exists(path) else {}
        write_json(path, {**known, **latest})

    # The steps

    def _ray(self) -> None:
        """Ray from here to the end of the run."""
        self._stack.enter_context(ray_session(self.config.resources.num_cpus))

    def _progress(self, description: str, total: int | None, unit: str) -> Progress:
        log = None if is_remote(self.root) else f"{self.root}/log.jsonl"
        return Progress(description, total, unit, log=log)

    def _work(self, step: str, folder: str) -> Path:
        """A local folder for checkpoints: within the step on disk, in the cache where the root is on S3."""
        work = Path(folder) / "work" if not is_remote(folder) else cache_folder() / "work" / f"{step}-{self.key(step)}"
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
        return localize(self.folder("prepare"))

    def _runner(self, name: str) -> Any:
        from relevance_ray.training.ray_train import ray_runner

        self._ray()
        resources = self.config.resources
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
        with self._progress("train-teacher", None, "steps") as progress, _model_in(folder, work) as model:
            return train_teacher(
                self.config.teacher,
                read_scale(prepared),
                str(prepared / "judged_groups.parquet"),
                partial(iter_products, prepared),
                model,
                work,
                self._runner("train-teacher"),
                on_progress=partial(_show_training, progress),
                label_smoothing=self.config.data.label_smoothing,
            )

    def _generate(self, folder: str) -> dict[str, Any]:
        from relevance_ray.generate.pipeline import generate

        self._ray()
        with self._progress("generate", self.config.generate.num_pairs, "pairs") as progress:
            return generate(
                self.config.generate,
                self.folder("prepare"),
                folder,
                num_workers=self.config.resources.generate_workers,
                progress=progress,
            )

    def _generated(self) -> dict[str, Any]:
        """What the generate step said of this run."""
        return dict(read_json(join(self.folder("generate"), "step.json"))["summary"])

    def _shards(self) -> list[Any]:
        """The shards of groups that this run asked for; a larger run before it may have left more."""
        from relevance_ray.labeling.pipeline import shards_to_label

        return shards_to_label(CommitLog(self.folder("generate")), self._generated()["shards"])

    def _label(self, folder: str) -> dict[str, Any]:
        from relevance_ray.data.prepare import read_scale
        from relevance_ray.engines.registry import open_engine
        from relevance_ray.labeling.pipeline import label

        shards = self._shards()
        model = join(self.folder("train-teacher"), "model") if self._trains_teacher else None
        resources = self.config.resources
        self._ray()
        with self._progress("label", sum(shard.num_pairs for shard in shards), "pairs") as progress:
            summary = label(
                shards,
                folder,
                self.key("label"),
                partial(open_engine, self.config.label, model, read_scale(self._prepared())),
                num_actors=resources.label_actors,
                num_cpus=resources.cpus_per_label_actor,
                num_gpus=resources.gpus_per_label_actor,
                progress=progress,
            )
        if summary["skipped"]:
            self.say(f"label: {summary['skipped']} of {summary['shards']} shards were labeled before and were skipped")
        return summary

    def _train_student(self, folder: str) -> dict[str, Any]:
        log = CommitLog(self.folder("label"))
        files = [log.path(shard.label_name) for shard in self._shards()]
        work = self._work("train-student", folder)
        return self._fit_student(self.config.student, folder, files, work, "train-student")

    def _fit_student(
        self, options: StudentOptions, folder: str, files: list[str] | None, work: Path, name: str
    ) -> dict[str, Any]:
        """Train a student on files of labeled groups, or, without any, on the human judgments alone."""
        from relevance_ray.data.prepare import read_scale
        from relevance_ray.training.student import train_student

        prepared = self._prepared()
        with self._progress(name, None, "steps") as progress, _model_in(folder, work) as model:
            return train_student(
                options,
                read_scale(prepared),
                files,
                str(prepared / "judged_groups.parquet"),
                model,
                work,
                self._runner(name),
                on_progress=partial(_show_training, progress),
            )

    def _human_only(self) -> Path:
        """The model folder of the same student on human labels alone: the baseline of every evaluation, kept for all
        that share it."""
        config = self.config
        options = replace(config.student, loss=config.evaluate.human_loss, fit=config.evaluate.human_fit)
        key = fingerprint("human-only", VERSIONS["train-student"], self.key("prepare"), semantic(options))
        folder = join(self.root, "evaluate-baselines", f"human_only-{key}")
        if not exists(join(folder, "step.json")):
            self.say(f"evaluate: training the same student on human labels alone ({folder})")
            work = Path(folder) / "work" if not is_remote(folder) else cache_folder() / "work" / f"human_only-{key}"
            work.mkdir(parents=True, exist_ok=True)
            summary = self._fit_student(options, folder, None, work, "human-only student")
            write_json(join(folder, "step.json"), {"fingerprint": key, "summary": summary})
        return localize(join(folder, "model"))

    def models(self) -> dict[str, Path]:
        """Model folders that `evaluate` compares, by name, in the order of the report; after a run all are there."""
        from relevance_ray.data.prepare import iter_products, read_judged, read_scale
        from relevance_ray.evaluation.baselines import build_baselines
        from relevance_ray.model_folder import read_model_info

        prepared = self._prepared()
        folders = {"student": localize(join(self.folder("train-student"), "model"))}
        if self._trains_teacher:
            folders["teacher"] = localize(join(self.folder("train-teacher"), "model"))
        folders["human_only"] = self._human_only()
        return folders | build_baselines(
            self.config.evaluate,
            partial(iter_products, prepared),
            read_judged(prepared, "dev"),
            read_scale(prepared),
            read_model_info(folders["student"]).template,
            self._work("evaluate", self.folder("evaluate")),
        )

    def _evaluate(self, folder: str) -> dict[str, Any]:
        from relevance_ray.data.prepare import read_judged, read_scale
        from relevance_ray.engines.transformers import load_pair_model
        from relevance_ray.evaluation.compare import evaluate_models
        from relevance_ray.evaluation.report import write_report

        models = {name: load_pair_model(path) for name, path in self.models().items()}
        judged, scale = read_judged(self._prepared()), read_scale(self._prepared())
        with self._progress("evaluate", None, "pairs") as progress:
            results = evaluate_models(judged, models, scale, self.config.evaluate, on_progress=progress.advance)
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
        teacher = config.teacher
        members = ", ".join(f"{member.kind} {member.model}" for member in teacher.members)
        labels = read_json(join(self.folder("label"), "step.json"))["summary"]
        return {
            "data": f"{config.data.format} {config.data.path or config.data.market_size}",
            "teacher": (
                f"ensemble of {members}"
                if members
                else f"{teacher.kind} {teacher.model}"
                if self._trains_teacher
                else f"none: labels from engine {config.label.engine}"
            ),
            "labeled pairs": f"{labels['pairs']:,} ({labels['errors']:,} failed)",
            "student": f"{config.student.kind} {config.student.model}, level weight {config.student.level_weight}",
            "root": self.root,
        }


@contextlib.contextmanager
def _model_in(folder: str, work: Path) -> Iterator[Path]:
    """Where training puts the model of a step folder: there at once on disk, by upload afterwards on S3."""
    if not is_remote(folder):
        yield Path(folder) / "model"
        return
    yield work / "model"
    publish_folder(work / "model", join(folder, "model"))


def _show_training(progress: Progress, record: dict[str, Any]) -> None:
    """A line of the training log on the live line."""
    shown: dict[str, Any] = {key: record[key] for key in ("part", "loss", "pairs_per_second") if key in record}
    if "dev" in record:
        shown["dev_ndcg"] = record["dev"]["ndcg"]
    progress.update(record["step"], total=record["steps"], **shown)
