"""The catalog spread over Ray actors, where it is too large for every worker to map."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from relevance_ray.cluster.workers import Workers
from relevance_ray.generate.index.catalog_index import CatalogIndex
from relevance_ray.generate.index.search import CatalogSearch, SpreadSearch
from relevance_ray.generate.work import OpenSearch
from relevance_ray.progress import Progress


class SearchActor:
    """The actor that holds some shards of the catalog for all workers."""

    def __init__(self, index: CatalogIndex, shards: Sequence[int], dense: bool) -> None:
        self._search = index.search(shards, dense=dense)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._search, method)(*arguments)


def open_whole(index: CatalogIndex, *, dense: bool) -> CatalogSearch:
    """The whole catalog, mapped into this process."""
    return index.search(range(index.catalog.num_shards), dense=dense)


def open_spread(parts: Sequence[tuple[Sequence[int], Any]], index: CatalogIndex) -> CatalogSearch:
    """The catalog by way of search actors, each given with its shards."""

    def caller(actor: Any) -> Callable[..., Any]:
        return lambda method, *arguments: actor.call.remote(method, *arguments).future()

    return SpreadSearch([(shards, caller(actor)) for shards, actor in parts], index.catalog.starts)


@contextlib.contextmanager
def spread(index: CatalogIndex, workers: Workers, *, dense: bool, progress: Progress) -> Iterator[OpenSearch]:
    """How workers search: in their own process, or, with so many `workers` (no more than shards), in actors that share the
    catalog's shards; `dense` where there are vectors. The live line says how many are there: a cluster may have to grow
    before they are."""
    import ray

    if workers.count == 0:
        yield partial(open_whole, dense=dense)
        return
    # An actor that dies with its node is started on another, and what was asked of it is asked again.
    remote = ray.remote(**workers.remote_options(), max_restarts=-1, max_task_retries=-1)(SearchActor)
    shares = [range(first, index.catalog.num_shards, workers.count) for first in range(workers.count)]
    actors = [remote.remote(index, list(shards), dense) for shards in shares]
    try:
        stage, waited = progress.extra.get("stage"), [actor.__ray_ready__.remote() for actor in actors]
        while waited:
            progress.update(stage=f"waiting for search actors {workers.count - len(waited)}/{workers.count}")
            ready, waited = ray.wait(waited)
            ray.get(ready)
        progress.update(stage=stage)
        yield partial(open_spread, list(zip(shares, actors, strict=True)))
    finally:
        for actor in actors:
            ray.kill(actor)
