"""Requests on their way to the model: one at a time, in the order of arrival, and only as many as are soon answered.

Past capacity a queue without bound makes every answer late. This one refuses what it could only answer late, so that
what it takes is answered about as fast as at high load; a refused client hears when to come again. The bound counts
pairs beside requests, because a request holds 1 to 1,000 of them. A caller that went away is never scored.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")
_MEMORY = 0.9
"""How much of the measured rate the last request leaves as it was."""


class OverloadedError(Exception):
    """The queue is full. `retry_after` is in how many whole seconds, at least 1, it is expected to be empty."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the server is at its capacity; try again in {retry_after} s")
        self.retry_after = retry_after


class ScoringQueue:
    """Runs work in a thread of its own, and refuses it where too much waits.

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
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._lock = threading.Lock()
        self._requests = self._pairs = 0
        self._pairs_per_second = 0.0

    async def run(self, num_pairs: int, work: Callable[[], _T]) -> _T:
        """The result of `work()`, when its turn came.

        Raises:
            OverloadedError: too much waits already.
            Exception: whatever `work` raises.
        """
        with self._lock:
            ahead = max(0, self._requests - 1)
            if self._requests and (ahead >= self.max_requests or (ahead and self._pairs + num_pairs > self.max_pairs)):
                raise OverloadedError(self._seconds_to_empty())
            self._requests += 1
            self._pairs += num_pairs
            depth = self._requests
        self._on_change(depth)
        held = [work]  # the executor keeps a cancelled call until its turn; what the call holds is let go at once
        future = self._executor.submit(self._timed, num_pairs, held)

        def leave(_done: Future[_T]) -> None:
            held.clear()
            self._leave(num_pairs)

        future.add_done_callback(leave)
        del work
        return await asyncio.wrap_future(future)  # cancelled with its caller, it is never begun

    def _timed(self, num_pairs: int, held: list[Callable[[], _T]]) -> _T:
        start = time.perf_counter()
        result = held[0]()
        rate = num_pairs / max(time.perf_counter() - start, 1e-9)
        with self._lock:
            known = self._pairs_per_second
            self._pairs_per_second = _MEMORY * known + (1 - _MEMORY) * rate if known else rate
        return result

    def _leave(self, num_pairs: int) -> None:
        with self._lock:
            self._requests -= 1
            self._pairs -= num_pairs
            depth = self._requests
        self._on_change(depth)

    def _seconds_to_empty(self) -> int:
        seconds = self._pairs / self._pairs_per_second if self._pairs_per_second else 1.0
        return max(1, min(60, math.ceil(seconds)))
