"""Which share of a cross-encoder's best products the vectors of a two-tower find in a whole catalog: recall@100.

Both students learn from the same labels. The two-tower's vectors of the catalog are exported by `embed` and searched with
faiss (exact inner product); the cross-encoder scores every held-out query with every product of the catalog, and its best
10 and best 100 are what there is to find. Beside it the cosine of the untrained encoder, and BM25.

    python benchmarks/retrieval.py [--config jobs/esci.yaml] [--data FOLDER] [--work FOLDER] [--set KEY=VALUE]...
        [--queries N] [--quick]

Killed and started again it goes on where it was: steps that are done are skipped, and so are queries that are scored.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from relevance_ray.calibration import logit_of_classes
from relevance_ray.config import load_config
from relevance_ray.data.prepare import iter_products, read_judged, read_scale
from relevance_ray.engines.base import FolderModel
from relevance_ray.engines.bi_encoder import BiEncoderModel
from relevance_ray.engines.registry import load_pair_model
from relevance_ray.evaluation.baselines import build_baselines
from relevance_ray.evaluation.significance import percentile_interval, resample_counts
from relevance_ray.progress import Progress
from relevance_ray.quiet import quiet_libraries
from relevance_ray.steps import Chain
from relevance_ray.storage import fingerprint
from relevance_ray.student.vectors import read_vectors

ROOT = Path(__file__).resolve().parents[1]
DEPTH = 100
BEST = (10, 100)
QUICK = [
    "teacher={kind: ensemble, members: [{kind: bi_encoder, max_tokens: 32}, {kind: bm25}]}",
    "generate={num_pairs: 1200, quotas: {bm25: 2, bm25_middle: 2, category: 2, random: 2}}",
    "student.num_layers=1",
    "student.max_tokens=32",
]

Products = list[dict[str, Any]]


def logits(model: FolderModel, query: str, products: Products) -> np.ndarray:
    """float64 [products], -inf where the model has none."""
    labels = model.label_rows([query] * len(products), products)
    return np.nan_to_num(logit_of_classes(labels.class_logits, model.gains), nan=-np.inf)


def score_catalog(model: FolderModel, queries: list[str], products: Products, folder: Path) -> np.ndarray:
    """float32 [queries, products] of logits, -inf where there is none; kept in the folder, a file a query."""
    folder.mkdir(parents=True, exist_ok=True)
    with Progress("score", len(queries) * len(products), "pairs") as progress:
        for number, query in enumerate(queries):
            place = folder / f"{number:04d}.npy"
            if not place.exists():
                unfinished = place.with_suffix(".unfinished.npy")
                np.save(unfinished, logits(model, query, products))
                unfinished.rename(place)
            progress.advance(len(products))
    return np.stack([np.load(folder / f"{number:04d}.npy") for number in range(len(queries))])


def nearest(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """int64 [queries, DEPTH]: rows of the nearest vectors."""
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return np.asarray(index.search(queries, DEPTH)[1])


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """int64 [queries, k]: columns of the highest scores, of equal ones the first."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def recall(found: np.ndarray, wanted: np.ndarray) -> dict[str, Any]:
    """The mean share of what is wanted that was found, with its 95% interval over queries."""
    each = np.asarray([np.isin(row, got).mean() for row, got in zip(wanted, found, strict=True)])
    draws = resample_counts(len(each), 2000, seed=0) / len(each)
    low, high = percentile_interval(draws @ each)
    return {"recall": round(float(each.mean()), 4), "low": round(low, 4), "high": round(high, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", default=str(ROOT / "jobs" / "esci.yaml"), help="the chain; its student.kind is set here"
    )
    parser.add_argument("--data", help="folder of the official files")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the configuration")
    parser.add_argument("--queries", type=int, help="held-out judged queries, at the most; 20, or 3 with --quick")
    parser.add_argument("--work", default="runs/retrieval", help="where all is kept, and resumed from")
    parser.add_argument("--quick", action="store_true", help="untrained teacher, few labels, students of one layer")
    arguments = parser.parse_args()
    quiet_libraries()
    started = time.monotonic()
    data_format = load_config(arguments.config).data.format
    data = arguments.data or f"{os.environ.get('RELEVANCE_RAY_TEST_DATA', 'data')}/{data_format}"
    work = Path(arguments.work).absolute() / data_format / ("quick" if arguments.quick else "full")
    settings = [
        *(QUICK if arguments.quick else []),
        *arguments.set,
        f"data.path={json.dumps(str(Path(data).resolve()))}",
        f"storage.root={json.dumps(str(work))}",
    ]
    students, vectors_folder = {}, ""
    for kind in ("cross_encoder", "two_tower"):
        config = load_config(arguments.config, [*settings, f"student.kind={kind}"])
        folders = Chain(config).run("embed" if kind == "two_tower" else "train-student").folders
        students[kind] = Path(folders["train-student"], "model")
        vectors_folder = folders.get("embed", "")
    prepared = folders["prepare"]

    judged = read_judged(prepared)
    held_out = [group["query"] for group in judged.to_pylist() if group["split"] in ("dev", "test")]
    queries = held_out[: arguments.queries or (3 if arguments.quick else 20)]
    products = [row for table in iter_products(prepared) for row in table.to_pylist()]
    row_of = {product["product_id"]: row for row, product in enumerate(products)}
    scored = work / f"scores-{fingerprint(str(students['cross_encoder']), queries, len(products))}"
    scores = score_catalog(load_pair_model(students["cross_encoder"]), queries, products, scored)

    ids, parts = zip(*read_vectors(vectors_folder), strict=True)
    rows = np.asarray([row_of[name] for part in ids for name in part])
    tower = BiEncoderModel(students["two_tower"])
    found = {"two-tower": rows[nearest(np.concatenate(parts), tower.encoder.embed(queries))]}

    folders_of = build_baselines(
        config.evaluate,
        partial(iter_products, prepared),
        read_judged(prepared, "dev"),
        read_scale(prepared),
        config.student.template(),
        work / f"baselines-{fingerprint(prepared, config.student.template().to_dict(), config.evaluate.cosine_model)}",
    )
    if "cosine" in folders_of:
        cosine = BiEncoderModel(folders_of["cosine"])
        texts = [cosine.info.template.render_product(product) for product in products]
        found["cosine, untrained"] = nearest(cosine.encoder.embed(texts), cosine.encoder.embed(queries))
    if "bm25" in folders_of:
        words = load_pair_model(folders_of["bm25"])
        found["bm25"] = best(np.stack([logits(words, query, products) for query in queries]), DEPTH)

    table = {name: {k: recall(each, best(scores, k)) for k in BEST} for name, each in found.items()}
    print(f"\n{len(queries)} queries, {len(products):,} products\n")
    print(f"| found among the first {DEPTH} of | the cross-encoder's best 10 | its best 100 |\n|---|---|---|")
    for name, row in table.items():
        cells = [f"{value['recall']:.3f} [{value['low']:.3f}, {value['high']:.3f}]" for value in row.values()]
        print(f"| {name} | {' | '.join(cells)} |")
    print(
        json.dumps(
            {
                "benchmark": "retrieval",
                "data": data_format,
                "quick": arguments.quick,
                "hardware": f"{os.cpu_count()} CPUs {platform.machine()}",
                "seconds": round(time.monotonic() - started, 1),
                "queries": len(queries),
                "products": len(products),
                "recall_at_100": table,
            }
        )
    )


if __name__ == "__main__":
    main()
