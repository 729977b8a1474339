"""The page at /, as a person uses it: by keyboard, on a phone, with a token, with mistakes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
from browser import CHROMIUM, needs_browser
from judged_groups import judged_table
from on_a_socket import on_a_socket
from playwright.sync_api import Browser, Page, expect, sync_playwright
from tiny_student import build_tiny_student

from relevance_ray.errors import UserError
from relevance_ray.schema import JUDGED_GROUP
from relevance_ray.serving.examples import judged_examples, read_examples, write_examples
from relevance_ray.serving.http import create_app
from relevance_ray.serving.options import ServeOptions
from relevance_ray.serving.scorer import Scorer

EXAMPLES = [
    {
        "query": "red shoes",
        "products": ["red running shoes", {"title": "leather wallet", "brand": "acme", "price": 9.5}],
    },
    {"query": "cotton shirt", "products": ["blue cotton shirt", "phone case", "green wallet"]},
]
HOSTILE = "<img src=x onerror=document.title='taken'> red shoes"


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return Scorer(build_tiny_student(tmp_path_factory.mktemp("models") / "student"))


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("examples") / "examples.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in EXAMPLES), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def url(scorer: Scorer, examples: str) -> Iterator[str]:
    with on_a_socket(create_app(scorer, ServeOptions(examples=examples))) as (host, port):
        yield f"http://{host}:{port}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """A page of its own, that must neither complain nor ask anybody else."""
    page = browser.new_page(viewport={"width": 1000, "height": 900})
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(url) else complaints.append(request.url))
    page.goto(url)
    yield page
    assert complaints == []
    page.close()


@needs_browser
def test_a_query_is_ranked_by_keyboard_alone(page: Page, url: str) -> None:
    products = ["leather wallet", "red running shoes", {"title": "phone case", "color": "red"}]
    expect(page.locator("#query")).to_be_focused()
    page.keyboard.type("red shoes")
    page.keyboard.press("Tab")
    expect(page.locator("#products")).to_be_focused()
    page.keyboard.insert_text("\n".join(p if isinstance(p, str) else json.dumps(p) for p in products))
    page.keyboard.press("Control+Enter")
    expect(page.locator("#results li")).to_have_count(3)
    rows = requests.post(f"{url}/score", json={"query": "red shoes", "products": products}, timeout=30).json()[
        "results"
    ]
    order = sorted(range(3), key=lambda place: -rows[place]["logit"])
    titles = [p if isinstance(p, str) else p["title"] for p in products]
    assert page.locator("#results .title").all_inner_texts() == [titles[place] for place in order]
    widths = [
        float(w.removesuffix("%")) for w in page.locator(".bar i").evaluate_all("all => all.map(i => i.style.width)")
    ]
    assert widths == pytest.approx([100 * rows[place]["probability"] for place in order], abs=0.06)
    assert page.locator("#results .grade").all_inner_texts() == [rows[place]["grade"] for place in order]
    assert "red" in page.locator("#results mark").all_inner_texts()
    expect(page.locator("#said")).to_contain_text("3 products in")


@needs_browser
def test_an_example_is_picked_and_says_why(page: Page) -> None:
    page.locator("#examples").focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator("#results li")).to_have_count(2)
    expect(page.locator("#query")).to_have_value("red shoes")
    page.locator("#results summary").first.press("Enter")
    why = page.locator("#results details[open] dl")
    expect(why).to_contain_text("expected gain")
    page.get_by_text("why").nth(1).click()
    expect(page.locator("dl", has_text="price (not read)")).to_contain_text("9.5")


@needs_browser
def test_mistakes_are_told_and_what_is_pasted_stays_text(page: Page) -> None:
    page.fill("#query", "red")
    page.fill("#products", "{not JSON")
    page.press("#query", "Enter")
    expect(page.locator("#said.wrong")).to_contain_text("The products are no JSON")
    page.fill("#products", '{"titel": "a"}')
    page.press("#query", "Enter")
    expect(page.locator("#said.wrong")).to_have_text("products.0.titel: there is no such key")
    page.fill("#query", HOSTILE)
    page.fill("#products", HOSTILE)
    page.press("#query", "Enter")
    expect(page.locator("#results .title")).to_have_text(HOSTILE)
    assert page.title() == "relevance_ray"
    assert page.locator("#results img").count() == 0


@needs_browser
def test_a_token_is_asked_for_where_one_is_needed(browser: Browser, scorer: Scorer, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("right\n", encoding="utf-8")
    with on_a_socket(create_app(scorer, ServeOptions(tokens_file=str(tmp_path / "tokens")))) as (host, port):
        page = browser.new_page()
        page.goto(f"http://{host}:{port}")
        expect(page.locator("#said.wrong")).to_contain_text("give a valid token")
        page.fill("#token", "right")
        page.fill("#query", "red")
        page.fill("#products", "red shoes")
        page.press("#query", "Enter")
        expect(page.locator("#results li")).to_have_count(1)
        expect(page.locator("#model")).to_contain_text(scorer.model_id)
        page.close()


@needs_browser
@pytest.mark.parametrize("width", [390, 1000])
def test_it_fits_a_phone_and_a_screen(browser: Browser, url: str, tmp_path: Path, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(url)
    page.select_option("#examples", "1")
    expect(page.locator("#results li")).to_have_count(3)
    assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
    picture = tmp_path / "page.png"
    page.screenshot(path=picture, full_page=True)
    page.close()
    import matplotlib.image

    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[1] == width
    assert 0.005 < (pixels[..., :3].min(axis=-1) < 0.5).mean() < 0.5  # ink


def test_the_page_may_load_nothing_from_elsewhere(url: str) -> None:
    answer = requests.get(url, timeout=30)
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "connect-src 'self'" in answer.headers["content-security-policy"]
    assert "http" not in answer.text.replace("http-equiv", "")


def test_examples_are_given_and_bad_ones_are_named(url: str, examples: str, tmp_path: Path) -> None:
    found = requests.get(f"{url}/examples", timeout=30).json()
    assert [each["query"] for each in found] == ["red shoes", "cotton shirt"]
    assert found == read_examples(examples)
    assert read_examples("") == []
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(EXAMPLES[0]) + '\n{"query": "red"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: products: Field required; write a body of POST /score"):
        read_examples(str(bad))
    with pytest.raises(UserError, match=r"which serve\.examples names, cannot be read"):
        read_examples(str(tmp_path / "absent"))


def test_judged_queries_become_examples_that_can_be_asked(tmp_path: Path) -> None:
    rows = judged_table(4).to_pylist()
    rows[1]["products"][0]["fields"]["price"] = float("nan")
    rows[2]["split"] = "train"
    pq.write_table(pa.Table.from_pylist(rows, schema=JUDGED_GROUP), tmp_path / "judged_groups.parquet")
    found = judged_examples(tmp_path)
    assert [each["query"] for each in found] == ["query 0", "query 3"]
    assert found[0]["products"][0]["title"].startswith("product 0 of grade")
    write_examples(str(tmp_path / "examples.jsonl"), found)
    assert read_examples(str(tmp_path / "examples.jsonl")) == found
