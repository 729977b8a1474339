"""What requests are made of: texts and products, checked strictly, and the sentence that a refusal gives."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Discriminator, Field, FiniteFloat, StringConstraints, Tag

from relevance_ray.engines.base import MAX_TEXT_CHARS

MAX_PRODUCTS = 1000

Text = Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARS)]


class ProductFields(BaseModel):
    """A product by its fields. The model reads those of its template (see `/info`); the others are accepted unread."""

    model_config = ConfigDict(extra="forbid", strict=True)

    product_id: Text | None = Field(None, description="Returned with the result; never read by the model.")
    title: Text | None = None
    brand: Text | None = None
    color: Text | None = None
    category: Text | None = Field(None, description='A path, "A > B > C".')
    description: Text | None = None
    bullets: Text | None = None
    attributes: dict[Text, Text] | None = None
    price: FiniteFloat | None = None
    locale: Text | None = None


def form_of(product: Any) -> str | None:
    """Which of the two forms of a product is meant, by which it is then checked; None for neither."""
    if isinstance(product, str):
        return "text"
    return "fields" if isinstance(product, dict | ProductFields) else None


Product = Annotated[
    Annotated[Text, Tag("text")] | Annotated[ProductFields, Tag("fields")],
    Discriminator(
        form_of, custom_error_type="product", custom_error_message="a product is a text or an object of fields"
    ),
]


def sentence_of(error: RequestValidationError) -> str:
    """What is wrong with a request, in one sentence that repeats nothing of what was sent."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return f"the body is no JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "text", "fields"))
    more = len(error.errors()) - 1
    return (f"{where}: " if where else "") + str(first["msg"]) + (f" (and {more} more)" if more else "")
