"""Where the time of one request goes: the same request through ever more of the server, medians of rounds that alternate.

    python benchmarks/serving_phases.py MODEL_DIR [--products 100] [--requests 30] [--threads 1]

The parts of the scorer are timed by themselves; then the whole scorer, the application without a network (ASGI), behind
uvicorn, and behind Ray Serve, and Serve in its throughput-optimized mode. What a line adds to the one before is the price of
that layer. Caches are off, one caller asks.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import requests
from servers import free_port, running
from serving import Texts, read_texts

from relevance_ray.engines.token_model import TokenModel
from relevance_ray.quiet import quiet_libraries
from relevance_ray.serving.http import create_app
from relevance_ray.serving.scorer import Scorer

UVICORN = """
import sys, uvicorn
from relevance_ray.serving.http import create_app
from relevance_ray.serving.scorer import Scorer
app = create_app(Scorer(sys.argv[1], device="cpu", num_threads=int(sys.argv[2])))
uvicorn.run(app, port=int(sys.argv[3]), log_level="error")
"""


def parts(scorer: Scorer, query: str, products: list[str]) -> dict[str, float]:
    """Seconds of each part of the scorer."""
    model = scorer._model
    assert isinstance(model, TokenModel)
    start = time.perf_counter()
    work = scorer.prepare(query, products)
    prepared = time.perf_counter()
    outputs = work.run(work.texts)
    ran = time.perf_counter()
    work.finish(outputs)
    end = time.perf_counter()
    inputs = model.inputs([query] * len(products), products)
    before = time.perf_counter()
    model.tokenize(inputs.distinct)
    tokenized = time.perf_counter() - before
    return {
        "tokenizing": tokenized,
        "checks and rendering": prepared - start - tokenized,
        "the model": ran - prepared,
        "logits to answers": end - ran,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--products", type=int, default=100)
    parser.add_argument("--requests", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", default="runs/serving")
    given = parser.parse_args()
    quiet_libraries()
    work = Path(given.work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    fields = json.loads((Path(given.model) / "relevance.json").read_text())["template"]["fields"]
    texts: Texts = read_texts(fields, work)
    asked = [(texts.queries[place], texts.candidates(place, given.products)) for place in range(given.requests)]
    scorer = Scorer(given.model, device="cpu", num_threads=given.threads)
    app, loop = create_app(scorer), asyncio.new_event_loop()
    inside = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://inside")

    def through(url: str) -> Callable[[str, list[str]], Any]:
        session = requests.Session()
        return lambda query, products: session.post(
            f"{url}/score", json={"query": query, "products": products}, timeout=300
        ).raise_for_status()

    ways: dict[str, Callable[[str, list[str]], Any]] = {
        "the scorer": scorer.score,
        "the application (ASGI)": lambda query, products: loop.run_until_complete(
            inside.post("/score", json={"query": query, "products": products})
        ),
    }
    off = ["score_cache_mb=0", "token_cache_mb=0", f"cpus_per_replica={given.threads}"]
    threads = {"OMP_NUM_THREADS": str(given.threads)}
    with contextlib.ExitStack() as stack:
        port = free_port()
        command = [sys.executable, "-c", UVICORN, given.model, str(given.threads), str(port)]
        url = f"http://127.0.0.1:{port}"
        stack.enter_context(running(command, f"{url}/health", work / "uvicorn.log", **threads))
        ways["uvicorn"] = through(url)
        for name, optimized in (("Ray Serve", "0"), ("Ray Serve, throughput-optimized", "1")):
            port = free_port()
            url = f"http://127.0.0.1:{port}"
            command = [sys.executable, "-m", "relevance_ray.cli", "serve", given.model, "--port", str(port)]
            command += [f"--set=serve.{each}" for each in off]
            environment = {**threads, "RAY_SERVE_THROUGHPUT_OPTIMIZED": optimized}
            stack.enter_context(running(command, f"{url}/health", work / f"serve-{optimized}.log", **environment))
            ways[name] = through(url)
        seconds: dict[str, list[float]] = {}
        for place, (query, products) in enumerate([asked[0], *asked]):
            for part, spent in parts(scorer, query, products).items():
                seconds.setdefault(part, []).append(spent)
            for name, way in ways.items():
                start = time.perf_counter()
                way(query, products)
                seconds.setdefault(name, []).append(time.perf_counter() - start)
            if not place:
                seconds.clear()  # the first of all is slow everywhere
    medians = {name: 1000 * float(np.median(found)) for name, found in seconds.items()}
    for name, milliseconds in medians.items():
        print(f"{name:34} {milliseconds:8.2f} ms", flush=True)
    hardware = f"{os.cpu_count()} CPUs {platform.machine()}"
    rounded = {name: round(milliseconds, 3) for name, milliseconds in medians.items()}
    print(json.dumps({"benchmark": "serving_phases", "hardware": hardware, "products": given.products, "ms": rounded}))


if __name__ == "__main__":
    main()
