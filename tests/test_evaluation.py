"""Comparison of models on judged groups: intervals, failures, the report."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import norm
from sklearn.metrics import ndcg_score, roc_auc_score

from relevance_ray.data.prepare import iter_products, prepare, read_judged, read_scale
from relevance_ray.data.source import DataOptions
from relevance_ray.engines.base import SINGLE_LOGIT_GAINS, FolderModel
from relevance_ray.engines.registry import load_pair_model
from relevance_ray.errors import UserError
from relevance_ray.evaluation.ask import predict
from relevance_ray.evaluation.baselines import build_baselines
from relevance_ray.evaluation.compare import compare_predictions, difference, is_sure
from relevance_ray.evaluation.evaluate import as_results, evaluate_models
from relevance_ray.evaluation.judged import JudgedPairs, Judgments, flatten, of_split
from relevance_ray.evaluation.measure import Predictions, measure
from relevance_ray.evaluation.options import EvaluateOptions
from relevance_ray.evaluation.report.markdown import render_markdown
from relevance_ray.evaluation.report.words import p_text, verdict, verdicts
from relevance_ray.evaluation.report.write import write_report
from relevance_ray.evaluation.significance import (
    holm,
    means_over_queries,
    percentile_interval,
    permutations_drawn,
    randomization_test,
    resample_counts,
)
from relevance_ray.evaluation.slices import (
    SLICE_METRIC,
    Slice,
    SliceContext,
    find_slices,
    read_slices,
    slice_columns,
    slice_reports,
)
from relevance_ray.metrics import group_offsets
from relevance_ray.model_folder import ModelInfo
from relevance_ray.schema import JUDGED_GROUP, PRODUCT, SCALES, pair_id, product_fields
from relevance_ray.templates import Template

ESCI = SCALES["esci"]
FAST = EvaluateOptions(num_resamples=200)


def judged_table(num_queries: int = 12, *, seed: int = 0, grades: str = "ICSE", split: str = "test") -> pa.Table:
    """Queries with 4 to 9 products each, graded at random; a title tells its grade."""
    rng = np.random.default_rng(seed)
    rows = []
    for q in range(num_queries):
        products = []
        for i in range(int(rng.integers(4, 10))):
            grade = str(rng.choice(list(grades)))
            products.append(
                {
                    "pair_id": pair_id(f"query {q}", str(i)),
                    "product_id": str(i),
                    "fields": product_fields({"title": f"product {i} of grade {grade}"}),
                    "origins": [{"name": "human", "rank": 0}],
                    "grade": grade,
                    "soft_target": 0.5,
                    "rater_grades": None,
                }
            )
        rows.append(
            {"query_id": str(q), "query": f"query {q}", "query_source": "human", "split": split, "products": products}
        )
    return pa.Table.from_pylist(rows, schema=JUDGED_GROUP)


class TitleReader(FolderModel):
    """A model that reads the grade off the title, right up to noise, and refuses some titles."""

    def __init__(self, *, noise: float = 0.0, refuses: str = "nothing"):
        self.info = ModelInfo("cross_encoder", ESCI, Template())
        self.gains = SINGLE_LOGIT_GAINS
        self.noise, self.refuses, self.calls = noise, refuses, []

    def _forward(self, queries, products):
        self.calls.append(len(queries))
        logits = np.array([float("ICSE".index(product["title"][-1])) for product in products])
        logits += self.noise * np.random.default_rng(len(queries)).normal(size=len(logits))
        errors = ["too good to be true" if p["title"].endswith(self.refuses) else None for p in products]
        return np.stack([np.zeros(len(logits)), logits], axis=1).astype(np.float32), errors


def test_judged_groups_flatten_with_gains_classes_and_relevance():
    pairs = flatten(judged_table(), ESCI)
    letters = [product["title"][-1] for product in pairs.products]
    assert pairs.gains.tolist() == [{"I": 0.0, "C": 0.01, "S": 0.1, "E": 1.0}[letter] for letter in letters]
    assert pairs.classes.tolist() == ["ICSE".index(letter) for letter in letters]
    assert pairs.relevant.tolist() == [letter == "E" for letter in letters]
    assert pairs.num_queries == 12
    assert all(len(set(pairs.queries[a:b])) == 1 for a, b in itertools.pairwise(pairs.offsets))


def test_an_unknown_grade_names_query_and_product():
    with pytest.raises(UserError, match=r"query 'query 0' and product '0'.*grade"):
        flatten(judged_table(grades="X"), ESCI)


def test_bootstrap_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(0).normal(size=400)
    samples = means_over_queries(values[:, None])(resample_counts(400, 4000, seed=1))[:, 0]
    low, high = percentile_interval(samples)
    half = norm.ppf(0.975) * values.std() / np.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.006)


def test_resamples_draw_whole_queries_and_depend_on_no_block(monkeypatch):
    whole = resample_counts(7, 50, seed=3)
    assert (whole.sum(axis=1) == 7).all()
    assert whole.min() == 0
    assert whole.max() > 1
    monkeypatch.setattr("relevance_ray.evaluation.significance.MAX_BLOCK_VALUES", 20)
    np.testing.assert_array_equal(resample_counts(7, 50, seed=3), whole)


@pytest.mark.parametrize("max_bins", [8192, 12])
def test_a_resample_of_a_metric_is_the_metric_of_the_drawn_queries(monkeypatch, max_bins):
    monkeypatch.setattr("relevance_ray.evaluation.measure.MAX_BINS", max_bins)
    rng = np.random.default_rng(2)
    lengths = rng.integers(1, 9, 40)

    def judgments(queries):
        taken = np.concatenate([np.arange(a, b) for a, b in zip(offsets[queries], offsets[queries + 1], strict=True)])
        parts = (gains[taken], classes[taken], gains[taken] == 1.0)
        found = Predictions(logits[taken], predicted[taken], probabilities[taken])
        return Judgments(group_offsets(lengths[queries]), *parts), found

    offsets = group_offsets(lengths)
    classes = rng.integers(0, 4, offsets[-1])
    gains, logits = np.array([0.0, 0.01, 0.1, 1.0])[classes], np.round(rng.normal(size=offsets[-1]), 1)
    predicted, probabilities = rng.integers(0, 4, offsets[-1]), rng.random(offsets[-1])
    counts = resample_counts(40, 3, seed=0)
    drawn = [part.draw(counts) for part in measure(*judgments(np.arange(40)), 4, [3], [0.5])]
    for row, times in enumerate(counts.astype(int)):
        again = measure(*judgments(np.repeat(np.arange(40), times)), 4, [3], [0.5])
        for found, part in zip(drawn, again, strict=True):
            pooled = "roc_auc" in part.names and max_bins == 12  # fewer bins than scores
            assert found[row] == pytest.approx(part.values, abs=0.1 if pooled else 1e-12)


def test_queries_without_a_value_leave_every_mean_they_are_drawn_into():
    values = np.array([[0.2], [np.nan], [0.6]])
    counts = np.array([[3.0, 0, 0], [0, 3, 0], [1, 1, 1]])
    assert means_over_queries(values)(counts)[:, 0] == pytest.approx([0.2, np.nan, 0.4], nan_ok=True)


def test_a_randomization_test_counts_the_assignments_that_are_as_far_from_none():
    differences = np.array([0.3, 0.1, 0.2, -0.05, 0.15, 0.1, 0.02, 0.3])
    signs = np.array(list(itertools.product((-1, 1), repeat=8)))
    exact = (np.abs(signs @ differences) >= differences.sum() - 1e-12).mean()
    columns = np.stack([differences, -differences, np.zeros(8), np.full(8, np.nan)], axis=1)
    found = randomization_test(columns, 20_000, seed=0)
    assert found[:2] == pytest.approx([exact, exact], abs=0.004)
    assert found[2] == 1.0
    assert np.isnan(found[3])
    rounding = np.concatenate([np.full(3, 1e-11), np.zeros(97)])
    assert randomization_test(rounding[:, None], 100, seed=0)[0] == 1.0


def test_holm_raises_p_values_by_how_many_comparisons_there_are():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    found = holm({"a": 0.6, "b": float("nan"), "c": 0.9})
    assert (found["a"], found["c"]) == (1.0, 1.0)
    assert np.isnan(found["b"])


def test_figures_equal_scikit_learn_on_the_same_judgments():
    judged, model = judged_table(), TitleReader(noise=1.0)
    results = evaluate_models(judged, {"student": model}, ESCI, FAST)
    pairs = flatten(judged, ESCI)
    scores = predict(TitleReader(noise=1.0), pairs).logits
    metrics = results["splits"]["test"]["models"]["student"]["metrics"]
    spans = [slice(a, b) for a, b in itertools.pairwise(pairs.offsets)]
    per_query = [ndcg_score([pairs.gains[s]], [scores[s]], k=10) for s in spans if pairs.gains[s].any()]
    assert metrics["ndcg@10"]["value"] == pytest.approx(np.mean(per_query))
    assert metrics["roc_auc"]["value"] == pytest.approx(roc_auc_score(pairs.relevant, scores))
    assert metrics["ndcg@10"]["low"] < metrics["ndcg@10"]["value"] < metrics["ndcg@10"]["high"]
    assert "macro_f1" not in metrics  # no calibration, no grades
    assert "brier" not in metrics


def test_a_paired_difference_is_surer_than_its_two_figures():
    judged = judged_table(60)
    pairs = flatten(judged, ESCI)
    base = predict(TitleReader(noise=3.0), pairs).logits
    nudged = base + 0.3 * pairs.classes
    split = compare_predictions(pairs, {"better": Predictions(nudged), "base": Predictions(base)}, ESCI, FAST)
    found = difference(split, "ndcg", "better", "base")
    single = split["models"]["base"]["metrics"]["ndcg"]
    assert found["low"] > 0
    assert found["high"] - found["low"] < 0.5 * (single["high"] - single["low"])
    [stored] = [row for row in split["differences"] if row["metric"] == "ndcg"]
    assert stored["p"] == stored["p_holm"] < 0.01
    assert next(row for row in split["differences"] if row["metric"] == "roc_auc")["p"] < 0.01
    turned = difference(split, "ndcg", "base", "better")
    assert (turned["difference"], turned["low"], turned["high"]) == (
        -found["difference"],
        -found["high"],
        -found["low"],
    )


def test_the_same_seed_gives_the_same_intervals():
    pairs = flatten(judged_table(), ESCI)
    predictions = {"a": Predictions(np.arange(pairs.num_pairs, dtype=float))}
    assert compare_predictions(pairs, predictions, ESCI, FAST) == compare_predictions(pairs, predictions, ESCI, FAST)


def test_perfect_grades_have_an_f1_of_one():
    pairs = flatten(judged_table(), ESCI)
    perfect = Predictions(pairs.classes.astype(float), pairs.classes, pairs.relevant.astype(float))
    metrics = compare_predictions(pairs, {"m": perfect}, ESCI, FAST)["models"]["m"]["metrics"]
    assert {name: found["value"] for name, found in metrics.items()} == {
        name: 0.0 if "calibration_error" in name or "brier" in name else pytest.approx(1.0) for name in metrics
    }
    assert len(metrics) == 17


def test_a_pair_that_a_model_refuses_is_ranked_last_and_counted():
    judged = judged_table()
    results = evaluate_models(judged, {"all": TitleReader(), "refusing": TitleReader(refuses="E")}, ESCI, FAST)
    models = results["splits"]["test"]["models"]
    assert models["all"]["num_failed"] == 0
    assert models["refusing"]["num_failed"] == flatten(judged, ESCI).relevant.sum()
    assert models["refusing"]["metrics"]["roc_auc"]["value"] == 0.0
    assert len(models["refusing"]["errors"]) == 3
    markdown = render_markdown(results, title="t", about={})
    assert "Pairs that could not be scored, ranked last: refusing" in markdown
    assert f"The first: refusing: {models['refusing']['errors'][0]}" in markdown
    assert "too good to be true" in markdown


def test_models_are_asked_in_blocks_of_whole_queries_and_each_pair_once(monkeypatch):
    monkeypatch.setattr("relevance_ray.evaluation.ask.PAIRS_PER_CALL", 15)
    pairs = flatten(judged_table(), ESCI)
    model, seen = TitleReader(), []
    predict(model, pairs, seen.append)
    assert model.calls == seen
    assert sum(seen) == pairs.num_pairs
    assert len(seen) > 2
    assert set(np.cumsum(seen)) <= set(pairs.offsets)


def test_random_order_is_the_floor_and_splits_are_reported_apart():
    judged = pa.concat_tables([judged_table(split="dev"), judged_table(seed=1), judged_table(seed=2, split="train")])
    results = evaluate_models(judged, {"student": TitleReader()}, ESCI, FAST)
    assert list(results["splits"]) == ["dev", "test"]
    random = results["splits"]["test"]["models"]["random"]["metrics"]
    assert random["roc_auc"]["value"] == random["pairwise_accuracy"]["value"] == 0.5
    assert 0.2 < random["ndcg"]["value"] < 1.0


def test_no_judgment_in_any_split_says_what_to_change():
    with pytest.raises(UserError, match=r"dev or test.*evaluate\.splits"):
        evaluate_models(judged_table(split="train"), {}, ESCI, FAST)


@pytest.mark.parametrize(
    "wrong", [{"splits": ["tset"]}, {"splits": []}, {"ks": [0]}, {"precisions": [0.0]}, {"num_resamples": 0}]
)
def test_options_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EvaluateOptions(**wrong)


def test_the_report_says_what_the_interval_carries(tmp_path):
    models = {"teacher": TitleReader(noise=1.0), "student": TitleReader()}
    results = evaluate_models(judged_table(60), models, ESCI, FAST)
    write_report(results, str(tmp_path), title="Market", about={"teacher": "a title reader"})
    markdown = (tmp_path / "report.md").read_text()
    assert "The student passes the teacher on test nDCG: +0." in markdown
    assert "- **teacher**: a title reader" in markdown
    assert "| student minus | teacher | random |" in markdown
    assert "| recall at precision 0.9 |" in markdown
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["about"] == {"teacher": "a title reader"}
    assert stored["splits"]["test"]["models"]["student"]["metrics"]["ndcg"]["value"] == 1.0


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


def test_a_handful_of_queries_gets_no_interval_and_proves_nothing():
    pairs = flatten(judged_table(3), ESCI)
    rng = np.random.default_rng(0)
    predictions = {"student": Predictions(pairs.gains), "teacher": Predictions(rng.normal(size=pairs.num_pairs))}
    split = compare_predictions(pairs, predictions, ESCI, FAST)
    assert split["models"]["student"]["metrics"]["ndcg"] == {"value": 1.0, "low": None, "high": None}
    sentence = verdict("test", split, "student", "teacher")
    assert sentence.startswith("3 queries are too few to tell the student from the teacher on test nDCG: +0.")
    assert sentence.endswith("; cross-validate over all judged ones (data.folds).")


def test_a_shift_of_probabilities_within_queries_is_seen_though_the_pool_hides_it():
    """Half of the queries hold relevant products only, half none; the model says .5 of everything."""
    relevant = np.repeat([True, False] * 10, 4)
    offsets = group_offsets([4] * 20)
    pairs = Judgments(offsets, relevant.astype(float), relevant.astype(int), relevant)
    said = Predictions(np.zeros(80), relevant.astype(int), np.full(80, 0.5))
    parts = measure(pairs, said, 2, [10], [0.9])
    found = {metric: value for part in parts for metric, value in zip(part.names, part.values, strict=True)}
    assert found["calibration_error"] == pytest.approx(0.0)
    assert found["query_calibration_error"] == pytest.approx(0.5 - np.sqrt(2 / np.pi * 0.25 / 4))
    assert found["query_brier"] == found["brier"] == pytest.approx(0.25)


def test_fewer_permutations_than_asked_for_are_told():
    pairs = flatten(judged_table(6), ESCI)
    predictions = {name: Predictions(pairs.gains) for name in ("student", "teacher")}
    results = as_results({"test": compare_predictions(pairs, predictions, ESCI, FAST)}, ESCI, FAST)
    assert "over queries (10,000 sign assignments) for means" in render_markdown(results, title="t", about={})
    results["splits"]["test"]["num_permutations"] = permutations_drawn(10_000, 40_000)
    told = "over queries (10,000 sign assignments; 2,000 on test, for its many queries) for means"
    assert told in render_markdown(results, title="t", about={})


def test_the_verdict_claims_nothing_within_the_noise():
    pairs = flatten(judged_table(12), ESCI)
    rng = np.random.default_rng(0)
    same = {name: Predictions(rng.normal(size=pairs.num_pairs)) for name in ("student", "teacher")}
    split = compare_predictions(pairs, same, ESCI, FAST)
    sentence = verdict("test", split, "student", "teacher")
    assert sentence.startswith("The student cannot be told from the teacher on test nDCG")
    assert "cross-validate" in sentence
    swapped = compare_predictions(pairs, {"student": same["student"], "teacher": Predictions(pairs.gains)}, ESCI, FAST)
    assert verdict("test", swapped, "student", "teacher").startswith("The student falls behind the teacher")
    assert verdict("test", swapped, "student", "bm25") is None


def test_right_probabilities_have_no_calibration_error_by_query_whatever_the_lists_length():
    rng = np.random.default_rng(4)
    lengths = rng.integers(4, 40, 4000)
    offsets = group_offsets(lengths)
    probabilities = rng.beta(0.6, 1.4, offsets[-1])
    relevant = rng.random(offsets[-1]) < probabilities
    pairs = Judgments(offsets, relevant.astype(float), relevant.astype(int), relevant)
    *_, levels = measure(pairs, Predictions(probabilities, relevant.astype(int), probabilities), 2, [10], [0.9])
    assert dict(zip(levels.names, levels.values, strict=True))["query_calibration_error"] == pytest.approx(0, abs=0.003)


def test_alike_models_are_told_apart_as_seldom_as_claimed():
    """Of five equally good models, over 40 draws: what is bold in a table is wrong in about one table in twenty."""
    rng = np.random.default_rng(7)
    pairs = flatten(judged_table(60), ESCI)
    slices = [Slice("category", str(part), rng.integers(12, size=pairs.num_pairs) == part) for part in range(12)]
    bold = {"pooled": 0, "slices": 0}
    for _ in range(40):
        predictions = {str(m): Predictions(pairs.classes + 4 * rng.normal(size=pairs.num_pairs)) for m in range(5)}
        found = compare_predictions(pairs, predictions, ESCI, FAST)["differences"]
        bold["pooled"] += any(is_sure(row) for row in found if row["metric"] == "roc_auc")
        two = {name: predictions[name] for name in "01"}
        reports = slice_reports(pairs, two, slices, ESCI, FAST, "0")
        rows = [row for report in reports for row in report.get("differences", ())]
        bold["slices"] += any(is_sure(row) for row in rows if row["metric"] == SLICE_METRIC)
    assert bold["pooled"] <= 6
    assert bold["slices"] <= 6


def test_a_model_that_leaves_out_pairs_is_not_held_against_the_student():
    pairs = flatten(judged_table(60), ESCI)
    gaps = np.where(np.arange(pairs.num_pairs) % 3 == 0, -np.inf, pairs.gains)
    split = compare_predictions(pairs, {"student": Predictions(pairs.gains), "engine": Predictions(gaps)}, ESCI, FAST)
    [said] = verdicts(as_results({"test": split}, ESCI, FAST, others=("engine",)))
    assert said.startswith("The student is not held against the engine on test: the engine scores all but 1")


def test_claims_are_made_on_test_and_corrected_for_each_other():
    pairs = flatten(judged_table(60), ESCI)
    rng = np.random.default_rng(3)
    noise = rng.normal(size=(2, pairs.num_pairs))
    predictions = {
        "student": Predictions(pairs.classes + 2.0 * noise[0]),
        "teacher": Predictions(pairs.classes + 2.6 * noise[0]),
        "engine": Predictions(2.0 * noise[1]),
    }
    split = compare_predictions(pairs, predictions, ESCI, FAST)
    both = as_results({"dev": split, "test": split}, ESCI, FAST, others=("teacher", "engine"))
    sentences = verdicts(both)
    assert ["on test" in sentence for sentence in sentences] == [True, True]
    p = difference(split, "ndcg", "student", "teacher")["p"]
    assert f"p {p_text(p)}" in sentences[0]  # the larger of two stays as it is
    only_dev = as_results({"dev": split}, ESCI, FAST)
    assert "on dev" in verdicts(only_dev)[0]


@pytest.mark.parametrize("change", [{"splits": ["test", "test"]}, {"ks": [10, 10]}, {"slices": ["brand", "brand"]}])
def test_what_is_named_twice_is_refused(change):
    with pytest.raises(ValueError, match="names something twice"):
        replace(FAST, **change)


def test_only_one_split_is_taken():
    judged = pa.concat_tables([judged_table(3, split="dev"), judged_table(4)])
    assert of_split(judged, "dev").num_rows == 3


def products_of(judged: pa.Table) -> pa.Table:
    rows = {p["product_id"]: p for group in judged["products"].to_pylist() for p in group}
    return pa.Table.from_pylist([{"product_id": key, **row["fields"]} for key, row in rows.items()], schema=PRODUCT)


def test_baselines_are_model_folders_calibrated_on_dev_and_built_once(tmp_path):
    judged, scale = grounded_table(), SCALES["binary"]
    dev, streams = judged.slice(0, 6), []

    def products():
        streams.append(1)
        yield products_of(judged)

    template = Template(max_tokens=32, prompt="{query} {product}")
    folders = build_baselines(FAST, products, dev, scale, template, tmp_path)
    assert list(folders) == ["bm25", "cosine"]
    before = {name: (folder / "relevance.json").read_bytes() for name, folder in folders.items()}
    assert build_baselines(FAST, products, dev, scale, template, tmp_path) == folders
    assert len(streams) == 1
    assert {name: (folder / "relevance.json").read_bytes() for name, folder in folders.items()} == before

    models = {name: load_pair_model(folder) for name, folder in folders.items()}
    results = evaluate_models(judged, models, scale, FAST)
    found = {name: model["metrics"] for name, model in results["splits"]["test"]["models"].items()}
    for name in ("bm25", "cosine"):
        assert found[name]["ndcg"]["value"] > found["random"]["ndcg"]["value"] + 0.1
        assert found[name]["macro_f1"]["value"] > 0.8


def test_on_real_judgments_bm25_and_the_cosine_beat_random_order(shared_data, tmp_path):
    prepare(DataOptions(format="esci", path=str(shared_data / "esci")), tmp_path / "prepared")
    judged, scale = read_judged(tmp_path / "prepared"), read_scale(tmp_path / "prepared")
    dev = of_split(judged, "dev")
    folders = build_baselines(
        FAST, lambda: iter_products(tmp_path / "prepared"), dev, scale, Template(max_tokens=48), tmp_path / "baselines"
    )
    models = {name: load_pair_model(folder) for name, folder in folders.items()}
    split = evaluate_models(judged, models, scale, replace(FAST, splits=["test"]))["splits"]["test"]
    assert split["num_queries"] == 15
    for name in ("bm25", "cosine"):
        assert difference(split, "ndcg", name, "random")["difference"] > 0.02
        assert difference(split, "pairwise_accuracy", name, "random")["difference"] > 0.03
        assert split["models"][name]["num_failed"] == 0


def grounded_table() -> pa.Table:
    """Queries for a thing, one product that is the thing and four that are other things."""
    things = ["lamp", "kettle", "bicycle", "carpet", "violin", "hammer", "sofa", "camera", "tent", "mirror"]
    rows = []
    for q, thing in enumerate(things):
        sold = [thing, *(things[(q + i) % len(things)] for i in range(1, 5))]
        products = [
            {
                "pair_id": pair_id(thing, name),
                "product_id": name,
                "fields": product_fields({"title": f"a fine {name}", "brand": "Acme"}),
                "origins": [{"name": "human", "rank": 0}],
                "grade": str(int(name == thing)),
                "soft_target": float(name == thing),
                "rater_grades": None,
            }
            for name in reversed(sold)
        ]
        rows.append({"query_id": thing, "query": thing, "query_source": "human", "split": "test", "products": products})
    return pa.Table.from_pylist(rows, schema=JUDGED_GROUP)
