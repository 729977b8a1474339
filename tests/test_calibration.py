"""Golden numbers for logits and probabilities, and a fit against known parameters."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from relevance_ray.calibration import (
    CALIBRATIONS,
    Calibration,
    IsotonicCalibration,
    OrdinalCalibration,
    calibration_of,
    class_logits_of_distribution,
    logit_of_classes,
)
from relevance_ray.schema import SCALES


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_two_classes_give_exactly_the_difference() -> None:
    class_logits = np.array([[0.1, 3.7], [-2.0, 5e4], [1e-7, 0.3]], dtype=np.float32)
    np.testing.assert_array_equal(logit_of_classes(class_logits, (0, 1)), class_logits[:, 1] - class_logits[:, 0])


def test_logit_is_the_log_odds_of_the_expected_gain() -> None:
    # p = (.5, .3, .2), gains (0, .5, 1): gain .35, odds .35 / .65.
    class_logits = np.log([[0.5, 0.3, 0.2]]) + 7.0
    logit = logit_of_classes(class_logits, (0.0, 0.5, 1.0))
    assert logit.dtype == np.float32
    np.testing.assert_allclose(logit, [math.log(0.35 / 0.65)], rtol=1e-6)


def test_logit_of_random_esci_classes_matches_a_float64_reference() -> None:
    rng = np.random.default_rng(0)
    class_logits = rng.normal(size=(200, 4)) * 5
    p = np.exp(class_logits) / np.exp(class_logits).sum(axis=1, keepdims=True)
    gain = p @ np.asarray(SCALES["esci"].gains)
    np.testing.assert_allclose(
        logit_of_classes(class_logits, SCALES["esci"].gains), np.log(gain / (1 - gain)), rtol=1e-4, atol=1e-5
    )


def test_nan_stays_and_impossible_classes_are_skipped() -> None:
    inf = np.inf
    class_logits = np.array([[np.nan] * 3, [0.0, -inf, 0.0], [0.0, -inf, -inf], [-inf, -inf, 2.0]], dtype=np.float32)
    logit = logit_of_classes(class_logits, (0.0, 0.5, 1.0))
    assert np.isnan(logit[0])
    np.testing.assert_array_equal(logit[1:], [0.0, -inf, inf])


def test_grades_become_finite_logits() -> None:
    distributions = np.stack([SCALES["wands"].distribution(grade) for grade in SCALES["wands"].grades])
    class_logits = class_logits_of_distribution(distributions)
    np.testing.assert_allclose(np.exp(class_logits).sum(axis=1), 1, rtol=1e-6)
    logits = logit_of_classes(class_logits, SCALES["wands"].gains)
    # Irrelevant: .9 and .1 to Partial, gain .05; Exact mirrors it.
    np.testing.assert_allclose(logits, [math.log(0.05 / 0.95), 0.0, math.log(0.95 / 0.05)], atol=3e-3)


def test_probabilities_are_the_sigmoids_written_out() -> None:
    calibration = OrdinalCalibration(2.0, (-1.0, 0.5, 3.0))
    probabilities = calibration.class_probabilities(np.array([0.75]))[0]
    at_least = [sigmoid(1.5 + 1.0), sigmoid(1.5 - 0.5), sigmoid(1.5 - 3.0)]
    expected = [1 - at_least[0], at_least[0] - at_least[1], at_least[1] - at_least[2], at_least[2]]
    np.testing.assert_allclose(probabilities, expected, rtol=1e-12)
    np.testing.assert_allclose(calibration.probability(np.array([0.75]), 3), [at_least[2]])
    np.testing.assert_allclose(
        calibration.score(np.array([0.75]), SCALES["esci"].gains),
        [expected[1] * 0.01 + expected[2] * 0.1 + expected[3]],
    )
    assert calibration.grade_index(np.array([-9.0, 0.75, 9.0])).tolist() == [0, 2, 3]


def test_fit_recovers_the_parameters_that_made_the_data() -> None:
    truth = OrdinalCalibration(1.7, (-2.0, 0.5, 1.5))
    logits = np.random.default_rng(1).normal(loc=3.0, scale=2.0, size=4000) - 3.0
    found = OrdinalCalibration.fit(logits, truth.class_probabilities(logits))
    np.testing.assert_allclose(found.slope, truth.slope, rtol=2e-2)
    np.testing.assert_allclose(found.thresholds, truth.thresholds, atol=5e-2)


def test_fit_of_uninformative_logits_gives_the_base_rates() -> None:
    distributions = np.tile([0.2, 0.3, 0.5], (50, 1))
    found = OrdinalCalibration.fit(np.full(50, 4.0), distributions)
    np.testing.assert_allclose(found.class_probabilities(np.array([4.0]))[0], [0.2, 0.3, 0.5], atol=2e-3)


def test_separable_backward_and_one_sided_judgments_stay_finite() -> None:
    logits = np.array([-2.0, -1.0, 1.0, 2.0])
    separable = np.eye(2)[[0, 0, 1, 1]]
    for distributions in (separable, separable[::-1], np.eye(2)[[1, 1, 1, 1]], np.eye(4)[[0, 0, 3, 3]]):
        found = OrdinalCalibration.fit(logits, distributions)
        assert found.slope > 0
        probabilities = found.class_probabilities(logits)
        assert np.isfinite(probabilities).all()
        np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert OrdinalCalibration.fit(logits, separable).probability(logits, 1)[[0, -1]] == pytest.approx([0, 1], abs=0.02)


def test_calibration_never_changes_the_order() -> None:
    rng = np.random.default_rng(2)
    logits = np.sort(rng.normal(size=50))
    found = OrdinalCalibration.fit(logits, rng.dirichlet(np.ones(3), size=50))
    assert (np.diff(found.probability(logits, 2)) > 0).all()
    assert (np.diff(found.score(logits, (0.0, 0.5, 1.0))) > 0).all()


@pytest.mark.parametrize("method", CALIBRATIONS.values())
def test_bad_input_is_refused(method: type[Calibration]) -> None:
    with pytest.raises(ValueError, match="finite"):
        method.fit(np.array([np.nan]), np.eye(2)[[0]])
    with pytest.raises(ValueError, match="at least one row"):
        method.fit(np.array([]), np.empty((0, 2)))


def test_bad_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="rising"):
        OrdinalCalibration(1.0, (2.0, 1.0))


def test_isotonic_of_two_classes_equals_scikit_learns_where_it_is_not_floored() -> None:
    from sklearn.isotonic import IsotonicRegression

    rng = np.random.default_rng(3)
    logits = rng.normal(size=3000).round(2)  # with ties
    relevant = (rng.random(3000) < 1 / (1 + np.exp(-(logits**3)))).astype(np.int64)
    found = IsotonicCalibration.fit(logits, np.eye(2)[relevant])
    reference = IsotonicRegression(out_of_bounds="clip").fit(logits, relevant)
    asked = np.concatenate([logits, rng.normal(size=500), [-50.0, 50.0]])
    expected = reference.predict(asked).clip(1 / 3002, 1 - 1 / 3002)
    np.testing.assert_allclose(found.probability(asked, 1), expected, atol=2 / 3002)
    assert len(found.knots) < 200  # of 600 distinct logits


def test_isotonic_probabilities_never_cross_and_never_fall() -> None:
    rng = np.random.default_rng(4)
    logits = rng.normal(size=300)
    found = IsotonicCalibration.fit(logits, rng.dirichlet(np.ones(4), size=300))
    asked = np.sort(rng.normal(size=2000) * 3)
    classes = found.class_probabilities(asked)
    np.testing.assert_allclose(classes.sum(axis=1), 1)
    assert classes.min() >= 0
    assert (np.diff(found.at_least(asked), axis=0) >= 0).all()
    assert (np.diff(found.score(asked, (0.0, 0.1, 0.5, 1.0))) >= -1e-12).all()
    assert found.probability(asked, 1).max() < 1


def test_isotonic_is_nearer_the_truth_than_a_sigmoid_where_the_truth_is_none() -> None:
    rng = np.random.default_rng(5)
    logits = rng.uniform(-3, 3, size=20_000)
    truth = np.where(logits < 0, 0.1, np.where(logits < 1.5, 0.4, 0.9))
    judged = np.eye(2)[(rng.random(20_000) < truth).astype(int)]
    errors = {
        name: np.abs(method.fit(logits, judged).probability(logits, 1) - truth).mean()
        for name, method in CALIBRATIONS.items()
    }
    assert errors["isotonic"] < 0.02 < 0.06 < errors["ordinal"]


def test_a_calibration_is_read_back_as_it_was_written() -> None:
    rng = np.random.default_rng(6)
    logits, distributions = rng.normal(size=80), rng.dirichlet(np.ones(3), size=80)
    for method in CALIBRATIONS.values():
        found = method.fit(logits, distributions)
        assert calibration_of(json.loads(json.dumps(found.to_dict()))) == found
    assert calibration_of({"slope": 2.0, "thresholds": [0.5]}) == OrdinalCalibration(2.0, (0.5,))  # of earlier folders
    with pytest.raises(ValueError, match="method 'spline'"):
        calibration_of({"method": "spline"})
    with pytest.raises(ValueError, match="never fall"):
        IsotonicCalibration((0.0, 1.0), ((0.5,), (0.4,)))
