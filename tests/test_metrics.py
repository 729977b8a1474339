"""Metrics against hand-computed numbers and against scikit-learn and trec_eval."""

import itertools

import numpy as np
import pytest
from scipy.stats import kendalltau
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, ndcg_score, roc_auc_score

from relevance_ray.metrics import (
    Ranking,
    Thresholds,
    brier_score,
    calibration_error,
    calibration_sums,
    confusion_by_query,
    group_offsets,
    macro_f1,
    micro_f1,
    ndcg,
    pairwise_accuracy,
    pooled_figures,
    pr_auc,
    recall_at_precision,
    reciprocal_rank,
    roc_auc,
)


def random_queries(seed: int, *, ties: bool, num_queries: int = 30):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 25, num_queries)
    offsets = group_offsets(lengths)
    gains = rng.choice([0.0, 0.01, 0.1, 1.0], offsets[-1])
    scores = rng.integers(0, 5, offsets[-1]).astype(float) if ties else rng.normal(size=offsets[-1])
    return gains, scores, offsets


def slices(offsets):
    return [slice(a, b) for a, b in itertools.pairwise(offsets)]


def test_ndcg_of_a_hand_computed_list():
    gains, scores = np.array([0.0, 1.0, 0.1]), np.array([3.0, 2.0, 1.0])
    expected = (1 / np.log2(3) + 0.1 / 2) / (1 + 0.1 / np.log2(3))
    assert ndcg(gains, scores, np.array([0, 3])) == pytest.approx([expected])
    assert ndcg(gains, scores, np.array([0, 3]), k=1) == pytest.approx([0.0])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [None, 1, 5, 10])
def test_ndcg_equals_scikit_learn(ties, k):
    gains, scores, offsets = random_queries(0, ties=ties)
    ours = ndcg(gains, scores, offsets, k)
    for value, part in zip(ours, slices(offsets), strict=True):
        if gains[part].any():
            assert value == pytest.approx(ndcg_score([gains[part]], [scores[part]], k=k), abs=1e-12)
        else:
            assert np.isnan(value)


def test_ranking_metrics_equal_trec_eval_where_nothing_ties():
    import ir_measures
    from ir_measures import AP, RR, R, nDCG

    gains, scores, offsets = random_queries(1, ties=False)
    grades = (gains * 100).astype(int)
    qrels, run = [], []
    for q, part in enumerate(slices(offsets)):
        for i in range(part.start, part.stop):
            qrels.append(ir_measures.Qrel(str(q), str(i), int(grades[i])))
            run.append(ir_measures.ScoredDoc(str(q), str(i), float(scores[i])))
    ranking, relevant = Ranking(scores, offsets), gains == 1.0
    ours = {
        nDCG: ranking.ndcg(gains),
        nDCG @ 10: ranking.ndcg(gains, 10),
        RR(rel=100): ranking.reciprocal_rank(relevant),
        AP(rel=100): ranking.average_precision(relevant),
        R(rel=100) @ 5: ranking.recall(relevant, 5),
    }
    measured = {measure: {} for measure in ours}
    for row in ir_measures.iter_calc(list(measured), qrels, run):
        measured[row.measure][int(row.query_id)] = row.value
    for measure, values in ours.items():
        assert np.nan_to_num(values) == pytest.approx([measured[measure][q] for q in range(len(values))], abs=1e-9)


@pytest.mark.parametrize("ties", [False, True])
def test_kendall_tau_equals_scipy(ties):
    gains, scores, offsets = random_queries(5, ties=ties)
    _, tau = Ranking(scores, offsets).concordance(gains)
    assert tau == pytest.approx([kendalltau(gains[p], scores[p]).statistic for p in slices(offsets)], nan_ok=True)
    _, constant = Ranking(np.zeros(5), np.array([0, 3, 5])).concordance(np.array([1.0, 0.0, 0.1, 1.0, 1.0]))
    assert constant == pytest.approx([0.0, np.nan], nan_ok=True)  # a model that says nothing is measured all the same


def test_a_query_is_worth_the_same_wherever_it_stands():
    gains, scores, offsets = random_queries(8, ties=False, num_queries=300)
    alone = [ndcg(gains[p], scores[p], np.array([0, p.stop - p.start]))[0] for p in slices(offsets)]
    np.testing.assert_array_equal(ndcg(gains, scores, offsets), alone)


