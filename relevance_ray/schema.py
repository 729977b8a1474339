"""Tables and label scales: what every stage agrees on.

The Arrow schemas here are the contract between steps; a `Group` (one query with its candidates) carries the product
fields along, so that no stage after generation needs a join or a shuffle.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from relevance_ray.errors import UserError

PRODUCT = pa.schema(
    [
        pa.field("product_id", pa.string(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("description", pa.string()),
        pa.field("bullets", pa.string()),
        pa.field("brand", pa.string()),
        pa.field("color", pa.string()),
        pa.field("category", pa.string()),
        pa.field("attributes", pa.map_(pa.string(), pa.string())),
        pa.field("price", pa.float32()),
        pa.field("locale", pa.string()),
    ]
)
"""A product. `bullets` is one newline-joined string, `category` a path "A > B > C"."""

JUDGMENT = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("query", pa.string(), nullable=False),
        pa.field("product_id", pa.string(), nullable=False),
        pa.field("grade", pa.string(), nullable=False),
        pa.field("soft_target", pa.float32(), nullable=False),
        pa.field("rater_grades", pa.list_(pa.float32())),
        pa.field("split", pa.string(), nullable=False),
    ]
)
"""A human judgment. `grade` is the label as published ("E", "2.33"); `soft_target` is its expected gain after
smoothing; `rater_grades` are the single raters' numeric grades; `split` is train, dev or test."""

QUERY = pa.schema(
    [
        pa.field("query", pa.string(), nullable=False),
        pa.field("frequency", pa.int64(), nullable=False),
        pa.field("locale", pa.string()),
    ]
)
"""A line of a query log."""

FIELDS = pa.struct(
    [
        pa.field("title", pa.string()),
        pa.field("brand", pa.string()),
        pa.field("color", pa.string()),
        pa.field("category", pa.string()),
        pa.field("description", pa.string()),
        pa.field("attributes", pa.map_(pa.string(), pa.string())),
        pa.field("price", pa.float32()),
    ]
)
"""What of a product travels inside a group; `description` is cut to `DESCRIPTION_CHARS` characters."""

DESCRIPTION_CHARS = 500

ORIGIN = pa.struct([pa.field("name", pa.string()), pa.field("rank", pa.int32())])

_CANDIDATE = [
    pa.field("pair_id", pa.int64()),
    pa.field("product_id", pa.string()),
    pa.field("fields", FIELDS),
    pa.field("origins", pa.list_(ORIGIN)),
]
_LABEL = [
    pa.field("logit", pa.float32()),
    pa.field("class_logits", pa.list_(pa.float32())),
    pa.field("rationale", pa.string()),
    pa.field("error", pa.string()),
]
_QUERY_FIELDS = [
    pa.field("query_id", pa.string(), nullable=False),
    pa.field("query", pa.string(), nullable=False),
    pa.field("query_source", pa.string(), nullable=False),
]
GROUP = pa.schema([*_QUERY_FIELDS, pa.field("products", pa.list_(pa.struct(_CANDIDATE)))])
"""The unit of everything after generation: one query with its candidates."""

LABELED_GROUP = pa.schema([*_QUERY_FIELDS, pa.field("products", pa.list_(pa.struct(_CANDIDATE + _LABEL)))])
"""A group whose candidates carry the teacher's `logit`, its `class_logits`, and an `error` where labeling failed."""

_HUMAN_LABEL = [
    pa.field("grade", pa.string()),
    pa.field("soft_target", pa.float32()),
    pa.field("rater_grades", pa.list_(pa.float32())),
]
JUDGED_GROUP = pa.schema(
    [
        *_QUERY_FIELDS,
        pa.field("split", pa.string(), nullable=False),
        pa.field("products", pa.list_(pa.struct(_CANDIDATE + _HUMAN_LABEL))),
    ]
)
"""A judged query with its judged products and their fields: the human counterpart of a labeled group, made once by the
prepare step, and what the teacher is trained on and every model is scored on."""

_WHITESPACE = re.compile(r"\s+")


def normalize_query(query: str) -> str:
    """NFKC, casefolded, whitespace collapsed: two queries that look alike are equal."""
    return _WHITESPACE.sub(" ", unicodedata.normalize("NFKC", query).casefold()).strip()


def pair_id(query: str, product_id: str, locale: str | None = None) -> int:
    """The int64 identity of a (query, product) pair: BLAKE2b-64, the same on every machine, forever.

    The hashed text is `normalize_query(query) \\x1f locale \\x1f product_id`. Among a billion pairs a collision has a
    chance of 2.7%: harmless here, since nothing joins on it across queries.
    """
    text = f"{normalize_query(query)}\x1f{locale or ''}\x1f{product_id}"
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def query_id(query: str, locale: str | None = None) -> str:
    """A stable id for a query that came without one: 16 hex digits of BLAKE2b over its normal form and locale."""
    text = f"{normalize_query(query)}\x1f{locale or ''}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def product_fields(product: Mapping[str, Any]) -> dict[str, Any]:
    """The `FIELDS` struct of a product row (or of any mapping with some of its keys); the description is cut."""
    out = {field.name: product.get(field.name) for field in FIELDS}
    if out["description"]:
        out["description"] = out["description"][:DESCRIPTION_CHARS]
    if isinstance(out["attributes"], Mapping):
        out["attributes"] = list(out["attributes"].items())
    return out


