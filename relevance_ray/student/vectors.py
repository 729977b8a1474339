"""Vectors of a whole catalog by a two-tower, for any index of vectors.

A shard of them is a Parquet file of one row group of products, committed by itself, so a killed run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from relevance_ray.data.prepare import product_files
from relevance_ray.engines.base import row_error
from relevance_ray.engines.bi_encoder import BiEncoderModel
from relevance_ray.errors import UserError
from relevance_ray.model_folder import read_model_info
from relevance_ray.storage import CommitLog, localize, read_table


def vector_schema(dimension: int) -> pa.Schema:
    """One row a product: its id, and its unit vector."""
    return pa.schema(
        [
            pa.field("product_id", pa.string(), nullable=False),
            pa.field("vector", pa.list_(pa.float32(), dimension), nullable=False),
        ]
    )


def check_two_tower(folder: str | Path) -> None:
    """Raise `UserError` for a model that gives no vectors."""
    if (kind := read_model_info(folder).kind) != "bi_encoder":
        raise UserError(f"{folder} is a {kind}, which has no vectors; train with student.kind=two_tower")


def parts_of(prepared: str | Path) -> list[dict[str, int]]:
    """The row groups of a prepared catalog: `file` (its place among `product_files`) and `group`, in catalog order."""
    return [
        {"file": number, "group": group}
        for number, path in enumerate(product_files(prepared))
        for group in range(pq.ParquetFile(path).num_row_groups)
    ]


def shard_name(file: int, group: int) -> str:
    return f"vectors-{file:05d}-{group:05d}"


def open_export(model: str, prepared: str, out_dir: str, key: str) -> Callable[[int, int], int]:
    """Opens a two-tower; what it returns embeds and commits the products of one row group, and returns how many have text
    to embed."""
    loaded, log, files = BiEncoderModel(localize(model)), CommitLog(out_dir), product_files(localize(prepared))

    def work(file: int, group: int) -> int:
        table = embed_products(loaded, pq.ParquetFile(files[file]).read_row_group(group))
        log.commit(shard_name(file, group), table, key)
        return int(table.num_rows)

    return work


def embed_products(model: BiEncoderModel, products: pa.Table) -> pa.Table:
    """The vectors of a PRODUCT table's rows, in their order; a product without text in the model's fields has none and is
    left out."""
    rows = products.to_pylist()
    texts = ["" if row_error("any", row) else model.info.template.render_product(row) for row in rows]
    kept = [row for row, text in enumerate(texts) if text]
    vectors = model.encoder.embed([texts[row] for row in kept])
    schema = vector_schema(model.encoder.dimension)
    values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1), pa.float32()), model.encoder.dimension)
    return pa.table([pa.array([rows[row]["product_id"] for row in kept], pa.string()), values], schema=schema)


def read_vectors(folder: str, shards: Sequence[str] | None = None) -> Iterator[tuple[list[str], np.ndarray]]:
    """Product ids and unit vectors float32 [n, d] of each committed shard, in catalog order."""
    log = CommitLog(folder)
    for name in shards if shards is not None else log.committed():
        table = read_table(log.path(name))
        column = table["vector"].combine_chunks()
        yield table["product_id"].to_pylist(), column.flatten().to_numpy().reshape(len(table), -1)
