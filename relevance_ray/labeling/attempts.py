"""How often a shard was tried, and the shards that were given up.

A try leaves its mark before it begins, since an engine that takes its process along leaves none afterwards. Marks are
those of one run: a driver that was killed says nothing against the shards it had in flight.
"""

from __future__ import annotations

import json
from typing import Any

from relevance_ray.storage import create_exclusive, exists, join, listdir, read_json, remove_tree, write_json

MAX_ATTEMPTS = 3
"""A shard that failed so often is set aside and named, and the job goes on without it."""


class Attempts:
    """The tries of one run at the shards of a label folder.

    Args:
        folder: of the label step.
        run: any name that no other run has.
    """

    def __init__(self, folder: str, run: str) -> None:
        self._folder, self._marks = folder, join(folder, "attempts", run)

    def begin(self, shard: str) -> int | None:
        """The number of the try that may begin now, from 1; None once all are spent."""
        for number in range(1, MAX_ATTEMPTS + 1):
            if create_exclusive(self._mark(shard, number), json.dumps({"error": ""}).encode()):
                return number
        return None

    def fail(self, shard: str, number: int, error: str) -> None:
        """Write down why a try ended; where it cannot, the process is gone."""
        write_json(self._mark(shard, number), {"error": error})

    def end(self, shard: str, number: int) -> None:
        """Remove the marks of a shard that is done."""
        for spent in range(1, number + 1):
            remove_tree(self._mark(shard, spent))

    def set_aside(self, shard: str) -> str:
        """Give a shard up until `retry`; returns the last reason known."""
        reasons = [read_json(self._mark(shard, number))["error"] for number in range(1, MAX_ATTEMPTS + 1)]
        reason = next((reason for reason in reversed(reasons) if reason), "the engine's process died each time")
        write_json(join(self._folder, "failed", f"{shard}.json"), {"error": reason, "attempts": MAX_ATTEMPTS})
        self.end(shard, MAX_ATTEMPTS)
        return reason

    def _mark(self, shard: str, number: int) -> str:
        return join(self._marks, f"{shard}.{number}.json")


def shards_set_aside(folder: str) -> dict[str, str]:
    """Shard -> why, of those that were given up."""
    names = [name for name in listdir(join(folder, "failed")) if name.endswith(".json")]
    return {name.removesuffix(".json"): str(_read(join(folder, "failed", name))["error"]) for name in names}


def take_back(folder: str) -> None:
    """Forget what was given up and every mark, so that all of it is tried again; for the holder of the lease."""
    for part in ("failed", "attempts"):
        if exists(join(folder, part)):
            remove_tree(join(folder, part))


def _read(path: str) -> dict[str, Any]:
    return dict(read_json(path))
