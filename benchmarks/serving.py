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
import contextlib
import json
import os
import platform
import random
import signal
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from servers import CORES, BareScorer, Server, Spell, ask, infinity, ours, sentence_transformers

from relevance_ray.chain.export import export_student
from relevance_ray.config import load_config
from relevance_ray.data.prepare import iter_products, prepare
from relevance_ray.engines.runtimes import read_runtime
from relevance_ray.quiet import quiet_libraries
from relevance_ray.steps import Chain
from relevance_ray.templates import Template

ROOT = Path(__file__).resolve().parents[1]
MODEL = "model"
TRAINED = [
    "data.market_size=4000",
    "label.engine=oracle",
    "student={model: minilm, num_layers: 6, max_tokens: 80, fields: [title, brand, color, category]}",
    "student.fit={learning_rate: 2.0e-4}",
    "generate.num_pairs=8000",
]
ZIPF_QUERIES = 10_000


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


def agreement(servers: Sequence[Server], bare: BareScorer, texts: Texts) -> dict[str, float]:
    """Rank correlation of each server's scores with the scorer's; every server is warmed up."""
    query, products = next(uniform(texts, 100, 7))
    expected, found = bare.ask(query, products)[1], {}
    for server in servers:
        body = json.dumps(server.body(query, products)).encode()
        asked = urllib.request.Request(server.url, body, {"Content-Type": "application/json"})
        answer = server.scores(json.loads(urllib.request.urlopen(asked, timeout=120).read()))
        found[server.name] = round(float(spearmanr(expected, answer).statistic), 4)
        ask(server, uniform(texts, 100, 1), 4, 5.0)
    return found


def cold_rows(
    servers: Sequence[Server], texts: Texts, loads: Sequence[tuple[int, int]], rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """Each server under each load, (callers, products of a request)."""
    rows = []
    for callers, count in loads:
        spells: dict[str, list[Spell]] = {server.name: [] for server in servers}
        for number in range(rounds):
            for server in servers:
                spells[server.name].append(ask(server, uniform(texts, count, number), callers, seconds))
        for name, each in spells.items():
            rows.append(row_of(name, callers, count, each))
            show(rows[-1])
    return rows


def overhead(
    server: Server, bare: BareScorer, texts: Texts, rounds: int, seconds: float
) -> tuple[float, list[dict[str, Any]]]:
    """How much longer 100 products take one caller over HTTP than the scorer alone, as a share; and the rows."""
    alone, served = [], []
    for number in range(rounds):
        alone.append(bare.spell(uniform(texts, 100, number), seconds))
        served.append(ask(server, uniform(texts, 100, number), 1, seconds))
    rows = [row_of("the scorer alone", 1, 100, alone), row_of(f"{server.name}, one caller", 1, 100, served)]
    for row in rows:
        show(row)
    ratios = [a.products_per_second / b.products_per_second for a, b in zip(alone, served, strict=True)]
    return float(np.median(ratios)) - 1, rows


def warm_row(server: Server, texts: Texts, hot: int, rounds: int, seconds: float) -> tuple[dict[str, Any], float]:
    """Requests by Zipf's law after the `hot` most frequent were asked once, and the share that the cache answered."""
    for place in range(hot):
        ask(server, iter([(texts.queries[place], texts.candidates(place, 100))]), 1, 0.001)
    row = row_of(server.name, 8, 100, [ask(server, zipf(texts, 100, number), 8, seconds) for number in range(rounds)])
    show(row)
    counts: dict[str, float] = {}
    for line in urllib.request.urlopen(server.url.replace("/score", "/metrics")).read().decode().splitlines():
        for key in ("hits", "misses"):
            if line.startswith(f'relevance_ray_cache_{key}_total{{cache="scores"}}'):
                counts[key] = float(line.rsplit(" ", 1)[1])
    return row, counts["hits"] / (counts["hits"] + counts["misses"])


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
    texts = read_texts(json.loads((model / "relevance.json").read_text())["template"]["fields"], work)
    loads = [(8, 100)] if given.quick else [(c, n) for n in (10, 100, 1000) for c in (1, 8, 32) if c * n <= 8000]
    rounds, seconds = given.rounds, given.seconds or (15.0 if given.quick else 30.0)
    with contextlib.ExitStack() as stack:
        mine = stack.enter_context(ours(model, work / "ours.log", "ours, cold", caches=False, settings=given.set))
        servers = [mine, stack.enter_context(sentence_transformers(model, work))]
        if not given.without_infinity:
            servers.append(stack.enter_context(infinity(model, work)))
        bare = BareScorer(model)
        stack.callback(bare.close)
        agreed = agreement(servers, bare, texts)
        rows = cold_rows(servers, texts, loads, rounds, seconds)
        over, more = overhead(mine, bare, texts, 2 * rounds, seconds / 2)
    with ours(model, work / "ours.log", "ours, warm", caches=True, settings=given.set) as server:
        warm, hit_rate = warm_row(server, texts, 60 if given.quick else 300, rounds, seconds)
    cold = {row["server"]: row for row in rows if (row["in_flight"], row["products"]) == (8, 100)}
    own, rate = cold["ours, cold"], "products_per_second"
    peers = {
        f"cold_over_{name.replace('-', '_')}": round(own[rate] / row[rate], 3)
        for name, row in cold.items()
        if row is not own
    }
    print(
        json.dumps(
            {
                "benchmark": "serving",
                "quick": given.quick,
                "hardware": f"{CORES} CPUs {platform.machine()}",
                "runtime": (read_runtime(model) or ("torch", ""))[0],
                **peers,
                "p99_over_sentence_transformers": round(own["p99"] / cold["sentence-transformers"]["p99"], 3),
                "overhead_over_scorer": round(over, 4),
                "warm_over_cold": round(warm[rate] / own[rate], 3),
                "score_cache_hit_rate": round(hit_rate, 4),
                "rank_correlation_with_scorer": agreed,
                "rows": [*rows, *more, warm],
            }
        )
    )


if __name__ == "__main__":
    main()
