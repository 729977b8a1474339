"""What teaches a student most: origins of candidates, sources of queries, or how it is distilled.

Every variant generates the same number of pairs, has them labeled by the same teacher (the stack of cosine and BM25, fitted
on the training queries), and trains the same student on them, once a seed; the seed draws queries, candidates and the
student's fresh weights (with `--one-draw`, for sources that are dear and for `options`, which learn from the same pairs
but for "groups of 16", the weights alone). Students rank the held-out judged queries: nDCG of each query, averaged over the
seeds, and the difference to the first variant with an interval over queries (paired bootstrap; the seeds' spread is told
beside it).

    python benchmarks/what_teaches.py origins|sources|options --data FOLDER --format esci|homedepot|chorus [--quick]

`--queries FILE` is a log of a shop's queries (Best Buy's, say, for Chorus, which sells the same kind of things); without one
the log is the judged train queries, and where these are few, `--log-candidates` gives each as many products as the number
of pairs takes. Killed and started again it goes on where it was. All variants share one root: the catalog's index, the
teacher and every label that two of them need are made once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

from relevance_ray.config import Config, build_config
from relevance_ray.data.prepare import read_judged, read_scale
from relevance_ray.engines.registry import load_pair_model
from relevance_ray.evaluation.ask import predict
from relevance_ray.evaluation.judged import JudgedPairs, flatten
from relevance_ray.evaluation.significance import percentile_interval, resample_counts
from relevance_ray.metrics import ndcg
from relevance_ray.quiet import quiet_libraries
from relevance_ray.steps import Chain
from relevance_ray.storage import exists, fingerprint, join, read_json, write_json

Sections = dict[str, dict[str, Any]]
"""Of a configuration; what a variant changes."""


def generating(**options: Any) -> Sections:
    return {"generate": options}


def distilling(**options: Any) -> Sections:
    return {"student": options}


ORIGINS: dict[str, Sections] = {
    "default": {},
    "top": generating(quotas={"bm25": 1, "dense": 1}),
    "top of BM25": generating(quotas={"bm25": 1}),
    "top and random": generating(quotas={"bm25": 1, "dense": 1, "random": 2}),
    "top and middle": generating(quotas={"bm25": 1, "dense": 1, "bm25_middle": 1, "dense_middle": 1}),
    "middle": generating(quotas={"bm25_middle": 1, "dense_middle": 1}),
    "far middle (30 to 300) for middle": generating(middle_ranks=[30, 300]),
    "random": generating(quotas={"random": 1}),
}
SOURCES: dict[str, Sections] = {
    "titles": generating(source="titles"),
    "log": generating(source="log"),
    "language model": generating(source="llm"),
    "all three": generating(source=["log", "titles", "llm"]),
}
OPTIONS: dict[str, Sections] = {
    "default": {},
    # 64 products a step, as by default
    "groups of 2": distilling(max_group_products=2, fit={"batch_size": 32}),
    "groups of 4": distilling(max_group_products=4, fit={"batch_size": 16}),
    "groups of 16": generating(candidates_per_query=16) | distilling(fit={"batch_size": 4}),
    "margins alone": distilling(level_weight=0.0),
    "level_weight .5": distilling(level_weight=0.5),
    "margins of differing grades": distilling(margins="differing"),
    "margins and soft targets": distilling(bce_weight=1.0),
    "soft targets alone": distilling(margin_weight=0.0, level_weight=0.0, bce_weight=1.0),
    "margins and KL of classes": distilling(kl_weight=1.0),
    "a fifth human, mixed": distilling(human_share=0.2),
    "a fifth human, last": distilling(human_share=0.2, human_order="last"),
    "two-tower": distilling(kind="two_tower"),
    "two-tower with InfoNCE": distilling(kind="two_tower", infonce_weight=0.1),
}
STUDIES = {"origins": ORIGINS, "sources": SOURCES, "options": OPTIONS}


def config_of(arguments: argparse.Namespace, variant: Sections, seed: int, root: Path) -> Config:
    quick, generate, student = arguments.quick, variant.get("generate", {}), variant.get("student", {})
    values = {
        "data": {"format": arguments.format, "path": str(Path(arguments.data).resolve()), **arguments.data_options},
        "storage": {"root": str(root)},
        "teacher": {"kind": "ensemble", "members": [{"kind": "bi_encoder", "max_tokens": 64}, {"kind": "bm25"}]},
        "generate": {
            "source": ["log", "titles"],
            "num_pairs": 800 if quick else arguments.pairs,
            "seed": 0 if arguments.one_draw else seed,
            "candidates_per_query": arguments.log_candidates
            if generate.get("source") == "log"
            else arguments.candidates,
            **generate,
        },
        "student": {
            "num_layers": 2 if quick else arguments.layers,
            "max_tokens": 64,
            **student,
            "fit": {"seed": seed, **student.get("fit", {})},
        },
    }
    return build_config(values, arguments.set, where="what_teaches.py")


def per_query(config: Config, judged: JudgedPairs | None) -> tuple[JudgedPairs, np.ndarray]:
    """The held-out pairs, and nDCG of each query, float64 [q], as the configuration's student ranks them."""
    chain = Chain(config)
    outcome = chain.run("train-student")
    if judged is None:
        prepared = outcome.folders["prepare"]
        judged = flatten(read_judged(prepared, "test"), read_scale(prepared))
    place = join(config.storage.root, "ndcg", f"{fingerprint(outcome.folders['train-student'])}.json")
    if not exists(place):
        model = load_pair_model(join(outcome.folders["train-student"], "model"))
        values = ndcg(judged.gains, predict(model, judged).logits, judged.offsets)
        write_json(place, [None if np.isnan(value) else float(value) for value in values])
    return judged, np.asarray([np.nan if value is None else value for value in read_json(place)], dtype=np.float64)


