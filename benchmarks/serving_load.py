"""What a served student does past its capacity: how late it answers, what it refuses and holds, whether any answer is wrong.

One replica, a core of its own, behind Ray Serve. Its capacity is what four callers get who each wait for their answer. Then
callers come at random (Poisson), whether or not others are answered: at .8 of the capacity, and at 1.5 times it for as long
as asked. Every answer's logits are held against those of the same model in this process. The clients share the machine.

    python benchmarks/serving_load.py [MODEL_DIR] [--seconds 600] [--products 10]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

from relevance_ray.calibration import OrdinalCalibration
from relevance_ray.models import resolve_model
from relevance_ray.schema import SCALES
from relevance_ray.serving.app import running_server
from relevance_ray.serving.options import ServeOptions
from relevance_ray.serving.scorer import Scorer

TOLERANCE = 1e-3
WORDS = [
    "red",
    "blue",
    "green",
    "running",
    "shoes",
    "leather",
    "wallet",
    "phone",
    "case",
    "cotton",
    "shirt",
    "garden",
    "sink",
]


@dataclass
class Seen:
    """What became of the requests of one spell.

    Attributes:
        seconds: of each answered request, from its start to its answer's end.
        statuses: how many answers of each; 0 is a connection that broke.
        wrong: answers whose logits are not the model's.
        unnamed: refusals without Retry-After.
        models: answers by the model that they name.
        lost: when requests broke or were answered 5xx, by `time.monotonic`.
    """

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: int = 0
    unnamed: int = 0
    models: Counter[str] = field(default_factory=Counter)
    lost: list[float] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        return float(np.quantile(self.seconds, share)) if self.seconds else float("nan")


Expected = Mapping[str, Sequence[Sequence[float]]]
"""model_id -> the logits of each request."""


def make_requests(num_products: int, count: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Bodies of POST /score of so many products each."""
    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    return [
        {"query": text(1, 4), "products": [{"title": text(4, 14)} for _ in range(num_products)]} for _ in range(count)
    ]


def logits_of(scorer: Scorer, requests: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    return [[row["logit"] for row in scorer.score(each["query"], each["products"])] for each in requests]


class Callers:
    """Clients of a server that know what it should answer."""

    def __init__(self, url: str, requests: Sequence[Mapping[str, Any]], expected: Expected) -> None:
        self.url, self.requests, self.expected = url, requests, expected

    def closed(self, callers: int, seconds: float, stop: Callable[[], bool] = lambda: False) -> tuple[float, Seen]:
        """So many callers, each asking again when it was answered; requests a second, and what became of them."""

        async def run() -> tuple[float, Seen]:
            seen, end, start = Seen(), time.monotonic() + seconds, time.monotonic()
            async with self._session() as session:

                async def caller(number: int) -> None:
                    place = number
                    while time.monotonic() < end and not stop():
                        await self._ask(session, place % len(self.requests), seen)
                        place += callers

                await asyncio.gather(*(caller(number) for number in range(callers)))
            return seen.statuses[200] / (time.monotonic() - start), seen

        return asyncio.run(run())

    def open(self, per_second: float, seconds: float, watch: Callable[[], object] = lambda: None) -> Seen:
        """Requests that come at random, so many a second; `watch` is called about once a second."""

        async def run() -> Seen:
            seen, rng, tasks = Seen(), random.Random(1), set()
            async with self._session() as session:
                start = due = time.monotonic()
                watched = 0
                while due < start + seconds:
                    await asyncio.sleep(max(0.0, due - time.monotonic()))
                    task = asyncio.create_task(self._ask(session, rng.randrange(len(self.requests)), seen))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                    due += rng.expovariate(per_second)
                    if time.monotonic() - start > watched:
                        watched += 1
                        watch()
                await asyncio.gather(*tasks)
            return seen

        return asyncio.run(run())

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=120))

    async def _ask(self, session: aiohttp.ClientSession, place: int, seen: Seen) -> None:
        start = time.monotonic()
        try:
            async with session.post(f"{self.url}/score", json=self.requests[place]) as answer:
                body = await answer.read()
                status = answer.status
                retry_after = answer.headers.get("Retry-After")
        except (aiohttp.ClientError, TimeoutError):
            seen.statuses[0] += 1
            seen.lost.append(time.monotonic())
            return
        seen.statuses[status] += 1
        if status == 200:
            seen.seconds.append(time.monotonic() - start)
            found = json.loads(body)
            seen.models[found["model_id"]] += 1
            logits = [row["logit"] for row in found["results"]]
            expected = self.expected.get(found["model_id"])
            if expected is None or not np.allclose(logits, expected[place], atol=TOLERANCE):
                seen.wrong += 1
        elif status == 429:
            seen.unnamed += retry_after is None
        else:
            seen.lost.append(time.monotonic())


