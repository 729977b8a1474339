"""What a generate folder keeps beside its shards, under `index/`: the catalog, BM25 and the vectors by shard, the pool.

    catalog.json, catalog/arrays/, catalog/products-00000.arrow ...    what is known of all products; the shards of them
    postings/00000.json, postings/00000/ ...                           BM25, a shard each
    lexicon.json, lexicon/                                             the word counts of the whole catalog
    vectors/00000/                                                     rows and parts of the dense vectors, a shard each
    written/part-000000.parquet ...                                    queries that a language model wrote
    pool.json, pool/groups.arrow                                       the queries of the run

All of it is made anew from the prepared data where it is missing, and counts once its JSON file is there, so that a
killed run goes on with what it has. Workers map local files into memory; from S3 each machine takes a copy first.
"""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from relevance_ray.data.prepare import iter_products, read_judged, read_queries
from relevance_ray.data.splits import LeakGuard
from relevance_ray.engines.generation import TextGenerator
from relevance_ray.generate.arrays import npy_bytes
from relevance_ray.generate.catalog import COLUMNS, Catalog, ProductFile, build_catalog, products_file, search_text
from relevance_ray.generate.dense import VECTORS_PER_PART, part_name, sample_rows
from relevance_ray.generate.lexical import Lexicon, build_lexicon, index_words, word_hash
from relevance_ray.generate.options import GenerateOptions
from relevance_ray.generate.pool import PoolSummary, write_pool
from relevance_ray.generate.queries import (
    PoolCounts,
    PoolQuery,
    file_queries,
    log_queries,
    mix,
    read_pairs,
    title_queries,
)
from relevance_ray.generate.search import CatalogSearch, ShardSearch, in_order
from relevance_ray.generate.titles import TitleProduct
from relevance_ray.generate.writing import PROMPTS
from relevance_ray.generate.written import WrittenPlan, round_trip, write_part, written_queries
from relevance_ray.schema import normalize_query
from relevance_ray.storage import (
    content_id,
    exists,
    is_remote,
    join,
    listdir,
    localize,
    makedirs,
    publish_folder,
    read_json,
    read_table,
    remove_file,
    remove_tree,
    write_bytes,
    write_json,
    write_table,
)
from relevance_ray.tokens import tokenize

_STAGING = ".making-"
_SEARCHED = ["title", "brand", "color", "category"]


WriteParts = Callable[[Sequence[int]], None]


def file_contents(options: GenerateOptions) -> list[list[str]]:
    """What the files that the options name hold, and which prompts are used, for fingerprints."""
    prompts = [["prompts", PROMPTS]] if options.uses_llm else []
    return [[key, content_id(path)] for key, path in options.files.items()] + prompts