def test_large_blocks_and_small_ones_give_the_same(monkeypatch):
    gains, scores, offsets = random_queries(6, ties=True)
    whole, tau = Ranking(scores, offsets).ndcg(gains, 5), Ranking(scores, offsets).concordance(gains)
    monkeypatch.setattr("relevance_ray.metrics.MAX_BLOCK_VALUES", 30)
    np.testing.assert_array_equal(Ranking(scores, offsets).ndcg(gains, 5), whole)
    np.testing.assert_array_equal(Ranking(scores, offsets).concordance(gains), tau)


def test_empty_queries_are_no_harm():
    offsets = np.array([0, 0, 2, 2])
    ranking = Ranking(np.array([1.0, 2.0]), offsets)
    gains = np.array([1.0, 0.0])
    for values in (
        ranking.ndcg(gains),
        ranking.average_precision(gains),
        ranking.recall(gains, 1),
        *ranking.concordance(gains),
    ):
        assert np.isnan(values).tolist() == [True, False, True]


def test_a_constant_score_is_worth_the_mean_over_all_orders():
    gains, offsets = np.array([1.0, 0.0, 0.1, 0.0]), np.array([0, 4])
    orders = [np.array(order, dtype=float) for order in itertools.permutations(range(4))]
    for metric in (
        lambda scores: ndcg(gains, scores, offsets, 2)[0],
        lambda scores: reciprocal_rank(gains > 0, scores, offsets)[0],
        lambda scores: pairwise_accuracy(gains, scores, offsets)[0],
        lambda scores: Ranking(scores, offsets).average_precision(gains > 0)[0],
        lambda scores: Ranking(scores, offsets).recall(gains > 0, 3)[0],
    ):
        assert metric(np.zeros(4)) == pytest.approx(np.mean([metric(order) for order in orders]))


def test_file_order_never_decides():
    gains, scores, offsets = random_queries(2, ties=True, num_queries=1)
    order = np.random.default_rng(0).permutation(len(gains))
    for metric in (ndcg, pairwise_accuracy):
        assert metric(gains, scores, offsets) == pytest.approx(metric(gains[order], scores[order], offsets))
    relevant = gains == 1.0
    assert reciprocal_rank(relevant, scores, offsets) == pytest.approx(
        reciprocal_rank(relevant[order], scores[order], offsets)
    )


def test_pairwise_accuracy_counts_ties_half_and_equal_grades_not_at_all():
    gains = np.array([1.0, 0.1, 0.1, 0.0, 1.0, 1.0])
    scores = np.array([2.0, 2.0, 3.0, 1.0, 1.0, 2.0])
    # (1, .1) tied: .5; (1, .1) wrong: 0; (1, 0), (.1, 0), (.1, 0) right
    assert pairwise_accuracy(gains, scores, np.array([0, 4, 6])) == pytest.approx([3.5 / 5, np.nan], nan_ok=True)


@pytest.mark.parametrize("ties", [False, True])
def test_roc_auc_equals_scikit_learn_with_and_without_weights(ties):
    gains, scores, _ = random_queries(3, ties=ties)
    relevant = gains == 1.0
    weights = np.random.default_rng(0).integers(0, 4, (3, len(gains)))
    assert roc_auc(relevant, scores) == pytest.approx(roc_auc_score(relevant, scores))
    for ours, weight in zip(roc_auc(relevant, scores, weights), weights, strict=True):
        assert ours == pytest.approx(roc_auc_score(relevant, scores, sample_weight=weight))


@pytest.mark.parametrize("ties", [False, True])
def test_pr_auc_equals_scikit_learn_with_and_without_weights(ties):
    gains, scores, _ = random_queries(3, ties=ties)
    relevant = gains == 1.0
    weights = np.random.default_rng(0).integers(0, 4, (3, len(gains)))
    assert pr_auc(relevant, scores) == pytest.approx(average_precision_score(relevant, scores))
    for ours, weight in zip(pr_auc(relevant, scores, weights), weights, strict=True):
        assert ours == pytest.approx(average_precision_score(relevant, scores, sample_weight=weight))


def test_few_bins_are_near_the_exact_areas_and_keep_ties_together():
    rng = np.random.default_rng(4)
    relevant = rng.random(20_000) < 0.3
    scores = np.round(rng.normal(size=20_000) + relevant, 2)
    binned = Thresholds(relevant, scores, max_bins=200)
    assert binned.num_bins <= 200
    assert all(len(set(binned.bin[scores == value])) == 1 for value in (0.0, 0.5, 1.0))
    assert (np.diff(binned.bin[np.argsort(-scores, kind="stable")]) >= 0).all()
    assert pooled_figures(*binned.sums()).tolist() == pytest.approx(
        [float(roc_auc(relevant, scores)), float(pr_auc(relevant, scores))], abs=0.005
    )


