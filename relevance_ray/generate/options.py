"""What a user may say about generation. `num_pairs` is operational: no shard's content depends on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from relevance_ray.options import STRICT, option

Source = Literal["log", "titles", "file"]
SOURCES: tuple[Source, ...] = ("log", "titles", "file")
QUOTAS = {"bm25": 2.0, "bm25_middle": 1.0, "dense": 2.0, "dense_middle": 1.0, "category": 1.0, "random": 1.0}
"""Near, middle and far products of each query: what a teacher's ranking is learned from, not only its top."""


@dataclass(frozen=True)
class GenerateOptions:
    """Queries and candidate products to label."""

    __pydantic_config__ = STRICT

    num_pairs: int = option(
        32_000,
        "(query, product) pairs to generate, met within 1% or refused; raising it later keeps what exists",
        operational=True,
    )
    source: Source | list[Source] = option(
        ["log", "titles"],
        "where queries come from: log (the query log and the judged train queries), titles (cut from product titles), "
        "file (your own pairs); a list mixes them",
    )
    source_weights: dict[str, float] = option(
        {}, "share of each source in a mix, by name (default 1 each); where one runs out the others go on"
    )
    pairs_file: str = option(
        "",
        "for source file: Parquet, CSV or JSON lines with columns query, product_id and, optionally, rank",
        operational=True,
    )
    frequency_power: float = option(
        0.5, "log queries are drawn with weight frequency ** this: 0 draws tail and head alike, 1 as often as typed"
    )
    min_title_words: int = option(2, "fewest words of a query cut from a title")
    max_title_words: int = option(6, "most words of a query cut from a title")
    candidates_per_query: int = option(
        8, "products of each query (a pairs file brings its own, at most so many a group)"
    )
    quotas: dict[str, float] = option(
        QUOTAS,
        "shares of a query's products by origin, scaled to candidates_per_query: bm25 and dense (top ranks), "
        "bm25_middle and dense_middle (from middle_ranks), category (same category, other brand), random",
    )
    middle_ranks: list[int] = option([10, 100], "first and last rank that bm25_middle and dense_middle draw from")
    dense_model: str = option("minilm", "bi-encoder behind dense and dense_middle: a short name, a folder or a hub id")
    dense_max_products: int = option(
        1_000_000, "dense candidates come from a fixed random sample of so many products where the catalog has more"
    )
    groups_per_shard: int = option(64, "queries in a shard, the unit of commit of generation and labeling")
    seed: int = option(0, "another seed draws other queries and other candidates")
    max_batch_tokens: int = option(16_384, "tokens in one batch of the dense model", operational=True)

    def __post_init__(self) -> None:
        if self.num_pairs < 1:
            raise ValueError(f"num_pairs must be at least 1, not {self.num_pairs}")
        if self.candidates_per_query < 2:
            raise ValueError(
                f"candidates_per_query must be at least 2, not {self.candidates_per_query}: margins need two"
            )
        if self.groups_per_shard < 1:
            raise ValueError(f"groups_per_shard must be at least 1, not {self.groups_per_shard}")
        if not 1 <= self.min_title_words <= self.max_title_words:
            raise ValueError(
                f"min_title_words ({self.min_title_words}) must be at least 1 and at most max_title_words "
                f"({self.max_title_words})"
            )
        if self.dense_max_products < 1 or self.max_batch_tokens < 1:
            raise ValueError("dense_max_products and max_batch_tokens must be at least 1")
        if not 0.0 <= self.frequency_power <= 1.0:
            raise ValueError(f"frequency_power must lie between 0 and 1, not {self.frequency_power}")
        if len(self.middle_ranks) != 2 or not 1 <= self.middle_ranks[0] <= self.middle_ranks[1]:
            raise ValueError(f"middle_ranks must be [first, last] with 1 <= first <= last, not {self.middle_ranks}")
        _check_weights("quotas", self.quotas, tuple(QUOTAS))
        _check_weights("source_weights", self.source_weights, SOURCES)
        if not any(self.quotas.values()):
            raise ValueError("quotas are all 0; give at least one origin a share")
        if not self.sources:
            raise ValueError(f"source is an empty list; name at least one of {', '.join(SOURCES)}")
        if len(set(self.sources)) != len(self.sources):
            raise ValueError(f"source names one twice: {list(self.sources)}")
        if any(self.weight(source) == 0 for source in self.sources):
            raise ValueError("source_weights gives a named source the weight 0; leave it out of source instead")
        strangers = [name for name in self.source_weights if name not in self.sources]
        if strangers:
            raise ValueError(f"source_weights names {strangers[0]!r}, which is not in source {list(self.sources)}")
        if ("file" in self.sources) != bool(self.pairs_file):
            raise ValueError("source file and pairs_file go together: set both or neither")

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources as a tuple, however they were given."""
        return (self.source,) if isinstance(self.source, str) else tuple(self.source)

    def weight(self, source: str) -> float:
        return float(self.source_weights.get(source, 1.0))

    @property
    def uses_dense(self) -> bool:
        return any(self.quotas.get(name, 0) > 0 for name in ("dense", "dense_middle"))


def _check_weights(key: str, weights: dict[str, float], names: tuple[str, ...]) -> None:
    for name, weight in weights.items():
        if name not in names:
            raise ValueError(f"{key} names {name!r}, which is none of {', '.join(names)}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{key}: {name} must be a number from 0 up, not {weight}")
