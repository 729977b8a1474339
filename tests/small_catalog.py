"""A catalog of 240 products, what prepare leaves of it, and its queries, for the tests of generation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from relevance_ray.data.splits import LeakGuard
from relevance_ray.generate.index.catalog import Catalog, ProductFile, build_catalog, products_file, search_text
from relevance_ray.generate.index.dense import part_name
from relevance_ray.generate.index.lexical import Lexicon, build_lexicon, write_postings
from relevance_ray.generate.index.search import ShardSearch
from relevance_ray.generate.options import GenerateOptions
from relevance_ray.generate.queries.sources import (
    PoolCounts,
    log_queries,
    mix_sources,
    title_queries,
)
from relevance_ray.generate.queries.titles import TitleProduct
from relevance_ray.schema import JUDGED_GROUP, PRODUCT, QUERY

BRANDS = ["Acme", "Bolt", "Cord", "Dune", "Echo"]
COLORS = ["red", "green", "blue", "black", "white", "pink"]
TYPES = [
    "running shoes",
    "rain jacket",
    "water bottle",
    "desk lamp",
    "yoga mat",
    "phone case",
    "garden hose",
    "wool hat",
]
LEXICAL = {"bm25": 3.0, "bm25_middle": 1.0, "category": 2.0, "random": 2.0}


def make_products(repeat: int = 1) -> list[dict]:
    """240 products a repeat: every brand, color and type once; the last one has nothing but a title."""
    out = []
    for series in range(repeat):
        for brand in BRANDS:
            for color in COLORS:
                for kind in TYPES:
                    number = len(out)
                    out.append(
                        {
                            "product_id": f"P{number}",
                            "title": f"{brand} {color.title()} {kind.title()} with Model{series} - Pack of {number % 7 + 1}",
                            "description": "d" * 700,
                            "brand": brand,
                            "color": color,
                            "category": f"Home > {kind.split()[-1].title()}",
                            "attributes": [("size", str(number))],
                            "price": float(number),
                            "locale": "us",
                        }
                    )
    out[-1] = {"product_id": out[-1]["product_id"], "title": "Plain Unbranded Thing for Nothing"}
    return out


def product_table(products: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(products, schema=PRODUCT)


def make_catalog(folder: Path, products: list[dict], per_shard: int = 1000) -> Catalog:
    table = product_table(products)
    build_catalog([table.slice(0, 100), table.slice(100)], folder / "catalog", per_shard)
    return Catalog(folder / "catalog" / "arrays")


def make_search(
    folder: Path, products: list[dict], per_shard: int = 1000, vectors: np.ndarray | None = None, part_size: int = 64
) -> tuple[Catalog, Lexicon, ShardSearch]:
    """The whole index of some products, as the pipeline leaves it, with given vectors float32 [n, d]."""
    catalog = make_catalog(folder, products, per_shard)
    for shard in range(catalog.num_shards):
        batches = ProductFile(folder / "catalog" / products_file(shard)).batches(
            ["title", "brand", "color", "category"]
        )
        write_postings((search_text(batch.to_pydict()) for batch in batches), folder / f"postings/{shard:05d}", ["en"])
        if vectors is not None:
            rows = np.asarray(catalog.shard_rows(shard))
            (folder / f"vectors/{shard:05d}").mkdir(parents=True)
            np.save(folder / f"vectors/{shard:05d}/rows.npy", rows)
            for part, start in enumerate(range(0, len(rows), part_size)):
                place = folder / f"vectors/{shard:05d}" / part_name(part)
                np.save(place, vectors[rows[start : start + part_size]])
    build_lexicon([folder / f"postings/{shard:05d}" for shard in range(catalog.num_shards)], folder / "lexicon")
    search = ShardSearch(range(catalog.num_shards), folder.joinpath, dense=vectors is not None)
    return catalog, Lexicon(folder / "lexicon"), search


def make_prepared(folder: Path, products: list[dict], log: list[str], held_out: list[str]) -> Path:
    """What the prepare step leaves, as far as generation reads it."""
    (folder / "products").mkdir(parents=True)
    table = product_table(products)
    pq.write_table(table.slice(0, 150), folder / "products" / "products-00000.parquet")
    pq.write_table(table.slice(150), folder / "products" / "products-00001.parquet")
    queries = [{"query": query, "frequency": 10 - i % 10, "locale": "us"} for i, query in enumerate(log)]
    pq.write_table(pa.Table.from_pylist(queries, schema=QUERY), folder / "queries.parquet")
    judged = [
        {"query_id": str(i), "query": query, "query_source": "human", "split": ("dev", "test")[i % 2], "products": []}
        for i, query in enumerate(held_out)
    ]
    pq.write_table(pa.Table.from_pylist(judged, schema=JUDGED_GROUP), folder / "judged_groups.parquet")
    return folder


def no_guard() -> LeakGuard:
    return LeakGuard([])


def stream_of(products: list[dict], options: GenerateOptions, log: list[str], guard: LeakGuard, counts: PoolCounts):  # type: ignore[no-untyped-def]
    texts = [
        TitleProduct(p["product_id"], p["title"], p.get("brand"), p.get("color"), p.get("category")) for p in products
    ]
    table = pa.Table.from_pylist([{"query": q, "frequency": 1} for q in log], schema=QUERY)
    keys = np.arange(len(texts), dtype=np.uint64)
    titles = title_queries(keys, lambda rows: [(texts[row], "us") for row in rows], lambda word: True, options)
    return mix_sources([(1.0, log_queries(table, 0, 0.5, {})), (3.0, titles)], guard, counts)


def write_pairs(path: Path, rows: list[str]) -> str:
    path.write_text("\n".join(["query,product_id,rank", *rows]) + "\n")
    return str(path)
