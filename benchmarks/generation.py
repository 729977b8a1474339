"""What generation holds in memory at a size and at ten times that size, and its rate beside a plain `bm25s` loop.

The catalog, log and judgments of the demo market; queries from the log and from titles; candidates by BM25 (top and middle
ranks), category and chance, and with --dense also by vectors. Memory is the sum over driver, Ray's own processes and
workers of their proportional share (PSS), plus the object store, sampled twice a second: the peak of each run, index
included. Workers map the index, so their share of it counts as long as the system keeps it in memory.

The peer is a loop over `bm25s` on one core: its index over the same texts, mapped as well, as many best products for each
of the same queries, and nothing else: no other origins, no products' fields, no files. Ours is whole shards,
but without their commits; both on one core, alternating, in one run. (bm25s can also compile its scoring with numba, which
is no dependency here.) The loop scores every product; ours scores those that its budget of hits opens
(`lexical.POSTINGS_BUDGET`), which on this catalog, of few words, are not always the best (RESULTS.md has the share).

    python benchmarks/generation.py [--quick] [--dense] [--pairs N] [--products N] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from labeling_memory import memory

from relevance_ray.cluster.session import ray_session
from relevance_ray.cluster.workers import Workers
from relevance_ray.data.prepare import prepare
from relevance_ray.data.source import DataOptions
from relevance_ray.generate.index.catalog import search_text
from relevance_ray.generate.index.catalog_index import CatalogIndex
from relevance_ray.generate.options import QUOTAS, GenerateOptions
from relevance_ray.generate.pipeline import generate
from relevance_ray.generate.queries.store import QueryStore
from relevance_ray.generate.search_actors import open_whole
from relevance_ray.generate.shards import ShardContext, generate_shard
from relevance_ray.generate.work import open_embedder

LEXICAL = {"bm25": 3.0, "bm25_middle": 2.0, "category": 2.0, "random": 1.0}
GROUPS_PER_SHARD = 512
ROUNDS = 5
TIMED_QUERIES = 256


class Peak(threading.Thread):
    """The most that was held at once, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.total = 0
        self._stop_now = threading.Event()

    def run(self) -> None:
        while not self._stop_now.wait(0.5):
            self.total = max(self.total, sum(memory()))

    def stop(self) -> float:
        self._stop_now.set()
        self.join()
        return self.total / 1e9


def options_for(pairs: int, dense: bool) -> GenerateOptions:
    return GenerateOptions(
        num_pairs=pairs,
        quotas=QUOTAS if dense else LEXICAL,
        groups_per_shard=GROUPS_PER_SHARD,
        source=["log", "titles"],
    )


def measure(pairs: int, prepared: Path, out: Path, dense: bool) -> dict[str, float]:
    """Generate from nothing, and what was held meanwhile."""
    shutil.rmtree(out, ignore_errors=True)
    started = time.monotonic()
    with ray_session(os.cpu_count()):
        peak = Peak()
        peak.start()
        summary = generate(options_for(pairs, dense), str(prepared), str(out), workers=Workers(os.cpu_count() or 1))
        gigabytes = peak.stop()
    return {"pairs": summary["pairs"], "peak_gb": gigabytes, "seconds": time.monotonic() - started}


def in_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run in a process of its own, so that what it holds is given back."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def build_peer(index: CatalogIndex, folder: Path) -> None:
    import bm25s

    texts: list[str] = []
    for shard in range(index.catalog.num_shards):
        for batch in index.product_file(shard).batches(["title", "brand", "color", "category"]):
            texts += search_text(batch.to_pydict())
    tokens = bm25s.tokenize(texts, stopwords="en", show_progress=False)
    retriever = bm25s.BM25(k1=1.2, b=0.75, method="lucene", backend="numpy", csc_backend="scipy")
    retriever.index(tokens, show_progress=False)
    retriever.save(folder, show_progress=False)


