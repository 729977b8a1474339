"""The scaling curve: laws that are known, and the forecast they make."""

from __future__ import annotations

import numpy as np
import pytest

from relevance_ray.evaluation.scaling import (
    REACH,
    PowerLaw,
    fit_power_law,
    scaling_markdown,
    scaling_plot,
    scaling_report,
)

SIZES = [1000, 2000, 4000, 8000, 16000]


@pytest.mark.parametrize("law", [PowerLaw(0.9, 2.0, 0.4), PowerLaw(0.8, 30.0, 0.9), PowerLaw(1.0, 1.0, 0.15)])
def test_a_law_is_found_in_its_own_values(law: PowerLaw) -> None:
    found = fit_power_law(SIZES, law.at(np.array(SIZES)))
    np.testing.assert_allclose(found.at(np.array([500, 3000, 64000])), law.at(np.array([500, 3000, 64000])), atol=2e-3)
    value = float(law.at(20000))
    assert found.pairs_for(value) == pytest.approx(20000, rel=0.1)
    assert law.pairs_for(value) == pytest.approx(20000)


def test_a_student_that_does_not_gain_has_a_flat_law_that_reaches_nothing_above() -> None:
    flat = fit_power_law(SIZES, [0.8, 0.79, 0.8, 0.79, 0.78])
    assert flat.scale == 0
    assert flat.pairs_for(0.9) == float("inf")
    assert flat.pairs_for(0.5) == 0
    assert PowerLaw(0.8, 1.0, 0.5).pairs_for(0.8) == float("inf")


def test_two_sizes_make_no_law() -> None:
    with pytest.raises(ValueError, match="at least 3 sizes"):
        fit_power_law([1, 2], [0.5, 0.6])


def queries(mean: float, seed: int, num: int = 400) -> np.ndarray:
    """nDCG of queries whose hardness is shared by all models, and a little noise of each model's own."""
    shared = np.random.default_rng(0).uniform(-0.1, 0.1, num)
    own = np.random.default_rng(seed).normal(0, 0.02, num)
    return mean + (shared - shared.mean()) + (own - own.mean())


LAW = PowerLaw(0.9, 2.0, 0.4)


def report(teacher: float) -> dict:
    by_size = {size: np.stack([queries(float(LAW.at(size)), size + seed) for seed in range(3)]) for size in SIZES}
    lines = {"teacher": queries(teacher, 1), "human_only": queries(0.7, 2)}
    return scaling_report(by_size, lines, num_resamples=200)


def test_a_flat_curve_is_told_in_words() -> None:
    flat = scaling_report(
        {size: queries(0.8, 7)[None] for size in SIZES}, {"teacher": queries(0.9, 1)}, num_resamples=50
    )
    text = scaling_markdown(flat)
    assert "No gain with more pairs was measured. By this curve the student does not pass" in text
    assert "pairs^" not in text


def test_a_curve_that_crosses_its_teacher_says_where() -> None:
    law = PowerLaw(0.9, 2.0, 0.4)
    found = report(float(law.at(40000)))
    forecast = found["forecast"]
    assert forecast["pairs"] == pytest.approx(40000, rel=0.05)
    assert forecast["low"] < 40000 < forecast["high"]
    assert forecast["reached"] == 1.0
    assert "passes its teacher at" in forecast["sentence"]
    assert [row["pairs"] for row in found["sizes"]] == SIZES
    first, *_, last = found["sizes"]
    assert last["to_teacher"]["high"] < 0
    assert last["to_size_before"]["low"] > 0
    assert "to_size_before" not in first
    assert found["baselines"]["human_only"]["to_teacher"]["high"] < 0


def test_a_curve_that_has_crossed_says_so_and_one_that_never_does_gives_no_number() -> None:
    passed = report(float(PowerLaw(0.9, 2.0, 0.4).at(5000)))
    assert passed["forecast"]["pairs"] == pytest.approx(5000, rel=0.1)
    assert "has passed" in passed["forecast"]["sentence"]
    assert passed["sizes"][-1]["to_teacher"]["low"] > 0
    always = report(0.5)["forecast"]
    assert (always["pairs"], always["low"]) == (1000, 1000)
    assert "the fewest pairs that were measured, 1,000" in always["sentence"]
    never = report(0.93)["forecast"]
    assert (never["pairs"], never["high"]) == (None, None)
    assert f"within {REACH * SIZES[-1]:,} pairs" in never["sentence"]


def test_queries_without_a_relevant_product_are_left_out_of_all() -> None:
    values = queries(0.8, 3)
    values[7] = np.nan
    found = scaling_report(dict.fromkeys(SIZES, values[None]), {"teacher": queries(0.9, 1)}, num_resamples=50)
    assert found["queries"] == 399


def test_the_table_and_the_picture_show_every_size_and_model() -> None:
    found = report(0.88)
    text = scaling_markdown(found)
    assert text.count("pairs |") == len(SIZES)
    assert "| teacher | 0.8800 |" in text
    assert "Fitted law: nDCG = 0." in text
    assert scaling_plot(found).startswith(b"\x89PNG")
