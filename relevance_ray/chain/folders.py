"""Where each step of a configuration is kept, and whether it is done.

A step's folder is named after everything that decides its result, so that a finished step is skipped, a half-done one
resumes in its folder, and a changed one is redone beside the old. Generation and labeling grow instead: how many pairs
are asked for is no part of their fingerprint, and what is there is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from relevance_ray.config import Config
from relevance_ray.data.readers import files_read
from relevance_ray.errors import UserError
from relevance_ray.generate.index.catalog_index import index_options
from relevance_ray.generate.queries.store import file_contents
from relevance_ray.labeling.pipeline import Shard, shards_to_label
from relevance_ray.options import semantic
from relevance_ray.storage import CommitLog, content_id, exists, fingerprint, is_remote, join, listdir, read_json

VERSIONS = {"prepare": 3, "train-teacher": 3, "generate": 5, "label": 1, "train-student": 1, "evaluate": 5}
"""Raised when a step's code comes to give other results from the same input."""

STEPS = tuple(VERSIONS)

ON_DEMAND = {"compact": 1, "embed": 1}
"""Steps, with their versions, that are done only where they are asked for by name."""

ALL_STEPS = VERSIONS | ON_DEMAND

NEEDS_JUDGMENTS = ("train-teacher", "train-student", "evaluate")

NEEDS = {
    "prepare": (),
    "train-teacher": ("prepare",),
    "generate": ("prepare",),
    "label": ("train-teacher", "generate"),
    "train-student": ("label",),
    "evaluate": ("train-student",),
    "compact": ("label",),
    "embed": ("train-student",),
}
"""What must be there before a step; without a teacher to train, `train-teacher` falls out."""


class StepFolders:
    """The folders of one configuration's steps at its root.

    Attributes:
        root: the root, absolute or s3://.
        steps: the steps that this configuration has, in order.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        root = config.storage.root.removeprefix("file://").rstrip("/")
        self.root = root if is_remote(root) else str(Path(root).absolute())
        self.trains_teacher = config.label.runs_teacher and not config.label.model
        self.steps = tuple(step for step in STEPS if step != "train-teacher" or self.trains_teacher)
        self._keys: dict[str, str] = {}

    def key(self, step: str) -> str:
        """The fingerprint of a step. That of `train-student` is known once its labels are there."""
        if step not in self._keys:
            self._keys[step] = fingerprint(step, ALL_STEPS[step], *self._inputs(step))
        return self._keys[step]

    def _inputs(self, step: str) -> list[Any]:
        config = self.config
        if step == "prepare":
            return [semantic(config.data), [content_id(path) for path in files_read(config.data)]]
        if step == "train-teacher":
            return [self.judged_key(), semantic(config.teacher)]
        if step == "generate":
            return [self.key("prepare"), semantic(config.generate), file_contents(config.generate)]
        if step == "label":
            if self.trains_teacher:
                return [self.key("train-teacher"), semantic(config.label)]
            if config.label.model:
                return [content_id(config.label.model), semantic(config.label)]
            file = content_id(config.label.path) if config.label.path else ""
            read = ("format", "scale", "label_smoothing") if file else ("format", "scale")
            meaning = [semantic(config.data)[name] for name in read]
            return [semantic(config.label), file, *meaning]
        if step == "train-student":
            records = CommitLog(self.folder("label")).committed()
            labels = [records[name]["checksum"] for name in self.labeled_shards()]
            return [self.key("prepare"), semantic(config.student), labels]
        if step == "compact":  # one generate's labels at one layout, however many; the label folder holds those of many
            return [self.key("label"), self.key("generate"), config.label.compact_mb]
        if step == "embed":
            return [self.key("prepare"), self.key("train-student")]
        labeler = content_id(config.label.model) if config.label.model else ""
        teacher = self.key("train-teacher") if self.trains_teacher else labeler
        given = config.evaluate.models | config.evaluate.scores
        others = [[name, content_id(path)] for name, path in given.items()]
        return [self.key("prepare"), self.key("train-student"), teacher, others, semantic(config.evaluate)]

    def judged_key(self) -> str:
        """The fingerprint of the human judgments with their products, known once `prepare` is done. A teacher hangs on
        it and not on the rest of the catalog, so a product more does not make all labels anew; BM25 within a teacher
        keeps the word counts of the catalog it was trained beside."""
        judged = read_json(join(self.folder("prepare"), "step.json"))["summary"]["judged_content"]
        return fingerprint(judged, self.config.data.label_smoothing)

    def folder(self, step: str) -> str:
        return join(self.root, f"{step}-{self.key(step)}")

    def index(self) -> str:
        """The folder of the catalog's index, which other quotas, queries and numbers of pairs share."""
        key = fingerprint("index", VERSIONS["generate"], self.key("prepare"), index_options(self.config.generate))
        return join(self.root, f"index-{key}")

    def teacher(self) -> str | None:
        """The model folder that labels: the one trained here, the one given, or none."""
        return join(self.folder("train-teacher"), "model") if self.trains_teacher else self.config.label.model or None

    def target(self, step: str) -> dict[str, Any]:
        """How much of a growing step is asked for; a finished step that reached less goes on."""
        if step == "generate":
            return {"num_pairs": self.config.generate.num_pairs}
        if step == "label":
            return {"shards": fingerprint([shard.label_name for shard in self.shards()])}
        if step == "compact":
            records = CommitLog(self.folder("label")).committed()
            return {"labels": fingerprint([[name, records[name]["checksum"]] for name in self.labeled_shards()])}
        return {}

    def is_done(self, step: str) -> bool:
        marker = join(self.folder(step), "step.json")
        return exists(marker) and read_json(marker)["target"] == self.target(step)

    def plan(self, until: str | None = None) -> Iterator[tuple[str, str, str]]:
        """(step, "done" | "resume" | "run", folder) for each step, nothing changed. Where the folder of a step depends
        on what an unfinished one will give, it says after which."""
        unfinished = ""
        for step in self.until(until):
            if unfinished and not (unfinished == "prepare" and step == "generate"):
                yield step, "run", f"(known after {unfinished})"
                continue
            state = "done" if self.is_done(step) else "resume" if listdir(self.folder(step)) else "run"
            yield step, state, self.folder(step)
            if state != "done" and step in ("prepare", "generate", "label", "train-student"):
                unfinished = step

    def until(self, until: str | None) -> tuple[str, ...]:
        """A step and all that it needs, in order; everything without one."""
        if until is None:
            return self.steps
        if until not in ALL_STEPS:
            raise UserError(f"--until {until} is none of {', '.join(ALL_STEPS)}")
        if until not in (*self.steps, *ON_DEMAND):
            raise UserError(
                "no teacher is trained where label.model names one, or with an engine that is none of ours; "
                "set label.engine=transformers and no label.model"
            )
        wanted = {until}
        for step in reversed(ALL_STEPS):
            if step in wanted:
                wanted.update(NEEDS[step])
        return tuple(step for step in (*self.steps, *ON_DEMAND) if step in wanted)

    def labeled_shards(self) -> list[str]:
        """Names of the shards of this run that have labels: all but those set aside."""
        records = CommitLog(self.folder("label")).committed()
        return [shard.label_name for shard in self.shards() if shard.label_name in records]

    def _generated(self) -> dict[str, Any]:
        """What the generate step said of this run."""
        return dict(read_json(join(self.folder("generate"), "step.json"))["summary"])

    def shards(self) -> list[Shard]:
        """The shards of groups that this run asked for; a larger run before it may have left more."""
        return shards_to_label(CommitLog(self.folder("generate")), self._generated()["shards"])