def rates(store: QueryStore, peer: Path) -> tuple[list[float], list[float]]:
    """Pairs a second of one core, ours and the peer's, alternating over stretches of the same queries."""
    import bm25s

    index, read = store.index, store.read_pool().read
    options = index.options
    context = ShardContext(
        options,
        index.catalog,
        index.lexicon,
        open_whole(index, dense=options.uses_dense),
        open_embedder(options) if options.uses_dense else None,
        read,
    )
    retriever = bm25s.BM25.load(peer, mmap=True)
    size = options.candidates_per_query
    ours, others = [], []
    for number in range(ROUNDS + 1):
        start = number * TIMED_QUERIES
        started = time.perf_counter()
        table = generate_shard(context, start, start + TIMED_QUERIES)
        ours.append(table.num_rows * size / (time.perf_counter() - started))
        queries = table["query"].to_pylist()
        started = time.perf_counter()
        for query in queries:
            tokens = bm25s.tokenize([query], stopwords="en", show_progress=False, return_ids=False)
            retriever.retrieve(tokens, k=size, show_progress=False)
        others.append(len(queries) * size / (time.perf_counter() - started))
    return ours[1:], others[1:]  # the first round reads the index from disk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100,000 products, 100,000 and 1,000,000 pairs")
    parser.add_argument("--dense", action="store_true", help="vectors too; 100,000 products by default")
    parser.add_argument("--pairs", type=int, help="the smaller size; 1,000,000 by default")
    parser.add_argument("--products", type=int, help="of the catalog; 1,000,000 by default")
    parser.add_argument("--work", help="where all is kept; a temporary folder by default")
    arguments = parser.parse_args()
    work = Path(arguments.work or tempfile.mkdtemp(prefix="generation-")).absolute()
    pairs = arguments.pairs or (100_000 if arguments.quick else 1_000_000)
    products = arguments.products or (100_000 if arguments.quick or arguments.dense else 1_000_000)
    started = time.monotonic()
    prepared = work / f"prepare-{products}"
    if not (prepared / "scale.json").exists():
        prepare(DataOptions(format="market", market_size=products), prepared)
    runs = []
    for times in (1, 10):
        runs.append(measure(times * pairs, prepared, work / f"generate-{times}", arguments.dense))
        print(json.dumps({name: round(value, 3) for name, value in runs[-1].items()}), flush=True)
    out = work / "generate-10"
    index = CatalogIndex(options_for(10 * pairs, arguments.dense), str(prepared), str(out / "index"))
    in_process(build_peer, index, work / "bm25s")
    ours, others = in_process(rates, QueryStore(index, str(prepared), str(out)), work / "bm25s")
    small, large = runs
    per_pair = max(0.0, large["peak_gb"] - small["peak_gb"]) / (large["pairs"] - small["pairs"])
    rate, other = statistics.median(ours), statistics.median(others)
    print(
        json.dumps(
            {
                "benchmark": "generation",
                "quick": arguments.quick,
                "figures": {
                    "peak_memory_gb": round(large["peak_gb"], 3),
                    "peak_memory_gb_at_a_tenth": round(small["peak_gb"], 3),
                    "growth_at_10_times": round(large["peak_gb"] / small["peak_gb"] - 1, 4),
                    "extrapolated_gb_at_1e8_pairs": round(small["peak_gb"] + per_pair * 1e8, 2),
                    "over_bm25s_loop": round(rate / other, 3),
                    "pairs_per_second_per_core": round(rate, 1),
                    "whole_run_pairs_per_second": round(large["pairs"] / large["seconds"], 1),
                },
                "comparisons": [
                    {
                        "what": "candidate pairs a second on one core: whole shards against a bm25s loop",
                        "ours": round(rate, 1),
                        "peer": round(other, 1),
                        "rows": ROUNDS * TIMED_QUERIES * 8,
                        "seconds": round(time.monotonic() - started, 1),
                    }
                ],
            }
        )
    )
    if not arguments.work:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
