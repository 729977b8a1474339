"""How far the data plane of labeling carries: many replicas of an engine that only sleeps.

Each replica takes as long as if it labeled 200 pairs a second, on real rows and with real commits, and loads no torch. The
efficiency is the steady rate over what the replicas could do; then the engines are made faster, until the plane (reading,
assembling, committing, Ray) cannot keep up: the rate at which it breaks on this machine is the largest that it reached.

    python benchmarks/labeling_scaling.py [--quick] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from market_shards import write_shards

from relevance_ray.cluster.session import ray_session
from relevance_ray.cluster.workers import Workers
from relevance_ray.engines.base import Labels, Pair
from relevance_ray.labeling.pipeline import Shard, label

PAIRS_PER_SECOND = 200.0
PRODUCTS = 8
BROKEN = 0.9


class SleepingEngine:
    """Takes as long as an engine that labels `rate` pairs a second."""

    gains: tuple[float, ...] = (0.0, 1.0)
    num_tokens = 0

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def label(self, pairs: Sequence[Pair]) -> Labels:
        time.sleep(len(pairs) / self.rate)
        logits = np.array([pair.pair_id % 1000 / 100 for pair in pairs], dtype=np.float32)
        return Labels(np.stack([np.zeros_like(logits), logits], axis=1), [None] * len(pairs), [None] * len(pairs))


def steady_rate(shards: Sequence[Shard], folder: Path, replicas: int, rate: float) -> float:
    """Pairs a second while every replica is at work: between the commits of the second and of the last but one round."""
    shutil.rmtree(folder, ignore_errors=True)
    label(shards, str(folder), "benchmark", partial(SleepingEngine, rate), workers=Workers(replicas, 0.1))
    times = sorted(path.stat().st_mtime for path in (folder / "commits").iterdir())
    first, last = replicas, len(times) - replicas
    return shards[0].num_pairs * (last - first) / (times[last] - times[first])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 replicas, fewer rounds, two rates")
    parser.add_argument("--work", help="where shards and labels are kept; a temporary folder by default")
    arguments = parser.parse_args()
    work = Path(arguments.work or tempfile.mkdtemp(prefix="labeling-scaling-")).absolute()
    replicas, rounds, groups = (8, 6, 100) if arguments.quick else (32, 8, 250)
    speedups = [1, 8] if arguments.quick else [1, 2, 3, 4, 6, 8]
    started = time.monotonic()
    shards = write_shards(str(work / "generate"), replicas * rounds, groups, PRODUCTS, distinct=replicas)
    found: dict[float, float] = {}
    with ray_session(max(4, replicas // 4)):  # logical: each replica takes a tenth of one, and they only sleep
        for speedup in speedups:
            asked = replicas * PAIRS_PER_SECOND * speedup
            found[asked] = steady_rate(shards, work / "label", replicas, PAIRS_PER_SECOND * speedup)
            print(f"asked for {asked:,.0f} pairs/s: {found[asked]:,.0f}, {found[asked] / asked:.3f} of it", flush=True)
            if found[asked] < 0.5 * asked:
                break
    asked = replicas * PAIRS_PER_SECOND
    broken = [rate for rate, reached in found.items() if reached < BROKEN * rate]
    rows = sum(shard.num_pairs for shard in shards)
    print(
        json.dumps(
            {
                "benchmark": "labeling_scaling",
                "quick": arguments.quick,
                "figures": {
                    f"efficiency_at_{replicas}": round(found[asked] / asked, 4),
                    "breaking_rate": round(max(found.values()), 1),
                    "first_rate_below_0.9": min(broken) if broken else None,
                    "rates": {f"{rate:.0f}": round(reached, 1) for rate, reached in found.items()},
                },
                "comparisons": [
                    {
                        "what": f"pairs a second of {replicas} replicas, measured against their sum",
                        "ours": round(found[asked], 1),
                        "peer": asked,
                        "rows": rows,
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
