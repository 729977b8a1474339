"""Requests on their way to an answer: tokenised, run through the model in turns, and only as many as are soon answered.

Past capacity a queue without bound makes every answer late. This one refuses what it could only answer late, so that
what it takes is answered about as fast as at high load; a refused client hears when to come again. The bound counts
pairs beside requests, because a request holds 1 to 1,000 of them. A caller that went away is never scored.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from relevance_ray.serving.turns import Turns, Work

_T = TypeVar("_T")
_MEMORY = 0.9
"""How much of the measured rate the last turn leaves as it was."""


class OverloadedError(Exception):
    """The queue is full. `retry_after` is in how many whole seconds, at least 1, it is expected to be empty."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the server is at its capacity; try again in {retry_after} s")
        self.retry_after = retry_after


class ScoringQueue:
    """Takes requests, and refuses them where too much waits. Tokenising has a thread of its own, and so has the model.

    Args:
        max_requests: that may wait behind the one that is worked on.
        max_pairs: that these and the one worked on may hold together. A request that finds none waiting is taken, however
            large.
        on_change: called with the number of requests waiting or worked on, whenever it changes.
    """

    def __init__(
        self, max_requests: int, max_pairs: int, on_change: Callable[[int], object] = lambda depth: None
    ) -> None:
        self.max_requests, self.max_pairs = max_requests, max_pairs
        self._on_change = on_change
        self._tokenizer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        self._turns = Turns(self._worked)
        self._lock = threading.Lock()
        self._requests = self._pairs = 0
        self._recent_pairs = self._recent_seconds = 0.0

    @contextlib.contextmanager
    def admitted(self, num_pairs: int) -> Iterator[None]:
        """Count a request while it is worked on.

        Raises:
            OverloadedError: too much waits already.
        """
        with self._lock:
            ahead = max(0, self._requests - 1)
            if self._requests and (ahead >= self.max_requests or (ahead and self._pairs + num_pairs > self.max_pairs)):
                raise OverloadedError(self._seconds_to_empty())
            self._requests += 1
            self._pairs += num_pairs
            depth = self._requests
        self._on_change(depth)
        try:
            yield
        finally:
            with self._lock:
                self._requests -= 1
                self._pairs -= num_pairs
                depth = self._requests
            self._on_change(depth)

    async def run(self, prepare: Callable[[], Work[_T]]) -> tuple[_T, float]:
        """What the work that `prepare` makes ends with, and the seconds that it took without waiting.

        Raises:
            Exception: whatever `prepare` or the work raises.
        """
        held: list[Callable[[], Work[_T]]] = [prepare]  # executors keep a cancelled call; what it holds is let go
        del prepare

        def prepared() -> tuple[Work[_T], float]:
            start = time.perf_counter()
            return held.pop()(), time.perf_counter() - start

        asked = self._tokenizer.submit(prepared)
        try:
            work, seconds = await asyncio.wrap_future(asked)
        finally:
            held.clear()
        outputs: Any
        if work.texts is not None and not work.texts.input_ids:
            outputs, in_turns = None, 0.0
        else:
            outputs, in_turns = await asyncio.wrap_future(self._turns.submit(work))
        # For a thousand products a matter of milliseconds, in which the event loop shall answer others.
        found = await asyncio.wrap_future(self._tokenizer.submit(work.finish, outputs))
        return found, seconds + in_turns

    def _worked(self, seconds: float, num_pairs: int) -> None:
        with self._lock:
            self._recent_pairs = _MEMORY * self._recent_pairs + num_pairs
            self._recent_seconds = _MEMORY * self._recent_seconds + seconds

    def _seconds_to_empty(self) -> int:
        rate = self._recent_pairs / self._recent_seconds if self._recent_pairs else 0.0
        return max(1, min(60, math.ceil(self._pairs / rate))) if rate else 1
