"""Requests take turns at the model, in a thread of its own, which runs what several of them ask in one forward pass.

In order of arrival, with two exceptions. Small requests that wait one behind the other share a pass, which a single one
would not fill. A large one is cut: after so many tokens it goes to the end of the line, so that a request of ten products
does not wait for all of a thousand.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from relevance_ray.engines.encoding import EncodedTexts, join_texts

_T = TypeVar("_T")


@dataclass
class Work(Generic[_T]):
    """What is left to do for a request once its text is tokens.

    Attributes:
        run: outputs float32 [m, width] of `texts`; works that have the same function share its passes.
        finish: what the request is answered, from these outputs.
        texts: what the model reads; None for a model that is asked as a whole: `run(None)`.
        pass_tokens: about as many make a full forward pass.
        num_pairs: that it answers.
    """

    run: Callable[[Any], Any]
    finish: Callable[[Any], _T]
    texts: EncodedTexts | None = None
    pass_tokens: int = 0
    num_pairs: int = 1


@dataclass(eq=False)
class _Waiting:
    """A work in line: the rows left, longest first, and the outputs so far."""

    work: Work[Any] | None
    future: Future[tuple[Any, float]]
    rows: np.ndarray = field(init=False)
    lengths: np.ndarray = field(init=False)
    outputs: np.ndarray | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        assert self.work is not None
        lengths = np.zeros(0, dtype=np.int64) if self.work.texts is None else self.work.texts.lengths
        self.rows = np.argsort(-lengths, kind="stable")
        self.lengths = lengths[self.rows]

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def take(self, max_tokens: int) -> np.ndarray:
        """Its next rows, at least one, of about so many tokens."""
        count = max(1, int(np.searchsorted(np.cumsum(self.lengths), max_tokens, side="right")))
        rows, self.rows, self.lengths = self.rows[:count], self.rows[count:], self.lengths[count:]
        return rows

    def release(self, _done: Future[Any]) -> None:
        """Let go of what it holds, also where it waits on in line after its caller went away."""
        self.work = self.outputs = None


_Part = tuple[_Waiting, Work[Any], np.ndarray]
"""Whose turn it is, its work, and the rows of it that are run now."""


class Turns:
    """Runs works. A turn of one work takes at most `TURN_PASSES` passes' tokens; works that share a turn fill one pass.

    Args:
        on_busy: told of the seconds of each turn, and of the pairs of works that it ended, in the model's thread.
    """

    TURN_PASSES = 2

    def __init__(self, on_busy: Callable[[float, int], object] = lambda seconds, pairs: None) -> None:
        self._on_busy = on_busy
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._lock = threading.Lock()
        self._line: deque[_Waiting] = deque()

    def submit(self, work: Work[Any]) -> Future[tuple[Any, float]]:
        """The outputs of a work, and the seconds of its turns. Cancelled before its turn it is never begun, between two
        turns it is not gone on with."""
        waiting = _Waiting(work, Future())
        waiting.future.add_done_callback(waiting.release)
        with self._lock:
            self._line.append(waiting)
        self._executor.submit(self._turn)
        return waiting.future

    def _turn(self) -> None:
        with self._lock:
            taken = self._take()
        if not taken:
            return  # what this turn was for shared another's, or its caller went away
        works = [(waiting, waiting.work, rows) for waiting, rows in taken if waiting.work is not None]
        if not works:
            return
        try:
            self._run(works)
        except BaseException as error:  # noqa: BLE001 - it is its caller's
            if len(works) == 1:
                with contextlib.suppress(InvalidStateError):
                    works[0][0].future.set_exception(error)
            # It is of one of them; the others are none the worse for having shared its turn.
            for each in works if len(works) > 1 else ():
                try:
                    self._run([each])
                except BaseException as own:  # noqa: BLE001
                    with contextlib.suppress(InvalidStateError):
                        each[0].future.set_exception(own)

    def _run(self, works: Sequence[_Part]) -> None:
        start = time.perf_counter()
        first = works[0][1]
        if first.texts is None:
            outputs = first.run(None)
        else:
            outputs = first.run(
                join_texts([work.texts.take(rows) for _, work, rows in works if work.texts is not None])
            )
        seconds = time.perf_counter() - start
        self._on_busy(seconds, sum(work.num_pairs for waiting, work, _ in works if not len(waiting.rows)))
        place = 0
        for waiting, work, rows in works:
            waiting.seconds += seconds
            done = outputs
            if work.texts is not None:
                part = outputs[place : place + len(rows)]
                place += len(rows)
                done = waiting.outputs  # which goes when its caller does, at any moment
                if done is None:
                    done = waiting.outputs = np.empty((len(work.texts.input_ids), part.shape[1]), dtype=part.dtype)
                done[rows] = part
                if len(waiting.rows):
                    with self._lock:
                        self._line.append(waiting)
                    self._executor.submit(self._turn)
                    continue
            with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
                waiting.future.set_result((done, waiting.seconds))

    def _take(self) -> list[tuple[_Waiting, np.ndarray]]:
        """Whose turn it is, with the rows of each."""
        first, work = self._next()
        if first is None or work is None:
            return []
        taken = [(first, first.take(self.TURN_PASSES * work.pass_tokens))]
        room = 0 if work.texts is None or len(first.rows) else work.pass_tokens
        room -= 0 if work.texts is None else int(work.texts.lengths[taken[0][1]].sum())
        while room > 0:
            other, its_work = self._next()
            if other is None or its_work is None:
                break
            if its_work.run != work.run or other.num_tokens > room:
                self._line.appendleft(other)
                break
            room -= other.num_tokens
            taken.append((other, other.take(other.num_tokens)))
        return taken

    def _next(self) -> tuple[_Waiting | None, Work[Any] | None]:
        """The first in line whose caller is still there, and its work."""
        while self._line:
            waiting = self._line.popleft()
            if (work := waiting.work) is not None:
                return waiting, work
        return None, None
