"""What a user may say about generation. `num_pairs` is operational: no shard's content depends on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from relevance_ray.generate.writer_options import WriterOptions
from relevance_ray.options import STRICT, option

Source = Literal["log", "titles", "llm", "file"]
SOURCES: tuple[Source, ...] = ("log", "titles", "llm", "file")
STOPWORDS = {
    "da": "DANISH",
    "de": "GERMAN",
    "en": "EN",
    "es": "SPANISH",
    "fr": "FRENCH",
    "it": "ITALIAN",
    "nl": "DUTCH",
    "no": "NORWEGIAN",
    "pt": "PORTUGUESE",
    "ru": "RUSSIAN",
    "sv": "SWEDISH",
    "tr": "TURKISH",
}
"""Languages whose words that say nothing can be left out, and what bm25s calls their lists."""
BANDS = ("head", "torso", "tail")
QUOTAS = {"bm25": 2.0, "bm25_middle": 1.0, "dense": 2.0, "dense_middle": 1.0, "category": 1.0, "random": 1.0}
"""Near, middle and far products of each query: what a teacher's ranking is learned from, not only its top."""
ORIGINS = (*QUOTAS, "engine")


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
        "llm (written by a language model from a product), file (your own pairs); a list mixes them",
    )
    source_weights: dict[str, float] = option(
        {}, "share of each source in a mix, by name (default 1 each); where one runs out the others go on"
    )
    pairs_file: str = option(
        "",
        "for source file: Parquet, CSV or JSON lines with columns query, product_id and, optionally, rank",
        operational=True,
    )
    llm: WriterOptions = option(WriterOptions(), "source llm: the model, what it is asked for, and what is refused")
    log_bands: dict[str, float] = option(
        {},
        "shares of the log's queries by band (head, torso, tail: the queries that make up the first, second and last "
        "third of all searches); a band that runs out leaves its share to the others; empty: no bands",
    )
    frequency_power: float = option(
        0.5,
        "log queries are drawn, within their band, with weight frequency ** this: 0 draws rare and frequent ones alike, "
        "1 as often as typed",
    )
    min_title_words: int = option(2, "fewest words of a query cut from a title")
    max_title_words: int = option(6, "most words of a query cut from a title")
    candidates_per_query: int = option(
        8, "products of each query (a pairs file brings its own, at most so many a group)"
    )
    quotas: dict[str, float] = option(
        QUOTAS,
        "shares of a query's products by origin, scaled to candidates_per_query: bm25 and dense (top ranks), "
        "bm25_middle and dense_middle (from middle_ranks), category (same category, other brand), random, engine (the "
        "best of engine_file)",
    )
    engine_file: str = option(
        "",
        "what the shop's own search engine found, the origin `engine` of quotas: Parquet, CSV or JSON lines with columns "
        "query, product_id and, optionally, rank",
        operational=True,
    )
    middle_ranks: list[int] = option([10, 100], "first and last rank that bm25_middle and dense_middle draw from")
    dense_model: str = option("minilm", "bi-encoder behind dense and dense_middle: a short name, a folder or a hub id")
    dense_max_products: int = option(
        1_000_000, "dense candidates come from a fixed random sample of so many products where the catalog has more"
    )
    stopwords: list[str] = option(
        ["en"],
        f"languages whose commonest words BM25 leaves out: {', '.join(STOPWORDS)}; an empty list leaves out none",
    )
    products_per_shard: int = option(
        200_000, "products in a shard of the catalog's index; no candidate depends on it", operational=True
    )
    groups_per_shard: int = option(64, "queries in a shard, the unit of commit of generation and labeling")
    seed: int = option(0, "another seed draws other queries and other candidates")
    max_batch_tokens: int | None = option(
        None, "padded tokens in one batch of the dense model; none: 8192, or 2048 on a CPU", operational=True
    )

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
        for name in ("dense_max_products", "max_batch_tokens", "products_per_shard"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        for language in self.stopwords:
            if language not in STOPWORDS:
                raise ValueError(f"stopwords names {language!r}, which is none of {', '.join(STOPWORDS)}")
        if not 0.0 <= self.frequency_power <= 1.0:
            raise ValueError(f"frequency_power must lie between 0 and 1, not {self.frequency_power}")
        if len(self.middle_ranks) != 2 or not 1 <= self.middle_ranks[0] <= self.middle_ranks[1]:
            raise ValueError(f"middle_ranks must be [first, last] with 1 <= first <= last, not {self.middle_ranks}")
        _check_weights("quotas", self.quotas, ORIGINS)
        _check_weights("log_bands", self.log_bands, BANDS)
        if self.log_bands and not any(self.log_bands.values()):
            raise ValueError("log_bands are all 0; give at least one band a share")
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
        if self.llm != WriterOptions() and not self.uses_llm:
            raise ValueError("llm is only read with source llm; name it in source or remove the section")
        if (self.quotas.get("engine", 0) > 0) != bool(self.engine_file):
            raise ValueError("a quota for engine and engine_file go together: set both or neither")

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources as a tuple, however they were given."""
        return (self.source,) if isinstance(self.source, str) else tuple(self.source)

    def weight(self, source: str) -> float:
        return float(self.source_weights.get(source, 1.0))

    @property
    def files(self) -> dict[str, str]:
        """The files that are read besides the prepared data, by their keys."""
        named = {"pairs_file": self.pairs_file, "engine_file": self.engine_file}
        return {key: path for key, path in named.items() if path}

    @property
    def uses_llm(self) -> bool:
        return "llm" in self.sources

    @property
    def uses_dense(self) -> bool:
        """Whether vectors of the catalog are needed; pairs of a file bring their own products."""
        searched = set(self.sources) != {"file"}
        return searched and any(self.quotas.get(name, 0) > 0 for name in ("dense", "dense_middle"))


def _check_weights(key: str, weights: dict[str, float], names: tuple[str, ...]) -> None:
    for name, weight in weights.items():
        if name not in names:
            raise ValueError(f"{key} names {name!r}, which is none of {', '.join(names)}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{key}: {name} must be a number from 0 up, not {weight}")