class Index:
    """The `index/` of one generate folder.

    Args:
        options: of the generation.
        prepared_dir: what the prepare step wrote.
        out_dir: the generate folder, local or s3://.
    """

    def __init__(self, options: GenerateOptions, prepared_dir: str, out_dir: str) -> None:
        self.options, self._prepared_dir, self._out_dir = options, prepared_dir, out_dir
        self.root = join(out_dir, "index")
        self._opened: dict[int, ProductFile] = {}

    def __reduce__(self) -> tuple[type, tuple[GenerateOptions, str, str]]:
        """What travels to an actor: where the index lies, and nothing that is open."""
        return Index, (self.options, self._prepared_dir, self._out_dir)

    def locate(self, name: str) -> Path:
        """A file or folder of the index as a local path."""
        return localize(join(self.root, name))

    def sweep(self) -> None:
        """Remove what a killed run left half-made; only for the holder of the lease, before work starts."""
        makedirs(self.root)
        for name in listdir(self.root):
            if name.startswith(_STAGING):
                remove_tree(join(self.root, name))

    @contextlib.contextmanager
    def _staged(self, name: str, about: dict[str, Any]) -> Iterator[Path]:
        """A path to make a folder at, which then appears whole as `name`; it counts once `name`.json is there."""
        # Staged on the file system it is published to, where publishing is one rename.
        parent = None if is_remote(self.root) else self.root.removeprefix("file://")
        with tempfile.TemporaryDirectory(prefix=_STAGING, dir=parent, ignore_cleanup_errors=True) as staging:
            folder = Path(staging) / "made"
            yield folder
            publish_folder(folder, join(self.root, name))
        write_json(join(self.root, f"{name}.json"), about)

    # The catalog

    def build_catalog(self) -> Catalog:
        """The catalog, made where it is missing."""
        if not exists(join(self.root, "catalog.json")):
            about = {"products_per_shard": self.options.products_per_shard}
            with self._staged("catalog", about) as folder:
                products = iter_products(localize(self._prepared_dir), COLUMNS)
                build_catalog(products, folder, self.options.products_per_shard)
        return self.catalog

    @functools.cached_property
    def catalog(self) -> Catalog:
        return Catalog(self.locate("catalog/arrays"))

    def product_file(self, shard: int) -> ProductFile:
        if shard not in self._opened:
            self._opened[shard] = ProductFile(self.locate(f"catalog/{products_file(shard)}"))
        return self._opened[shard]

    def _names(self, kind: str) -> list[str]:
        return [f"{kind}/{shard:05d}" for shard in range(self.catalog.num_shards)]

    # BM25

    def missing_postings(self) -> list[int]:
        """The shards that have no postings yet."""
        there = set(listdir(join(self.root, "postings")))
        return [shard for shard in range(self.catalog.num_shards) if f"{shard:05d}.json" not in there]

    def build_postings(self, shard: int) -> None:
        with self._staged(f"postings/{shard:05d}", {}) as folder:
            batches = self.product_file(shard).batches(_SEARCHED)
            index_words((search_text(batch.to_pydict()) for batch in batches), folder, self.options.stopwords)

    def build_lexicon(self) -> Lexicon:
        """The word counts of the whole catalog, added up where that is still to be done."""
        if not exists(join(self.root, "lexicon.json")):
            with self._staged("lexicon", {}) as folder:
                build_lexicon(map(self.locate, self._names("postings")), folder)
        return self.lexicon

    @functools.cached_property
    def lexicon(self) -> Lexicon:
        return Lexicon(self.locate("lexicon"))

    # Vectors

    def missing_vectors(self) -> list[tuple[int, int]]:
        """The (shard, part) that are still to be computed; writes each shard's `rows.npy`, which its parts follow."""
        catalog = self.catalog
        rows = sample_rows(catalog.keys, self.options.dense_max_products, self.options.seed)
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

    def vector_texts(self, shard: int, part: int) -> list[str]:
        """The texts whose vectors make up a part: title, brand and color."""
        rows = np.load(self.locate(f"vectors/{shard:05d}/rows.npy"))
        mine = rows[part * VECTORS_PER_PART : (part + 1) * VECTORS_PER_PART] - self.catalog.starts[shard]
        columns = self.product_file(shard).take(mine, _SEARCHED[:3]).to_pydict()
        return search_text({**columns, "category": [None] * len(mine)})

    def write_vectors(self, shard: int, part: int, vectors: np.ndarray) -> None:
        path = join(self.root, "vectors", f"{shard:05d}", part_name(part))
        write_bytes(path, npy_bytes(vectors.astype(np.float32)))

    def search(self, shards: Sequence[int], *, dense: bool) -> ShardSearch:
        """Some shards, mapped into this process."""
        return ShardSearch(shards, self.locate, dense=dense)

    # Written queries

    @functools.cached_property
    def written_plan(self) -> WrittenPlan:
        return WrittenPlan(self.options, self.catalog)

    def write_queries(self, part: int, generator: TextGenerator) -> None:
        """Ask the products of a part, and keep what came of it."""
        table = write_part(self.written_plan, part, self._products, generator, self.options)
        write_table(join(self.root, "written", _written_file(part)), table)

    def _read_written(self, write: WriteParts, parts: Sequence[int]) -> Iterator[pa.Table]:
        there = set(listdir(join(self.root, "written")))
        if missing := [part for part in parts if _written_file(part) not in there]:
            write(missing)
        for part in parts:
            yield read_table(join(self.root, "written", _written_file(part)))

    def _written_queries(self, write: WriteParts, search: CatalogSearch, counts: PoolCounts) -> Iterator[PoolQuery]:
        options = self.options
        share = options.weight("llm") / sum(options.weight(source) for source in options.sources)
        wanted = math.ceil(options.num_pairs / options.candidates_per_query * share)
        read = functools.partial(self._read_written, write)
        finds = round_trip(self.catalog, self.lexicon, search, options.llm.round_trip_depth)
        return written_queries(read, self.written_plan.num_parts, wanted, finds, options, counts)

    # The pool

    def build_pool(self, write: WriteParts, open_search: Callable[[Index], CatalogSearch]) -> PoolSummary:
        """The queries of this run: what is there where it was made for as many pairs, else made anew.

        Args:
            write: has a language model write some parts of queries.
            open_search: what these are checked by.
        """
        place = join(self.root, "pool.json")
        if exists(place):
            known = PoolSummary(**read_json(place))
            if known.asked == self.options.num_pairs:
                return known
        counts = PoolCounts()
        prepared = localize(self._prepared_dir)
        held_out = [read_judged(prepared, split)["query"].to_pylist() for split in ("dev", "test")]
        guard = LeakGuard([query for queries in held_out for query in queries])
        stream = mix(list(self._sources(prepared, write, open_search, counts)), guard, counts)
        if self.options.engine_file:
            stream = self._with_engine_rows(stream)
        group_size = min(self.options.candidates_per_query, self.catalog.num_distinct)
        about: dict[str, Any] = {}
        with self._staged("pool", about) as folder:
            folder.mkdir()
            summary = write_pool(stream, folder / "groups.arrow", self.options.num_pairs, group_size, counts)
            about.update(summary.to_dict())
            remove_file(place)
        return summary

    def _sources(
        self, prepared: Path, write: WriteParts, open_search: Callable[[Index], CatalogSearch], counts: PoolCounts
    ) -> Iterator[tuple[float, Iterator[PoolQuery]]]:
        options, catalog = self.options, self.catalog
        for source in options.sources:
            weight = options.weight(source)
            if source == "log":
                log = read_queries(prepared)
                yield weight, log_queries(log, options.seed, options.frequency_power, options.log_bands)
            elif source == "titles":
                yield weight, title_queries(catalog.keys, self._titles, _shared_words(self.lexicon), options)
            elif source == "llm":
                yield weight, self._written_queries(write, open_search(self), counts)
            else:
                yield weight, file_queries(options.pairs_file, self._product_ids(), options)

    def _with_engine_rows(self, stream: Iterator[PoolQuery]) -> Iterator[PoolQuery]:
        found = read_pairs(self.options.engine_file, self._product_ids(), "generate.engine_file")
        for query in stream:
            _, ranked = found.get(normalize_query(query.query), ("", []))
            yield replace(query, engine_rows=tuple(row for row, _ in ranked))

    def _products(self, rows: np.ndarray, columns: Sequence[str] = COLUMNS) -> pa.Table:
        """The products of catalog rows, in their order."""
        owner = np.searchsorted(self.catalog.starts, rows, side="right") - 1
        pieces = [
            self.product_file(int(shard)).take(rows[owner == shard] - self.catalog.starts[shard], columns)
            for shard in np.unique(owner)
        ]
        return in_order(pieces, np.argsort(owner, kind="stable"))

    def _titles(self, rows: np.ndarray) -> list[tuple[TitleProduct, str | None]]:
        names = ["product_id", "title", "brand", "color", "category", "locale"]
        taken = self._products(rows, names)
        columns = [taken[name].to_pylist() for name in names]
        return [(TitleProduct(*texts), locale) for *texts, locale in zip(*columns, strict=True)]

    def _product_ids(self) -> list[str]:
        files = map(self.product_file, range(self.catalog.num_shards))
        return [
            value for file in files for batch in file.batches(["product_id"]) for value in batch.column(0).to_pylist()
        ]


def _written_file(part: int) -> str:
    return f"part-{part:06d}.parquet"


def _shared_words(lexicon: Lexicon) -> Any:
    """Whether a word, or all that it is put together from, stands in more than one product; remembers its answers."""
    known: dict[str, bool] = {}

    def is_shared(word: str) -> bool:
        if word not in known:
            if len(known) >= 1_000_000:
                known.clear()
            known[word] = min(lexicon.frequencies([word_hash(part) for part in tokenize(word)]), default=0) > 1
        return known[word]

    return is_shared
