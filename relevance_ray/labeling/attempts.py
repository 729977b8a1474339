"""How often a shard was tried, and the shards that were given up.

A try leaves its mark before it begins, since an engine that takes its process along leaves none afterwards. Marks are
those of one run: a driver that was killed says nothing against the shards it had in flight.
"""

from __future__ import annotations

import contextlib
import json
import uuid

from relevance_ray.storage import join, listdir, read_json, remove_file, remove_tree, write_json
from relevance_ray.whole_files import create_exclusive

MAX_ATTEMPTS = 3
"""A shard that failed so often is set aside and named, and the job goes on without it."""


class Attempts:
    """The tries of one run at the shards of a label folder.

    Args:
        folder: of the label step.
        run: any name that no other run has.
    """

    def __init__(self, folder: str, run: str) -> None:
        self._folder, self._run, self._marks = folder, run, join(folder, "attempts", run)

    def begin(self, shard: str) -> int | None:
        """The number of the try that may begin now, from 1; None once all are spent."""
        for number in range(1, MAX_ATTEMPTS + 1):
            mark = {"error": "", "token": uuid.uuid4().hex}
            if create_exclusive(self._mark(shard, number), json.dumps(mark).encode()):
                return number
        return None

    def fail(self, shard: str, number: int, error: str) -> None:
        """Write down why a try ended; where it cannot, the process is gone."""
        write_json(self._mark(shard, number), {"error": error})

    def end(self, shard: str, number: int) -> None:
        """Remove the marks of a shard that is done."""
        for spent in range(1, number + 1):
            remove_file(self._mark(shard, spent))

    def set_aside(self, shard: str) -> None:
        """Give a shard up, for the last reason known, until it is labeled on request."""
        reasons = []
        for number in range(1, MAX_ATTEMPTS + 1):
            # One that was taken for dead may have ended the shard meanwhile, and removed the marks.
            with contextlib.suppress(FileNotFoundError):
                reasons.append(read_json(self._mark(shard, number))["error"])
        reason = next((reason for reason in reversed(reasons) if reason), "the engine's process died each time")
        write_json(_failed(self._folder, shard), {"error": reason, "run": self._run})
        self.end(shard, MAX_ATTEMPTS)

    def set_open_aside(self, reason: str) -> None:
        """Give up every shard whose try has not ended."""
        for shard in sorted({name.rsplit(".", 2)[0] for name in listdir(self._marks)}):
            write_json(_failed(self._folder, shard), {"error": reason, "run": self._run})

    def excuse(self) -> None:
        """Blame none of the shards that this run gave up, nor one that an actor of it still gives up."""
        write_json(join(self._folder, "excused", f"{self._run}.json"), {})

    def _mark(self, shard: str, number: int) -> str:
        return join(self._marks, f"{shard}.{number}.json")


def shards_set_aside(folder: str) -> dict[str, str]:
    """Shard -> why, of those that were given up; one that was labeled since may still be among them."""
    names = [name.removesuffix(".json") for name in listdir(join(folder, "failed")) if name.endswith(".json")]
    records = {name: read_json(_failed(folder, name)) for name in names}
    excused = set(listdir(join(folder, "excused")))
    return {name: record["error"] for name, record in records.items() if f"{record['run']}.json" not in excused}


def take_back(folder: str, shard: str) -> None:
    """Forget that a shard was given up."""
    remove_file(_failed(folder, shard))


def sweep_marks(folder: str) -> None:
    """Remove what killed runs left; for the holder of the lease, before work starts."""
    remove_tree(join(folder, "attempts"))


def _failed(folder: str, shard: str) -> str:
    return join(folder, "failed", f"{shard}.json")
