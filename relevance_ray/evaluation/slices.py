"""Parts of the judgments that a mean may hide: rare queries, long ones, a category, brands that training never saw.

A slice is a set of pairs. Where it is cut by query it holds whole lists; where it is cut by product (category, brand,
price, a missing field) each query keeps its products of the slice, and is ranked on these alone. So slices are compared by
pairwise accuracy, which is .5 for random order whatever the length of a list, rather than by nDCG.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from relevance_ray.evaluation.compare import compare_predictions
from relevance_ray.evaluation.judged import JudgedPairs, Judgments
from relevance_ray.evaluation.measure import Predictions
from relevance_ray.evaluation.options import Dimension, EvaluateOptions
from relevance_ray.evaluation.significance import MIN_QUERIES, holm
from relevance_ray.generate.options import BANDS
from relevance_ray.generate.queries.language import count_words, language_of
from relevance_ray.generate.queries.sources import log_bands
from relevance_ray.metrics import group_offsets
from relevance_ray.schema import LabelScale, normalize_query

SLICE_METRIC = "pairwise_accuracy"
_MOST_CATEGORIES = 8
_TITLES_READ = 20
_FIELDS = ("brand", "color", "category", "description", "price")
_COLUMN = "slice."
_LENGTHS = {1: "1 word", 2: "2 words", 3: "3 words", 4: "4 or 5 words", 5: "4 or 5 words"}
_LONG = "6 and more words"
_NOT_IN_LOG = "not in the log"
_KNOWN: Mapping[Dimension, Sequence[str]] = {
    "frequency": (*BANDS, _NOT_IN_LOG),
    "length": (*dict.fromkeys(_LENGTHS.values()), _LONG),
    "brand": ("judged in training", "new to training", "no brand"),
}


@dataclass(frozen=True)
class Slice:
    """Some of n judged pairs.

    Attributes:
        dimension: what it is cut by.
        name: which part.
        pairs: bool [n].
    """

    dimension: Dimension
    name: str
    pairs: np.ndarray


@dataclass(frozen=True)
class SliceContext:
    """What slices need to know beside the judged pairs.

    Attributes:
        log: the query log, a `QUERY` table.
        train_brands: normalised brands of the products that were judged in training.
    """

    log: pa.Table
    train_brands: frozenset[str]

    @classmethod
    def of(cls, log: pa.Table, train: pa.Table) -> SliceContext:
        """From the query log and the judged groups of split train."""
        judged = [product for group in train["products"].to_pylist() for product in group]
        return cls(log, frozenset(filter(None, (_brand(product["fields"]) for product in judged))))


def find_slices(pairs: JudgedPairs, context: SliceContext, dimensions: Sequence[Dimension]) -> list[Slice]:
    """The slices of judged pairs, by dimension; every pair is in one slice of each, but for missing fields, of which it may
    lack several or none. A dimension that does not tell pairs apart (no log, no prices) has one slice, of all; where its
    slices are known beforehand (bands, lengths, fields), those without a pair are among them."""
    names: Mapping[Dimension, Callable[[JudgedPairs, SliceContext], list[str]]] = {
        "frequency": _frequencies,
        "length": lambda pairs, _: _by_query(pairs, _length),
        "language": _languages,
        "category": _categories,
        "brand": _brands,
        "price": _prices,
    }
    found: list[Slice] = []
    for dimension in dimensions:
        if dimension == "missing":
            for field in (name for name in _FIELDS if name not in dimensions):  # those have a slice of their own for it
                lacking = np.array([_is_missing(product.get(field)) for product in pairs.products], dtype=bool)
                found.append(Slice(dimension, f"no {field}", lacking))
            continue
        of_pair = np.asarray(names[dimension](pairs, context), dtype=object)
        found += [Slice(dimension, name, of_pair == name) for name in _names_of(dimension, set(of_pair))]
    return found


def _names_of(dimension: Dimension, there: set[str]) -> list[str]:
    """Those of pairs, and those known beforehand unless a dimension has one slice only."""
    known = _KNOWN.get(dimension, ()) if len(there) > 1 else ()
    return [*known, *sorted(there - set(known))]


def slice_columns(slices: Sequence[Slice], num_pairs: int) -> dict[str, pa.Array]:
    """The slices as columns beside a table of the pairs, `slice.DIMENSION`: list<string>, the names that a pair is in."""
    columns: dict[str, list[list[str]]] = {}
    for each in slices:
        names = columns.setdefault(f"{_COLUMN}{each.dimension}", [[] for _ in range(num_pairs)])
        for row in np.flatnonzero(each.pairs).tolist():
            names[row].append(each.name)
    return {name: pa.array(values, pa.list_(pa.string())) for name, values in columns.items()}


def read_slices(table: pa.Table) -> list[Slice]:
    """The slices of the rows of a table with `slice_columns`; those without a pair are not told of."""
    found: list[Slice] = []
    for column in (name for name in table.column_names if name.startswith(_COLUMN)):
        dimension = cast("Dimension", column.removeprefix(_COLUMN))
        rows = pc.list_parent_indices(table[column]).to_numpy()
        names = pc.list_flatten(table[column]).to_numpy(zero_copy_only=False)
        for name in sorted(set(names)):
            pairs = np.zeros(table.num_rows, dtype=bool)
            pairs[rows[names == name]] = True
            found.append(Slice(dimension, name, pairs))
    return found


def slice_reports(
    pairs: Judgments,
    predictions: Mapping[str, Predictions],
    slices: Sequence[Slice],
    scale: LabelScale,
    options: EvaluateOptions,
    model: str = "student",
) -> list[dict[str, Any]]:
    """Each slice measured, the worst for one model first.

    Args:
        pairs: n judged pairs.
        predictions: of the same pairs, by the models to compare.
        slices: of the same pairs.
        model: the one whose pairwise accuracy orders them.

    Returns:
        Of each slice "dimension", "slice", "num_queries" (of two products and more, of different gain: the others rank
        nothing), "num_pairs", and the rest of `compare_predictions` where it has at least `MIN_QUERIES` such queries and is
        not all there is; `p_holm` of the model's pairwise accuracy is held against all slices and others. Unmeasured and
        undefined ones come last.
    """
    options = replace(options, num_permutations=min(options.num_permutations, 1000))
    reports = []
    for each in slices:
        part, of_part = restrict(pairs, predictions, each.pairs)
        report: dict[str, Any] = {"dimension": each.dimension, "slice": each.name}
        ranked = _num_ranked(part)
        if ranked >= MIN_QUERIES and part.num_pairs < pairs.num_pairs:
            report |= compare_predictions(part, of_part, scale, options)
        report |= {"num_queries": ranked, "num_pairs": part.num_pairs}
        reports.append(report)
    _correct(reports, model)
    return sorted(reports, key=lambda report: _value(report, model))


def _correct(reports: Sequence[Mapping[str, Any]], model: str) -> None:
    """Hold the model's differences in `SLICE_METRIC` against each other: of many slices some look bad by chance."""
    rows = [
        row
        for report in reports
        for row in report.get("differences", [])
        if row["metric"] == SLICE_METRIC and model in (row["model"], row["other"])
    ]
    known = {place: row["p"] for place, row in enumerate(rows) if row["p"] is not None}
    for place, p in holm(known).items():
        rows[place]["p_holm"] = p


