"""Ingest on Ray: files of groups through a pool of actors, to token files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from relevance_ray.cluster.actor_pool import ItemActor, run_pool
from relevance_ray.cluster.workers import Workers
from relevance_ray.training.ingest import IngestSpec, Item, RunItems


def ray_ingest(workers: Workers) -> RunItems:
    """Does the items in actors of a pool; ray must be initialised when it is called."""

    def run(spec: IngestSpec, items: Sequence[Item]) -> Iterator[int]:
        pool = replace(workers, gpus=0).at_most(len(items))
        for row in run_pool(items, ItemActor, (_open, spec), pool, num_blocks=len(items)):
            yield int(row["done"])

    return run


def _open(spec: IngestSpec) -> Callable[[Sequence[str], str], int]:
    return spec.open()
