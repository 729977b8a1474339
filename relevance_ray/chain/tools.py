"""What the work of every step has at hand: Ray, the live line, folders to work in, the prepared data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from relevance_ray.chain.folders import StepFolders
from relevance_ray.cluster.gauges import RunGauges
from relevance_ray.cluster.preflight import check_demands
from relevance_ray.cluster.session import ray_session
from relevance_ray.config import Config
from relevance_ray.object_log import ObjectLog
from relevance_ray.progress import Progress
from relevance_ray.storage import cache_folder, fingerprint, is_remote, localize

Say = Callable[[str], None]


class StepTools:
    """What the steps of one configuration share.

    Args:
        at: where each step is kept.
        say: told what takes long and has no line of its own.
        stack: closed when the run ends; Ray is opened on it by the first step that needs it.
    """

    def __init__(self, config: Config, at: StepFolders, say: Say, stack: contextlib.ExitStack) -> None:
        self.config, self.at, self.say, self._stack = config, at, say, stack
        self._gauges = RunGauges(at.root)
        self._log = ObjectLog(at.root) if is_remote(at.root) else f"{at.root}/log.jsonl"

    def ray(self, step: str) -> None:
        """Ray from here to the end of the run, which must be able to hold what a step wants at once."""
        resources = self.config.resources
        self._stack.enter_context(ray_session(resources.num_cpus, resources.custom()))
        for said in check_demands(
            resources.needed(step, self.config.generate.uses_llm), autoscaling=resources.autoscaling
        ):
            self.say(f"{step}: {said}")

    def progress(self, description: str, total: int | None, unit: str) -> Progress:
        return Progress(description, total, unit, log=self._log, on_shown=self._gauges)

    def work_folder(self, step: str, folder: str) -> Path:
        """A folder for this process: within the step on disk, in the cache where the root is on S3."""
        cached = cache_folder() / "work" / f"{step}-{fingerprint(folder)}"
        work = cached if is_remote(folder) else Path(folder) / "work"
        work.mkdir(parents=True, exist_ok=True)
        return work

    def prepared(self) -> Path:
        return localize(self.at.folder("prepare"))
