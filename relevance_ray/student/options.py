"""Options of a student, light enough for the configuration to import."""

from __future__ import annotations

from dataclasses import dataclass

from relevance_ray.options import STRICT, option
from relevance_ray.templates import Template


@dataclass(frozen=True)
class EncoderOptions:
    """The encoder that a student is made of, and how it reads."""

    __pydantic_config__ = STRICT
    model: str = option("minilm", "Encoder to start from: a short name, a hub id, or a folder")
    num_layers: int | None = option(None, "Keep only the first layers; unset: all of them")
    max_tokens: int = option(
        96, "Tokens of query and product together, of which the product is cut, never the query; of each in a two-tower"
    )
    fields: list[str] = option(["title", "brand", "color"], "Product fields the model reads, in order")
    dropout: float = option(
        0.0,
        "Dropout while training; the margins of many labels regularise better than noise, and it costs a tenth of the speed",
    )

    def __post_init__(self) -> None:
        if self.num_layers is not None and self.num_layers < 1:
            raise ValueError(f"num_layers {self.num_layers} must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout {self.dropout} must be in [0, 1)")
        self.template()

    def template(self) -> Template:
        return Template(fields=tuple(self.fields), max_tokens=self.max_tokens)
