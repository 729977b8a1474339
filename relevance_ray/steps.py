"""The chain of steps, in which order, and what it leaves.

The folder of a step, and whether it is done, is `chain.folders`' business; what a step does there is `chain.work`'s. Here a
step that is not done is run, under a lease on the root.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relevance_ray.chain.folders import NEEDS_JUDGMENTS, StepFolders
from relevance_ray.chain.run_state import begin_run, begin_step
from relevance_ray.chain.tools import Say, StepTools
from relevance_ray.chain.work import StepWork
from relevance_ray.cluster.preflight import check_demands
from relevance_ray.config import Config
from relevance_ray.engines.registry import check_engine, check_generator
from relevance_ray.errors import UserError
from relevance_ray.lease import Lease
from relevance_ray.model_folder import read_model_info
from relevance_ray.models import check_layers, resolve_model
from relevance_ray.storage import (
    check_reachable,
    exists,
    is_remote,
    join,
    listdir,
    localize,
    read_json,
    remove_tree,
    write_json,
)
from relevance_ray.training.options import StudentOptions, TeacherOptions

if TYPE_CHECKING:
    import pyarrow as pa


def print_at_once(line: str) -> None:
    """Print, also into a file, before the step that the line is about."""
    print(line, flush=True)


@dataclass
class Outcome:
    """What a run of the chain left: each step's folder and summary, and how many rows and whole shards failed."""

    folders: dict[str, str] = field(default_factory=dict)
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed_rows: int = 0
    failed_shards: int = 0

    def add(self, step: str, folder: str, summary: dict[str, Any]) -> None:
        self.folders[step], self.summaries[step] = folder, summary
        self.failed_rows += int(summary.get("errors", 0))
        self.failed_shards += len(summary.get("set_aside", {}))