def test_brier_score_equals_scikit_learn_and_calibration_error_is_what_the_bins_say():
    rng = np.random.default_rng(7)
    offsets = group_offsets([30, 50, 20])
    probabilities = rng.random(100)
    relevant = rng.random(100) < probabilities
    assert brier_score(relevant, probabilities).mean() == pytest.approx(brier_score_loss(relevant, probabilities))
    expected = 0.0
    for b in range(15):
        inside = (probabilities >= b / 15) & (probabilities < (b + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(probabilities[inside].mean() - relevant[inside].mean())
    sums = calibration_sums(relevant, probabilities, offsets)
    assert sums[:, 0].sum(-1).tolist() == [30, 50, 20]
    assert calibration_error(sums.sum(0)) == pytest.approx(expected)
    certain = calibration_sums(np.ones(4, bool), np.ones(4), np.array([0, 4]))
    assert calibration_error(certain.sum(0)) == 0.0


def test_recall_at_precision_by_hand():
    relevant = np.array([1, 1, 0, 1, 0, 1], dtype=bool)
    scores = np.array([6.0, 5, 4, 3, 2, 1])
    # precision at each cut: 1, 1, .67, .75, .6, .67
    assert recall_at_precision(relevant, scores, 0.9) == pytest.approx(0.5)
    assert recall_at_precision(relevant, scores, 0.75) == pytest.approx(0.75)
    assert recall_at_precision(relevant, scores, 0.5) == pytest.approx(1.0)
    assert recall_at_precision(~relevant, scores, 0.9) == 0.0
    assert recall_at_precision(relevant, np.zeros(6), 0.9) == 0.0  # all pass together, at precision .67


def test_recall_at_precision_reaches_nine_of_ten_exactly():
    relevant = np.array([True] * 9 + [False])
    assert recall_at_precision(relevant, np.zeros(10), 0.9) == 1.0


def test_weights_are_repeated_pairs():
    gains, scores, _ = random_queries(4, ties=True)
    relevant = gains == 1.0
    weights = np.random.default_rng(1).integers(0, 3, len(gains))
    repeated = np.repeat(np.arange(len(gains)), weights)
    for metric in (roc_auc, lambda r, s, w=None: recall_at_precision(r, s, 0.4, w)):
        assert metric(relevant, scores, weights) == pytest.approx(metric(relevant[repeated], scores[repeated]))


def test_f1_equals_scikit_learn_and_leaves_out_absent_classes():
    rng = np.random.default_rng(5)
    truth, predicted = rng.choice([0, 1, 3], 60), rng.choice([0, 3], 60)
    confusion = confusion_by_query(truth, predicted, 4, np.array([0, 20, 60]))
    assert confusion[0].sum() == 20
    total = confusion.sum(0)
    assert macro_f1(total) == pytest.approx(f1_score(truth, predicted, average="macro", zero_division=0))
    assert micro_f1(total) == pytest.approx(f1_score(truth, predicted, average="micro"))


def test_what_is_undefined_is_nan():
    offsets = np.array([0, 2])
    assert np.isnan(ndcg(np.zeros(2), np.array([1.0, 2.0]), offsets)).all()
    assert np.isnan(reciprocal_rank(np.zeros(2, bool), np.array([1.0, 2.0]), offsets)).all()
    assert np.isnan(roc_auc(np.ones(2, bool), np.array([1.0, 2.0])))
    assert np.isnan(recall_at_precision(np.zeros(2, bool), np.array([1.0, 2.0])))


def test_a_pair_that_could_not_be_scored_comes_last_and_nan_is_refused():
    offsets = np.array([0, 3])
    gains = np.array([1.0, 0.1, 0.0])
    assert ndcg(gains, np.array([2.0, 1.0, -np.inf]), offsets) == pytest.approx([1.0])
    with pytest.raises(ValueError, match="NaN"):
        ndcg(gains, np.array([2.0, 1.0, np.nan]), offsets)


def test_a_long_list_is_compared_in_parts_that_agree_with_the_whole(monkeypatch) -> None:
    rng = np.random.default_rng(11)
    offsets = group_offsets([300, 7, 300, 41])
    gains, scores = rng.integers(0, 4, offsets[-1]) / 3, rng.normal(size=offsets[-1]).round(1)
    whole = Ranking(scores, offsets).concordance(gains)
    monkeypatch.setattr("relevance_ray.metrics.MAX_BLOCK_VALUES", 1000)
    for parts, at_once in zip(Ranking(scores, offsets).concordance(gains), whole, strict=True):
        np.testing.assert_array_equal(parts, at_once)
