"""What each step does in its folder: the options and folders of a configuration, given to the part that does the work."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from relevance_ray.chain.tools import StepTools
from relevance_ray.chain.trainings import TrainingWork
from relevance_ray.errors import UserError
from relevance_ray.model_folder import read_model_info
from relevance_ray.options import by_key, changed
from relevance_ray.storage import (
    CommitLog,
    is_remote,
    join,
    localize,
    makedirs,
    publish_folder,
    read_json,
    remove_if_empty,
    write_json,
    write_table,
)


class StepWork:
    """Does the steps of one configuration."""

    def __init__(self, tools: StepTools) -> None:
        self.tools, self.config, self.at = tools, tools.config, tools.at
        self.training = TrainingWork(tools)

    def run(self, step: str, folder: str, retry: bool = False) -> dict[str, Any]:
        """Do a step, and mark it done by its `step.json`; the summary that stands there."""
        makedirs(folder)
        started = time.monotonic()
        runners: dict[str, Callable[[str], dict[str, Any]]] = {
            "prepare": self._prepare,
            "train-teacher": self.training.train_teacher,
            "generate": self._generate,
            "label": partial(self._label, retry=retry),
            "train-student": self.training.train_student,
            "evaluate": self._evaluate,
            "compact": self._compact,
            "embed": self._embed,
        }
        try:
            summary = runners[step](folder)
        except BaseException:
            remove_if_empty(folder)
            raise
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

    def check_given(self, steps: Collection[str]) -> None:
        """Refuse what does not fit the prepared data before any of the steps after `prepare`: models of other grades, files
        of scores of other pairs, a calibration that takes more judgments."""
        from relevance_ray.data.prepare import read_judged, read_scale
        from relevance_ray.evaluation.given_scores import GivenScores

        method = self.config.student.calibration
        if method != "ordinal" and "train-student" in steps:
            from relevance_ray.training.finish import check_dev_queries

            check_dev_queries(str(self.tools.prepared() / "judged_groups.parquet"), method)
        models = self.config.given_models(steps)
        files = self.config.evaluate.scores if "evaluate" in steps else {}
        if not models and not files:
            return
        scale = read_scale(self.tools.prepared())
        for name, path in files.items():
            judged = [read_judged(self.tools.prepared(), split) for split in self.config.evaluate.splits]
            GivenScores(localize(path), scale).check(judged, f"evaluate.scores.{name} {path}")
        for key, model in models.items():
            given = read_model_info(model).scale
            if (given.grades, given.gains) != (scale.grades, scale.gains):
                raise UserError(
                    f"{key} {model} grades {', '.join(given.grades)} with gains {list(given.gains)}, the data "
                    f"{', '.join(scale.grades)} with {list(scale.gains)}; give a model of the same scale"
                )

    def _prepare(self, folder: str) -> dict[str, Any]:
        from relevance_ray.data.prepare import prepare

        local = self.tools.work_folder("prepare", folder) if is_remote(folder) else Path(folder)
        with self.tools.progress("prepare", None, "products") as progress:
            summary = prepare(self.config.data, local, progress)
        if untitled := summary["products_without_title"]:
            self.tools.say(f"prepare: {untitled:,} of {summary['products']:,} products have no title")
        if dropped := _about_dropped(summary):
            self.tools.say(f"prepare: {dropped}; {'; '.join(summary['of_another_grade']['first'])}".rstrip("; "))
        if is_remote(folder):
            publish_folder(local, folder)
        return summary

    def _generate(self, folder: str) -> dict[str, Any]:
        from relevance_ray.generate.index.catalog_index import latest_vectors
        from relevance_ray.generate.pipeline import generate

        resources, index = self.config.resources, self.at.index()
        self.tools.ray("generate")
        with self.tools.progress("generate", self.config.generate.num_pairs, "pairs") as progress:
            summary = generate(
                self.config.generate,
                self.at.folder("prepare"),
                folder,
                index_dir=index,
                earlier_index=latest_vectors(self.at.root, index, self.config.generate),
                workers=resources.generators,
                search_actors=resources.search_actors,
                writers=resources.writers,
                progress=progress,
            )
        if refused := summary["left_out"]["refused"]:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in Counter(refused).most_common())
            self.tools.say(
                f"generate: {sum(refused.values()):,} answers of the language model were refused ({reasons})"
            )
        return summary

    def _label(self, folder: str, retry: bool) -> dict[str, Any]:
        from relevance_ray.data.prepare import read_scale
        from relevance_ray.engines.registry import open_engine
        from relevance_ray.labeling.pipeline import label

        shards = self.at.shards()
        model = self.at.teacher()
        resources = self.config.resources
        scale, smoothing = read_scale(self.tools.prepared()), self.config.data.label_smoothing
        factory = partial(open_engine, self.config.label, model, scale, smoothing)
        if model is None:
            factory()  # out of an actor, what the user must mend in a file of labels would be no `UserError` any more
        self.tools.ray("label")
        with self.tools.progress("label", sum(shard.num_pairs for shard in shards), "pairs") as progress:
            summary = label(
                shards,
                folder,
                self.at.key("label"),
                factory,
                workers=resources.labelers,
                progress=progress,
                retry=retry,
                no_progress_seconds=60 * resources.no_progress_minutes,
            )
        if summary["skipped"]:
            self.tools.say(
                f"label: {summary['skipped']} of {summary['shards']} shards were labeled before and were skipped"
            )
        if summary["reused"]:
            self.tools.say(
                f"label: {summary['reused']:,} pairs were labeled in earlier shards, and their labels taken over"
            )
        return summary

    def _compact(self, folder: str) -> dict[str, Any]:
        from relevance_ray.labeling.compact_pipeline import in_ray_tasks
        from relevance_ray.labeling.compaction import Do, Part, compact, in_turn

        def run(do: Do, parts: Sequence[Part]) -> Iterator[int]:
            if len(parts) < 2:
                return in_turn(do, parts)
            self.tools.ray("compact")
            return in_ray_tasks(do, parts)

        with self.tools.progress("compact", None, "pairs") as progress:
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
        from relevance_ray.student.vectors_pipeline import export_vectors

        resources = self.config.resources
        self.tools.ray("embed")
        with self.tools.progress("embed", None, "products") as progress:
            return export_vectors(
                join(self.at.folder("train-student"), "model"),
                self.at.folder("prepare"),
                folder,
                self.at.key("embed"),
                resources.labelers,
                progress,
            )

    def _evaluate(self, folder: str) -> dict[str, Any]:
        from relevance_ray.chain.report import write_run_report
        from relevance_ray.data.prepare import read_judged, read_scale, read_whole_log
        from relevance_ray.engines.registry import load_pair_model
        from relevance_ray.evaluation.ask import Asked
        from relevance_ray.evaluation.evaluate import evaluate_models
        from relevance_ray.evaluation.given_scores import GivenScores
        from relevance_ray.evaluation.slices import SliceContext

        prepared = self.tools.prepared()
        judged, scale = read_judged(prepared), read_scale(prepared)
        dev, method = read_judged(prepared, "dev"), self.config.student.calibration
        scores = {
            name: GivenScores(localize(path), scale, dev, method) for name, path in self.config.evaluate.scores.items()
        }
        models: dict[str, Asked] = {name: load_pair_model(path) for name, path in self.training.models().items()}
        with self.tools.progress("evaluate", None, "pairs") as progress:
            results = evaluate_models(
                judged,
                {**models, **scores},
                scale,
                self.config.evaluate,
                on_progress=progress.advance,
                on_predictions=partial(write_table, join(folder, "predictions.parquet")),
                context=SliceContext.of(read_whole_log(prepared), read_judged(prepared, "train")),
                others=("teacher", *(scores or ("bm25",))),  # what the shop ranks by, or what stands for it
            )
        results["settings"] = by_key({key: value for key, value in changed(self.config).items() if key != "storage"})
        return {
            "report": write_run_report(self.at, results, self._about()),
            "splits": {
                split: {name: model["metrics"] for name, model in found["models"].items()}
                for split, found in results["splits"].items()
            },
        }

    def _about(self) -> dict[str, str]:
        config = self.config
        labels = read_json(join(self.at.folder("label"), "step.json"))["summary"]
        prepared = read_json(join(self.at.folder("prepare"), "step.json"))["summary"]
        data = [f"{config.data.format} {config.data.path or config.data.market_size}", _about_dropped(prepared)]
        return {
            "data": ", ".join(filter(None, data)),
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


def _about_dropped(prepared: Mapping[str, Any]) -> str:
    """What was done about judgments that cannot all be used; "" where they can."""
    told = []
    if repeated := prepared["repeated_judgments_dropped"]:
        conflicts = prepared.get("of_another_grade", {}).get("count", 0)
        told.append(
            f"{repeated:,} judgments repeat a pair and were dropped, {conflicts:,} of them with another grade than the first"
        )
    if leaking := prepared["leaking_judgments_dropped"]:
        told.append(f"{leaking:,} train judgments were dropped: their queries nearly equal ones of dev or test")
    return "; ".join(told)
