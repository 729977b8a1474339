"""The catalog as generation reads it: rows by number, memory-mapped, shared by all workers of a machine.

What a group carries of each product lies in Arrow IPC files, one a shard of the catalog; small arrays over all rows hold
what candidates are drawn by (category, brand, identity of the text). The trade-off: about a kilobyte of disk per product
for not moving any through Ray, and some 45 bytes of it on every worker's machine, however the shards are spread.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from relevance_ray.errors import UserError
from relevance_ray.generate.index.arrays import mapped
from relevance_ray.schema import DESCRIPTION_CHARS, FIELDS

COLUMNS = ["product_id", "locale", *(field.name for field in FIELDS)]
_SCHEMA = pa.schema([pa.field("product_id", pa.string()), pa.field("locale", pa.string()), *FIELDS])
_ROWS_PER_BATCH = 10_000


def search_text(columns: dict[str, list[Any]]) -> list[str]:
    """What the candidate engines read of each product: title, brand, color and category, missing ones skipped."""
    parts = zip(*(columns[name] for name in ("title", "brand", "color", "category")), strict=True)
    return [" ".join(part for part in product if part) for product in parts]


def products_file(shard: int) -> str:
    return f"products-{shard:05d}.arrow"


def in_order(pieces: Sequence[pa.Table], order: np.ndarray) -> pa.Table:
    """Tables whose rows, one after the other, belong at the places `order`, put there."""
    back = np.empty(len(order), dtype=np.int64)
    back[order] = np.arange(len(order))
    return pa.concat_tables(pieces).combine_chunks().take(pa.array(back))


def take_rows(
    open_file: Callable[[int], ProductFile], starts: np.ndarray, rows: np.ndarray, columns: Sequence[str] = COLUMNS
) -> pa.Table:
    """The products of catalog rows int64 [n], in their order.

    Args:
        open_file: the products of a shard.
        starts: int64 [shards + 1], the first row of each shard.
    """
    owner = np.searchsorted(starts, rows, side="right") - 1
    pieces = [open_file(int(shard)).take(rows[owner == shard] - starts[shard], columns) for shard in np.unique(owner)]
    return in_order(pieces, np.argsort(owner, kind="stable"))


class ProductFile:
    """The products of one shard of the catalog, memory-mapped."""

    def __init__(self, path: Path) -> None:
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        sizes = [self._reader.get_batch(index).num_rows for index in range(self._reader.num_record_batches)]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for index in range(self._reader.num_record_batches):
            yield self._reader.get_batch(index).select(list(columns))

    def take(self, rows: np.ndarray, columns: Sequence[str] = COLUMNS) -> pa.Table:
        """The given rows of this file, int64 [n], in their order: only the batches that hold them are touched."""
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(owner, kind="stable")
        pieces = []
        for index in np.unique(owner):
            local = rows[order][owner[order] == index] - self._starts[index]
            pieces.append(self._reader.get_batch(int(index)).select(list(columns)).take(pa.array(local)))
        schema = pa.schema([_SCHEMA.field(name) for name in columns])
        return in_order([pa.Table.from_batches(pieces, schema=schema)], order)


class Catalog:
    """What is known of all products, from the arrays that `build_catalog` wrote.

    Attributes:
        num_products: rows.
        starts: int64 [shards + 1], the first row of each shard.
        text_ids: int64 [num_products], equal for products whose search texts are equal.
        num_distinct: how many different texts there are, the most that one group can hold.
        keys: uint64 [num_products], `text_ids` as what random choices are made by.
        ring: int64 [num_products], the rows by rising key; `ring_keys` uint64, their keys.
        brands: int32 [num_products], -1 where there is none.
        categories: int32 [num_products], -1 where there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.starts = np.load(folder / "starts.npy")
        self.num_products = int(self.starts[-1])
        self.text_ids = mapped(folder / "text_ids.npy")
        self.num_distinct = int(json.loads((folder / "catalog.json").read_text())["num_distinct"])
        self.keys = self.text_ids.view(np.uint64)
        self.ring = mapped(folder / "ring.npy")
        self.ring_keys = mapped(folder / "ring_keys.npy")
        self.brands = mapped(folder / "brands.npy")
        self.categories = mapped(folder / "categories.npy")
        self._by_category = mapped(folder / "by_category.npy")
        self._category_starts = mapped(folder / "category_starts.npy")

    @property
    def num_shards(self) -> int:
        return len(self.starts) - 1

    def shard_rows(self, shard: int) -> range:
        return range(int(self.starts[shard]), int(self.starts[shard + 1]))

    def same_category(self, row: int) -> np.ndarray:
        """Rows of the products that share the row's category path, itself included, by rising key; empty where it has
        none."""
        category = int(self.categories[row])
        if category < 0:
            return np.empty(0, dtype=np.int64)
        return self._by_category[self._category_starts[category] : self._category_starts[category + 1]]


