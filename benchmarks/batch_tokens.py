"""How many tokens a forward pass of a scorer should take on this machine: the same pairs, scored by batches of many sizes.

    python benchmarks/batch_tokens.py [--kind cross_encoder|classifier|bi_encoder] [--model minilm] [--layers N]
        [--pairs N] [--rounds N] [--quick]

Pairs of the demo market, an untrained model, one thread on a CPU; the sizes alternate within a round. Processor time, so
that other work beside it disturbs little (on a GPU wall time).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from relevance_ray.data.market import products
from relevance_ray.data.market_queries import queries
from relevance_ray.data.market_truth import MARKET_SCALE
from relevance_ray.engines.bi_encoder import build_bi_encoder_folder
from relevance_ray.engines.registry import load_pair_model
from relevance_ray.models import resolve_model
from relevance_ray.quiet import quiet_libraries
from relevance_ray.student.cross_encoder import build_cross_encoder
from relevance_ray.student.options import EncoderOptions
from relevance_ray.teacher.classifier import build_classifier
from relevance_ray.teacher.options import ClassifierOptions

SIZES = (512, 1024, 2048, 4096, 8192, 16_384)


def build(kind: str, model: str, num_layers: int | None, folder: Path) -> None:
    """An untrained model folder of a kind, of up to 64 tokens a pair."""
    if kind == "classifier":
        build_classifier(
            ClassifierOptions(model=model, num_layers=num_layers, max_tokens=64), MARKET_SCALE, folder, seed=0
        )
    elif kind == "cross_encoder":
        build_cross_encoder(
            EncoderOptions(model=model, num_layers=num_layers, max_tokens=64), MARKET_SCALE, folder, seed=0
        )
    else:
        build_bi_encoder_folder(resolve_model(model), MARKET_SCALE, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="cross_encoder", choices=["cross_encoder", "classifier", "bi_encoder"])
    parser.add_argument("--model", default="minilm", help="short name, folder or hub id")
    parser.add_argument("--layers", type=int, help="its first layers alone")
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="64 pairs, one round")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.pairs, arguments.rounds = 64, 1
    quiet_libraries()
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    rows = products(0, 0, arguments.pairs).to_pylist()
    asked = queries(0, 0, arguments.pairs)
    rates: dict[int, list[float]] = {size: [] for size in SIZES}
    with tempfile.TemporaryDirectory() as scratch:
        build(arguments.kind, arguments.model, arguments.layers, Path(scratch, "model"))
        models = {size: load_pair_model(Path(scratch, "model"), "auto", 1, size) for size in SIZES}
        for model in models.values():
            model.logits(asked[:8], rows[:8])
        for number in range(arguments.rounds):
            for size in SIZES if number % 2 == 0 else reversed(SIZES):
                started = clock()
                models[size].logits(asked, rows)
                rates[size].append(arguments.pairs / (clock() - started))
    figures = {size: round(statistics.median(found), 1) for size, found in rates.items()}
    print("| tokens of a pass | pairs/s |\n|---|---|")
    for size, rate in figures.items():
        print(f"| {size:,} | {rate:,.1f} |")
    print(
        json.dumps(
            {
                "benchmark": "batch_tokens",
                "kind": arguments.kind,
                "model": arguments.model,
                "quick": arguments.quick,
                "hardware": torch.cuda.get_device_name()
                if torch.cuda.is_available()
                else f"one core, {platform.machine()}",
                "pairs_per_second": figures,
            }
        )
    )


if __name__ == "__main__":
    main()
