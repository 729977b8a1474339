"""The paper's result, measured: students of more and more teacher-labeled pairs, beside what people's judgments teach.

The teacher is trained on the human judgments; students are trained on human labels alone, and on the teacher's labels of
generated pairs, each size twice the one before; all rank the held-out judged queries. Prints the table, the fitted power law
and its forecast, and JSON; the picture lies in `scaling/` of the work folder.

    python benchmarks/scaling_curve.py --format esci|homedepot|market [--quick] [--data FOLDER] [--work FOLDER]

Home Depot is taken as a shop with few judgments: 2,000 human pairs to train on, others to choose and to test by, its whole
catalog. Killed and started again it goes on where it was, stage by stage.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from relevance_ray.config import Config, build_config
from relevance_ray.data.prepare import iter_products, read_judged
from relevance_ray.evaluation.scaling import scaling_markdown
from relevance_ray.quiet import quiet_libraries
from relevance_ray.steps import Chain

TEACHER = {"kind": "ensemble", "members": [{"kind": "bi_encoder", "max_tokens": 64}, {"kind": "bm25"}]}
HUMAN_PAIRS, HELD_OUT_PAIRS = 2_000, 8_000


def few_judgments(data: str, work: Path) -> dict[str, Any]:
    """Home Depot as a generic shop whose judgments are a sample of its queries: `HUMAN_PAIRS` of train, as many of dev, and
    `HELD_OUT_PAIRS` of test. The files lie in the work folder."""
    folder = work / "shop"
    options = {
        "format": "generic",
        "path": str(folder),
        "products": "products.parquet",
        "judgments": "judgments.parquet",
        "scale": "homedepot",
    }
    if (folder / "judgments.parquet").exists():
        return options
    whole = build_config({"data": {"format": "homedepot", "path": data}, "storage": {"root": str(work / "whole")}})
    prepared = Chain(whole).run("prepare").folders["prepare"]
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.concat_tables(iter_products(prepared, ["product_id", "title"])), folder / "products.parquet")
    rows: dict[str, list[Any]] = {name: [] for name in ("query", "product_id", "grade", "split")}
    for split, wanted in (("train", HUMAN_PAIRS), ("dev", HUMAN_PAIRS), ("test", HELD_OUT_PAIRS)):
        taken = 0
        for group in read_judged(prepared, split).sort_by("query_id").to_pylist():
            if taken >= wanted:
                break
            for product in group["products"]:
                rows["query"].append(group["query"])
                rows["product_id"].append(product["product_id"])
                rows["grade"].append(product["grade"])
                rows["split"].append(split)
            taken += len(group["products"])
    partial = folder / ".judgments.parquet"
    pq.write_table(pa.table(rows), partial)
    partial.rename(folder / "judgments.parquet")
    return options


def further_judgments(work: Path, data: str, num_pairs: int) -> pa.Table:
    """Judged groups of Home Depot's other queries, of `num_pairs` pairs or a few more: what the 8,000 pairs of test are too
    few to tell. None of them is among the few judgments, whatever split the whole data has it in; of the products only the
    title is kept, as in the shop."""
    whole = build_config({"data": {"format": "homedepot", "path": data}, "storage": {"root": str(work / "whole")}})
    judged = read_judged(Chain(whole).run("prepare").folders["prepare"]).sort_by("query_id")
    few = pc.unique(pq.read_table(work / "shop" / "judgments.parquet", columns=["query"])["query"])
    others = judged.filter(pc.invert(pc.is_in(judged["query"], few)))
    taken = pc.cumulative_sum(pc.list_value_length(others["products"])).to_numpy()
    rows = others.slice(0, int((taken < num_pairs).sum()) + 1).to_pylist()
    for product in (product for row in rows for product in row["products"]):
        product["fields"] = {name: value if name == "title" else None for name, value in product["fields"].items()}
    return pa.Table.from_pylist(rows, schema=judged.schema)


def config_of(arguments: argparse.Namespace, work: Path) -> Config:
    quick = arguments.quick
    if arguments.format == "homedepot":
        data = few_judgments(str(Path(arguments.data).resolve()), work)
    elif arguments.format == "market":
        data = {"format": "market", "market_size": 2_000 if quick else 20_000}
    else:
        data = {"format": arguments.format, "path": str(Path(arguments.data).resolve()), "folds": 2, "fold": 0}
    values = {
        "data": data,
        "storage": {"root": str(work / "root")},
        "teacher": TEACHER,
        "generate": {"source": arguments.source.split(","), "num_pairs": arguments.pairs},
        "student": {"num_layers": arguments.layers, "max_tokens": 64},
    }
    return build_config(values, arguments.set, where="scaling_curve.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="esci", choices=["esci", "homedepot", "market"])
    parser.add_argument("--data", help="folder of the official files")
    parser.add_argument("--pairs", type=int, help="at the most; 32,000, or 1,600 with --quick")
    parser.add_argument("--source", default="log,titles", help="of the generated queries")
    parser.add_argument("--layers", type=int, help="of the student; 3, or 2 with --quick")
    parser.add_argument("--sizes", type=int, default=5, help="each half of the next")
    parser.add_argument("--seeds", type=int, help="3; 1 with --quick")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the configuration")
    parser.add_argument(
        "--held-out", type=int, metavar="PAIRS", help="homedepot: measure on so many pairs of other queries"
    )
    parser.add_argument("--work", default="runs/scaling_curve", help="where all is kept, and resumed from")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.sizes < 3:
        parser.error(f"--sizes {arguments.sizes}: a law needs at least 3")
    if arguments.held_out and arguments.format != "homedepot":
        parser.error("--held-out takes other queries' judgments, which --format homedepot alone has")
    quick = arguments.quick
    arguments.data = arguments.data or f"{os.environ.get('RELEVANCE_RAY_TEST_DATA', 'data')}/{arguments.format}"
    arguments.pairs = arguments.pairs or (1_600 if quick else 32_000)
    arguments.layers = arguments.layers or (2 if quick else 3)
    quiet_libraries()
    started = time.monotonic()
    work = Path(arguments.work).absolute() / arguments.format
    config = config_of(arguments, work)
    chain = Chain(config)
    outcome = chain.run("label")
    held_out = further_judgments(work, arguments.data, arguments.held_out) if arguments.held_out else None
    report, path = chain.measure_scaling(arguments.seeds or (1 if quick else 3), arguments.sizes, held_out)
    human = read_judged(outcome.folders["prepare"], "train")
    print(scaling_markdown(report))
    teacher = report["baselines"]["teacher"]["ndcg"]
    print(
        json.dumps(
            {
                "benchmark": "scaling_curve",
                "format": arguments.format,
                "quick": quick,
                "hardware": f"{os.cpu_count()} CPUs {platform.machine()}",
                "human_pairs": int(pc.sum(pc.list_value_length(human["products"])).as_py()),
                "report": path,
                "law": report["law"],
                "forecast": report["forecast"],
                "comparisons": [
                    {
                        "what": f"nDCG of a student of {row['pairs']:,} labeled pairs, against its teacher",
                        "ours": round(row["ndcg"], 4),
                        "peer": round(teacher, 4),
                        "rows": report["judged_pairs"],
                        "seconds": round(time.monotonic() - started, 1),
                    }
                    for row in report["sizes"]
                ],
            }
        )
    )


if __name__ == "__main__":
    main()