def build_catalog(products: Iterable[pa.Table], folder: Path, products_per_shard: int) -> None:
    """Write a stream of PRODUCT tables into a new folder: `products-00000.arrow` and on, and `arrays/`.

    Raises:
        UserError: the stream is empty.
    """
    arrays = folder / "arrays"
    arrays.mkdir(parents=True)
    category_codes, brand_codes = _Codes(), _Codes()
    text_ids: list[np.ndarray] = []
    starts = [0]
    for shard, batches in enumerate(_shards(products, products_per_shard)):
        with pa.ipc.new_file(str(folder / products_file(shard)), _SCHEMA) as writer:
            starts.append(starts[-1])
            for batch in batches:
                writer.write_batch(batch)
                starts[-1] += batch.num_rows
                columns = batch.select(["title", "brand", "color", "category"]).to_pydict()
                category_codes.add(columns["category"])
                brand_codes.add([brand and brand.casefold() for brand in columns["brand"]])
                text_ids.append(_text_ids(search_text(columns)))
    if starts[-1] == 0:
        raise UserError("the catalog has no product; prepare one with at least one product before generating pairs")
    categories = category_codes.array()
    identity = np.concatenate(text_ids)
    counts = np.bincount(categories[categories >= 0], minlength=len(category_codes))
    keys = identity.view(np.uint64)
    ring = np.argsort(keys, kind="stable")
    by_category = np.lexsort((keys, categories))[int((categories < 0).sum()) :]
    np.save(arrays / "starts.npy", np.asarray(starts, dtype=np.int64))
    np.save(arrays / "text_ids.npy", identity)
    np.save(arrays / "ring.npy", ring)
    np.save(arrays / "ring_keys.npy", keys[ring])
    np.save(arrays / "brands.npy", brand_codes.array())
    np.save(arrays / "categories.npy", categories)
    np.save(arrays / "by_category.npy", by_category.astype(np.int64))
    np.save(arrays / "category_starts.npy", np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
    about = {"num_products": starts[-1], "num_distinct": len(np.unique(identity)), "shards": len(starts) - 1}
    (arrays / "catalog.json").write_text(json.dumps(about) + "\n")


def _shards(products: Iterable[pa.Table], products_per_shard: int) -> Iterator[Iterator[pa.RecordBatch]]:
    """The stream cut into shards of so many products (the last one has what is left), each read before the next."""
    stream = _batches(products)
    batch = next(stream, None)

    def one_shard() -> Iterator[pa.RecordBatch]:
        nonlocal batch
        room = products_per_shard
        while batch is not None and room:
            head, rest = batch.slice(0, room), batch.slice(room)
            room -= head.num_rows
            yield head
            batch = rest if rest.num_rows else next(stream, None)

    while batch is not None:
        yield one_shard()


def _batches(products: Iterable[pa.Table]) -> Iterator[pa.RecordBatch]:
    for table in products:
        table = table.select(COLUMNS)
        cut = pc.utf8_slice_codeunits(table["description"], 0, DESCRIPTION_CHARS)
        table = table.set_column(COLUMNS.index("description"), "description", cut).cast(_SCHEMA)
        for batch in table.combine_chunks().to_batches(max_chunksize=_ROWS_PER_BATCH):
            if batch.num_rows:
                yield batch


def _text_ids(texts: list[str]) -> np.ndarray:
    hashes = b"".join(
        hashlib.blake2b(text.casefold().encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts
    )
    return np.frombuffer(hashes, dtype=np.int64)


class _Codes:
    """Numbers strings in the order they first appear; None is -1."""

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}
        self._chunks: list[np.ndarray] = []

    def add(self, values: list[str | None]) -> None:
        codes = self._codes
        chunk = [codes.setdefault(value, len(codes)) if value else -1 for value in values]
        self._chunks.append(np.asarray(chunk, dtype=np.int32))

    def __len__(self) -> int:
        return len(self._codes)

    def array(self) -> np.ndarray:
        return np.concatenate(self._chunks)
