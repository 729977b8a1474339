"""What a user may say about queries that a language model writes."""

from __future__ import annotations

from dataclasses import dataclass

from relevance_ray.engines.options import GeneratorOptions
from relevance_ray.options import option

STYLE_WEIGHTS = {"plain": 3.0, "attribute_dropped": 2.0, "broader": 1.0, "misspelled": 1.0, "use": 2.0}
"""As shoppers search: mostly for the thing itself, with some of its properties or by what it is for."""
STYLES = tuple(STYLE_WEIGHTS)


@dataclass(frozen=True)
class WriterOptions(GeneratorOptions):
    """Queries that a language model writes from a product."""

    styles: dict[str, float] = option(
        STYLE_WEIGHTS,
        "shares of the kinds of query: plain, attribute_dropped (no brand, color or size), broader (the kind of thing), "
        "misspelled, use (what it is for); 0 or absent: none. A product is asked for each once at most",
    )
    min_words: int = option(
        1, "fewest words of a query; three characters count as one where a script has no spaces between words"
    )
    max_words: int = option(10, "most words of a query")
    max_tokens: int = option(
        48, "most tokens that the model may write for a query; an answer that takes all is refused"
    )
    temperature: float = option(0.3, "0: always the likeliest words; more: more varied queries, and more nonsense")
    description_chars: int = option(
        0,
        "characters of a product's description, and as many of its attributes, that the model reads beside title, brand, "
        "color and category; worth its tokens with a large model",
    )
    check_language: bool = option(True, "refuse a query in another script or language than the product's title")
    max_similarity: float = option(
        0.8,
        "refuse a query whose three-letter shingles are so similar (Jaccard) to those of one already taken; 1: only the "
        "same",
    )
    round_trip_depth: int = option(
        50, "keep a query only where BM25 finds the product it was written from among so many; 0: no such check"
    )

    def __post_init__(self) -> None:
        GeneratorOptions.__post_init__(self)
        for name, weight in self.styles.items():
            if name not in STYLES:
                raise ValueError(f"styles names {name!r}, which is none of {', '.join(STYLES)}")
            if not 0 <= weight < float("inf"):
                raise ValueError(f"styles: {name} must be a number from 0 up, not {weight}")
        if not any(self.styles.values()):
            raise ValueError("styles are all 0; give at least one a share")
        if not 1 <= self.min_words <= self.max_words:
            raise ValueError(
                f"min_words ({self.min_words}) must be at least 1 and at most max_words ({self.max_words})"
            )
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens {self.max_tokens} must be at least 1")
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature {self.temperature} must be between 0 and 2")
        if not 0 < self.max_similarity <= 1:
            raise ValueError(f"max_similarity {self.max_similarity} must be more than 0 and at most 1")
        for name in ("description_chars", "round_trip_depth"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative")
