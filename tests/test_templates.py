"""The text of a product and of a prompt, written out."""

from __future__ import annotations

import pytest

from relevance_ray.templates import FIELD_NAMES, Template

TENT = {
    "title": "Trail  Tent 2",
    "brand": "Norrvik",
    "color": "moss green",
    "category": "Outdoor > Tents",
    "description": "A light tent\nfor two.",
    "attributes": [("season", "3"), ("pole material", "aluminium")],
    "price": 129.0,
}


def test_fields_come_in_the_order_of_the_template() -> None:
    template = Template(fields=("title", "description", "attributes", "price", "color"))
    assert template.render_product(TENT) == (
        "Trail Tent 2 | A light tent for two. | season: 3; pole material: aluminium | 129.00 | moss green"
    )


def test_a_brand_that_stands_in_the_title_is_not_said_twice() -> None:
    product = {"title": "Norrvik Trail Tent", "brand": "NORRVIK", "color": "red"}
    assert Template().render_product(product) == "Norrvik Trail Tent | red"
    # "red" inside "layered" is no word of the title.
    assert Template().render_product({"title": "layered tent", "color": "red"}) == "layered tent | red"


def test_missing_fields_leave_nothing_behind() -> None:
    product = {"title": "Tent", "brand": None, "color": "", "price": float("nan"), "attributes": None}
    assert Template(fields=FIELD_NAMES).render_product(product) == "Tent"
    assert Template().render_product({}) == ""


def test_attributes_read_the_same_as_mapping_and_as_pairs() -> None:
    template = Template(fields=("attributes",))
    assert template.render_product({"attributes": dict(TENT["attributes"])}) == template.render_product(TENT)  # type: ignore[call-overload]


def test_description_is_cut() -> None:
    assert Template(fields=("description",), description_chars=7).render_product(TENT) == "A light"


def test_prompt_takes_query_and_product_literally() -> None:
    template = Template(fields=("title",), prompt="Query: {query}\nProduct: {product}\nRelevant?")
    assert (
        template.render("{product} tent", {"title": "{query}"}) == "Query: {product} tent\nProduct: {query}\nRelevant?"
    )


def test_template_survives_its_dict() -> None:
    template = Template(fields=("title", "price"), max_tokens=64, prompt="{query} {product}")
    assert Template.from_dict(template.to_dict()) == template


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"fields": ("title", "colour")}, "colour"),
        ({"fields": ()}, "must be some of"),
        ({"max_tokens": 4}, "max_tokens 4"),
        ({"prompt": "only {product}"}, "{query} once"),
        ({"prompt": "{product} before {query}"}, "after it"),
    ],
)
def test_wrong_templates_are_refused(wrong: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Template(**wrong)
