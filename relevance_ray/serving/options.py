"""How a student is served; apart from `app.py`, so that a configuration is read without loading Ray."""

from __future__ import annotations

from dataclasses import dataclass

from relevance_ray.options import STRICT, option


@dataclass(frozen=True)
class ServeOptions:
    """Size of the server; none of it changes a score. Host and port belong to the command line."""

    __pydantic_config__ = STRICT

    num_replicas: int = option(1, "Copies of the model that answer in parallel", operational=True)
    cpus_per_replica: int = option(1, "CPU cores, and torch threads, of each copy", operational=True)
    gpus_per_replica: float = option(0.0, "GPUs, or the share of one, of each copy", operational=True)

    def __post_init__(self) -> None:
        if self.num_replicas < 1 or self.cpus_per_replica < 1 or self.gpus_per_replica < 0:
            raise ValueError("num_replicas and cpus_per_replica must be at least 1, gpus_per_replica at least 0")
