"""The JSON log of a run whose root is an object store, which cannot append.

The lines lie in objects that are rewritten whole, now and then; a full one is left as it is and the next begun. A log is no
part of the result: where it cannot be written, the run says so once and goes on.
"""

from __future__ import annotations

import sys
import time
import uuid

from relevance_ray.file_systems import StorageError
from relevance_ray.storage import join, listdir, read_bytes
from relevance_ray.whole_files import write_bytes

WRITE_SECONDS = 30.0
"""At most so often an object is written, besides at the end of each step."""

MAX_LINES = 1_000
"""Lines of one object."""


class ObjectLog:
    """The log of one run: a text stream to `Progress`, which closes it after each step and may go on writing.

    Args:
        root: the run's root; the objects are `log/<start of the run>-<a name of its own>-<number>.jsonl` under it.
    """

    def __init__(self, root: str) -> None:
        self._folder = join(root, "log")
        self._run = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:12]}"
        self._lines: list[str] = []
        self._number, self._written_lines, self._written_at = 0, 0, 0.0
        self._told = False

    def write(self, line: str) -> None:
        if len(self._lines) == MAX_LINES:
            self._put()
            self._lines, self._written_lines = [], 0
            self._number += 1
        self._lines.append(line)

    def flush(self) -> None:
        """Write what is new, unless the object was written a moment ago."""
        if time.monotonic() - self._written_at >= WRITE_SECONDS or not self._written_at:
            self._put()

    def close(self) -> None:
        """Write what is new."""
        self._put()

    def _put(self) -> None:
        if self._written_lines == len(self._lines):
            return
        place = join(self._folder, f"{self._run}-{self._number:05d}.jsonl")
        try:
            write_bytes(place, "".join(self._lines).encode())
            self._written_lines = len(self._lines)
        except (StorageError, FileNotFoundError) as error:
            if not self._told:
                sys.stderr.write(f"\nthe log cannot be written, and the run goes on without: {error}\n")
                self._told = True
        self._written_at = time.monotonic()


def newest_lines(root: str) -> bytes:
    """The newest object of the logs at a root; empty where there is none."""
    names = listdir(join(root, "log"))
    return read_bytes(join(root, "log", names[-1])) if names else b""
