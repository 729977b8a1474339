"""What the steps of a run tell Prometheus: the numbers of the live line, by way of Ray's own metrics on a cluster."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from relevance_ray.cluster.session import in_local_session

_PREFIX = "relevance_ray_"


class RunGauges:
    """A gauge for each number that a live line shows, named after it, by root and step; Ray exports it as
    `ray_relevance_ray_NAME` from the node of the job's driver. A local Ray exports nothing.

    Args:
        root: of the run.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._gauges: dict[str, Any] = {}

    def __call__(self, record: Mapping[str, Any], final: bool) -> None:
        """Set what a line shows; after the last one of a step nothing is done a second."""
        # Not loaded for this: a step that needs no Ray is told by none. Another thread may be in the middle of loading it.
        is_initialized = getattr(sys.modules.get("ray"), "is_initialized", None)
        if is_initialized is None or in_local_session() or not is_initialized():
            return
        ended = {"per_second": 0.0, "seconds_left": 0.0} if final else {}
        for name, value in (dict(record) | ended).items():
            if name != "time" and isinstance(value, int | float) and name.isidentifier():
                self._gauge(name).set(value, tags={"root": self._root, "step": str(record["step"])})

    def _gauge(self, name: str) -> Any:
        if name not in self._gauges:
            from ray.util.metrics import Gauge

            self._gauges[name] = Gauge(f"{_PREFIX}{name}", "Of the live line of a step.", tag_keys=("root", "step"))
        return self._gauges[name]
