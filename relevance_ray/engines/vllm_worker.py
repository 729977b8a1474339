"""Runs within vLLM's own processes: ends them with the process that opened the engine.

vLLM's processes outlive an owner that is killed (kill -9, or by the kernel where memory runs out), and hold the memory
that the next engine needs. The end of a worker is the end of the rest of an engine.
"""

from __future__ import annotations

import os
import select
import threading

OWNER = "RELEVANCE_RAY_VLLM_OWNER"
"""Environment variable: the process that opened the engine."""


class EndsWithOwner:
    """Mixed into vLLM's worker (its argument `worker_extension_cls`), which imports this module."""


def _end_with(owner: int) -> None:
    try:
        handle = os.pidfd_open(owner)
    except ProcessLookupError:  # it was killed while vLLM started
        os._exit(1)
    select.select([handle], [], [])
    os._exit(1)


if OWNER in os.environ and int(os.environ[OWNER]) != os.getpid():
    threading.Thread(target=_end_with, args=(int(os.environ[OWNER]),), name="vllm-owner", daemon=True).start()
