"""What HTTP costs a student, beside its peers: products a second and latency of the same model folder, on the same machine.

Ours is `relevance-ray serve` of a folder that `relevance-ray export` made. Beside it (a) sentence-transformers'
`CrossEncoder` behind FastAPI, (b) `infinity-emb`'s rerank, in an environment of its own that is built first, (c) our scorer
alone in a loop, in a process of its own. All have the same cores and read the same texts: queries and products of ESCI
where its files are at hand (RELEVANCE_RAY_TEST_DATA), else of the demo market. All run while one is asked; rounds alternate.

Cold is without caches. Warm has them, after the most frequent queries were asked once; queries then come by Zipf's law
(exponent 1) out of 10,000.

    python benchmarks/serving.py [--model MODEL_DIR] [--work FOLDER] [--quick] [--seconds S] [--rounds N]
        [--without-infinity] [--set serve.KEY=VALUE]

Without a model one is trained on the demo market first (a few minutes, kept in the work folder). --quick: 8 requests in
flight, 100 products each; otherwise 1, 8 and 32 in flight with 10, 100 and 1,000 products.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from scipy.stats import spearmanr

from relevance_ray.chain.export import export_student
from relevance_ray.config import load_config
from relevance_ray.data.prepare import iter_products, prepare
from relevance_ray.engines.runtimes import read_runtime
from relevance_ray.quiet import quiet_libraries
from relevance_ray.steps import Chain
from relevance_ray.templates import Template

ROOT = Path(__file__).resolve().parents[1]
CORES = os.cpu_count() or 1
MODEL = "model"
TRAINED = [
    "data.market_size=4000",
    "label.engine=oracle",
    "student={model: minilm, num_layers: 6, max_tokens: 80, fields: [title, brand, color, category]}",
    "student.fit={learning_rate: 2.0e-4}",
    "generate.num_pairs=8000",
]
ZIPF_QUERIES = 10_000
QUEUE = 200
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
INFINITY = ["torch==2.13.0", "infinity-emb[torch,server]==0.0.78"]

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


class Texts:
    """Queries and products as text; a query's candidates are the same whenever it is asked."""

    def __init__(self, queries: Sequence[str], products: Sequence[str]) -> None:
        self.queries, self.products = list(queries), list(products)

    def candidates(self, query: int, count: int) -> list[str]:
        rng = random.Random(query)
        if count <= len(self.products):
            return rng.sample(self.products, count)
        return rng.choices(self.products, k=count)


def read_texts(fields: Sequence[str], work: Path) -> Texts:
    """ESCI's, or the demo market's; further queries are the first words of titles."""
    data = Path(os.environ.get("RELEVANCE_RAY_TEST_DATA", "data")) / "esci"
    if data.is_dir():
        config = load_config(str(ROOT / "jobs" / "esci.yaml"), [f"data.path={json.dumps(str(data))}"])
    else:
        config = load_config(str(ROOT / "relevance_ray" / "demo.yaml"), ["data.market_size=4000"])
    folder = work / f"texts-{config.data.format}"
    if not (folder / "ready").exists():
        prepare(config.data, folder)
        (folder / "ready").touch()
    template = Template(fields=tuple(fields))
    products, queries = [], []
    for table in iter_products(folder):
        for product in table.to_pylist():
            if text := template.render_product(product):
                products.append(text)
                words = str(product.get("title") or "").split()
                queries += [" ".join(words[start : start + 3]) for start in (0, 2) if len(words) >= start + 3]
    rng = random.Random(0)
    rng.shuffle(queries)
    return Texts(list(dict.fromkeys(queries))[:ZIPF_QUERIES], products)


def trained_model(work: Path) -> Path:
    """A cross-encoder of six layers of minilm, taught by the demo market's truth, and exported; made once."""
    out = work / MODEL
    if not out.exists():
        settings = [*TRAINED, f"storage.root={json.dumps(str(work / 'run'))}"]
        chain = Chain(load_config(str(ROOT / "relevance_ray" / "demo.yaml"), settings))
        export_student(chain, str(out), "auto", CORES)
    return out


def infinity_environment(work: Path) -> Path:
    """Python of an environment with infinity in it; built once."""
    folder = work / "infinity"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *INFINITY], check=True)
        (folder / "ready").touch()
    return python


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
    command += ["--served-model-name", MODEL, "--engine", "torch", "--device", "cpu", "--no-bettertransformer"]
    command += ["--no-model-warmup", "--port", str(port)]
    environment = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": str(CORES)}
    with running(command, f"http://127.0.0.1:{port}/health", work / "infinity.log", **environment):

        def scores(answer: Any) -> list[float]:
            found = {row["index"]: row["relevance_score"] for row in answer["results"]}
            return [found[place] for place in range(len(found))]

        yield Server(
            "infinity",
            f"http://127.0.0.1:{port}/rerank",
            lambda query, products: {"model": MODEL, "query": query, "documents": list(products)},
            scores,
        )


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


def uniform(texts: Texts, count: int, seed: int) -> Iterator[tuple[str, list[str]]]:
    rng = random.Random(seed)
    while True:
        query = rng.randrange(len(texts.queries))
        yield texts.queries[query], texts.candidates(query, count)


def zipf(texts: Texts, count: int, seed: int) -> Iterator[tuple[str, list[str]]]:
    rng = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(len(texts.queries))]
    while True:
        for query in rng.choices(range(len(texts.queries)), weights, k=1000):
            yield texts.queries[query], texts.candidates(query, count)


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


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    return float(spearmanr(first, second).statistic)