@dataclass(frozen=True)
class LabelScale:
    """K ordered grades, worst first, with their gains.

    Attributes:
        name: what reports call it.
        grades: the K names, worst to best, as published ("I", "C", "S", "E").
        gains: K gains in [0, 1], rising, 0 and 1 both present: what nDCG uses.
        relevant_from: the first grade that counts as relevant.
        numeric: the grades are numbers, and a fractional one is split between its neighbours.
    """

    name: str
    grades: tuple[str, ...]
    gains: tuple[float, ...]
    relevant_from: str
    numeric: bool = False

    def __post_init__(self) -> None:
        where = f"label scale {self.name!r}"
        if len(self.grades) < 2 or len(set(self.grades)) != len(self.grades):
            raise UserError(f"{where} needs at least two grades, each named once; it has {list(self.grades)}")
        if len(self.gains) != len(self.grades):
            raise UserError(f"{where} has {len(self.grades)} grades but {len(self.gains)} gains; give one gain a grade")
        if list(self.gains) != sorted(self.gains) or self.gains[0] != 0.0 or self.gains[-1] != 1.0:
            raise UserError(f"{where}: gains must rise from 0 to 1, worst grade first; they are {list(self.gains)}")
        if self.relevant_from not in self.grades[1:]:
            raise UserError(f"{where}: relevant_from {self.relevant_from!r} must be one of {list(self.grades[1:])}")
        if self.numeric:
            values = [_as_number(grade) for grade in self.grades]
            if None in values or values != sorted(values):  # type: ignore[type-var]
                raise UserError(
                    f"{where} is numeric, so its grades must be rising numbers; they are {list(self.grades)}"
                )

    @property
    def num_classes(self) -> int:
        return len(self.grades)

    @property
    def relevant_index(self) -> int:
        return self.grades.index(self.relevant_from)

    def hard_distribution(self, grade: str | float) -> np.ndarray:
        """float64 [K]: one-hot, or, for a fractional number, split between its two neighbours (2.33 is .67 of 2 and .33
        of 3). Raises `UserError` for a grade that is not on the scale."""
        out = np.zeros(self.num_classes)
        if self.numeric:
            value = _as_number(grade)
            values = [float(name) for name in self.grades]
            if value is None or not values[0] <= value <= values[-1]:
                raise UserError(f"grade {grade!r} is not between {self.grades[0]} and {self.grades[-1]} ({self.name})")
            upper = next(k for k, v in enumerate(values) if v >= value)
            lower = max(upper - 1, 0)
            share = 1.0 if upper == lower else (value - values[lower]) / (values[upper] - values[lower])
            out[lower] += 1.0 - share
            out[upper] += share
            return out
        if grade not in self.grades:
            raise UserError(f"grade {grade!r} is none of {', '.join(self.grades)} ({self.name})")
        out[self.grades.index(str(grade))] = 1.0
        return out

    def distribution(
        self, grade: str | float, rater_grades: Sequence[float] | None = None, label_smoothing: float = 0.1
    ) -> np.ndarray:
        """The soft distribution, float64 [K]: the raters' votes where several voted, else the grade's mass with
        `label_smoothing` of it leaked to its neighbours (all of it to the only neighbour at an end of the scale)."""
        if rater_grades is not None and len(rater_grades) > 1:
            return np.mean([self.hard_distribution(vote) for vote in rater_grades], axis=0)
        hard = self.hard_distribution(grade)
        out = hard * (1.0 - label_smoothing)
        for k in np.flatnonzero(hard):
            neighbours = [j for j in (k - 1, k + 1) if 0 <= j < self.num_classes]
            out[neighbours] += hard[k] * label_smoothing / len(neighbours)
        return out

    def expected_gain(self, distribution: np.ndarray) -> np.ndarray:
        """Expected gain of class distributions [..., K] -> [...]."""
        return np.asarray(distribution) @ np.asarray(self.gains)

    def gain(self, grade: str | float) -> float:
        """The gain of a published grade, without smoothing: what nDCG uses."""
        return float(self.expected_gain(self.hard_distribution(grade)))

    def class_index(self, grade: str | float) -> int:
        """The class of a published grade: its own, or the nearest for a fractional one (ties go up)."""
        hard = self.hard_distribution(grade)
        return int(self.num_classes - 1 - np.argmax(hard[::-1]))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"grades": list(self.grades), "gains": list(self.gains)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> LabelScale:
        return cls(
            name=value["name"],
            grades=tuple(str(grade) for grade in value["grades"]),
            gains=tuple(float(gain) for gain in value["gains"]),
            relevant_from=str(value["relevant_from"]),
            numeric=bool(value.get("numeric", False)),
        )


def _as_number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


SCALES: dict[str, LabelScale] = {
    scale.name: scale
    for scale in (
        LabelScale("esci", ("I", "C", "S", "E"), (0.0, 0.01, 0.1, 1.0), "E"),
        LabelScale("wands", ("Irrelevant", "Partial", "Exact"), (0.0, 0.5, 1.0), "Exact"),
        LabelScale("homedepot", ("1", "2", "3"), (0.0, 0.5, 1.0), "3", numeric=True),
        LabelScale("chorus", ("0", "1", "2", "3"), (0.0, 1 / 3, 2 / 3, 1.0), "2", numeric=True),
        LabelScale("binary", ("0", "1"), (0.0, 1.0), "1", numeric=True),
    )
}
"""The scales of the public sets. A user's own comes as YAML under `data.scale`."""