def compare(values: np.ndarray, first: np.ndarray) -> dict[str, Any]:
    """Mean nDCG of a variant's [seeds, q] values, and its difference to the first variant's with a 95% interval."""
    defined = ~np.isnan(values).any(axis=0) & ~np.isnan(first).any(axis=0)
    own, other = values[:, defined].mean(axis=0), first[:, defined].mean(axis=0)
    draws = resample_counts(int(defined.sum()), 2000, seed=0) / defined.sum()
    low, high = percentile_interval(draws @ (own - other))
    by_seed = values[:, defined].mean(axis=1)
    return {
        "ndcg": round(float(own.mean()), 4),
        "by_seed": [round(float(value), 4) for value in by_seed],
        "difference": round(float((own - other).mean()), 4),
        "low": round(low, 4),
        "high": round(high, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    default_data = os.environ.get("RELEVANCE_RAY_TEST_DATA", "data")
    parser.add_argument("--format", default="esci", choices=["esci", "homedepot", "chorus"])
    parser.add_argument("--data", help="folder of the official files")
    parser.add_argument("--pairs", type=int, default=6000)
    parser.add_argument("--candidates", type=int, default=8, help="products of each query")
    parser.add_argument("--one-draw", action="store_true", help="the seeds train other students on the same pairs")
    parser.add_argument("--log-candidates", type=int, help="of each query of variant log; as of the others")
    parser.add_argument("--queries", help="a query log: Parquet, CSV or JSON lines")
    parser.add_argument("--layers", type=int, default=3, help="of the student")
    parser.add_argument("--seeds", type=int, help="3; 1 with --quick")
    parser.add_argument("--only", action="append", help="a variant by name, beside the first; repeatable")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the configuration")
    parser.add_argument("--work", default="runs/what_teaches", help="where all is kept, and resumed from")
    parser.add_argument("--quick", action="store_true", help="800 pairs, two variants, one seed, a 2-layer student")
    arguments = parser.parse_args()
    arguments.data = arguments.data or f"{default_data}/{arguments.format}"
    # Few judged queries: half of them are held out, whatever the official split says.
    arguments.data_options = {} if arguments.format == "homedepot" else {"folds": 2, "fold": 0}
    if arguments.queries:
        arguments.data_options["queries"] = str(Path(arguments.queries).resolve())
    arguments.log_candidates = arguments.log_candidates or arguments.candidates
    seeds = arguments.seeds or (1 if arguments.quick else 3)
    variants = STUDIES[arguments.study]
    names = list(variants)[: 2 if arguments.quick else None]
    if arguments.study == "options":
        arguments.one_draw = True
    if arguments.only:
        names = [names[0], *arguments.only]
    root = Path(arguments.work).absolute() / arguments.format
    quiet_libraries()

    started = time.monotonic()
    judged: JudgedPairs | None = None
    found: dict[str, np.ndarray] = {}
    for name in names:
        rows = []
        for seed in range(seeds):
            print(f"{name}, seed {seed}", flush=True)
            judged, values = per_query(config_of(arguments, variants[name], seed, root), judged)
            rows.append(values)
        found[name] = np.stack(rows)
        print(f"{name}: {json.dumps(compare(found[name], found[names[0]]))}", flush=True)
    assert judged is not None
    figures = {name: compare(values, found[names[0]]) for name, values in found.items()}
    print(
        json.dumps(
            {
                "benchmark": "what_teaches",
                "study": arguments.study,
                "format": arguments.format,
                "quick": arguments.quick,
                "one_draw": arguments.one_draw,
                "hardware": f"{os.cpu_count()} CPUs {platform.machine()}",
                "queries": judged.num_queries,
                "figures": figures,
                "comparisons": [
                    {
                        "what": f"nDCG of a student taught by {name}, against {names[0]}",
                        "ours": figures[name]["ndcg"],
                        "peer": figures[names[0]]["ndcg"],
                        "rows": judged.num_pairs,
                        "seconds": round(time.monotonic() - started, 1),
                    }
                    for name in names[1:]
                ],
            }
        )
    )


if __name__ == "__main__":
    main()
