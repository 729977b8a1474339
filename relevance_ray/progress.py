"""One live line for long work, and the same as JSON lines.

On a terminal the line is rewritten in place; elsewhere (a log file, `ray job logs`) one appears every ten seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TextIO

TTY_SECONDS, PLAIN_SECONDS = 0.2, 10.0
"""How often the line is shown at most."""

TTY_BEAT_SECONDS, PLAIN_BEAT_SECONDS = 1.0, 30.0
"""After how long it is shown again where nothing new is known: whoever looks sees that the work goes on."""


def memory_used() -> int:
    """Bytes of main memory that this process holds, its share of what it shares included (PSS where the system tells it,
    else the resident set)."""
    try:
        with open("/proc/self/smaps_rollup", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class Log(Protocol):
    """Where the JSON lines go; an open text file is one."""

    def write(self, line: str, /) -> object: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Progress:
    """Counts `done` of `total` and shows rate, failures and time left.

    Args:
        description: what is being done, at the head of the line.
        total: how many units in all; without it no share and no time left are shown.
        unit: what is counted ("pairs", "groups").
        log: a local file, or any `Log`, that gets one JSON line for each line shown.
        on_shown: called with what each line shows, as the log has it, and whether it is the last.
    """

    def __init__(
        self,
        description: str,
        total: int | None = None,
        unit: str = "pairs",
        log: str | os.PathLike[str] | Log | None = None,
        stream: TextIO | None = None,
        on_shown: Callable[[Mapping[str, Any], bool], object] | None = None,
    ) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done, self.failures, self.extra = 0, 0, {}  # type: int, int, dict[str, Any]
        self._stream, self._on_shown = stream or sys.stderr, on_shown
        self.already_done = 0
        self._start = time.monotonic()
        self._last = 0.0
        self._width = 0
        self._showing, self._ended = threading.Lock(), threading.Event()
        self._log: Log | None = None
        if log is not None and not isinstance(log, str | os.PathLike):
            self._log = log
        elif log is not None:
            os.makedirs(os.path.dirname(os.path.abspath(log)), exist_ok=True)
            self._log = open(log, "a", encoding="utf-8")  # noqa: SIM115 (closed with the line)

    def __enter__(self) -> Progress:
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._ended.set()
        with self._showing:
            self._end(kind)

    def _end(self, kind: object) -> None:
        if kind is None:
            self._show(final=True)
        elif self._width:
            self._stream.write("\n")  # what is said of the failure begins on a line of its own
        if self._log is not None:
            self._log.close()

    def restart(self, already_done: int = 0) -> None:
        """Count rate and time left from now: another part begins, or it turned out how much was done before."""
        self.done = self.already_done = already_done
        self._start = time.monotonic()

    def update(
        self, done: int | None = None, *, failures: int | None = None, total: int | None = None, **extra: Any
    ) -> None:
        """Set what is known now: units done in all (not since last time), failures in all, and more to show (None: no
        longer)."""
        self.done = self.done if done is None else done
        self.failures = self.failures if failures is None else failures
        self.total = self.total if total is None else total
        self.extra = {key: value for key, value in (self.extra | extra).items() if value is not None}
        interval = TTY_SECONDS if self._stream.isatty() else PLAIN_SECONDS
        with self._showing:
            if time.monotonic() - self._last >= interval:
                self._show()

    def advance(self, count: int = 1, *, failures: int = 0, **extra: Any) -> None:
        """Add to what is done."""
        self.update(self.done + count, failures=self.failures + failures, **extra)

    def _beat(self) -> None:
        interval = TTY_BEAT_SECONDS if self._stream.isatty() else PLAIN_BEAT_SECONDS
        while not self._ended.wait(interval / 4):
            # A log that takes no more is told by the next update, in the thread of the work.
            with self._showing, contextlib.suppress(OSError):
                if self._last and time.monotonic() - self._last >= interval and not self._ended.is_set():
                    self._show()

    def _show(self, *, final: bool = False) -> None:
        self._last = time.monotonic()
        seconds = self._last - self._start
        rate = (self.done - self.already_done) / seconds if seconds > 0 else 0.0
        left = (self.total - self.done) / rate if self.total and rate > 0 else None
        line = self._line(seconds, rate, left, final)
        if self._stream.isatty():
            self._stream.write("\r" + line.ljust(self._width) + ("\n" if final else ""))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()
        record = {
            "time": round(time.time(), 3),
            "step": self.description,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "per_second": round(rate, 3),
            "failures": self.failures,
            "seconds_left": None if left is None else round(left, 1),
            **self.extra,
        }
        if self._on_shown is not None:
            self._on_shown(record, final)
        if self._log is not None:
            self._log.write(json.dumps(record) + "\n")
            self._log.flush()

    def _line(self, seconds: float, rate: float, left: float | None, final: bool) -> str:
        of = f" of {self.total:,}" if self.total else ""
        if final and not self.done and not self.total:
            return f"{self.description}: took {_clock(seconds)}"
        parts = [f"{self.description}: {self.done:,}{of} {self.unit}", f"{rate:,.1f}/s"]
        if self.failures:
            parts.append(f"{self.failures:,} failed")
        parts += [f"{key} {_short(value)}" for key, value in self.extra.items()]
        if final:
            parts.append(f"took {_clock(seconds)}")
        elif left is not None:
            parts.append(f"{_clock(left)} left")
        return ", ".join(parts)


def _short(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
