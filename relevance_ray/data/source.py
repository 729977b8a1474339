"""What every reader gives: a label scale, the judgments, and re-iterable streams of products and log queries.

Judgments fit in memory (a few million rows at most, and splits need all of them at once); products and queries may not,
so they come as calls that start a fresh stream of blocks. The price: a second look at the catalog reads it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from relevance_ray.errors import UserError
from relevance_ray.options import STRICT, option
from relevance_ray.schema import SCALES, LabelScale

BLOCK_ROWS = 50_000
"""Products and queries travel in tables of at most this many rows."""

NO_JUDGMENTS = "none"
SOURCE_JUDGMENT = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("query", pa.string(), nullable=False),
        pa.field("product_id", pa.string(), nullable=False),
        pa.field("grade", pa.string(), nullable=False),
        pa.field("rater_grades", pa.list_(pa.float32())),
        pa.field("split", pa.string()),
        pa.field("row", pa.int64(), nullable=False),
    ]
)
"""A judgment as read: `split` is the official one or null; `row` is its place in its file (1 = first row of data)."""


@dataclass(frozen=True)
class Source:
    """A judged catalog, as a reader hands it over.

    Attributes:
        scale: the label scale of the grades.
        judgments: `SOURCE_JUDGMENT` rows, not yet validated against scale and catalog (`prepare` does that).
        products: each call starts a stream of `PRODUCT` tables.
        queries: each call starts a stream of `QUERY` tables, the query log; possibly none.
        judgments_name: what error messages call the judgments' file.
        products_name: what error messages call the catalog's file.
    """

    scale: LabelScale
    judgments: pa.Table
    products: Callable[[], Iterator[pa.Table]]
    queries: Callable[[], Iterator[pa.Table]]
    judgments_name: str
    products_name: str


@dataclass(frozen=True)
class DataOptions:
    """Where the catalog, the judgments and the query log come from, and how queries are split."""

    __pydantic_config__ = STRICT

    format: Literal["market", "esci", "wands", "homedepot", "chorus", "generic"] = option(
        "market", "layout of the data: the built-in demo market, a public set, or your own files (generic)"
    )
    path: str = option("", "folder that holds the files, local or s3:// (not for the market)", operational=True)
    market_size: int = option(10_000, "products of the demo market; its query log grows with it")
    seed: int = option(0, "seed of the demo market")
    queries: str = option(
        "",
        "query log, local or s3:// (.parquet, .csv, .tsv, .jsonl), or a folder of such, with a column `query`, and "
        "`frequency` if known",
        operational=True,
    )
    products: str = option(
        "", "generic format: products file, relative to `path`; empty: the one named products.*", operational=True
    )
    judgments: str = option(
        "",
        "generic format: judgments file, relative to `path`; empty: the one named judgments.*; none: there are none, to "
        "generate and label without training",
        operational=True,
    )
    columns: dict[str, dict[str, str]] = option(
        {}, "generic format: {products: {our name: your column}, judgments: {...}}; unnamed ones keep our name"
    )
    scale: str | dict[str, Any] | None = option(
        None, "generic format: label scale, a known name or {name, grades, gains, relevant_from, numeric}"
    )
    locale: str = option("", "keep only products and judgments of this locale (esci, generic); empty: all")
    label_smoothing: float = option(0.1, "share of a grade's mass leaked to its neighbours where there are no votes")
    test_percent: int = option(15, "percent of the queries in test, where the data has no official test split")
    dev_percent: int = option(15, "percent of the queries in dev")
    folds: int = option(
        0, "cross-validation: number of folds over all judged queries, official split set aside; 0: off"
    )
    fold: int = option(0, "cross-validation: the fold that is the test split, from 0")

    @property
    def is_judged(self) -> bool:
        """Whether there are judgments to train on and to measure by."""
        return self.judgments != NO_JUDGMENTS

    def __post_init__(self) -> None:
        if self.format == "market" and not 1 <= self.market_size <= 1_000_000_000:
            raise ValueError(f"market_size must be from 1 to 1000000000; it is {self.market_size}")
        if self.format != "market":
            for name in ("market_size", "seed"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ValueError(f"{name} is read for format market only; format is {self.format}")
        if self.format != "market" and not self.path and not (self.products and self.judgments):
            raise ValueError(f"path must name the folder that holds the {self.format} files; it is empty")
        if self.format == "generic" and self.scale is None:
            raise ValueError(
                f"scale is needed for generic data: one of {', '.join(SCALES)}, or your own grades and gains"
            )
        if self.format != "generic":
            for name in ("products", "judgments", "columns", "scale"):
                if getattr(self, name):
                    raise ValueError(f"{name} is read for format generic only; format {self.format} has its own")
        if self.locale and self.format not in ("esci", "generic"):
            raise ValueError(f"locale is read for formats esci and generic only; format is {self.format}")
        if unknown := set(self.columns) - {"products", "judgments"}:
            raise ValueError(f"columns has unknown key {sorted(unknown)[0]!r}; it may hold products and judgments")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be from 0 to below 1; it is {self.label_smoothing}")
        if not (self.test_percent > 0 and self.dev_percent > 0 and self.test_percent + self.dev_percent < 100):
            raise ValueError(
                "test_percent and dev_percent must be positive and leave some queries for training; "
                f"they are {self.test_percent} and {self.dev_percent}"
            )
        if self.folds and not (self.folds >= 2 and 0 <= self.fold < self.folds):
            raise ValueError(
                f"fold must be from 0 to folds - 1 and folds at least 2; they are {self.fold}, {self.folds}"
            )
        if not self.folds and self.fold:
            raise ValueError(f"fold is {self.fold} but folds is 0; set folds to the number of folds")


def own_scale(value: str | dict[str, Any] | None) -> LabelScale:
    """The label scale named or described in the configuration. Raises `UserError` where it cannot be one."""
    if isinstance(value, dict):
        missing = [key for key in ("name", "grades", "gains", "relevant_from") if key not in value]
        if missing:
            raise UserError(f"data.scale lacks {missing[0]!r}; give name, grades, gains and relevant_from")
        try:
            return LabelScale.from_dict(value)
        except (TypeError, ValueError) as error:
            raise UserError(f"data.scale is no label scale ({error}); grades and gains must be lists") from error
    if value not in SCALES:
        raise UserError(f"data.scale {value!r} is none of {', '.join(SCALES)}; name one or give grades and gains")
    return SCALES[value]
