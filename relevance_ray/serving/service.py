"""A scorer at work: its queue, its counters, its log. What the routes ask, whatever their clients' shapes are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from relevance_ray.serving.metrics import ServingMetrics
from relevance_ray.serving.options import ServeOptions
from relevance_ray.serving.queue import ScoringQueue
from relevance_ray.serving.scorer import Scorer
from relevance_ray.serving.shadow_log import Answered, ShadowLog
from relevance_ray.serving.turns import Work
from relevance_ray.serving.two_stage import FirstStage, join_stages

_T = TypeVar("_T")


class Service:
    """One loaded model that answers many callers. `close` writes what its log still holds."""

    def __init__(
        self, scorer: Scorer, options: ServeOptions | None = None, first_stage: FirstStage | None = None
    ) -> None:
        self.scorer, self.options, self.first_stage = scorer, options or ServeOptions(), first_stage
        self.metrics = ServingMetrics()
        self.metrics.loaded(scorer.name, scorer.model_id)
        self._queue = ScoringQueue(
            self.options.max_queued_requests, self.options.max_queued_pairs, self.metrics.queued.set
        )
        self._log = None
        if self.options.shadow_log:
            self._log = ShadowLog(
                self.options.shadow_log,
                self.options.shadow_share,
                self.options.shadow_text,
                scorer.model_id,
                self._count_logged,
            )

    async def score(
        self, query: str, products: Sequence[str | Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], float]:
        """What `Scorer.score` gives, and the milliseconds that it took without waiting. Where a first stage cut the
        products, each also has its `stage`.

        Raises:
            UnscorableError: as `Scorer.score`.
            OverloadedError: too many requests wait.
        """
        first = self.first_stage
        if first is None or len(products) <= first.keep:
            rows, milliseconds = await self._run(len(products), lambda: self.scorer.prepare(query, products))
        else:
            rows, milliseconds = await self._in_two_stages(first, query, products)
        self.metrics.truncated_products.inc(sum(bool(row["truncated"]) for row in rows))
        return rows, milliseconds

    def answered(self, answered: Answered) -> None:
        """Tell the log, where there is one, of scores that a caller was given."""
        if self._log is not None:
            self._log.record(answered)

    async def embed(self, inputs: Sequence[str | Mapping[str, Any]]) -> tuple[np.ndarray, list[bool]]:
        """What `Scorer.embed` gives; errors as `score`."""
        found, _ = await self._run(len(inputs), lambda: self.scorer.prepare_embed(inputs))
        return found

    async def _in_two_stages(
        self, first: FirstStage, query: str, products: Sequence[str | Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], float]:
        with self._queue.admitted(len(products)):
            below, seconds = await self._queue.run(lambda: first.scorer.prepare(query, products))
            kept = first.kept(below)
            best, more = await self._queue.run(
                lambda: self.scorer.prepare(query, [products[place] for place in kept], kept)
            )
        self._count(len(products), seconds + more)
        return join_stages(below, kept, best, self.scorer), round(1000 * (seconds + more), 3)

    async def _run(self, num_pairs: int, prepare: Callable[[], Work[_T]]) -> tuple[_T, float]:
        with self._queue.admitted(num_pairs):
            result, seconds = await self._queue.run(prepare)
        self._count(num_pairs, seconds)
        return result, round(1000 * seconds, 3)

    def _count(self, num_pairs: int, seconds: float) -> None:
        self.metrics.scored_pairs.inc(num_pairs)
        self.metrics.scoring_seconds.observe(seconds)
        for name, cache in self.scorer.caches.items():
            self.metrics.cached(name, cache.hits, cache.misses)
        if self.first_stage is not None:
            for name, cache in self.first_stage.scorer.caches.items():
                self.metrics.cached(f"first_stage_{name}", cache.hits, cache.misses)

    def close(self) -> None:
        if self._log is not None:
            self._log.close()

    def _count_logged(self, written: int, lost: int) -> None:
        self.metrics.logged.inc(written)
        self.metrics.unlogged.inc(lost)
