"""One Ray for a run: the cluster that `RAY_ADDRESS` names (as `ray job submit` sets it), else a local one."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from relevance_ray.errors import UserError
from relevance_ray.quiet import quiet_libraries


@dataclass(frozen=True)
class Demand:
    """What a step wants at once: actors, CPUs and GPUs of each, the configuration's key that says so, and the CPUs that
    others of the step hold meanwhile."""

    count: int
    cpus: float
    gpus: float
    key: str
    taken_cpus: int = 0


def check_resources(demand: Demand, num_cpus: int | None = None) -> None:
    """Refuse what a local Ray can never hold at once: it would wait for ever, without a word. A cluster that `RAY_ADDRESS`
    names may still grow, so it is not asked. Before Ray is started, with `num_cpus` as `ray_session` would get it, this
    machine is asked instead."""
    if os.environ.get("RAY_ADDRESS"):
        return
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        there = sys.modules["ray"].cluster_resources()
    else:
        there = {"CPU": _cpus(num_cpus), "GPU": _gpus() if demand.gpus else 0}
    for name, each, taken in (("CPU", demand.cpus, demand.taken_cpus), ("GPU", demand.gpus, 0)):
        if demand.count * each + taken > there.get(name, 0):
            beside = f" beside {taken:g} that are taken" if taken else ""
            raise UserError(
                f"{demand.key} asks for {demand.count} at {each:g} {name}s each{beside}, and this Ray has "
                f"{there.get(name, 0):g}; lower it, or what each one takes"
            )


def _cpus(num_cpus: int | None) -> int:
    return num_cpus or max(4, os.cpu_count() or 1)


def _gpus() -> int:
    """As many as a local Ray would find."""
    from ray._private.accelerators import NvidiaGPUAcceleratorManager

    visible = NvidiaGPUAcceleratorManager.get_current_process_visible_accelerator_ids()
    found = int(NvidiaGPUAcceleratorManager.get_current_node_num_accelerators())
    return found if visible is None else min(found, len(visible))


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


@contextlib.contextmanager
def ray_session(num_cpus: int | None = None) -> Iterator[None]:
    """Ray for the length of the block; one that is already there is used and left as it is.

    A local Ray gets at least 4 logical CPUs: with fewer, a pool of actors can starve the stage that feeds it.
    """
    quiet_libraries()
    import ray

    if ray.is_initialized():
        yield
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
    else:
        with _without_banner():
            ray.init(num_cpus=_cpus(num_cpus), include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        _local.set()
    if on_sigterm is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own prints a stack of C
    try:
        yield
    finally:
        _local.clear()
        ray.shutdown()
