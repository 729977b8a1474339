"""One Ray for a run: the cluster that `RAY_ADDRESS` names (as `ray job submit` sets it), else a local one."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterable, Iterator

from relevance_ray.errors import UserError
from relevance_ray.quiet import quiet_libraries


def local_cpus(num_cpus: int | None) -> int:
    """Logical CPUs of a local Ray: at least 4, for with fewer a pool of actors can starve the stage that feeds it."""
    return num_cpus or max(4, os.cpu_count() or 1)


def local_gpus() -> int:
    """As many as a local Ray would find."""
    from ray._private.accelerators import NvidiaGPUAcceleratorManager

    visible = NvidiaGPUAcceleratorManager.get_current_process_visible_accelerator_ids()
    found = int(NvidiaGPUAcceleratorManager.get_current_node_num_accelerators())
    return found if visible is None else min(found, len(visible))


_CONNECT_SECONDS = 10.0
PLENTY = 1e6
"""Of a custom resource on a local Ray."""
_local = threading.Event()


def in_local_session() -> bool:
    """Whether Ray is one that a `ray_session` of this process started, and will stop with all that runs in it."""
    return _local.is_set()


@contextlib.contextmanager
def _without_banner() -> Iterator[None]:
    """Keep off the terminal what Ray's C++ says of its own log level as it starts; exceptions come through."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def _connect(address: str) -> None:
    """Join the cluster at an address. Raises `UserError` where nothing answers there, or the token is refused."""
    import ray
    from ray.exceptions import AuthenticationError

    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit():  # what else there is ("auto", "ray://...") Ray itself looks for
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise UserError(
                f"RAY_ADDRESS {address} does not answer ({error}); start Ray there, or unset it for a local Ray"
            ) from error
    try:
        ray.init(logging_level="WARNING", log_to_driver=False)
    except (ConnectionError, AuthenticationError) as error:
        said = str(error).strip().split("\n")[0]
        raise UserError(
            f"RAY_ADDRESS {address} does not let this job in ({said}); RAY_AUTH_MODE and the token must be its own"
        ) from error


@contextlib.contextmanager
def ray_session(num_cpus: int | None = None, custom: Iterable[str] = ()) -> Iterator[None]:
    """Ray for the length of the block; one that this process has already is used and left as it is.

    Args:
        num_cpus: of a local Ray (`local_cpus`).
        custom: names of resources that a local Ray has plenty of, since what they keep apart on a cluster is here on one
            machine anyway.
    """
    quiet_libraries()
    import ray

    if ray.is_initialized():
        yield
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if os.environ.get("RAY_ADDRESS"):
        _connect(os.environ["RAY_ADDRESS"])
    else:
        with _without_banner():
            ray.init(
                address="local",  # else it would join a Ray that somebody else started on this machine
                num_cpus=local_cpus(num_cpus),
                resources=dict.fromkeys(custom, PLENTY),
                include_dashboard=False,
                logging_level="ERROR",
                log_to_driver=False,
            )
        _local.set()
    if on_sigterm is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own prints a stack of C
    try:
        yield
    finally:
        _local.clear()
        ray.shutdown()
