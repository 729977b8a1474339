"""What a first stage costs in quality, and spares in time: the best k of 1,000 candidates to the cross-encoder.

The demo market, whose truth is known for every product: queries of its test split, each with its best candidates by BM25.
Both models are scored on all of them once; a two-tower then keeps k, the cross-encoder orders these, and nDCG@10 is held
against the truth. Time is of one request, the products' vectors remembered, as a server has them.

    python benchmarks/two_stage.py CROSS_ENCODER TWO_TOWER PREPARED [--queries 40] [--candidates 1000] [--threads 1]

CROSS_ENCODER and TWO_TOWER are model folders (of the second, an untrained encoder's short name will do), PREPARED a market's
prepare folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import bm25s
import numpy as np

from relevance_ray.data.market_truth import MARKET_SCALE, true_grade
from relevance_ray.data.prepare import iter_products, read_judged
from relevance_ray.engines.bi_encoder import BiEncoderModel, build_bi_encoder_folder
from relevance_ray.evaluation.significance import percentile_interval, resample_counts
from relevance_ray.metrics import group_offsets, ndcg
from relevance_ray.models import resolve_model
from relevance_ray.quiet import quiet_libraries
from relevance_ray.serving.scorer import Scorer
from relevance_ray.templates import Template

KEPT = (10, 20, 50, 100, 200, 500)


def read_catalog(prepared: str) -> list[dict[str, Any]]:
    return [product for table in iter_products(prepared) for product in table.to_pylist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cross_encoder")
    parser.add_argument("two_tower")
    parser.add_argument("prepared")
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    quiet_libraries()
    scorer = Scorer(given.cross_encoder, device="cpu", num_threads=given.threads)
    fields = scorer.info.template.fields
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(given.two_tower)
        if not (folder / "relevance.json").exists():
            template = Template(fields=fields, max_tokens=scorer.info.template.max_tokens)
            folder = build_bi_encoder_folder(resolve_model(given.two_tower), MARKET_SCALE, f"{scratch}/tower", template)
        tower = BiEncoderModel(folder, device="cpu", num_threads=given.threads)
    products = read_catalog(given.prepared)
    texts = [tower.render(product) for product in products]
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
    queries = [row["query"] for row in read_judged(given.prepared, "test").to_pylist()][: given.queries]
    vectors: dict[str, np.ndarray] = {}
    gains, first, second, seconds_first, seconds_pair = [], [], [], [], []
    for query in queries:
        found, _ = index.retrieve(bm25s.tokenize([query], show_progress=False), k=given.candidates, show_progress=False)
        some = [products[place] for place in found[0].tolist()]
        some_texts = [texts[place] for place in found[0].tolist()]
        new = [text for text in dict.fromkeys(some_texts) if text not in vectors]
        vectors.update(zip(new, tower.encoder.embed(new), strict=True))
        start = time.perf_counter()
        cosines = np.stack([vectors[text] for text in some_texts]) @ tower.encoder.embed([query])[0]
        seconds_first.append(time.perf_counter() - start)
        start = time.perf_counter()
        logits = np.asarray([row["logit"] for row in scorer.score(query, some)])
        seconds_pair.append((time.perf_counter() - start) / len(some))
        gains.append(np.asarray([MARKET_SCALE.gain(true_grade(query, product)) for product in some]))
        first.append(cosines)
        second.append(logits)
    offsets = group_offsets([len(each) for each in gains])
    truth = np.concatenate(gains)

    def quality(kept: int) -> np.ndarray:
        """nDCG@10 of each query where `kept` are scored by the cross-encoder and the others stand below."""
        scores = []
        for cosines, logits in zip(first, second, strict=True):
            below = cosines - cosines.max() + logits.min() - 1.0
            best = np.argsort(-cosines, kind="stable")[:kept]
            below[best] = logits[best]
            scores.append(below)
        return ndcg(truth, np.concatenate(scores), offsets, 10)

    whole = quality(given.candidates)
    defined = ~np.isnan(whole)
    counts = resample_counts(int(defined.sum()), 1000, 0) / defined.sum()
    rows = []
    stages = [("the two-tower alone", 0), *((f"{kept} kept", kept) for kept in KEPT), ("all", given.candidates)]
    for name, kept in stages:
        own = quality(kept)
        low, high = percentile_interval(counts @ (own - whole)[defined])
        milliseconds = 1000 * (
            np.median(seconds_pair) * kept + (np.median(seconds_first) if kept < given.candidates else 0)
        )
        rows.append(
            {
                "kept": kept,
                "ndcg@10": round(float(np.nanmean(own)), 4),
                "to_all": [round(float((own - whole)[defined].mean()), 4), round(low, 4), round(high, 4)],
                "milliseconds": round(float(milliseconds), 1),
            }
        )
        difference, low, high = rows[-1]["to_all"]
        print(
            f"{name:22} nDCG@10 {rows[-1]['ndcg@10']:.4f}, to all {difference:+.4f} [{low:+.4f}, {high:+.4f}], "
            f"{milliseconds:.0f} ms a request",
            flush=True,
        )
    hardware = f"{os.cpu_count()} CPUs {platform.machine()}"
    print(json.dumps({"benchmark": "two_stage", "hardware": hardware, "queries": int(defined.sum()), "rows": rows}))


if __name__ == "__main__":
    main()
