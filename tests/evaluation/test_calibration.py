"""A calibration fitted on earlier forecasts mends later ones, and knows nothing of them."""

from dataclasses import replace

import numpy as np
import pytest
from outcomes import DAYS, NAMES, simulated

from kronos_qlib.evaluation.calibration import compare_calibration, fit_calibration, measure_reliability
from kronos_qlib.evaluation.measures import measure, summarise

LATE = np.datetime64("2099-01-01")


def coverage(outcomes):
    return summarise(outcomes, measure(outcomes))["coverage_90"]


def test_bands_too_narrow_by_three_are_widened_by_three():
    calibration = fit_calibration(simulated(1 / 3), LATE)
    assert calibration.factors == pytest.approx([3, 3], rel=0.06)
    later = simulated(1 / 3, seed=1)
    table = compare_calibration(later, calibration).set_index(["measure", "step"])
    overall = table.loc[("coverage_90", "all")]
    assert overall["before"] < 0.5 and overall["after"] == pytest.approx(0.9, abs=0.02)
    assert overall["change_low"] <= overall["after"] - overall["before"] <= overall["change_high"]
    assert table.loc[("crps", "2"), "after"] < table.loc[("crps", "2"), "before"]
    assert table.loc[("crps", "2"), "factor"] == calibration.factors[1]


def test_the_factor_is_the_smallest_that_covers():
    outcomes = simulated(1 / 2)
    calibration = fit_calibration(outcomes, LATE)
    assert coverage(calibration.apply(outcomes)) >= 0.9
    assert coverage(replace(calibration, factors=0.98 * calibration.factors).apply(outcomes)) < 0.9


def test_widening_leaves_the_median_and_the_order_of_quantiles():
    outcomes = simulated(1 / 2)
    widened = fit_calibration(outcomes, LATE).apply(outcomes).quantiles
    assert np.array_equal(widened[..., 3], outcomes.quantiles[..., 3])
    assert (np.diff(widened, axis=-1) > 0).all()


def test_a_probability_that_says_too_much_is_drawn_to_what_came():
    def overconfident(seed):
        outcomes = simulated(seed=seed)
        chance = np.where(outcomes.mean_close > 1, 0.6, 0.4)  # right six times of ten
        told = np.random.default_rng(seed).random(len(outcomes)) < chance
        return replace(outcomes, prob_up=np.where(told, 0.99, 0.01))

    later, calibration = overconfident(1), fit_calibration(overconfident(0), LATE)
    assert np.unique(calibration.apply(later).prob_up) == pytest.approx([0.4, 0.6], abs=0.05)
    brier = compare_calibration(later, calibration).set_index("measure").loc["brier"]
    assert brier["after"] < brier["constant"] < brier["before"] and brier["change_high"] < 0
    table = measure_reliability(later, calibration)
    error = (table["forecast"] - table["share"]).abs().groupby(table["when"]).max()
    assert error["after"] < 0.05 < error["before"]
    assert table.groupby("when")["windows"].sum().eq(len(later)).all()


def test_what_came_after_the_last_day_decides_nothing():
    outcomes = simulated(1 / 2)
    until = outcomes.dates[DAYS * NAMES // 2]
    calibration = fit_calibration(outcomes, until)
    assert calibration.until == until
    assert calibration.windows == (outcomes.ends[:, -1] <= until).sum() < (outcomes.dates <= until).sum()
    changed = replace(outcomes, closes=np.where(outcomes.ends > until, 7.0, outcomes.closes))
    again = fit_calibration(changed, until)
    assert np.array_equal(calibration.factors, again.factors)
    assert np.array_equal(calibration.prob_up.y_thresholds_, again.prob_up.y_thresholds_)
    known = fit_calibration(changed, LATE)
    assert not np.array_equal(calibration.factors, known.factors), "it would have been noticed"


def test_forecasts_without_an_end_or_a_spread_are_refused():
    outcomes = simulated()
    with pytest.raises(ValueError, match="no forecast has all 2 bars after it by 2019-12-31"):
        fit_calibration(outcomes, np.datetime64("2019-12-31"))
    outcomes.quantiles[: len(outcomes) // 2, 1] = 1
    with pytest.raises(ValueError, match="more than 10% of the forecasts coincide at step 2.*draw more samples"):
        fit_calibration(outcomes, LATE)