def restrict(
    pairs: Judgments, predictions: Mapping[str, Predictions], kept: np.ndarray
) -> tuple[Judgments, dict[str, Predictions]]:
    """Some pairs (bool [n]) alone, with what the models say of them; queries that keep none are left out."""
    query = np.repeat(np.arange(pairs.num_queries), np.diff(pairs.offsets))
    lengths = np.bincount(query[kept], minlength=pairs.num_queries)
    offsets = group_offsets(lengths[lengths > 0])
    of_kept = {
        name: Predictions(
            found.logits[kept],
            None if found.classes is None else found.classes[kept],
            None if found.probabilities is None else found.probabilities[kept],
        )
        for name, found in predictions.items()
    }
    return Judgments(offsets, pairs.gains[kept], pairs.classes[kept], pairs.relevant[kept]), of_kept


def _num_ranked(pairs: Judgments) -> int:
    if not pairs.num_pairs:
        return 0
    starts = pairs.offsets[:-1]
    return int((np.maximum.reduceat(pairs.gains, starts) > np.minimum.reduceat(pairs.gains, starts)).sum())


def _value(report: Mapping[str, Any], model: str) -> float:
    found = report.get("models", {}).get(model, {}).get("metrics", {}).get(SLICE_METRIC)
    return float("inf") if found is None or found["value"] is None else float(found["value"])


def _by_query(pairs: JudgedPairs, name_of: Callable[[str], str]) -> list[str]:
    """A name for each pair, by its query's text."""
    names = {query: name_of(query) for query in dict.fromkeys(pairs.queries)}
    return [names[query] for query in pairs.queries]


def _length(query: str) -> str:
    return _LENGTHS.get(max(1, count_words(query)), _LONG)


def _frequencies(pairs: JudgedPairs, context: SliceContext) -> list[str]:
    frequencies = context.log["frequency"].to_numpy()
    bands = log_bands(frequencies)
    of_query = dict(zip(map(normalize_query, context.log["query"].to_pylist()), bands.tolist(), strict=True))

    def name_of(query: str) -> str:
        band = of_query.get(normalize_query(query))
        return _NOT_IN_LOG if band is None else BANDS[band]

    return _by_query(pairs, name_of)


def _languages(pairs: JudgedPairs, _: SliceContext) -> list[str]:
    names: list[str] = []
    for start, stop in zip(pairs.offsets[:-1], pairs.offsets[1:], strict=True):
        titles = [
            str(product.get("title") or "") for product in pairs.products[start : min(stop, start + _TITLES_READ)]
        ]
        names += [language_of(" ".join(titles)) or "not told"] * int(stop - start)
    return names


def _categories(pairs: JudgedPairs, _: SliceContext) -> list[str]:
    tops = [str(product.get("category") or "").split(">")[0].strip() for product in pairs.products]
    common = {name for name, _ in Counter(filter(None, tops)).most_common(_MOST_CATEGORIES)}
    return [name if name in common else "other categories" if name else "no category" for name in tops]


def _brands(pairs: JudgedPairs, context: SliceContext) -> list[str]:
    brands = [_brand(product) for product in pairs.products]
    return [
        "no brand" if not brand else "judged in training" if brand in context.train_brands else "new to training"
        for brand in brands
    ]


def _prices(pairs: JudgedPairs, _: SliceContext) -> list[str]:
    prices = np.array([np.nan if _is_missing(p.get("price")) else p["price"] for p in pairs.products], dtype=np.float64)
    known = prices[~np.isnan(prices)]
    if not len(known):
        return ["no price"] * len(prices)
    low, high = np.quantile(known, [1 / 3, 2 / 3])
    bands = (f"up to {low:.2f}", f"{low:.2f} to {high:.2f}", f"above {high:.2f}")
    return ["no price" if np.isnan(price) else bands[int(price > low) + int(price > high)] for price in prices]


def _brand(fields: Mapping[str, Any]) -> str:
    return normalize_query(str(fields.get("brand") or ""))


def _is_missing(value: Any) -> bool:
    return (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, float) and np.isnan(value))
    )
