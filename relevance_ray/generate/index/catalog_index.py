"""The index of a catalog, shared by all that is generated from it: products, BM25 and vectors, by shard.

    catalog.json, catalog/arrays/, catalog/products-00000.arrow ...    what is known of all products; the shards of them
    postings/00000.json, postings/00000/ ...                           BM25, a shard each
    lexicon.json, lexicon/                                             the word counts of the whole catalog
    vectors.json, vectors/00000/ ...                                   rows and parts of the dense vectors, a shard each

All of it is made anew from the prepared data where it is missing, and counts once its JSON file is there (a part of the
vectors, once it is), so that a killed run goes on with what it has. Workers map local files into memory; from S3 each
machine takes a copy first.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from relevance_ray.data.prepare import iter_products
from relevance_ray.generate.index.arrays import npy_bytes
from relevance_ray.generate.index.catalog import (
    COLUMNS,
    Catalog,
    ProductFile,
    build_catalog,
    products_file,
    search_text,
    take_rows,
)
from relevance_ray.generate.index.dense import VECTORS_PER_PART, part_name, sample_rows
from relevance_ray.generate.index.earlier_vectors import EarlierVectors
from relevance_ray.generate.index.lexical import Lexicon, build_lexicon, write_postings
from relevance_ray.generate.index.search import ShardSearch
from relevance_ray.generate.options import GenerateOptions
from relevance_ray.generate.staging import appears_whole
from relevance_ray.storage import content_id, exists, join, listdir, localize, read_json, write_bytes, write_json

VECTORS_MADE = "vectors.json"
_VECTORS_FORMAT = 1
EMBEDDED_TOKENS = 64
"""What of a text the dense candidates see: product titles rarely go further, and marketing text that does is slow."""
_SEARCHED = ["title", "brand", "color", "category"]


def index_options(options: GenerateOptions) -> list[Any]:
    """What decides an index beside the catalog, for its fingerprint."""
    dense = [*vectors_identity(options), options.dense_max_products] if options.uses_dense else []
    return [sorted(options.stopwords), dense]


def vectors_identity(options: GenerateOptions) -> list[Any]:
    """What decides the vector of a text: where it differs, no vector is taken over."""
    model = options.dense_model
    return [_VECTORS_FORMAT, EMBEDDED_TOKENS, model, content_id(model) if os.path.isdir(model) else ""]


def latest_vectors(root: str, but: str, options: GenerateOptions) -> str:
    """Of the indexes under a root the one, other than `but`, that was last given vectors of the same model; "" for none."""
    found = []
    for name in listdir(root):
        place = join(root, name, VECTORS_MADE)
        if name.startswith("index-") and join(root, name) != but and exists(place):
            made = read_json(place)
            if made["identity"] == vectors_identity(options):
                found.append((made["finished"], join(root, name)))
    return max(found)[1] if found else ""


class CatalogIndex:
    """One catalog's index.

    Args:
        options: of the generation; `index_options` names those that decide what is in it.
        prepared_dir: what the prepare step wrote.
        folder: where the index lies, local or s3://.
        earlier: the folder of an index whose vectors are taken over for products of the same text, or "".
    """

    def __init__(self, options: GenerateOptions, prepared_dir: str, folder: str, earlier: str = "") -> None:
        self.options, self._prepared_dir, self.root, self._earlier = options, prepared_dir, folder, earlier
        self._opened: dict[int, ProductFile] = {}

    def __reduce__(self) -> tuple[type, tuple[GenerateOptions, str, str, str]]:
        """What travels to an actor: where the index lies, and nothing that is open."""
        return CatalogIndex, (self.options, self._prepared_dir, self.root, self._earlier)

    def locate(self, name: str) -> Path:
        """A file or folder of the index as a local path."""
        return localize(join(self.root, name))

    # The catalog

    def build_catalog(self) -> Catalog:
        """The catalog, made where it is missing."""
        if not exists(join(self.root, "catalog.json")):
            about = {"products_per_shard": self.options.products_per_shard}
            with appears_whole(self.root, "catalog", about) as folder:
                products = iter_products(localize(self._prepared_dir), COLUMNS)
                build_catalog(products, folder, self.options.products_per_shard)
        return self.catalog

    @functools.cached_property
    def catalog(self) -> Catalog:
        """What is known of all products, once it is built."""
        return Catalog(self.locate("catalog/arrays"))

    def product_file(self, shard: int) -> ProductFile:
        if shard not in self._opened:
            self._opened[shard] = ProductFile(self.locate(f"catalog/{products_file(shard)}"))
        return self._opened[shard]

    def products(self, rows: np.ndarray, columns: Sequence[str] = COLUMNS) -> pa.Table:
        """The products of catalog rows, in their order."""
        return take_rows(self.product_file, self.catalog.starts, rows, columns)

    def product_ids(self) -> list[str]:
        files = map(self.product_file, range(self.catalog.num_shards))
        return [
            value for file in files for batch in file.batches(["product_id"]) for value in batch.column(0).to_pylist()
        ]

    # BM25

    def missing_postings(self) -> list[int]:
        """The shards that have no postings yet."""
        there = set(listdir(join(self.root, "postings")))
        return [shard for shard in range(self.catalog.num_shards) if f"{shard:05d}.json" not in there]

    def build_postings(self, shard: int) -> None:
        with appears_whole(self.root, f"postings/{shard:05d}", {}) as folder:
            batches = self.product_file(shard).batches(_SEARCHED)
            write_postings((search_text(batch.to_pydict()) for batch in batches), folder, self.options.stopwords)

    def build_lexicon(self) -> Lexicon:
        """The word counts of the whole catalog, added up where that is still to be done."""
        if not exists(join(self.root, "lexicon.json")):
            with appears_whole(self.root, "lexicon", {}) as folder:
                build_lexicon((self.locate(f"postings/{n:05d}") for n in range(self.catalog.num_shards)), folder)
        return self.lexicon

    @functools.cached_property
    def lexicon(self) -> Lexicon:
        return Lexicon(self.locate("lexicon"))

    # Vectors

    def missing_vectors(self) -> list[tuple[int, int]]:
        """The (shard, part) that are still to be computed; writes each shard's `rows.npy`, which its parts follow."""
        catalog = self.catalog
        rows = sample_rows(catalog.keys, self.options.dense_max_products)
        missing = []
        for shard in range(catalog.num_shards):
            mine = catalog.shard_rows(shard)
            inside = rows[np.searchsorted(rows, mine.start) : np.searchsorted(rows, mine.stop)]
            folder = join(self.root, "vectors", f"{shard:05d}")
            there = set(listdir(folder))
            if "rows.npy" not in there:
                write_bytes(join(folder, "rows.npy"), npy_bytes(inside))
            num_parts = -(-len(inside) // VECTORS_PER_PART)
            missing += [(shard, part) for part in range(num_parts) if part_name(part) not in there]
        return missing

    def build_vectors(self, shard: int, part: int, embed: Callable[[list[str]], np.ndarray]) -> None:
        """Make a part of the vectors, of title, brand and color; what an earlier index holds of the same text is taken
        over."""
        rows = np.load(self.locate(f"vectors/{shard:05d}/rows.npy"))
        mine = rows[part * VECTORS_PER_PART : (part + 1) * VECTORS_PER_PART]
        columns = self.products(mine, _SEARCHED[:3]).to_pydict()
        texts = search_text({**columns, "category": [None] * len(mine)})
        vectors = self._earlier_vectors.complete(self.catalog.text_ids[mine], texts, embed)
        path = join(self.root, "vectors", f"{shard:05d}", part_name(part))
        write_bytes(path, npy_bytes(vectors.astype(np.float32)))

    @functools.cached_property
    def _earlier_vectors(self) -> EarlierVectors:
        if not self._earlier:
            return EarlierVectors(np.empty(0, dtype=np.int64), [])
        folders = [localize(join(self._earlier, "vectors", name)) for name in listdir(join(self._earlier, "vectors"))]
        return EarlierVectors(Catalog(localize(join(self._earlier, "catalog", "arrays"))).text_ids, folders)

    def finish_vectors(self) -> None:
        """Say that all vectors are there, for later indexes that take them over."""
        if not exists(join(self.root, VECTORS_MADE)):
            write_json(
                join(self.root, VECTORS_MADE), {"identity": vectors_identity(self.options), "finished": time.time()}
            )

    def search(self, shards: Sequence[int], *, dense: bool) -> ShardSearch:
        """Some shards, mapped into this process."""
        return ShardSearch(shards, self.locate, dense=dense)
