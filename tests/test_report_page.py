"""The report as a page: whole, safe, self-contained, and readable on a phone."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from browser import CHROMIUM, needs_browser

from relevance_ray.evaluation.curves import MAX_POINTS, curves
from relevance_ray.evaluation.evaluate import as_results, report_split
from relevance_ray.evaluation.examples import won_and_lost
from relevance_ray.evaluation.judged import JudgedPairs
from relevance_ray.evaluation.measure import Predictions
from relevance_ray.evaluation.options import EvaluateOptions
from relevance_ray.evaluation.report.page import render_html
from relevance_ray.evaluation.scaling import scaling_report
from relevance_ray.evaluation.slices import SliceContext, find_slices
from relevance_ray.metrics import group_offsets
from relevance_ray.schema import SCALES

ESCI, FAST = SCALES["esci"], EvaluateOptions(num_resamples=50, num_permutations=2000)
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
OPTIONS += ["--disable-component-update", "--disable-sync"]
OTHERS = ("teacher", "bm25")
SNIPPET = "<script>alert('shoes')</script>"


def judged(num_queries: int = 40) -> JudgedPairs:
    rng = np.random.default_rng(0)
    offsets = group_offsets(rng.integers(3, 12, num_queries))
    classes = rng.integers(0, 4, offsets[-1])
    queries = [f"query number {q} {SNIPPET if q == 0 else ''}" for q in range(num_queries)]
    return JudgedPairs(
        offsets=offsets,
        gains=np.asarray(ESCI.gains)[classes],
        classes=classes,
        relevant=classes >= ESCI.relevant_index,
        query_ids=list(map(str, range(num_queries))),
        queries=list(np.repeat(queries, np.diff(offsets))),
        product_ids=[f"p{i}" for i in range(offsets[-1])],
        products=[
            {"title": f"A product with a rather long title, number {i}", "brand": "Acme"} for i in range(offsets[-1])
        ],
    )


def predictions_of(pairs: JudgedPairs) -> dict[str, Predictions]:
    rng = np.random.default_rng(1)
    found = {}
    for name, noise in (("student", 1.0), ("teacher", 5.0), ("human_only", 3.0), ("bm25", 2.5)):
        logits = pairs.classes + noise * rng.normal(size=pairs.num_pairs)
        found[name] = Predictions(logits, pairs.classes, 1 / (1 + np.exp(1.5 - logits)))
    return found | {"random": Predictions(np.zeros(pairs.num_pairs))}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    pairs = judged()
    predictions = predictions_of(pairs)
    context = SliceContext(pa.table({"query": ["query number 1"], "frequency": [3]}), frozenset())
    slices = find_slices(pairs, context, FAST.slices)
    split = report_split(pairs, predictions, slices, ESCI, FAST, "student", OTHERS)
    values = {size: np.linspace(0.4, 0.8 + level, 40) for level, size in enumerate((100, 200, 400))}
    scaling = scaling_report({size: values[size][None] / 3 for size in values}, {"teacher": np.full(40, 0.5)})
    diversity = {"groups": 50, "pairs": 400, "lines": ["warning: queries are longer than the log's"]}
    return {
        **as_results({"test": split}, ESCI, FAST, "student", OTHERS),
        "scaling": scaling,
        "diversity": diversity,
        "settings": {"student.kind": "two_tower"},
    }


@pytest.fixture(scope="module")
def page(results: dict[str, Any]) -> str:
    return render_html(results, title="A market", about={"teacher": "noise"}, pictures={"Lengths": b"a picture"})


def test_the_page_holds_all_it_shows_and_runs_nothing(page: str) -> None:
    assert not re.search(r"<(script|link|iframe)\b", page)
    loaded = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    assert all(reference.startswith(("#", "data:")) for reference in loaded), (
        loaded
    )  # its own drawings, and their parts
    assert page.count("<svg") == 4


def test_the_page_shows_what_a_report_is_for(page: str, results: dict[str, Any]) -> None:
    for other in OTHERS:
        called = "the teacher" if other == "teacher" else other
        assert f"The student passes {called} on test nDCG" in page
        assert f"<th>minus {other}</th>" in page
        assert f"won and lost against {other}" in page
    value = results["splits"]["test"]["models"]["teacher"]["metrics"]["ndcg"]["value"]
    assert f"<td>{value:.3f}<br>" in page
    for part in (
        "What was run",
        "<dt>student.kind</dt><dd>two_tower</dd>",
        "calibration error by query",
        "All metrics",
        "Kendall&#39;s tau",
        "Slices, the worst",
        "Won:",
        "How many pairs it takes",
        "400 pairs",
        "queries are longer",
        "How to read this",
    ):
        assert part in page
    assert SNIPPET not in page


def test_queries_won_and_lost_are_the_largest_differences(results: dict[str, Any]) -> None:
    found, against_bm25 = results["splits"]["test"]["examples"]
    assert against_bm25["other"] == "bm25"
    assert found["num_won"] + found["num_lost"] + found["num_equal"] == 40
    differences = [row["ndcg"]["student"] - row["ndcg"]["teacher"] for row in found["won"] + found["lost"][::-1]]
    assert differences == sorted(differences, reverse=True)
    assert differences[4] > 0 > differences[5]
    assert all(len(products) == 3 for products in found["won"][0]["first"].values())
    pairs = judged()
    assert won_and_lost(pairs, {"student": Predictions(pairs.gains)}, ESCI, "student", "teacher") is None


def test_curves_end_where_all_is_accepted() -> None:
    pairs = judged(400)
    found = curves(pairs, predictions_of(pairs)["student"])
    curve, bins = found["pr_curve"], found["reliability"]
    assert len(curve["recall"]) == MAX_POINTS
    assert curve["recall"][-1] == 1.0
    assert curve["precision"][-1] == pytest.approx(pairs.relevant.mean(), abs=1e-4)
    assert sum(bins["pairs"]) == pairs.num_pairs
    assert np.dot(bins["pairs"], bins["relevant"]) == pytest.approx(pairs.relevant.sum(), rel=1e-3)
    uncalibrated = curves(pairs, Predictions(pairs.gains))
    assert uncalibrated["reliability"] is None


@needs_browser
@pytest.mark.parametrize("width", [390, 1000])
def test_no_line_runs_out_of_a_phone_or_a_screen(page: str, tmp_path: Path, width: int) -> None:
    """Drawn by a browser: tables scroll by themselves, the page does not; and something was drawn."""
    probe = "<script>document.body.dataset.overflow = document.documentElement.scrollWidth - window.innerWidth</script>"
    file = tmp_path / "report.html"
    file.write_text(page.replace("</body>", f"{probe}</body>"), encoding="utf-8")
    command = [str(CHROMIUM), *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000"]
    done = subprocess.run([*command, "--dump-dom", str(file)], capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'data-overflow="(-?\d+)"', done.stdout)
    assert found is not None
    assert int(found[1]) <= 0
    picture = tmp_path / "page.png"
    subprocess.run([*command, f"--screenshot={picture}", str(file)], capture_output=True, timeout=120, check=True)
    import matplotlib.image

    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[1] == width
    assert 0.01 < (pixels[..., :3].min(axis=-1) < 0.5).mean() < 0.5  # ink


@needs_browser
def test_print_unfolds_what_the_screen_folds(page: str, tmp_path: Path) -> None:
    """As many pages as when all is unfolded by hand, and more than when none is."""

    def pages(name: str, text: str) -> int:
        source, target = tmp_path / f"{name}.html", tmp_path / f"{name}.pdf"
        source.write_text(text, encoding="utf-8")
        options = [*OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={target}"]
        subprocess.run([str(CHROMIUM), *options, str(source)], capture_output=True, timeout=120, check=True)
        return len(re.findall(rb"/Type\s*/Page\b", target.read_bytes()))

    folded = re.sub(r"(?s)(<details[^>]*><summary>.*?</summary>).*?</details>", r"\1</details>", page)
    assert pages("folded", folded) < pages("printed", page) == pages("open", page.replace("<details", "<details open"))