class Chain:
    """Runs the steps of one configuration.

    Attributes:
        at: where each step is kept.
    """

    def __init__(self, config: Config, say: Say = print_at_once) -> None:
        self.config = config
        self.at = StepFolders(config)
        self.say = say

    def run(self, until: str | None = None) -> Outcome:
        """Run what is not done yet, up to a step. One driver at a time: the root is leased for as long as it takes."""
        steps = self.at.until(until)
        self.preflight(until)
        outcome = Outcome()
        with self._at_work() as work:
            begin_run(self.at.root, self.config)
            for step in steps:
                folder = self.at.folder(step)
                begin_step(self.at.root, step, folder)
                if self.at.is_done(step):
                    summary = read_json(join(folder, "step.json"))["summary"]
                    self.say(f"{step}: done already, skipped ({folder})")
                else:
                    self.say(f"{step}: {'resuming' if listdir(folder) else 'running'} ({folder})")
                    summary = work.run(step, folder)
                outcome.add(step, folder, summary)
                self._write_latest(outcome)
                if step == "prepare":
                    work.check_given(steps)
        return outcome

    def retry_failed(self) -> Outcome:
        """Label again what failed, and only that: the failed rows of labeled shards, and the shards set aside."""
        outcome = Outcome()
        if not self.at.is_done("generate") or not self.at.is_done("label"):
            raise UserError(f"labeling at {self.at.root} is not finished yet; run the configuration first")
        folder = self.at.folder("label")
        with self._at_work() as work:
            remove_tree(join(folder, "step.json"))  # killed from here on, the step is a half-done one
            outcome.add("label", folder, work.run("label", folder, retry=True))
        return outcome

    def measure_scaling(
        self, seeds: int = 1, num_sizes: int = 5, held_out: pa.Table | None = None
    ) -> tuple[dict[str, Any], str]:
        """The scaling curve of the labels that are there (`chain.scaling.measure_scaling`)."""
        from relevance_ray.chain.report import refresh_run_report
        from relevance_ray.chain.scaling import measure_scaling

        if not self.at.is_done("prepare") or not self.at.is_done("generate") or not self.at.is_done("label"):
            raise UserError(f"labeling at {self.at.root} is not finished yet; run the configuration first")
        with self._at_work() as work:
            found = measure_scaling(work.training, seeds=seeds, num_sizes=num_sizes, held_out=held_out)
            refresh_run_report(self.at)
        return found

    def measure_diversity(self) -> tuple[dict[str, Any], str]:
        """How diverse the generated pairs are (`chain.diversity.report_diversity`); what it needs is run first."""
        from relevance_ray.chain.diversity import report_diversity
        from relevance_ray.chain.report import refresh_run_report

        self.run("generate")
        with self._at_work() as work, work.tools.progress("diversity", None, "pairs") as progress:
            found = report_diversity(self.at, progress)
            refresh_run_report(self.at)
        return found

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[StepWork]:
        """The lease on the root, and whatever steps open until the run ends."""
        with Lease(self.at.root), contextlib.ExitStack() as stack:
            yield StepWork(StepTools(self.config, self.at, self.say, stack))

    def student(self) -> str:
        """The student's model folder; what it needs is run first."""
        return join(self.run("train-student").folders["train-student"], "model")

    def newest_student(self) -> str:
        """The student that was trained last at this root, by whatever configuration; nothing is run."""
        latest = join(self.at.root, "latest.json")
        found = read_json(latest).get("student") if exists(latest) else None
        if found is None:
            raise UserError(f"{self.at.root} holds no student; run the configuration first")
        return str(found)

    def prepared(self) -> Path:
        """The prepared folder, as a local path; it must be there."""
        return localize(self.at.folder("prepare"))

    def preflight(self, until: str | None = None) -> None:
        """Refuse what can be known to fail before hours are spent: a model that does not resolve or has too few layers, a
        file that is not there, a root that cannot be reached or lies among the data that a fingerprint is of, resources that
        Ray does not have, an endpoint without its key."""
        config, steps = self.config, self.at.until(until)
        if config.data.path and _lies_within(self.at.root, config.data.path):
            raise UserError(
                f"storage.root {config.storage.root} lies within data.path {config.data.path}, so each run would change "
                "its own data; choose a folder elsewhere"
            )
        needs = next((step for step in steps if step in NEEDS_JUDGMENTS), None)
        if needs and not config.data.is_judged:
            raise UserError(
                f"data.judgments is none, and {needs} learns from judgments or measures by them; ask for a step before it, "
                "or name a file of judgments (label.model labels with a teacher that is there)"
            )
        if "embed" in steps and config.student.kind != "two_tower":
            raise UserError(f"student.kind {config.student.kind} has no vectors; set student.kind=two_tower")
        if "train-student" in steps and self.at.trains_teacher:
            _check_objective(config.student, config.teacher)
        files = {
            **{f"generate.{key}": path for key, path in config.generate.files.items()},
            "label.path": config.label.path,
            **{f"evaluate.scores.{name}": path for name, path in config.evaluate.scores.items()},
        }
        for key, path in files.items():
            if path and key.split(".")[0] in steps and not exists(path):
                raise UserError(f"{key} {path} does not exist; name the file")
        for key, path in config.given_models(steps).items():
            if not exists(path):
                raise UserError(f"{key} {path} does not exist; name the folder")
            read_model_info(path)
        members = config.teacher.members or [config.teacher]
        if config.label.engine == "vllm" and self.at.trains_teacher and all(m.kind != "classifier" for m in members):
            raise UserError("label.engine=vllm runs classifiers, and teacher has none; set label.engine=transformers")
        split, gpus = config.label.vllm.num_workers(), config.resources.gpus_per_label_actor
        if "label" in steps and split > max(1, gpus):
            raise UserError(
                f"label.vllm.engine_args share a teacher out over {split} GPUs, and resources.gpus_per_label_actor is "
                f"{gpus:g}; set it to {split}, on nodes that have so many"
            )
        check_reachable(self.at.root)
        pending = {step for step, state, _ in self.at.plan(until) if state != "done"}
        needed = (config.resources.needed(step, config.generate.uses_llm) for step in steps if step in pending)
        demands = [demand for step_demands in needed for demand in step_demands]
        check_demands(demands, config.resources.num_cpus, autoscaling=config.resources.autoscaling)
        if "generate" in pending and config.generate.uses_llm:
            check_generator(config.generate.llm, "generate.llm")
        if "label" in pending:
            check_engine(config.label)
        for model, num_layers in self._models(steps):
            check_layers(model, resolve_model(model), num_layers)
        if "train-teacher" in pending:
            from relevance_ray.engines.query_likelihood import check_query_likelihood

            for member in members:
                if member.kind == "query_likelihood":
                    check_query_likelihood(member.model, resolve_model(member.model), member.max_tokens)

    def _models(self, steps: tuple[str, ...]) -> Iterator[tuple[str, int | None]]:
        """The models that some steps start from, and how many of their layers are kept."""
        config = self.config
        if "train-student" in steps:
            yield config.student.model, config.student.num_layers
        if "train-teacher" in steps:
            members = config.teacher.members if config.teacher.kind == "ensemble" else [config.teacher]
            yield from ((member.model, member.num_layers) for member in members if member.kind != "bm25")
        if "generate" in steps and config.generate.uses_dense:
            yield config.generate.dense_model, None
        if "evaluate" in steps and "cosine" in config.evaluate.baselines:
            yield config.evaluate.cosine_model, None

    def _write_latest(self, outcome: Outcome) -> None:
        latest: dict[str, str] = dict(outcome.folders)
        if "train-teacher" in latest:
            latest["teacher"] = join(latest["train-teacher"], "model")
        if "train-student" in latest:
            latest["student"] = join(latest["train-student"], "model")
        path = join(self.at.root, "latest.json")
        known = read_json(path) if exists(path) else {}
        kept = {name: place for name, place in known.items() if self.at.trains_teacher or "teacher" not in name}
        write_json(path, {**kept, **latest})


def _lies_within(root: str, folder: str) -> bool:
    if is_remote(root) != is_remote(folder):
        return False
    if is_remote(root):
        return f"{root.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")
    return Path(root).resolve().is_relative_to(Path(folder).resolve())


def _check_objective(student: StudentOptions, teacher: TeacherOptions) -> None:
    """Refuse what a student cannot learn from the labels of a teacher."""
    single = teacher.kind == "classifier" and teacher.num_classes == "single"
    as_it_is = teacher.kind in ("bi_encoder", "query_likelihood")
    if student.kl_weight and student.human_share and (single or as_it_is):
        raise UserError(
            "student.kl_weight cannot mix human judgments, which have the classes of the scale, with labels of this "
            "teacher, which have two; set student.human_share to 0, or teacher.kind to ensemble or classifier"
        )
    asked = {
        "student.margins=differing": student.margins == "differing",
        "student.bce_weight": student.bce_weight > 0,
        "student.infonce_weight": student.infonce_weight > 0,
    }
    if as_it_is and (key := next((key for key, is_asked in asked.items() if is_asked), "")):
        raise UserError(
            f"{key} asks which products are relevant, and the logits of teacher.kind {teacher.kind} only rank them; make "
            "it the one member of teacher.kind ensemble, which learns that from the judgments"
        )
