"""Slices of the judged pairs."""

import numpy as np
import pyarrow as pa
import pytest
from judged_groups import ESCI, FAST

from relevance_ray.evaluation.compare import compare_predictions, difference
from relevance_ray.evaluation.evaluate import as_results
from relevance_ray.evaluation.judged import JudgedPairs
from relevance_ray.evaluation.measure import Predictions
from relevance_ray.evaluation.report.markdown import render_markdown
from relevance_ray.evaluation.slices import (
    SliceContext,
    find_slices,
    read_slices,
    slice_columns,
    slice_reports,
)


def sliced_pairs():
    """Three queries of three products: two long ones, one in the log."""
    products = [
        {
            "title": "red lamp for the desk",
            "brand": "Acme",
            "category": "Home > Lamps",
            "price": 10.0,
            "description": "a",
        },
        {"title": "blue lamp for the floor", "brand": "acme ", "category": "Home", "price": 20.0, "description": ""},
        {"title": "soft toy for children", "brand": "Echo", "category": "", "price": float("nan"), "description": None},
    ]
    queries = ["red lamp", "lamp for the desk", "toys for a small child"]
    gains = np.tile([1.0, 0.1, 0.0], 3)
    pairs = JudgedPairs(
        offsets=np.array([0, 3, 6, 9]),
        gains=gains,
        classes=np.tile([3, 2, 0], 3),
        relevant=gains == 1.0,
        query_ids=["1", "2", "3"],
        queries=list(np.repeat(queries, 3)),
        product_ids=["a", "b", "c"] * 3,
        products=products * 3,
    )
    log = pa.table({"query": ["Red  Lamp", "hat"], "frequency": [5, 1]})
    return pairs, SliceContext(log, frozenset({"acme"}))


def test_slices_are_cut_by_query_and_by_product():
    slices = find_slices(*sliced_pairs(), FAST.slices)
    found = {(s.dimension, s.name): np.flatnonzero(s.pairs).tolist() for s in slices if s.pairs.any()}
    assert found == {
        ("frequency", "head"): [0, 1, 2],
        ("frequency", "not in the log"): [3, 4, 5, 6, 7, 8],
        ("length", "2 words"): [0, 1, 2],
        ("length", "4 or 5 words"): [3, 4, 5, 6, 7, 8],
        ("language", "en"): list(range(9)),
        ("category", "Home"): [0, 1, 3, 4, 6, 7],
        ("category", "no category"): [2, 5, 8],
        ("brand", "judged in training"): [0, 1, 3, 4, 6, 7],
        ("brand", "new to training"): [2, 5, 8],
        ("price", "up to 10.00"): [0, 3, 6],
        ("price", "10.00 to 20.00"): [1, 4, 7],
        ("price", "no price"): [2, 5, 8],
        ("missing", "no color"): list(range(9)),
        ("missing", "no description"): [1, 2, 4, 5, 7, 8],
    }
    assert [f"{s.dimension}: {s.name}" for s in slices if not s.pairs.any()] == [
        "frequency: torso",
        "frequency: tail",
        "length: 1 word",
        "length: 3 words",
        "length: 6 and more words",
        "brand: no brand",
    ]
    pairs, context = sliced_pairs()
    assert [s.name for s in find_slices(pairs, context, ["missing"]) if s.pairs.any()][:3] == [
        "no color",
        "no category",
        "no description",
    ]


def test_a_slice_is_measured_on_its_pairs_alone_and_the_worst_comes_first(monkeypatch):
    for module in ("slices", "compare"):
        monkeypatch.setattr(f"relevance_ray.evaluation.{module}.MIN_QUERIES", 2)
    pairs, context = sliced_pairs()
    wrong_on_long = np.array([3.0, 2.0, 1.0] + [1.0, 2.0, 3.0] * 2)
    predictions = {"student": Predictions(wrong_on_long), "teacher": Predictions(pairs.gains)}
    slices = find_slices(pairs, context, ["length", "brand", "language"])
    reports = slice_reports(pairs, predictions, slices, ESCI, FAST)
    assert [(r["slice"], r["num_queries"], r["num_pairs"]) for r in reports if r["num_pairs"]] == [
        ("4 or 5 words", 2, 6),
        ("judged in training", 3, 6),
        ("2 words", 1, 3),
        ("new to training", 0, 3),
        ("en", 3, 9),
    ]
    worst, brand, few, none, whole = (report for report in reports if report["num_pairs"])
    assert worst["models"]["student"]["metrics"]["pairwise_accuracy"]["value"] == 0.0
    assert brand["models"]["student"]["metrics"]["pairwise_accuracy"]["value"] == pytest.approx(1 / 3)
    assert difference(worst, "pairwise_accuracy", "student", "teacher")["difference"] == -1.0
    assert all("models" not in part for part in (few, none, whole))
    split = compare_predictions(pairs, predictions, ESCI, FAST) | {"slices": reports}
    markdown = render_markdown(as_results({"test": split}, ESCI, FAST), title="t", about={})
    assert "| length: 4 or 5 words | 2 | 6 | 0.000 [0.000, 0.000] |" in markdown
    assert "Of too few queries to measure: length: 2 words (1); brand: new to training (0)." in markdown
    assert "All pairs fall into one slice: language: en." in markdown
    assert (
        "Slices without a pair: length: 1 word; length: 3 words; length: 6 and more words; brand: no brand." in markdown
    )


def test_slices_are_read_back_from_their_columns():
    pairs, context = sliced_pairs()
    slices = [each for each in find_slices(pairs, context, FAST.slices) if each.pairs.any()]
    table = pa.table({"product_id": pairs.product_ids, **slice_columns(slices, pairs.num_pairs)})
    back = read_slices(table)
    assert {(s.dimension, s.name): s.pairs.tolist() for s in back} == {
        (s.dimension, s.name): s.pairs.tolist() for s in slices
    }
    kept = read_slices(table.take([0, 5]))
    assert {(s.dimension, s.name): s.pairs.tolist() for s in kept}["brand", "new to training"] == [False, True]
