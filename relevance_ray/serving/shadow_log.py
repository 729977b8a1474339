"""Sampled requests and answers as Parquet: what is really asked, for the next round of queries to label.

A thread of its own writes, so no answer waits for a disk or a bucket; where that fails or falls behind, rows are dropped
and counted, never a request. A file appears whole. What is not yet written when a process is killed is lost: at most
`SECONDS` of it.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pyarrow as pa

from relevance_ray.storage import join, makedirs, write_table

SECONDS, PRODUCTS, MAX_WAITING = 60.0, 50_000, 200_000
"""A file is written after so many seconds, or so many products; a request is dropped where more products wait."""

SHADOW = pa.schema(
    [
        pa.field("time", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("route", pa.string(), nullable=False),
        pa.field("model_id", pa.string(), nullable=False),
        pa.field("query", pa.string()),
        pa.field(
            "products",
            pa.list_(
                pa.struct(
                    [
                        pa.field("product_id", pa.string()),
                        pa.field("title", pa.string()),
                        pa.field("logit", pa.float32()),
                        pa.field("probability", pa.float32()),
                        pa.field("score", pa.float32()),
                        pa.field("grade", pa.string()),
                        pa.field("truncated", pa.bool_()),
                        pa.field("stage", pa.int8()),
                    ]
                )
            ),
        ),
        pa.field("milliseconds", pa.float32()),
    ]
)
"""A row a request; query and titles are null unless texts were asked for. `stage` is 1 where a first stage cut a product and
its score is no score of the served model, 2 where not, null without stages."""
_ANSWER = ("logit", "probability", "score", "grade", "truncated")
_log = logging.getLogger(__name__)


class Answered(NamedTuple):
    """A request that was answered.

    Attributes:
        route: that was asked.
        query: as typed.
        products: n texts, or mappings of fields.
        rows: what `Service.score` said of each.
        milliseconds: that scoring took.
    """

    route: str
    query: str
    products: Sequence[str | Mapping[str, Any]]
    rows: Sequence[Mapping[str, Any]]
    milliseconds: float


class ShadowLog:
    """Files of `SHADOW` rows in a folder, local or s3://.

    Args:
        folder: made where it is not there.
        share: of the requests, 0 to 1.
        with_text: keep the query and the products' titles.
        model_id: of the model that answers.
        on_rows: called with how many rows were written, and how many were lost.
    """

    def __init__(
        self,
        folder: str,
        share: float,
        with_text: bool,
        model_id: str,
        on_rows: Callable[[int, int], object] = lambda written, lost: None,
    ) -> None:
        self.folder, self.share, self.with_text, self.model_id = folder, share, with_text, model_id
        self._on_rows = on_rows
        self._waiting: queue.SimpleQueue[tuple[datetime, Answered] | None] = queue.SimpleQueue()
        self._num_waiting, self._lock = 0, threading.Lock()
        makedirs(folder)
        self._thread = threading.Thread(target=self._write_all, name="shadow-log", daemon=True)
        self._thread.start()

    def record(self, answered: Answered) -> None:
        """Keep an answered request, if it is drawn. Never waits."""
        if random.random() >= self.share:
            return
        num_products = len(answered.products)
        with self._lock:
            room = self._num_waiting + num_products <= MAX_WAITING
            self._num_waiting += num_products if room else 0
        if room:
            self._waiting.put((datetime.now(UTC), answered))
        else:
            self._on_rows(0, 1)

    def close(self) -> None:
        """Write what waits, and stop."""
        self._waiting.put(None)
        self._thread.join()

    def _write_all(self) -> None:
        ended = False
        while not ended:
            kept: list[tuple[datetime, Answered]] = []
            num_products, deadline = 0, None
            while num_products < PRODUCTS:
                left: float | None = None if deadline is None else max(0.0, deadline - time.monotonic())
                try:
                    item = self._waiting.get(timeout=left)
                except queue.Empty:
                    break
                if item is None:
                    ended = True
                    break
                kept.append(item)
                num_products += len(item[1].products)
                deadline = deadline or time.monotonic() + SECONDS
            if kept:
                self._write(kept)
                with self._lock:
                    self._num_waiting -= num_products

    def _write(self, kept: list[tuple[datetime, Answered]]) -> None:
        name = f"{kept[0][0]:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}.parquet"
        try:
            table = pa.Table.from_pylist([self._row(*each) for each in kept], schema=SHADOW)
            write_table(join(self.folder, name), table)
        except Exception as error:  # noqa: BLE001  serving goes on without its log; the loss is counted and told
            _log.warning("the shadow log lost %d requests: %s: %s", len(kept), type(error).__name__, error)
            self._on_rows(0, len(kept))
        else:
            self._on_rows(len(kept), 0)

    def _row(self, moment: datetime, answered: Answered) -> dict[str, Any]:
        fields = [{"title": product} if isinstance(product, str) else product for product in answered.products]
        products = [
            {
                "product_id": given.get("product_id"),
                "title": given.get("title") if self.with_text else None,
                **{name: row[name] for name in _ANSWER},
                "stage": row.get("stage"),
            }
            for given, row in zip(fields, answered.rows, strict=True)
        ]
        return {
            "time": moment,
            "route": answered.route,
            "model_id": self.model_id,
            "query": answered.query if self.with_text else None,
            "products": products,
            "milliseconds": answered.milliseconds,
        }
