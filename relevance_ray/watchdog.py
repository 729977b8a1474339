"""End a wait that nothing will end: a job that hangs costs its machines, and one that stopped can be resumed."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

from relevance_ray.errors import UserError


class StalledError(UserError):
    """A job made no progress for too long and was ended."""


@contextlib.contextmanager
def watchdog(seconds: float, message: str) -> Iterator[Callable[[], None]]:
    """Interrupt the block once it made no progress for so long.

    Yields a function to call at each sign of progress. Works on the main thread, the only one that can be interrupted;
    elsewhere, and with `seconds` 0, it watches nothing.

    Raises:
        StalledError: `message`, after the block was interrupted as if by Ctrl-C.
    """
    last = time.monotonic()
    stalled, stop = threading.Event(), threading.Event()

    def progress() -> None:
        nonlocal last
        last = time.monotonic()

    def watch() -> None:
        while not stop.wait(min(seconds / 10, 5.0)):
            if time.monotonic() - last > seconds:
                # A true signal: one that is only noted would not wake a wait in C. And again, where it was swallowed.
                stalled.set()
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    if not seconds or threading.current_thread() is not threading.main_thread():
        yield progress
        return
    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread.start()
    try:
        yield progress
    except BaseException as error:
        stop.set()
        if stalled.is_set():
            raise StalledError(message) from error
        raise
    finally:
        stop.set()
        thread.join()
        signal.signal(signal.SIGINT, before)
