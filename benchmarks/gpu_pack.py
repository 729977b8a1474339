"""What `gpu.py` takes to a machine without Ray: judgments, generated pairs and weights, as files below 60 MB.

    python benchmarks/gpu_pack.py FOLDER [--data FOLDER] [--times 64] [--quick]

Home Depot's judgments are prepared and `--times` as many pairs generated; products are written once, groups as a query and
rows of products, MiniLM's weights in half precision. With `--quick` it is a small demo market.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from transformers import AutoModel, AutoTokenizer

from relevance_ray.config import build_config
from relevance_ray.data.prepare import read_judged
from relevance_ray.models import resolve_model
from relevance_ray.quiet import quiet_libraries
from relevance_ray.schema import FIELDS
from relevance_ray.steps import Chain
from relevance_ray.storage import CommitLog, read_table

PRODUCTS = 8
"""Of a generated group."""
LARGEST_FILE = 60e6


def pack(arguments: argparse.Namespace) -> None:
    """Generate the pairs, and put everything that `gpu.py` reads into a folder."""
    folder = Path(arguments.folder).absolute()
    data: dict[str, Any] = {"format": "homedepot", "path": str(Path(arguments.data).resolve())}
    if arguments.quick:
        data = {"format": "market", "market_size": 500}
    values = {
        "data": data,
        "storage": {"root": str(folder.with_name(f"{folder.name}-root"))},
        "generate": {"source": ["log", "titles"], "candidates_per_query": PRODUCTS},
    }
    prepared = Path(Chain(build_config(values)).run("prepare").folders["prepare"])
    human = pc.sum(pc.list_value_length(read_judged(prepared, "train")["products"])).as_py()
    num_pairs = (4 if arguments.quick else arguments.times) * human
    chain = Chain(build_config(values, [f"generate.num_pairs={num_pairs}"]))
    generated = CommitLog(chain.run("generate").folders["generate"])
    shards = (read_table(generated.path(name)) for name in sorted(generated.committed()))
    print(json.dumps(write_pack(folder, prepared, shards, resolve_model("minilm"))))


def write_pack(folder: Path, prepared: Path, shards: Iterable[pa.Table], model: Path) -> dict[str, int]:
    """Write judgments, products, generated groups and weights in half precision; the bytes of each file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("judged_groups.parquet", "scale.json"):
        shutil.copyfile(prepared / name, folder / name)
    places: dict[str, int] = {}
    fields: list[Any] = []
    queries: list[str] = []
    rows: list[list[int]] = []
    for shard in shards:
        for group in shard.select(["query", "products"]).to_pylist():
            queries.append(group["query"])
            rows.append([])
            for product in group["products"]:
                if product["product_id"] not in places:
                    places[product["product_id"]] = len(fields)
                    fields.append(product["fields"])
                rows[-1].append(places[product["product_id"]])
    _write(folder / "products.parquet", {"product_id": pa.array(places), "fields": pa.array(fields, FIELDS)})
    _write(folder / "groups.parquet", {"query": pa.array(queries), "rows": pa.array(rows, pa.list_(pa.int32()))})
    AutoModel.from_pretrained(model, dtype=torch.float16).save_pretrained(folder / "weights")
    AutoTokenizer.from_pretrained(model).save_pretrained(folder / "weights")
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert max(sizes.values()) < LARGEST_FILE, sizes
    return {"pairs": sum(map(len, rows)), "bytes": sum(sizes.values()), **sizes}


def _write(path: Path, columns: dict[str, pa.Array]) -> None:
    pq.write_table(pa.table(columns), path, compression="zstd", compression_level=19)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("RELEVANCE_RAY_TEST_DATA", "data")
    parser.add_argument("folder", metavar="FOLDER", help="of the pack")
    parser.add_argument("--data", default=f"{data}/homedepot", help="folder of Home Depot's train.csv")
    parser.add_argument("--times", type=int, default=64, help="as many generated pairs as human ones")
    parser.add_argument("--quick", action="store_true", help="a demo market of 500 products, 4 times its judgments")
    quiet_libraries()
    pack(parser.parse_args())


if __name__ == "__main__":
    main()
