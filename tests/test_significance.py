"""Intervals, p-values, and what is claimed by them."""

import itertools

import numpy as np
import pytest
from judged_groups import ESCI, FAST, TitleReader, judged_table
from scipy.stats import binomtest, norm

from relevance_ray.evaluation.ask import predict
from relevance_ray.evaluation.compare import compare_predictions, difference, is_sure
from relevance_ray.evaluation.evaluate import as_results
from relevance_ray.evaluation.judged import Judgments, flatten
from relevance_ray.evaluation.measure import Predictions, measure
from relevance_ray.evaluation.report.markdown import render_markdown
from relevance_ray.evaluation.report.words import p_text, verdict, verdicts
from relevance_ray.evaluation.significance import (
    holm,
    means_over_queries,
    percentile_interval,
    permutations_drawn,
    randomization_test,
    resample_counts,
    share_interval,
)
from relevance_ray.evaluation.slices import (
    SLICE_METRIC,
    Slice,
    slice_reports,
)
from relevance_ray.metrics import group_offsets


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


def test_a_handful_of_queries_gets_no_interval_and_proves_nothing():
    pairs = flatten(judged_table(3), ESCI)
    rng = np.random.default_rng(0)
    predictions = {"student": Predictions(pairs.gains), "teacher": Predictions(rng.normal(size=pairs.num_pairs))}
    split = compare_predictions(pairs, predictions, ESCI, FAST)
    assert split["models"]["student"]["metrics"]["ndcg"] == {"value": 1.0, "low": None, "high": None}
    sentence = verdict("test", split, "student", "teacher")
    assert sentence.startswith("3 queries are too few to tell the student from the teacher on test nDCG: +0.")
    assert sentence.endswith("; cross-validate over all judged ones (data.folds).")


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
    assert said.startswith("The student is not held against engine on test: engine scores all but 1")


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


def test_the_interval_of_a_share_counts_queries_that_agree_as_fewer_pairs():
    """Of 300 queries of five pairs: pairs on their own give Wilson's interval, pairs all alike that of 300; draws of the
    queries agree."""
    rng = np.random.default_rng(5)
    counts = np.full((300, 2), 5.0)
    hits = np.stack([rng.binomial(5, 0.3, 300), 5.0 * (rng.random(300) < 0.3)], axis=1)
    low, high = share_interval(hits, counts)
    for column, independent in enumerate((1500, 300)):
        share = hits[:, column].sum() / 1500
        exact = binomtest(round(share * independent), independent).proportion_ci(method="wilson")
        assert (low[column], high[column]) == pytest.approx((exact.low, exact.high), abs=0.006)
        draws = resample_counts(300, 4000, seed=1) @ hits[:, column] / 1500
        assert (low[column], high[column]) == pytest.approx(percentile_interval(draws), abs=0.01)


def test_a_share_of_all_has_an_interval_and_a_share_of_few_queries_none():
    counts = np.tile([2.0, 2.0], (12, 1))
    counts[9:, 1] = 0
    low, high = share_interval(counts, counts)
    assert 0.8 < low[0] < 0.9
    assert high[0] == pytest.approx(1.0)
    assert np.isnan([low[1], high[1]]).all()


def test_what_other_metrics_say_for_certain_stands_beside_the_sentence_on_ndcg() -> None:
    """The student swaps what is worth least in nearly every query, and is far better in two."""
    pairs = flatten(judged_table(60), ESCI)
    query = np.repeat(np.arange(pairs.num_queries), np.diff(pairs.offsets))
    student = np.where(pairs.classes == 0, 1.5, pairs.classes)
    teacher = np.where(query < 2, -pairs.classes, pairs.classes)
    predictions = {"student": Predictions(student), "teacher": Predictions(teacher)}
    split = compare_predictions(pairs, predictions, ESCI, FAST)
    [said] = verdicts(as_results({"test": split}, ESCI, FAST))
    assert said.startswith("The student cannot be told from the teacher on test nDCG: +")
    assert "By other metrics it can: pairwise accuracy -0." in said
    alike = {"student": Predictions(pairs.gains), "teacher": Predictions(pairs.gains)}
    [said] = verdicts(as_results({"test": compare_predictions(pairs, alike, ESCI, FAST)}, ESCI, FAST))
    assert "other metrics" not in said


def test_a_baseline_is_called_by_its_name() -> None:
    pairs = flatten(judged_table(60), ESCI)
    predictions = {"student": Predictions(pairs.gains), "bm25": Predictions(np.zeros(pairs.num_pairs))}
    split = compare_predictions(pairs, predictions, ESCI, FAST)
    [said] = verdicts(as_results({"test": split}, ESCI, FAST, others=("teacher", "bm25")))
    assert said.startswith("The student passes bm25 on test nDCG: +")
