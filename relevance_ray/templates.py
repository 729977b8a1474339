"""How a product becomes text, and a pair a prompt.

Every model folder carries its own template, so the text that a model saw in training is the text it sees when it
serves. The trade-off: fields are joined as plain values ("title | brand | color"), not as "brand: X", because each
label costs two tokens a product and a cross-encoder learns the positions anyway; only free attributes keep their names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

TEXT_FIELDS = ("title", "brand", "color", "category", "description", "bullets")
FIELD_NAMES = (*TEXT_FIELDS, "attributes", "price")
_SEPARATOR = " | "
_INSIDE_TITLE = ("brand", "color")


@dataclass(frozen=True)
class Template:
    """Which product fields a model reads, in which order, and how many tokens of them.

    Attributes:
        fields: names out of `FIELD_NAMES`, in the order of the text; truncation eats from the end.
        max_tokens: the whole input, query, product and special tokens together; the product is cut, never the query.
        prompt: for causal language models, a text with `{query}` before `{product}`; None for encoders, which read
            query and product as a text pair.
        description_chars: a longer description is cut before it is tokenised.

    Raises:
        ValueError: an unknown or doubled field, too few tokens, or a prompt without its two places.
    """

    fields: tuple[str, ...] = ("title", "brand", "color")
    max_tokens: int = 128
    prompt: str | None = None
    description_chars: int = 300

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", tuple(self.fields))
        unknown = [name for name in self.fields if name not in FIELD_NAMES]
        if unknown or not self.fields or len(set(self.fields)) != len(self.fields):
            raise ValueError(f"fields {list(self.fields)} must be some of {', '.join(FIELD_NAMES)}, each once")
        if self.max_tokens < 8:
            raise ValueError(f"max_tokens {self.max_tokens} leaves no room for a query and a product; give at least 8")
        if self.description_chars < 1:
            raise ValueError(f"description_chars {self.description_chars} must be at least 1")
        if self.prompt is not None:
            places = [self.prompt.count("{query}"), self.prompt.count("{product}")]
            if places != [1, 1] or self.prompt.index("{query}") > self.prompt.index("{product}"):
                raise ValueError("a prompt needs {query} once and, after it, {product} once")

    def render_product(self, product: Mapping[str, Any]) -> str:
        """The text of a product: its present fields joined by " | ".

        A brand or color whose words already stand in the title is not said twice. Attributes (a mapping or a list of
        pairs) become "name: value; name: value" in their own order.
        """
        title = _squeeze(product.get("title")).casefold()
        parts = []
        for name in self.fields:
            value = product.get(name)
            if name == "attributes":
                text = "; ".join(f"{_squeeze(key)}: {_squeeze(item)}" for key, item in attribute_pairs(value) if item)
            elif name == "price":
                text = "" if value is None or math.isnan(value) else f"{value:.2f}"
            elif name == "description":
                text = _squeeze(value)[: self.description_chars].rstrip()
            else:
                text = _squeeze(value)
            said = name in _INSIDE_TITLE and "title" in self.fields and f" {text.casefold()} " in f" {title} "
            if text and not said:
                parts.append(text)
        return _SEPARATOR.join(parts)

    def render(self, query: str, product: Mapping[str, Any]) -> str:
        """The whole prompt of a pair, untruncated; for a text pair, query and product on a line each."""
        text = self.render_product(product)
        if self.prompt is None:
            return f"{query}\n{text}"
        before, rest = self.prompt.split("{query}")
        between, after = rest.split("{product}")
        return f"{before}{query}{between}{text}{after}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"fields": list(self.fields)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Template:
        return cls(**{**value, "fields": tuple(value["fields"])})


def attribute_pairs(attributes: Any) -> Iterable[tuple[str, str]]:
    """Attributes as pairs, whether they came as a mapping, as Arrow's list of pairs, or not at all."""
    if attributes is None:
        return ()
    return attributes.items() if isinstance(attributes, Mapping) else attributes


def _squeeze(text: str | None) -> str:
    return " ".join(text.split()) if text else ""
