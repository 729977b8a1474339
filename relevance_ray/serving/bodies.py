"""What requests are made of: texts and products, checked strictly."""

from __future__ import annotations

from typing import Annotated, Any

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


class ScoreRequest(BaseModel):
    """One query with its products."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [
                {
                    "query": "red running shoes",
                    "products": ["Nike Pegasus running shoe, red", {"title": "Leather wallet", "color": "red"}],
                }
            ]
        },
    )

    query: Text = Field(description="The query as typed. Too long a query is refused, never cut.")
    products: list[Product] = Field(
        min_length=1, max_length=MAX_PRODUCTS, description="Products as text (taken as the title) or as fields."
    )
