"""What the labeling pipeline costs: its steady rate over that of the bare engine on the same rows.

Both run the same transformers engine with the same threads, in a worker of the same Ray. The bare engine is handed pairs
that are in memory; the pipeline reads its shards, labels them, and commits the labels. They alternate, and each figure
is a median. A pipeline's rate is taken between its first and its last commit, so that loading counts for neither.

    python benchmarks/labeling.py [--quick] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from market_shards import write_shards

from relevance_ray.cluster.session import ray_session
from relevance_ray.cluster.workers import Workers
from relevance_ray.engines.options import EngineOptions
from relevance_ray.engines.registry import open_engine
from relevance_ray.labeling.pipeline import Shard, label
from relevance_ray.labeling.shard import pairs_of
from relevance_ray.schema import SCALES
from relevance_ray.storage import CommitLog, read_table
from relevance_ray.student.cross_encoder import build_cross_encoder
from relevance_ray.student.options import EncoderOptions

THREADS = 2
PRODUCTS = 8


class BareEngine:
    """The engine alone: seconds to label each shard's pairs, already in memory."""

    def __init__(self, factory: Any, shards: list[Shard]) -> None:
        self._engine = factory()
        self._pairs = [pairs_of(read_table(shard.path)) for shard in shards]
        self._engine.label(self._pairs[0][:64])  # the first call pays for what all share

    def seconds(self) -> list[float]:
        taken = []
        for pairs in self._pairs:
            started = time.perf_counter()
            self._engine.label(pairs)
            taken.append(time.perf_counter() - started)
        return taken


def bare_rate(factory: Any, shards: list[Shard]) -> float:
    """Pairs a second of the bare engine, the first shard left out as it is for the pipeline."""
    import ray

    actor = ray.remote(num_cpus=THREADS)(BareEngine).remote(factory, shards)
    seconds = ray.get(actor.seconds.remote())[1:]
    ray.kill(actor)
    return sum(shard.num_pairs for shard in shards[1:]) / sum(seconds)


def pipeline_rate(factory: Any, shards: list[Shard], folder: Path) -> float:
    """Pairs a second between the first and the last commit."""
    shutil.rmtree(folder, ignore_errors=True)
    label(shards, str(folder), "benchmark", factory, workers=Workers(1, THREADS))
    assert len(CommitLog(str(folder)).committed()) == len(shards)
    times = sorted(path.stat().st_mtime for path in (folder / "commits").iterdir())
    pairs = shards[0].num_pairs
    return pairs * (len(shards) - 1) / (times[-1] - times[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shards and repeats, a 2-layer model")
    parser.add_argument("--work", help="where shards and labels are kept; a temporary folder by default")
    arguments = parser.parse_args()
    work = Path(arguments.work or tempfile.mkdtemp(prefix="labeling-")).absolute()
    num_shards, groups, repeats = (8, 100, 3) if arguments.quick else (12, 250, 5)
    started = time.monotonic()
    shards = write_shards(str(work / "generate"), num_shards, groups, PRODUCTS)
    model = work / "model"
    options = EncoderOptions(model="minilm", num_layers=2 if arguments.quick else 6, max_tokens=64)
    build_cross_encoder(options, SCALES["esci"], model, seed=0)
    factory = partial(open_engine, EngineOptions(num_threads=THREADS), str(model), SCALES["esci"])
    bare, pipeline = [], []
    with ray_session(4):
        for repeat in range(repeats):
            bare.append(bare_rate(factory, shards))
            pipeline.append(pipeline_rate(factory, shards, work / "label"))
            print(f"{repeat + 1} of {repeats}: bare {bare[-1]:.1f}, pipeline {pipeline[-1]:.1f} pairs/s", flush=True)
    ratios = [ours / peer for ours, peer in zip(pipeline, bare, strict=True)]
    rows = sum(shard.num_pairs for shard in shards)
    print(
        json.dumps(
            {
                "benchmark": "labeling",
                "quick": arguments.quick,
                "figures": {
                    "pipeline_over_engine": round(statistics.median(ratios), 4),
                    "ratios": [round(ratio, 4) for ratio in ratios],
                },
                "comparisons": [
                    {
                        "what": "pairs a second, pipeline against the bare engine",
                        "ours": round(statistics.median(pipeline), 2),
                        "peer": round(statistics.median(bare), 2),
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