def row_of(name: str, callers: int, count: int, spells: Sequence[Spell]) -> dict[str, Any]:
    seconds = [each for spell in spells for each in spell.seconds]
    p50, p95, p99 = (float(np.quantile(seconds, share)) for share in (0.5, 0.95, 0.99))
    rate = float(np.median([spell.products_per_second for spell in spells]))
    return {
        "server": name,
        "in_flight": callers,
        "products": count,
        "requests": len(seconds),
        "errors": sum(spell.errors for spell in spells),
        "p50": round(p50, 4),
        "p95": round(p95, 4),
        "p99": round(p99, 4),
        "requests_per_second": round(rate / count, 2),
        "products_per_second": round(rate, 1),
    }


def show(row: Mapping[str, Any]) -> None:
    print(
        f"{row['server']:24} {row['in_flight']:3} in flight, {row['products']:5} products: p50 {row['p50']:.3f} s, p99 "
        f"{row['p99']:.3f} s, {row['products_per_second']:.1f} products/s ({row['requests']} requests)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="exported model folder; by default one is trained")
    parser.add_argument("--work", default="runs/serving", help="where the model and infinity's environment are kept")
    parser.add_argument("--quick", action="store_true", help="8 in flight with 100 products")
    parser.add_argument("--seconds", type=float, help="of a spell (30; 15 with --quick)")
    parser.add_argument("--rounds", type=int, default=3, help="spells of each load and server")
    parser.add_argument("--without-infinity", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="serve.KEY=VALUE", help="of our server")
    given = parser.parse_args()
    quiet_libraries()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: the servers are stopped
    work = Path(given.work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    model = Path(given.model).absolute() if given.model else trained_model(work)
    info = json.loads((model / "relevance.json").read_text())
    texts = read_texts(info["template"]["fields"], work)
    loads = [(8, 100)] if given.quick else [(c, n) for n in (10, 100, 1000) for c in (1, 8, 32) if c * n <= 8000]
    rounds, hot = given.rounds, 60 if given.quick else 300
    seconds = given.seconds or (15.0 if given.quick else 30.0)
    rows: list[dict[str, Any]] = []
    cold: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(ours(model, work / "ours.log", "ours, cold", caches=False, settings=given.set))]
        servers.append(stack.enter_context(sentence_transformers(model, work)))
        if not given.without_infinity:
            servers.append(stack.enter_context(infinity(model, work)))
        bare = BareScorer(model)
        stack.callback(bare.close)
        query, products = next(uniform(texts, 100, 7))
        expected = bare.ask(query, products)[1]
        agreement = {}
        for server in servers:
            body = json.dumps(server.body(query, products)).encode()
            asked = urllib.request.Request(server.url, body, {"Content-Type": "application/json"})
            answer = server.scores(json.loads(urllib.request.urlopen(asked, timeout=120).read()))
            agreement[server.name] = round(rank_correlation(expected, answer), 4)
            ask(server, uniform(texts, 100, 1), 4, 5.0)
        for callers, count in loads:
            spells: dict[str, list[Spell]] = {}
            for number in range(rounds):
                for server in servers:
                    found = ask(server, uniform(texts, count, number), callers, seconds)
                    spells.setdefault(server.name, []).append(found)
            for name, each in spells.items():
                rows.append(row_of(name, callers, count, each))
                show(rows[-1])
                if (callers, count) == (8, 100):
                    cold[name] = rows[-1]
        alone: dict[str, list[Spell]] = {}
        for number in range(2 * rounds):
            alone.setdefault("scorer", []).append(bare.spell(uniform(texts, 100, number), seconds / 2))
            alone.setdefault("ours", []).append(ask(servers[0], uniform(texts, 100, number), 1, seconds / 2))
        for name, label in (("scorer", "the scorer alone"), ("ours", "ours, cold, one caller")):
            rows.append(row_of(label, 1, 100, alone[name]))
            show(rows[-1])
    overheads = [a.products_per_second / b.products_per_second - 1 for a, b in zip(*alone.values(), strict=True)]
    with ours(model, work / "ours.log", "ours, warm", caches=True, settings=given.set) as server:
        for place in range(hot):
            ask(server, iter([(texts.queries[place], texts.candidates(place, 100))]), 1, 0.001)
        warm = row_of(
            "ours, warm", 8, 100, [ask(server, zipf(texts, 100, number), 8, seconds) for number in range(rounds)]
        )
        rows.append(warm)
        show(warm)
        counted = urllib.request.urlopen(server.url.replace("/score", "/metrics")).read().decode()
    counts = {
        key: float(line.rsplit(" ", 1)[1])
        for line in counted.splitlines()
        for key in ("hits", "misses")
        if line.startswith(f'relevance_ray_cache_{key}_total{{cache="scores"}}')
    }
    mine = cold["ours, cold"]
    peers = {
        f"cold_over_{key}": round(mine["products_per_second"] / cold[name]["products_per_second"], 3)
        for key, name in (("sentence_transformers", "sentence-transformers"), ("infinity", "infinity"))
        if name in cold
    }
    print(
        json.dumps(
            {
                "benchmark": "serving",
                "quick": given.quick,
                "hardware": f"{CORES} CPUs {platform.machine()}",
                "runtime": (read_runtime(model) or ("torch", ""))[0],
                **peers,
                "p99_over_sentence_transformers": round(mine["p99"] / cold["sentence-transformers"]["p99"], 3),
                "overhead_over_scorer": round(float(np.median(overheads)), 4),
                "warm_over_cold": round(warm["products_per_second"] / mine["products_per_second"], 3),
                "score_cache_hit_rate": round(counts["hits"] / (counts["hits"] + counts["misses"]), 4),
                "rank_correlation_with_scorer": agreement,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
