"""The diversity report of a configuration's generated pairs, and of their labels where there are some.

It lies in the generate folder, beside the shards it is about, and is written anew as these grow. It changes nothing of a
run: no step reads it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from relevance_ray.chain.folders import StepFolders
from relevance_ray.data.prepare import iter_products, read_queries, read_scale
from relevance_ray.generate.diversity.counting import even_sample
from relevance_ray.generate.diversity.measure import CATALOG_COLUMNS, Diversity
from relevance_ray.generate.diversity.report import twenty_groups, write_diversity
from relevance_ray.progress import Progress
from relevance_ray.storage import CommitLog, join, localize, read_bytes, write_bytes

MAX_PAIRS = 1_000_000
"""Of a larger set as many whole shards are read as hold about so many pairs: one or two minutes of one core."""

FOLDER = "diversity"
_COLUMNS = [
    "query_id",
    "query",
    "query_source",
    *(
        f"products.list.element.{name}"
        for name in (
            "pair_id",
            "product_id",
            "fields.title",
            "fields.brand",
            "fields.category",
            "origins",
            "logit",
            "class_logits",
            "error",
        )
    ),
]


def report_diversity(
    at: StepFolders, progress: Progress | None = None, *, max_pairs: int = MAX_PAIRS, seed: int = 0
) -> tuple[dict[str, Any], str]:
    """Measure what `generate` made, and write the report into `diversity/` of its folder.

    Args:
        at: a configuration's folders, of which `prepare` and `generate` are done.
        max_pairs: read an even, seeded sample of the shards where there are more pairs.
        seed: of all samples.

    Returns:
        The report (`Diversity.report`), and the path of its Markdown.
    """
    prepared = localize(at.folder("prepare"))
    scale = read_scale(prepared)
    shards = at.shards()
    num_pairs = sum(shard.num_pairs for shard in shards)
    size = len(shards) if num_pairs <= max_pairs else max(1, len(shards) * max_pairs // num_pairs)
    chosen = [shards[index] for index in even_sample(len(shards), size, seed)]
    labels = CommitLog(at.folder("label"))
    records = labels.committed()
    labeled = {shard.label_name for shard in chosen if shard.label_name in records}

    def tables(done: Callable[[int], None] | None = None) -> Iterator[pa.Table]:
        for shard in chosen:
            path = labels.path(shard.label_name) if shard.label_name in labeled else shard.path
            table = pq.ParquetFile(io.BytesIO(read_bytes(path))).read(columns=_COLUMNS)
            yield table
            if done is not None:
                done(shard.num_pairs)

    diversity = Diversity(iter_products(prepared, CATALOG_COLUMNS), read_queries(prepared), scale, seed)
    if progress is not None:
        progress.update(0, total=sum(shard.num_pairs for shard in chosen))
    for table in tables(progress.advance if progress is not None else None):
        diversity.add(table)
    report = diversity.report()
    report["read"] = {"shards": len(chosen), "of_shards": len(shards), "labeled_shards": len(labeled), "seed": seed}
    about = {
        "read": f"{len(chosen):,} of {len(shards):,} shards"
        + ("" if len(chosen) == len(shards) else f", an even sample (seed {seed}); all figures are of these alone"),
        "generated": at.folder("generate"),
        "query log": f"{report['log']['rows']:,} queries, those of dev and test left out",
        "catalog": f"{report['catalog_products']:,} products",
        "labels": f"{len(labeled):,} of these shards, in {labels.folder}" if labeled else "none yet",
    }
    folder = join(at.folder("generate"), FOLDER)
    write_bytes(join(folder, "groups.txt"), twenty_groups(tables(), seed=seed, scale=scale).encode("utf-8", "replace"))
    return report, write_diversity(report, folder, about=about)
