"""Options of a teacher's parts, light enough for the configuration to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from relevance_ray.options import STRICT, option
from relevance_ray.teacher.prompts import DEFAULT_PROMPT
from relevance_ray.templates import Template


@dataclass(frozen=True)
class ClassifierOptions:
    """A language model (or encoder) with a classification head."""

    __pydantic_config__ = STRICT
    model: str = option(
        "minilm", "Model to start from: a short name (minilm, smollm2-135m, mpnet), a hub id, or a folder"
    )
    num_layers: int | None = option(None, "Keep only the first layers; unset: all of them")
    num_classes: Literal["scale", "single"] = option(
        "scale",
        "`scale`: a logit for each grade, cross-entropy; `single`: one logit, binary cross-entropy on the soft target",
    )
    lora: int = option(0, "Rank of the LoRA adapters on every linear layer; 0 trains all weights")
    max_tokens: int = option(160, "Tokens of the whole prompt; the product is cut, never the query")
    fields: list[str] = option(["title", "brand", "color", "category"], "Product fields the model reads, in order")
    prompt: str = option(
        DEFAULT_PROMPT, "Prompt of a causal model, with {query} before {product}; encoders read a text pair"
    )
    dropout: float = option(0.1, "Dropout while training")

    def __post_init__(self) -> None:
        if self.num_layers is not None and self.num_layers < 1:
            raise ValueError(f"num_layers {self.num_layers} must be at least 1")
        if self.lora < 0:
            raise ValueError(f"lora {self.lora} is a rank: 0 for none, or 8, 16, ...")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout {self.dropout} must be in [0, 1)")
        self.template(causal=True)

    def template(self, *, causal: bool) -> Template:
        """How this model reads a pair: by the prompt where it is a causal one, else as a text pair."""
        return Template(tuple(self.fields), self.max_tokens, prompt=self.prompt if causal else None)
