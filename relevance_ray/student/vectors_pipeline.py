"""Export on Ray: row groups of the catalog through a pool of actors with the two-tower, to committed vectors."""

from __future__ import annotations

from typing import Any

import pyarrow.parquet as pq

from relevance_ray.cluster.actor_pool import ItemActor, run_pool
from relevance_ray.cluster.workers import Workers
from relevance_ray.data.prepare import product_files
from relevance_ray.progress import Progress
from relevance_ray.storage import CommitLog, localize
from relevance_ray.student.vectors import check_two_tower, open_export, parts_of, shard_name


def export_vectors(
    model: str, prepared: str, out_dir: str, key: str, workers: Workers, progress: Progress | None = None
) -> dict[str, Any]:
    """Embed a prepared catalog; ray must be initialised, the root leased.

    Args:
        model: folder of a two-tower.
        prepared: what the prepare step wrote.
        out_dir: gets the vectors.
        key: stands in each commit.
        workers: actors, each with the model.
        progress: counts products.

    Returns:
        `products` (that have a vector), `shards` and how many of them were `skipped`.

    Raises:
        UserError: a model without vectors.
    """
    check_two_tower(localize(model))
    log = CommitLog(out_dir)
    log.sweep()
    there = log.committed()
    parts = parts_of(localize(prepared))
    num_products = sum(pq.ParquetFile(path).metadata.num_rows for path in product_files(localize(prepared)))
    missing = [part for part in parts if shard_name(**part) not in there]
    progress = progress or Progress("embed", unit="products")
    progress.restart(sum(record["rows"] for record in there.values()))
    progress.update(total=num_products)
    if missing:
        arguments = (open_export, model, prepared, out_dir, key)
        for row in run_pool(missing, ItemActor, arguments, workers.at_most(len(missing)), num_blocks=len(missing)):
            progress.advance(int(row["done"]))
    committed = log.committed()
    return {
        "products": sum(committed[shard_name(**part)]["rows"] for part in parts),
        "shards": len(parts),
        "skipped": len(parts) - len(missing),
    }
