"""The queries of a generate folder: those that a language model wrote, and the pool of the run.

written/part-000000.parquet ...    queries that a language model wrote
pool.json, pool/groups.arrow       the queries of the run, a row a group
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from relevance_ray.data.prepare import read_held_out_queries, read_queries
from relevance_ray.data.splits import LeakGuard
from relevance_ray.engines.generation import TextGenerator
from relevance_ray.generate.index.catalog_index import CatalogIndex, vectors_identity
from relevance_ray.generate.index.lexical import Lexicon, word_hash
from relevance_ray.generate.index.search import CatalogSearch
from relevance_ray.generate.options import GenerateOptions
from relevance_ray.generate.queries.pool import PoolFile, PoolSummary, write_pool
from relevance_ray.generate.queries.sources import (
    PoolCounts,
    PoolQuery,
    file_queries,
    log_queries,
    mix_sources,
    read_pairs,
    title_queries,
)
from relevance_ray.generate.queries.titles import TitleProduct
from relevance_ray.generate.queries.writing import PROMPTS
from relevance_ray.generate.queries.written import WrittenPlan, round_trip, write_part, written_queries
from relevance_ray.generate.staging import appears_whole
from relevance_ray.schema import normalize_query
from relevance_ray.storage import (
    content_id,
    exists,
    join,
    listdir,
    localize,
    read_json,
    read_table,
    remove_file,
    write_table,
)
from relevance_ray.tokens import tokenize

WriteParts = Callable[[Sequence[int]], None]


def file_contents(options: GenerateOptions) -> list[list[str]]:
    """What the files that the options name hold, which prompts and which vectors are used, for fingerprints."""
    prompts = [["prompts", PROMPTS]] if options.uses_llm else []
    dense = [["dense", *map(str, vectors_identity(options))]] if options.uses_dense else []
    return [[key, content_id(path)] for key, path in options.files.items()] + prompts + dense


class QueryStore:
    """The queries of one generate folder.

    Args:
        index: of the catalog.
        prepared_dir: what the prepare step wrote.
        folder: the generate folder, local or s3://.
    """

    def __init__(self, index: CatalogIndex, prepared_dir: str, folder: str) -> None:
        self.index, self._prepared_dir, self._folder = index, prepared_dir, folder

    @property
    def _options(self) -> GenerateOptions:
        return self.index.options

    def __reduce__(self) -> tuple[type, tuple[CatalogIndex, str, str]]:
        """What travels to an actor: where the queries lie, and nothing that is open."""
        return QueryStore, (self.index, self._prepared_dir, self._folder)

    # Written queries

    @functools.cached_property
    def written_plan(self) -> WrittenPlan:
        return WrittenPlan(self._options, self.index.catalog)

    def write(self, part: int, generator: TextGenerator) -> None:
        """Ask the products of a part, and keep what came of it."""
        table = write_part(self.written_plan, part, self.index.products, generator, self._options)
        write_table(join(self._folder, "written", _written_file(part)), table)

    def _read_written(self, write: WriteParts, parts: Sequence[int]) -> Iterator[pa.Table]:
        there = set(listdir(join(self._folder, "written")))
        if missing := [part for part in parts if _written_file(part) not in there]:
            write(missing)
        for part in parts:
            yield read_table(join(self._folder, "written", _written_file(part)))

    def _written_queries(self, write: WriteParts, search: CatalogSearch, counts: PoolCounts) -> Iterator[PoolQuery]:
        options = self._options
        share = options.weight("llm") / sum(options.weight(source) for source in options.sources)
        wanted = math.ceil(options.num_pairs / options.candidates_per_query * share)
        read = functools.partial(self._read_written, write)
        finds = round_trip(self.index.catalog, self.index.lexicon, search, options.llm.round_trip_depth)
        return written_queries(read, self.written_plan.num_parts, wanted, finds, options, counts)

    # The pool

    def build_pool(self, write: WriteParts, open_search: Callable[[CatalogIndex], CatalogSearch]) -> PoolSummary:
        """The queries of this run: what is there where it was made for as many pairs, else made anew.

        Args:
            write: has a language model write some parts of queries.
            open_search: what these are checked by.
        """
        place = join(self._folder, "pool.json")
        if exists(place):
            known = PoolSummary(**read_json(place))
            if known.asked == self._options.num_pairs:
                return known
        counts = PoolCounts()
        prepared = localize(self._prepared_dir)
        guard = LeakGuard(read_held_out_queries(prepared))
        stream = mix_sources(list(self._sources(prepared, write, open_search, counts)), guard, counts)
        if self._options.engine_file:
            stream = self._with_engine_rows(stream)
        group_size = min(self._options.candidates_per_query, self.index.catalog.num_distinct)
        about: dict[str, Any] = {}
        with appears_whole(self._folder, "pool", about) as folder:
            folder.mkdir()
            summary = write_pool(stream, folder / "groups.arrow", self._options.num_pairs, group_size, counts)
            about.update(summary.to_dict())
            remove_file(place)
        return summary

    def _sources(
        self,
        prepared: Path,
        write: WriteParts,
        open_search: Callable[[CatalogIndex], CatalogSearch],
        counts: PoolCounts,
    ) -> Iterator[tuple[float, Iterator[PoolQuery]]]:
        options, catalog = self._options, self.index.catalog
        for source in options.sources:
            weight = options.weight(source)
            if source == "log":
                log = read_queries(prepared)
                yield weight, log_queries(log, options.seed, options.frequency_power, options.log_bands)
            elif source == "titles":
                yield weight, title_queries(catalog.keys, self._titles, _shared_words(self.index.lexicon), options)
            elif source == "llm":
                yield weight, self._written_queries(write, open_search(self.index), counts)
            else:
                yield weight, file_queries(options.pairs_file, self.index.product_ids(), options)

    def _with_engine_rows(self, stream: Iterator[PoolQuery]) -> Iterator[PoolQuery]:
        found = read_pairs(self._options.engine_file, self.index.product_ids(), "generate.engine_file")
        for query in stream:
            _, ranked = found.get(normalize_query(query.query), ("", []))
            yield replace(query, engine_rows=tuple(row for row, _ in ranked))

    def read_pool(self) -> PoolFile:
        return PoolFile(localize(join(self._folder, "pool", "groups.arrow")))

    def _titles(self, rows: np.ndarray) -> list[tuple[TitleProduct, str | None]]:
        names = ["product_id", "title", "brand", "color", "category", "locale"]
        taken = self.index.products(rows, names)
        columns = [taken[name].to_pylist() for name in names]
        return [(TitleProduct(*texts), locale) for *texts, locale in zip(*columns, strict=True)]


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
