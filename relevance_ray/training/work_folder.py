"""Where a loop keeps checkpoints, log and result: a folder on disk, or one of a store with a copy on worker 0's disk.

Of a store, what changed goes up after each checkpoint, and what makes others count goes last: a checkpoint without its
state, or a loop without its result, is none. A worker 0 that begins, on whatever machine, begins with what is up.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from relevance_ray.storage import absolute, cache_folder, exists, fingerprint, is_remote, join, opened, remove_file
from relevance_ray.training.checkpoint import STATE_FILE

_LAST = (STATE_FILE, "result.json")


class WorkFolder:
    """One loop's.

    Args:
        path: local or s3://.

    Attributes:
        path: absolute.
        local: where worker 0 reads and writes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = absolute(path)
        self._is_remote = is_remote(self.path)
        self.local = cache_folder() / "work" / fingerprint(self.path) if self._is_remote else Path(self.path)
        self._saved: dict[str, tuple[int, int]] = {}

    def open(self) -> None:
        """Have the folder here as it was last saved."""
        if self._is_remote:
            shutil.rmtree(self.local, ignore_errors=True)
            if exists(self.path):
                with opened(self.path) as (fs, inner):
                    fs.get(inner.rstrip("/") + "/", f"{self.local}/", recursive=True)
        self.local.mkdir(parents=True, exist_ok=True)
        for folder in (self.local / "checkpoints").glob("step-*"):
            if not (folder / STATE_FILE).exists():
                shutil.rmtree(folder)
        self._saved = self._files()

    def save(self) -> None:
        """Keep what is here now."""
        if not self._is_remote:
            return
        now = self._files()
        changed = [name for name, state in now.items() if self._saved.get(name) != state]
        for name in sorted(changed, key=lambda name: (name.endswith(_LAST), name)):
            with opened(self.path) as (fs, inner):
                fs.put_file(str(self.local / name), f"{inner.rstrip('/')}/{name}")
        for name in sorted(self._saved.keys() - now.keys()):
            remove_file(join(self.path, name))
        self._saved = now

    def _files(self) -> dict[str, tuple[int, int]]:
        """Size and time of change of each file, by its name within the folder."""
        found = {}
        for file in self.local.rglob("*"):
            if file.is_file():
                at = file.stat()
                found[file.relative_to(self.local).as_posix()] = (at.st_size, at.st_mtime_ns)
        return found
