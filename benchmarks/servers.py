"""The servers that `serving.py` and its neighbours compare, each in a process of its own, and callers that ask them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

CORES = os.cpu_count() or 1
QUEUE = 200
INFINITY = ["torch==2.13.0", "infinity-emb[torch,server]==0.0.78"]

PEER = """
import threading
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import CrossEncoder

model, lock, app = CrossEncoder({model!r}, device="cpu"), threading.Lock(), FastAPI()

class Request(BaseModel):
    query: str
    documents: list[str]

@app.post("/rerank")
def rerank(request: Request) -> dict[str, list[float]]:
    with lock:  # several predictions at once would only share the cores
        return {{"scores": model.predict([(request.query, each) for each in request.documents]).tolist()}}
"""

SCORER = """
import json, sys, time
from relevance_ray.serving.scorer import Scorer
scorer = Scorer(sys.argv[1], device="cpu", num_threads=int(sys.argv[2]))
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    start = time.perf_counter()
    rows = scorer.score(asked["query"], asked["products"])
    print(json.dumps([time.perf_counter() - start, [row["logit"] for row in rows]]), flush=True)
"""

Body = Mapping[str, Any]


@dataclasses.dataclass
class Server:
    """A server under test.

    Attributes:
        url: of its route.
        body: a request of a query and products, as it wants it.
        scores: the scores of an answer, in the order of the products.
    """

    name: str
    url: str
    body: Callable[[str, Sequence[str]], Body]
    scores: Callable[[Any], list[float]]


@dataclasses.dataclass
class Spell:
    """What became of the requests of one spell: seconds of each, and products a second."""

    seconds: list[float]
    products_per_second: float
    errors: int = 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: Sequence[str], health: str, log: Path, **environment: str) -> Iterator[None]:
    """A server in a process of its own, from when it answers."""
    with log.open("w") as lines:
        process = subprocess.Popen(command, stdout=lines, stderr=lines, env={**os.environ, **environment})
        try:
            for _ in range(600):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(health, timeout=1).read()
                    break
                if process.poll() is not None:
                    raise RuntimeError(f"{command[0]} ended:\n{log.read_text()[-3000:]}")
                time.sleep(0.2)
            else:
                raise RuntimeError(f"{command[0]} does not answer; {log} says why")
            yield
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


@contextlib.contextmanager
def ours(model: Path, log: Path, name: str, *, caches: bool, settings: Sequence[str]) -> Iterator[Server]:
    port = free_port()
    options = [f"max_queued_requests={QUEUE}", "max_queued_pairs=1000000", f"cpus_per_replica={CORES}"]
    if not caches:
        options += ["score_cache_mb=0", "token_cache_mb=0"]
    given = [f"--set=serve.{each}" for each in options] + [f"--set={each}" for each in settings]
    command = [sys.executable, "-m", "relevance_ray.cli", "serve", str(model), "--port", str(port), *given]
    with running(command, f"http://127.0.0.1:{port}/health", log, OMP_NUM_THREADS=str(CORES)):
        yield Server(
            name,
            f"http://127.0.0.1:{port}/score",
            lambda query, products: {"query": query, "products": list(products)},
            lambda answer: [row["logit"] for row in answer["results"]],
        )


@contextlib.contextmanager
def sentence_transformers(model: Path, work: Path) -> Iterator[Server]:
    port = free_port()
    (work / "peer_app.py").write_text(PEER.format(model=str(model)))
    command = [sys.executable, "-m", "uvicorn", "peer_app:app", "--port", str(port), "--app-dir", str(work)]
    with running(command, f"http://127.0.0.1:{port}/docs", work / "peer.log", OMP_NUM_THREADS=str(CORES)):
        yield Server(
            "sentence-transformers",
            f"http://127.0.0.1:{port}/rerank",
            lambda query, products: {"query": query, "documents": list(products)},
            lambda answer: answer["scores"],
        )


@contextlib.contextmanager
def infinity(model: Path, work: Path) -> Iterator[Server]:
    port = free_port()
    command = [str(infinity_environment(work).with_name("infinity_emb")), "v2", "--model-id", str(model)]
    command += ["--served-model-name", "model", "--engine", "torch", "--device", "cpu", "--no-bettertransformer"]
    command += ["--no-model-warmup", "--port", str(port)]
    environment = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": str(CORES)}
    with running(command, f"http://127.0.0.1:{port}/health", work / "infinity.log", **environment):

        def scores(answer: Any) -> list[float]:
            found = {row["index"]: row["relevance_score"] for row in answer["results"]}
            return [found[place] for place in range(len(found))]

        yield Server(
            "infinity",
            f"http://127.0.0.1:{port}/rerank",
            lambda query, products: {"model": "model", "query": query, "documents": list(products)},
            scores,
        )


def infinity_environment(work: Path) -> Path:
    """Python of an environment with infinity in it; built once."""
    folder = work / "infinity"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *INFINITY], check=True)
        (folder / "ready").touch()
    return python


class BareScorer:
    """Our scorer in a process of its own, asked through a pipe; the seconds are its own."""

    def __init__(self, model: Path) -> None:
        command = [sys.executable, "-c", SCORER, str(model), str(CORES)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(CORES)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def ask(self, query: str, products: Sequence[str]) -> tuple[float, list[float]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"query": query, "products": list(products)}) + "\n")
        self._process.stdin.flush()
        seconds, logits = json.loads(self._process.stdout.readline())
        return seconds, logits

    def spell(self, stream: Iterator[tuple[str, list[str]]], seconds: float) -> Spell:
        found, done = [], 0
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            query, products = next(stream)
            found.append(self.ask(query, products)[0])
            done += len(products)
        return Spell(found, done / sum(found))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)


def ask(server: Server, stream: Iterator[tuple[str, list[str]]], callers: int, seconds: float) -> Spell:
    """So many callers, each asking again when it was answered."""

    async def run() -> Spell:
        found, done, errors = [], 0, 0
        start = time.perf_counter()
        timeout = aiohttp.ClientTimeout(total=600)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

            async def caller() -> None:
                nonlocal done, errors
                while time.perf_counter() - start < seconds:
                    query, products = next(stream)
                    body = json.dumps(server.body(query, products)).encode()
                    began = time.perf_counter()
                    headers = {"Content-Type": "application/json"}
                    async with session.post(server.url, data=body, headers=headers) as answer:
                        await answer.read()
                        if answer.status != 200:
                            errors += 1
                            continue
                    found.append(time.perf_counter() - began)
                    done += len(products)

            await asyncio.gather(*(caller() for _ in range(callers)))
        return Spell(found, done / (time.perf_counter() - start), errors)

    return asyncio.run(run())