def replica_processes() -> list[psutil.Process]:
    """The processes of the replicas on this machine."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if command.startswith("ray::ServeReplica:relevance_ray:scorer"):
            found.append(process)
    return found


def default_model(folder: Path) -> Path:
    """`minilm` as an untrained cross-encoder: as fast as a trained one."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from relevance_ray.model_folder import ModelInfo, finish_folder
    from relevance_ray.templates import Template

    torch.manual_seed(0)
    source = resolve_model("minilm")
    AutoModelForSequenceClassification.from_pretrained(source, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    scale = SCALES["esci"]
    calibration = OrdinalCalibration(1.0, tuple(float(k) for k in range(scale.num_classes - 1)))
    finish_folder(folder, ModelInfo("cross_encoder", scale, Template(), calibration))
    return folder


def overload(model: Path, seconds: float, num_products: int) -> dict[str, Any]:
    """The figures of the module's docstring."""
    requests = make_requests(num_products)
    scorer = Scorer(model, device="cpu", num_threads=1)
    expected = {scorer.model_id: logits_of(scorer, requests)}
    with running_server(model, port=0, options=ServeOptions(score_cache_mb=0, token_cache_mb=0)) as server:
        callers = Callers(server.url, requests, expected)
        callers.closed(2, 5)  # warm
        capacity, alone = callers.closed(4, max(10.0, seconds / 20))
        high = callers.open(0.8 * capacity, max(10.0, seconds / 4))
        [replica] = replica_processes()
        memory: list[int] = []
        over = callers.open(1.5 * capacity, seconds, lambda: memory.append(replica.memory_info().rss))
        still_there = replica.is_running()
    early, late = memory[len(memory) // 5], memory[-1]
    return {
        "capacity": round(capacity, 2),
        "seconds": seconds,
        "products": num_products,
        "p50_high": round(high.percentile(0.5), 4),
        "p99_high": round(high.percentile(0.99), 4),
        "refused_high": round(high.statuses[429] / high.statuses.total(), 4),
        "p50_over": round(over.percentile(0.5), 4),
        "p99_over": round(over.percentile(0.99), 4),
        "p99_over_high": round(over.percentile(0.99) / high.percentile(0.99), 3),
        "answered_over": over.statuses[200],
        "refused_over": over.statuses[429],
        "other_over": over.statuses.total() - over.statuses[200] - over.statuses[429],
        "answered_per_second_over": round(over.statuses[200] / seconds, 2),
        "wrong": alone.wrong + high.wrong + over.wrong,
        "refused_without_retry_after": over.unnamed,
        "memory_mb": round(late / 1e6, 1),
        "memory_growth_mb": round((late - early) / 1e6, 1),
        "replica_survived": still_there,
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="model folder; by default minilm with an untrained head")
    parser.add_argument("--seconds", type=float, default=600.0, help="at 1.5 times the capacity")
    parser.add_argument("--products", type=int, default=10, help="of each request")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(given.model) if given.model else default_model(Path(folder) / "model")
        figures = overload(model, given.seconds, given.products)
    hardware = f"{psutil.cpu_count()} CPUs {platform.machine()}"
    print(json.dumps({"benchmark": "serving_load", "hardware": hardware, **figures}))


if __name__ == "__main__":
    main(sys.argv[1:])
