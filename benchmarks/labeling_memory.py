"""What labeling holds in memory, at a size and at four times that size.

Real rows of the demo market, labeled by the oracle through the whole pipeline. Memory is the sum over driver, Ray's own
processes and workers of their proportional share (PSS), plus the object store, sampled while shards are committed: the
median of the last half of each run. It should not grow with the number of pairs; what it would be at a billion pairs is
extrapolated from the difference, and marked so.

    python benchmarks/labeling_memory.py [--quick] [--pairs N] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import psutil
from market_shards import write_shards

from relevance_ray.cluster.session import ray_session
from relevance_ray.cluster.workers import Workers
from relevance_ray.data.market_truth import MARKET_SCALE
from relevance_ray.engines.options import EngineOptions
from relevance_ray.engines.registry import open_engine
from relevance_ray.labeling.pipeline import Shard, label
from relevance_ray.storage import CommitLog

PRODUCTS, GROUPS = 8, 250
BILLION = 1e9


def memory() -> tuple[int, int]:
    """Bytes of this process with all that it started (PSS), and of the object store."""
    import ray

    total = store = 0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            full = process.memory_full_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
        total += full.pss
    there, free = ray.cluster_resources(), ray.available_resources()
    store = int(there.get("object_store_memory", 0) - free.get("object_store_memory", 0))
    return total, store


class Sampler(threading.Thread):
    """Samples `memory` twice a second, beside how many shards are committed."""

    def __init__(self, commits: Path) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[int, int, int]] = []
        self._commits, self._stop_now = commits, threading.Event()

    def run(self) -> None:
        while not self._stop_now.wait(0.5):
            done = len(os.listdir(self._commits)) if self._commits.is_dir() else 0
            if done:
                self.samples.append((done, *memory()))

    def stop(self) -> None:
        self._stop_now.set()
        self.join()


def measure(shards: list[Shard], folder: Path) -> dict[str, float]:
    """Label, and what was held meanwhile: medians over the second half of the shards, in GB."""
    shutil.rmtree(folder, ignore_errors=True)
    sampler = Sampler(folder / "commits")
    started = time.monotonic()
    with ray_session(os.cpu_count()):
        sampler.start()
        factory = partial(open_engine, EngineOptions(engine="oracle"), None, MARKET_SCALE)
        label(shards, str(folder), "benchmark", factory, workers=Workers(2, 1))
        sampler.stop()
    assert len(CommitLog(str(folder)).committed()) == len(shards)
    late = [(pss, store) for done, pss, store in sampler.samples if done >= len(shards) / 2]
    pss, store = (statistics.median(values) / 1e9 for values in zip(*late, strict=True))
    pairs = sum(shard.num_pairs for shard in shards)
    seconds = time.monotonic() - started
    return {
        "pairs": pairs,
        "shards": len(shards),
        "pss_gb": pss,
        "store_gb": store,
        "total_gb": pss + store,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100,000 and 400,000 pairs")
    parser.add_argument("--pairs", type=int, help="the smaller size; 1,000,000 by default")
    parser.add_argument("--work", help="where shards and labels are kept; a temporary folder by default")
    arguments = parser.parse_args()
    work = Path(arguments.work or tempfile.mkdtemp(prefix="labeling-memory-")).absolute()
    pairs = arguments.pairs or (100_000 if arguments.quick else 1_000_000)
    num_shards = max(1, pairs // (PRODUCTS * GROUPS))
    started = time.monotonic()
    runs = []
    for times in (1, 4):
        shards = write_shards(str(work / f"generate-{times}"), times * num_shards, GROUPS, PRODUCTS, distinct=20)
        runs.append(measure(shards, work / f"label-{times}"))
        print(json.dumps({name: round(value, 4) for name, value in runs[-1].items()}), flush=True)
    small, large = runs
    growth = large["total_gb"] / small["total_gb"] - 1
    per_shard = (large["total_gb"] - small["total_gb"]) / (large["shards"] - small["shards"])
    shards_of_a_billion = BILLION / 10_000
    print(
        json.dumps(
            {
                "benchmark": "labeling_memory",
                "quick": arguments.quick,
                "figures": {
                    "growth_at_4_times": round(growth, 4),
                    "total_gb": round(small["total_gb"], 3),
                    "total_gb_at_4_times": round(large["total_gb"], 3),
                    "extrapolated_gb_at_1e9_pairs_in_shards_of_10000": round(
                        small["total_gb"] + max(0.0, per_shard) * shards_of_a_billion, 2
                    ),
                },
                "comparisons": [
                    {
                        "what": "memory at four times the size against memory at the size, GB",
                        "ours": round(large["total_gb"], 3),
                        "peer": round(small["total_gb"], 3),
                        "rows": large["pairs"],
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
