"""How long the comparison of two models takes on millions of judged pairs, what it holds, and both beside `ir-measures`.

Judgments and scores are drawn at random: queries of 5 to 35 products, four grades, scores that know the grade up to noise.
Ours is the whole comparison of two models, as `evaluate` has it: all metrics of each, 1,000 bootstrap resamples, the
randomization test. Beside `ir-measures` (its pytrec_eval, from data frames) only the per-query metrics are measured that
both have, nDCG, nDCG@10, MRR, MAP and recall@10, for one model on the same rows; their means must agree to 1e-9. Every
measurement runs in a process of its own, whose peak of resident memory counts, the rows included.

    python benchmarks/evaluation.py [--quick] [--rows N] [--peer-rows N]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from relevance_ray.evaluation.compare import compare_predictions
from relevance_ray.evaluation.judged import Judgments
from relevance_ray.evaluation.measure import Predictions
from relevance_ray.evaluation.options import EvaluateOptions
from relevance_ray.metrics import Ranking, group_offsets
from relevance_ray.schema import SCALES

SCALE = SCALES["esci"]
MEASURES = ("nDCG", "nDCG@10", "RR(rel=100)", "AP(rel=100)", "R(rel=100)@10")
ROUNDS = 3


def draw(rows: int) -> tuple[Judgments, dict[str, Predictions]]:
    """Judged pairs, about so many, and two models' predictions of them."""
    rng = np.random.default_rng(0)
    offsets = group_offsets(rng.integers(5, 36, max(1, rows // 20)))
    classes = rng.integers(0, 4, offsets[-1])
    pairs = Judgments(offsets, np.asarray(SCALE.gains)[classes], classes, classes >= SCALE.relevant_index)
    found = {}
    for name, noise in (("student", 1.0), ("teacher", 1.2)):
        logits = classes - 2.0 + noise * rng.normal(size=len(classes))
        found[name] = Predictions(
            logits, np.clip(np.round(logits + 2), 0, 3).astype(np.int64), 1 / (1 + np.exp(-logits))
        )
    return pairs, found


def ours(rows: int) -> dict[str, Any]:
    """The whole comparison."""
    pairs, predictions = draw(rows)
    started = time.perf_counter()
    compare_predictions(pairs, predictions, SCALE, EvaluateOptions())
    return {"pairs": pairs.num_pairs, "seconds": time.perf_counter() - started}


def ours_by_query(rows: int) -> dict[str, Any]:
    """The per-query metrics that the peer has."""
    pairs, predictions = draw(rows)
    started = time.perf_counter()
    ranking = Ranking(predictions["student"].logits, pairs.offsets)
    values = [ranking.ndcg(pairs.gains), ranking.ndcg(pairs.gains, 10), ranking.reciprocal_rank(pairs.relevant)]
    values += [ranking.average_precision(pairs.relevant), ranking.recall(pairs.relevant, 10)]
    means = [float(np.nan_to_num(each).mean()) for each in values]  # the peer counts what is undefined as 0
    return {"seconds": time.perf_counter() - started, "means": means}


def peer_by_query(rows: int) -> dict[str, Any]:
    """The same by `ir-measures`."""
    import ir_measures
    import pandas as pd

    pairs, predictions = draw(rows)
    query = np.repeat(np.arange(pairs.num_queries), np.diff(pairs.offsets)).astype(str)
    product = np.arange(pairs.num_pairs).astype(str)
    grades = np.round(pairs.gains * 100).astype(int)
    qrels = pd.DataFrame({"query_id": query, "doc_id": product, "relevance": grades})
    run = pd.DataFrame({"query_id": query, "doc_id": product, "score": predictions["student"].logits})
    measures = [ir_measures.parse_measure(name) for name in MEASURES]
    started = time.perf_counter()
    found = ir_measures.calc_aggregate(measures, qrels, run)
    return {"seconds": time.perf_counter() - started, "means": [found[measure] for measure in measures]}


def in_process(work: Callable[[int], dict[str, Any]], rows: int) -> dict[str, Any]:
    """Run in a process of its own; `peak_gb` is what it held at most."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (work, rows))


def _measured(work: Callable[[int], dict[str, Any]], rows: int) -> dict[str, Any]:
    return work(rows) | {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=int, help="judged pairs of the whole comparison; 10 million, or 100,000 with --quick"
    )
    parser.add_argument("--peer-rows", type=int, help="of those beside the peer; 1 million, or 20,000 with --quick")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    rows = arguments.rows or (100_000 if arguments.quick else 10_000_000)
    peer_rows = arguments.peer_rows or (20_000 if arguments.quick else 1_000_000)
    whole = in_process(ours, rows)
    print(f"{whole['pairs']:,} pairs, two models: {whole['seconds']:.1f} s, {whole['peak_gb']:.2f} GB", flush=True)
    rounds = [(in_process(ours_by_query, peer_rows), in_process(peer_by_query, peer_rows)) for _ in range(ROUNDS)]
    own, peer = (statistics.median(each[part]["seconds"] for each in rounds) for part in (0, 1))
    apart = max(abs(a - b) for a, b in zip(rounds[0][0]["means"], rounds[0][1]["means"], strict=True))
    print(f"five metrics of {peer_rows:,} pairs: {own:.2f} s, ir-measures {peer:.2f} s, means apart by {apart:.1e}")
    print(
        json.dumps(
            {
                "benchmark": "evaluation",
                "quick": arguments.quick,
                "hardware": f"{os.cpu_count()} CPUs {platform.machine()}",
                "pairs": whole["pairs"],
                "seconds": round(whole["seconds"], 2),
                "peak_memory_gb": round(whole["peak_gb"], 2),
                "over_ir_measures": round(peer / own, 1),
                "largest_difference": apart,
                "comparisons": [
                    {
                        "what": "seconds for nDCG, nDCG@10, MRR, MAP and recall@10 of one model",
                        "ours": round(own, 3),
                        "peer": round(peer, 3),
                        "rows": peer_rows,
                    }
                ],
            }
        )
    )


if __name__ == "__main__":
    main()
