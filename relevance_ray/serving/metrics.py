"""What the server counts, for Prometheus, and the ASGI layer that counts it.

Several replicas answer behind one port, and a scrape reaches any one of them. Where `PROMETHEUS_MULTIPROC_DIR` names a
folder (the Ray shell sets it before a replica starts), they keep their numbers there and each tells the sum of all on its
machine; without it a process tells of itself alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Collection
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from starlette.types import ASGIApp, Message, Receive, Scope, Send

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MODEL_HEADER = "x-model-id"
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_PREFIX = "relevance_ray_"


class ServingMetrics:
    """The counters of one process.

    Attributes:
        requests: by route and status.
        seconds: from the request's first byte to the answer's last, by route.
        scored_pairs, truncated_products: by what they say.
        scoring_seconds: in the model, by request; of requests that share a pass, the whole pass for each.
        queued: requests waiting for the model or in it.
        cache_hits, cache_misses: inputs that a cache knew and did not know, by cache.
        logged, unlogged: requests that the shadow log wrote, and that it could not.
    """

    def __init__(self) -> None:
        self._folder = os.environ.get(FOLDER_VARIABLE)
        self._registry = None if self._folder else CollectorRegistry()
        own = self._registry
        self.requests = Counter(f"{_PREFIX}requests", "Requests answered.", ["route", "status"], registry=own)
        self.seconds = Histogram(
            f"{_PREFIX}request_seconds", "Seconds to an answer.", ["route"], buckets=_SECONDS, registry=own
        )
        self.scored_pairs = Counter(f"{_PREFIX}scored_pairs", "Pairs scored, and texts embedded.", registry=own)
        self.scoring_seconds = Histogram(
            f"{_PREFIX}scoring_seconds", "Seconds in the model, by request.", buckets=_SECONDS, registry=own
        )
        self.truncated_products = Counter(f"{_PREFIX}truncated_products", "Products whose text was cut.", registry=own)
        told = "Requests waiting for the model, or in it."
        self.queued = Gauge(f"{_PREFIX}queued_requests", told, multiprocess_mode="livesum", registry=own)
        self.cache_hits = Counter(f"{_PREFIX}cache_hits", "Inputs a cache knew.", ["cache"], registry=own)
        self.cache_misses = Counter(f"{_PREFIX}cache_misses", "Inputs it did not know.", ["cache"], registry=own)
        self._cached: dict[str, tuple[int, int]] = {}
        self.logged = Counter(f"{_PREFIX}shadow_logged_requests", "Requests written to the shadow log.", registry=own)
        self.unlogged = Counter(
            f"{_PREFIX}shadow_lost_requests", "Requests the shadow log could not write.", registry=own
        )
        self._info = Gauge(
            f"{_PREFIX}model",
            "1 for each model loaded.",
            ["model", "model_id"],
            multiprocess_mode="livemax",
            registry=own,
        )

    def loaded(self, model: str, model_id: str) -> None:
        self._info.labels(model, model_id).set(1)

    def cached(self, name: str, hits: int, misses: int) -> None:
        """Tell of a cache's counts since it was made."""
        hits_before, misses_before = self._cached.get(name, (0, 0))
        self._cached[name] = hits, misses
        self.cache_hits.labels(name).inc(hits - hits_before)
        self.cache_misses.labels(name).inc(misses - misses_before)

    def text(self) -> bytes:
        """In Prometheus's text format."""
        if self._registry is not None:
            return generate_latest(self._registry)
        assert self._folder is not None
        _forget_dead(Path(self._folder))
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=self._folder)
        return generate_latest(registry)


def _forget_dead(folder: Path) -> None:
    """Gauges tell of now, so those of replicas that ended are dropped; what they counted stays."""
    pids = {int(found[1]) for file in folder.glob("gauge_live*.db") if (found := re.search(r"_(\d+)\.db$", file.name))}
    for pid in pids:
        if not _runs(pid):
            with contextlib.suppress(FileNotFoundError):  # another replica, asked at the same time, was faster
                mark_process_dead(pid, str(folder))


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class Counted:
    """An ASGI application in front of another: counts and times its answers, and names in each the model that gave it."""

    def __init__(self, app: ASGIApp, metrics: ServingMetrics, model_id: str, routes: Collection[str]) -> None:
        self.app, self.metrics, self.routes = app, metrics, frozenset(routes)
        self.header = (MODEL_HEADER.encode(), model_id.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, route, status = time.perf_counter(), scope["path"], 0
        route = route if route in self.routes else "other"

        async def counting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), self.header]
            await send(message)

        try:
            await self.app(scope, receive, counting)
        except Exception:
            status = status or 500  # the answer is given outside
            raise
        finally:
            self.metrics.requests.labels(route, str(status or "client gone")).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - start)
