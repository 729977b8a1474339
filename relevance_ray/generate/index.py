"""What a generate folder keeps beside its shards, under `index/`: the catalog, BM25, the vectors, the pool.

All of it is made anew from the prepared data where it is missing, and each file or folder appears whole, so that a
killed run goes on with what is there. Workers map local files into memory; from S3
each machine takes a copy first.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from relevance_ray.data.prepare import iter_products, read_judged, read_queries
from relevance_ray.data.splits import LeakGuard
from relevance_ray.generate.catalog import COLUMNS, Catalog, build_catalog, search_text
from relevance_ray.generate.options import GenerateOptions
from relevance_ray.generate.queries import (
    PoolCounts,
    PoolQuery,
    file_queries,
    log_queries,
    mix,
    take_pool,
    title_queries,
)
from relevance_ray.generate.rankings import build_bm25, sample_rows
from relevance_ray.generate.titles import TitleProduct
from relevance_ray.storage import (
    exists,
    is_remote,
    join,
    listdir,
    localize,
    makedirs,
    publish_folder,
    remove_tree,
    write_bytes,
    write_json,
)

VECTORS_PER_PART = 2048
_STAGING = ".making-"


def build_search_folder(prepared_dir: str, out_dir: str) -> bool:
    """Make `index/search` (catalog and BM25) where it is missing; False where it was there."""
    root = join(out_dir, "index")
    if exists(join(root, "search.json")):
        return False
    makedirs(root)
    for name in listdir(root):
        if name.startswith(_STAGING):
            remove_tree(join(root, name))
    # Staged on the file system it is published to, where publishing is one rename.
    parent = None if is_remote(root) else root.removeprefix("file://")
    with tempfile.TemporaryDirectory(prefix=_STAGING, dir=parent, ignore_cleanup_errors=True) as staging:
        folder = Path(staging) / "search"
        build_catalog(iter_products(localize(prepared_dir), COLUMNS), folder)
        catalog = Catalog(folder)
        columns = ["title", "brand", "color", "category"]
        texts = [text for batch in catalog.batches(columns) for text in search_text(batch.to_pydict())]
        build_bm25(texts, folder / "bm25")
        publish_folder(folder, join(root, "search"))
        write_json(
            join(root, "search.json"), {"num_products": catalog.num_products, "num_distinct": catalog.num_distinct}
        )
    return True


def part_name(part: int) -> str:
    return f"part-{part:06d}.npy"


def plan_vector_parts(catalog: Catalog, options: GenerateOptions, out_dir: str) -> list[int]:
    """The parts of `index/vectors` that are still to be computed; writes `rows.npy`, which they follow."""
    rows = sample_rows(catalog.keys, options.dense_max_products, options.seed)
    folder = join(out_dir, "index", "vectors")
    write_bytes(join(folder, "rows.npy"), _npy(rows))
    there = set(listdir(folder))
    num_parts = -(-len(rows) // VECTORS_PER_PART)
    return [part for part in range(num_parts) if part_name(part) not in there]


def part_texts(catalog: Catalog, options: GenerateOptions, part: int) -> list[str]:
    """The texts whose vectors make up a part: title, brand and color."""
    rows = sample_rows(catalog.keys, options.dense_max_products, options.seed)
    mine = rows[part * VECTORS_PER_PART : (part + 1) * VECTORS_PER_PART]
    columns = catalog.take(mine).select(["title", "brand", "color"]).to_pydict()
    return search_text({**columns, "category": [None] * len(mine)})


def write_vectors(out_dir: str, part: int, vectors: np.ndarray) -> None:
    write_bytes(join(out_dir, "index", "vectors", part_name(part)), _npy(vectors.astype(np.float32)))


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def build_pool(
    options: GenerateOptions, prepared_dir: str, out_dir: str, catalog: Catalog
) -> tuple[pa.Table, int, PoolCounts]:
    """Write `index/pool.arrow`, the queries of this run, and return it, its number of pairs, and what was left out."""
    prepared = localize(prepared_dir)
    held_out = [read_judged(prepared, split)["query"].to_pylist() for split in ("dev", "test")]
    guard = LeakGuard([query for queries in held_out for query in queries])
    counts = PoolCounts()
    makers = {
        "log": lambda: log_queries(read_queries(prepared), options.seed, options.frequency_power),
        "titles": lambda: title_queries(_title_products(catalog), catalog.column("locale"), options),
        "file": lambda: _file_queries(options, catalog),
    }
    sources = [(options.weight(source), makers[source]()) for source in options.sources]
    group_size = min(options.candidates_per_query, catalog.num_distinct)
    pool, num_pairs = take_pool(mix(sources, guard, counts), options.num_pairs, group_size, counts)
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, pool.schema) as writer:
        writer.write_table(pool, max_chunksize=10_000)
    write_bytes(join(out_dir, "index", "pool.arrow"), sink.getvalue())
    return pool, num_pairs, counts


def read_pool(path: Path, start: int, stop: int) -> pa.Table:
    """Rows [start, stop) of the pool, from a local copy of its file."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all().slice(start, stop - start)


def _title_products(catalog: Catalog) -> list[TitleProduct]:
    names = ["product_id", "title", "brand", "color", "category"]
    columns = (batch.to_pydict() for batch in catalog.batches(names))
    return [TitleProduct(*row) for block in columns for row in zip(*(block[name] for name in names), strict=True)]


def _file_queries(options: GenerateOptions, catalog: Catalog) -> list[PoolQuery]:
    return list(file_queries(options.pairs_file, catalog.column("product_id"), options))
