"""How diverse a generated set of (query, products) groups is, and where it drifts from the log and the catalog.

Everything is read once, a table at a time, in memory that does not grow with the number of pairs. Exact over what is read:
groups, pairs, origins, ranks, query lengths and types, grades. Exact up to the capacity of a `KeySample`, estimated past it
(and the report says which): different products and how unevenly they are used, categories and brands, repeated queries. Of
an even sample of the different queries: n-grams, vocabulary, near-duplicates.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from relevance_ray.generate.diversity.counting import KeySample, divergence, value_counts
from relevance_ray.generate.diversity.drift import Check, LogTexts, category_checks, query_checks
from relevance_ray.generate.diversity.grade_figures import RANKS, GradeStats, rank_buckets
from relevance_ray.generate.diversity.query_figures import (
    MAX_NEAR,
    VIEWS,
    QueryStats,
    distinct_ngrams,
    log_stats,
    near_duplicates,
    read_query,
)
from relevance_ray.generate.diversity.query_text import TYPES, TypeRules, category_names, name_key
from relevance_ray.schema import LabelScale

CATALOG_COLUMNS = ["product_id", "brand", "category"]
PRODUCTS_KEPT = 65_536
NAMES_KEPT = 262_144
NUM_NAMED = 5
NO_ORIGIN = "none"


class Names:
    """Categories at two levels, and brands, of a stream of products."""

    def __init__(self, seed: int) -> None:
        self.products = 0
        self.leaf, self.top, self.brand = (KeySample(NAMES_KEPT, seed) for _ in range(3))

    def add(self, categories: pa.ChunkedArray | pa.Array, brands: pa.ChunkedArray | pa.Array) -> None:
        """Count products by their columns; null and empty are no name."""
        self.products += len(categories)
        for path, count in value_counts(categories).items():
            levels = [level.strip() for level in path.split(">")] if path else []
            if levels and levels[0]:
                self.leaf.add(" > ".join(levels), count)
                self.top.add(levels[0], count)
        for brand, count in value_counts(brands).items():
            if brand and brand.strip():
                self.brand.add(brand.casefold().strip(), count)


class Diversity:
    """Reads the catalog and the log, then takes generated tables as they come.

    Args:
        catalog: tables with `CATALOG_COLUMNS`.
        log: a QUERY table, or one without rows.
        scale: the label scale, for labeled groups.
        seed: of every sample.

    Attributes:
        groups, pairs: read so far.
    """

    def __init__(
        self, catalog: Iterable[pa.Table], log: pa.Table, scale: LabelScale | None = None, seed: int = 0
    ) -> None:
        self._seed = seed
        self._catalog = Names(seed)
        for table in catalog:
            self._catalog.add(table["category"], table["brand"])
        self._rules = TypeRules(
            {name_key(brand) for brand in self._catalog.brand.counts},
            {name for path in self._catalog.leaf.counts for name in category_names(path)},
        )
        self._num_log_rows = log.num_rows
        self._log = log_stats(log, self._rules, seed)
        self._log_at: dict[int, tuple[dict[str, float], float]] = {}
        self.groups = self.pairs = 0
        self._found = Names(seed)
        self._uses = KeySample(PRODUCTS_KEPT, seed)
        self._queries = QueryStats(seed=seed)
        self._sources: dict[str, QueryStats] = {}
        self._first: Counter[str] = Counter()
        self._any: Counter[str] = Counter()
        self._ranks: dict[str, Counter[str]] = defaultdict(Counter)
        self._grades = GradeStats(scale) if scale is not None else None

    def add(self, table: pa.Table) -> None:
        """Count a GROUP or LABELED_GROUP table; of the latter also the labels, where a scale was given."""
        sources = table["query_source"].to_pylist()
        for query, source in zip(table["query"].to_pylist(), sources, strict=True):
            if source not in self._sources:
                self._sources[source] = QueryStats(seed=self._seed)
            read = read_query(query, self._rules)
            self._queries.add(read)
            self._sources[source].add(read)
        lists = table["products"].combine_chunks()
        products, sizes = lists.flatten(), lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        self.groups += table.num_rows
        self.pairs += len(products)
        if not len(products):
            return
        self._uses.add_column(products.field("product_id"))
        fields = products.field("fields")
        self._found.add(fields.field("category"), fields.field("brand"))
        first, ranks = self._add_origins(products.field("origins"))
        if self._grades is not None and "logit" in {field.name for field in products.type}:
            group = np.repeat(np.arange(table.num_rows), sizes)
            names = {"origin": first, "source": np.array(sources, dtype=object)[group], "rank": ranks}
            self._grades.add(products, group, names)

    def _add_origins(self, origins: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
        """Count where products come from; [n] names of their first origins and [n] names of its rank bucket."""
        found = origins.flatten()
        sizes = origins.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        starts = np.cumsum(sizes) - sizes
        has = sizes > 0
        names = np.full(len(origins), NO_ORIGIN, dtype=object)
        buckets = np.zeros(len(origins), dtype=np.int64)
        all_names = np.array(found.field("name").to_pylist(), dtype=object)
        all_ranks = found.field("rank").fill_null(0).to_numpy(zero_copy_only=False)
        names[has], buckets[has] = all_names[starts[has]], rank_buckets(all_ranks[starts[has]])
        ranks = np.array(RANKS, dtype=object)[buckets]
        self._first.update(names.tolist())
        self._any.update(all_names.tolist())
        for (name, rank), count in Counter(zip(names.tolist(), ranks.tolist(), strict=True)).items():
            self._ranks[name][rank] += count
        return names, ranks

    def report(self) -> dict[str, Any]:
        """All figures as plain JSON values; `warnings`, sentences that begin with the gravest, of all queries and
        candidates; `source_warnings`, those of the queries of one source alone, which may be meant."""
        texts = LogTexts(self._log, self._rules)
        checks, not_checked = query_checks(self._queries, self._log, texts, self._sources, self._seed)
        checks += category_checks(self._catalog.top, self._found.top, self.groups, self._seed)
        alone = {}
        if len(self._sources) > 1:
            for name, stats in sorted(self._sources.items()):
                own, _ = query_checks(stats, self._log, texts, {}, self._seed)
                alone[name] = _warnings(own)
        return {
            "warnings": _warnings(checks),
            "source_warnings": {name: sentences for name, sentences in alone.items() if sentences},
            "not_checked": not_checked,
            "checks": [check.to_dict() for check in checks],
            "groups": self.groups,
            "pairs": self.pairs,
            "catalog_products": self._catalog.products,
            "products": self._product_figures(),
            "categories": {
                "leaf": _compare(self._catalog.leaf, self._found.leaf),
                "top": _compare(self._catalog.top, self._found.top),
            },
            "brands": _compare(self._catalog.brand, self._found.brand),
            "log": self._log_figures(),
            "queries": {"all": self._query_figures(self._queries)}
            | {f"source {name}": self._query_figures(stats) for name, stats in sorted(self._sources.items())},
            "type_rules": TYPES,
            "origins": {"first": dict(sorted(self._first.items())), "any": dict(sorted(self._any.items()))},
            "ranks": {
                name: {rank: found[rank] for rank in RANKS if rank in found}
                for name, found in sorted(self._ranks.items())
            },
            "grades": self._grades.figures() if self._grades is not None else None,
        }

    def _product_figures(self) -> dict[str, Any]:
        uses = np.sort(np.array(list(self._uses.counts.values())))[::-1]
        if not len(uses):
            return {"different": 0, "exact": True}
        top = uses[: max(1, round(len(uses) / 100))]
        distinct = self._uses.distinct
        return {
            "different": distinct,
            "exact": self._uses.exact,
            "catalog_share": min(1.0, distinct / self._catalog.products) if self._catalog.products else None,
            "mean_uses": float(uses.mean()),
            "median_uses": float(np.median(uses)),
            "max_uses": int(uses[0]),
            "top_1_percent_share": float(top.sum() / uses.sum()),
        }

    def _log_figures(self) -> dict[str, Any]:
        texts = self._log.sample.in_random_order()
        return {
            "rows": self._num_log_rows,
            "different": self._log.sample.distinct,
            "different_exact": self._log.sample.exact,
            "views": {
                name: {
                    "length": self._log.lengths(view),
                    "types": {kind: float(shares[view]) for kind, shares in self._log.type_shares().items()},
                }
                for view, name in enumerate(VIEWS)
            },
            "distinct_n": distinct_ngrams(texts) | {"queries": len(texts)},
            "near_duplicates": near_duplicates(texts),
        }

    def _query_figures(self, stats: QueryStats) -> dict[str, Any]:
        """Of one stream of queries, and beside it what the log shows with as many queries."""
        out = stats.figures()
        own, log = stats.sample.in_random_order(), self._log.sample.in_random_order()
        size = min(len(own), len(log))
        if not size:
            return out | {"against_log": None}
        _, counts, in_log = stats.sample.shared(self._log.sample)
        if size not in self._log_at:
            self._log_at[size] = (distinct_ngrams(log[:size]), near_duplicates(log[:size])["share"])
        whole, near = size == len(own), min(size, MAX_NEAR) == min(len(own), MAX_NEAR)
        out["against_log"] = {
            "queries": size,
            "distinct_n": out["distinct_n"] if whole else distinct_ngrams(own[:size]),
            "log_distinct_n": self._log_at[size][0],
            "near_duplicates": (out["near_duplicates"] if near else near_duplicates(own[:size]))["share"],
            "log_near_duplicates": self._log_at[size][1],
            "also_in_log": float(in_log[counts > 0].astype(bool).mean()) if (counts > 0).any() else None,
            "length_words_bits": [divergence(stats.num_words[0], view) for view in self._log.num_words],
            "length_chars_bits": [divergence(stats.num_chars[0], view) for view in self._log.num_chars],
        }
        return out


def _warnings(checks: Iterable[Check]) -> list[str]:
    return [c.sentence for c in sorted(checks, key=lambda c: c.threshold - c.value) if c.drifts]


def _compare(catalog: KeySample, found: KeySample) -> dict[str, Any]:
    """Names among the candidates against those of the catalog, all or an even sample of them."""
    names, supply, used = catalog.shared(found)
    supplied = supply > 0
    out: dict[str, Any] = {
        "in_catalog": catalog.distinct,
        "used": found.distinct,
        "exact": catalog.exact and found.exact,
        "coverage": float((used[supplied] > 0).mean()) if supplied.any() else None,
        "coverage_of_products": float(supply[used > 0].sum() / supply.sum()) if supplied.any() else None,
        "divergence_bits": divergence(used, supply),
        "over": [],
        "under": [],
        "largest": [],
    }
    if supply.sum() and used.sum():
        p, q = supply / supply.sum(), used / used.sum()
        for key, order in (("over", np.argsort(p - q)), ("under", np.argsort(q - p))):
            rows = [row for row in order[:NUM_NAMED] if (q[row] - p[row]) * (1 if key == "over" else -1) > 0]
            out[key] = [_named(names[row], p[row], q[row]) for row in rows]
        out["largest"] = [_named(names[row], p[row], q[row]) for row in np.argsort(-np.maximum(p, q))[:15]]
    return out


def _named(name: str, catalog: float, candidates: float) -> dict[str, Any]:
    return {"name": name, "catalog": float(catalog), "candidates": float(candidates)}


def measure_diversity(
    groups: Iterable[pa.Table],
    catalog: Iterable[pa.Table],
    log: pa.Table,
    scale: LabelScale | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The report of a whole stream; see `Diversity`."""
    diversity = Diversity(catalog, log, scale, seed)
    for table in groups:
        diversity.add(table)
    return diversity.report()
