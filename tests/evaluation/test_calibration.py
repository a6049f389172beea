"""A calibration fitted on earlier forecasts mends later ones, and knows nothing of them."""

from dataclasses import replace

import numpy as np
import pytest
import scoringrules
from outcomes import DAILY, DAYS, NAMES, simulated

from kronos_qlib.evaluation.calibration import (
    NoSpread,
    calibrate,
    compare_calibration,
    fit_calibration,
    fit_map,
    measure_reliability,
)
from kronos_qlib.evaluation.measures import LEVELS, measure
from kronos_qlib.forecast.calibration import ForecastIdentity

LATE = np.datetime64("2099-01-01")
IDENTITY = ForecastIdentity(
    tokenizer="a", model="b", temperature=1.0, top_k=0, top_p=1.0, s2_rotation="aligned", anchor=False
)


def noisy(spread=1.0, seed=0, signal=0.0, noise=1.0, samples=20):
    """Forecasts whose mean is `signal` times what comes and noise of so many daily deviations."""
    outcomes = simulated(spread, seed, samples)
    rng = np.random.default_rng(seed + 100)
    mean = signal * np.log(outcomes.closes) + noise * DAILY * rng.standard_normal(outcomes.closes.shape)
    paths = outcomes.paths * np.exp(mean)[:, None]
    return replace(
        outcomes,
        paths=paths,
        quantiles=np.moveaxis(np.quantile(paths, LEVELS, axis=1), 0, -1),
        mean_return=paths.mean((1, 2)) - 1,
        prob_up=(paths.mean(2) > 1).mean(1),
    )


def fit(outcomes, until=LATE):
    return fit_calibration(outcomes, until, IDENTITY, "valid", lookback=90)


def table_of(outcomes, calibration):
    return compare_calibration(outcomes, calibration).set_index(["measure", "step"])


def test_a_mean_of_noise_is_shrunk_away_and_the_right_spread_is_left():
    calibration = fit(noisy())
    assert calibration.terciles == (), "volatility says nothing here"
    assert np.abs(calibration.slopes).max() < 0.06
    assert np.array(calibration.spreads) == pytest.approx(1, abs=0.04)
    assert calibration.fitted_on.samples == 20 and calibration.fitted_on.windows == DAYS * NAMES


@pytest.mark.parametrize("samples", [3, 10, 200])
def test_the_spread_is_found_from_few_samples_as_from_many(samples):
    """The fair CRPS of moved samples, or the plain one, would give 10 or 30 % less or more with few."""
    fitted = fit_map(noisy(spread=1 / 2, samples=samples, noise=0.0), np.array([]))
    assert fitted.spreads[0] == pytest.approx([2, 2], rel=0.05)


def test_a_mean_with_something_to_it_keeps_what_it_deserves():
    """Of a mean of variance v (signal) + noise, and s²/n of n samples, the least-squares slope is the share of v."""
    fitted = fit_map(noisy(signal=0.5, noise=0.5, samples=200), np.array([]))
    came = DAILY**2 * np.array([1, 2])
    expected = 0.5 * came / (0.25 * came + 0.25 * DAILY**2 + came / 200)
    assert fitted.slopes[0] == pytest.approx(np.clip(expected, 0, 1), abs=0.05)


def test_terciles_of_volatility_are_kept_where_they_differ():
    outcomes = noisy(noise=0.0)
    rng = np.random.default_rng(3)
    volatility = rng.uniform(0.5, 2, len(outcomes)) * DAILY  # and the wilder third is forecast too quietly
    wild = volatility > np.quantile(volatility, 2 / 3)
    closes = np.where(wild[:, None], outcomes.closes**3, outcomes.closes)
    calibration = fit(replace(outcomes, volatility=volatility, closes=closes))
    assert calibration.terciles == tuple(np.quantile(volatility, [1 / 3, 2 / 3]))
    spreads = np.array(calibration.spreads)
    assert spreads[:2] == pytest.approx(1, abs=0.06) and spreads[2] == pytest.approx(3, rel=0.06)


@pytest.mark.parametrize("samples", [5, 20])
def test_the_limit_of_moved_samples_is_that_of_many_and_not_better(samples):
    """Of samples moved by their own mean the usual fair CRPS is too good; 400 samples need no limit."""
    few, many = noisy(samples=samples, noise=0.0), noisy(samples=400, noise=0.0)
    calibration = fit(few)
    assert np.abs(calibration.slopes).max() < 0.1
    corrected = calibrate(few, calibration)
    limit, usual = (measure(each)["crps_fair"].mean() for each in (corrected, replace(corrected, moved=False)))
    expected = measure(calibrate(many, calibration))["crps_paths"].mean()
    assert limit == pytest.approx(expected, rel=0.01)
    assert usual < expected * (1 - 0.6 / (2 * samples)), "half a sample's part too good"


def test_calibrating_gains_on_later_forecasts_what_the_figures_say():
    calibration, later = fit(noisy(spread=1 / 3)), noisy(spread=1 / 3, seed=1)
    table, corrected = table_of(later, calibration), calibrate(later, calibration)
    for measured in ("crps", "crps_paths"):
        row = table.loc[(measured, "all")]
        assert row["change_high"] < 0 and row["change_low"] <= row["after"] - row["before"] <= row["change_high"]
        assert row["less_volatility"] == pytest.approx(row["after"] - row["volatility"])
    expected = scoringrules.crps_ensemble(later.closes[:, 1], corrected.paths[:, :, 1], estimator="qd").mean()
    assert table.loc[("crps_paths", "2"), "after"] == pytest.approx(expected)
    for kind in ("coverage_90", "coverage_90_adaptive"):
        assert table.loc[(kind, "all"), "before"] < 0.5
        assert table.loc[(kind, "all"), "after"] == pytest.approx(0.9, abs=0.025)
    assert table.loc[("coverage_50", "1"), "after"] == pytest.approx(0.5, abs=0.03)
    assert (np.diff(corrected.quantiles, axis=-1) >= 0).all()
    assert corrected.mean_return == pytest.approx(corrected.paths.mean((1, 2)) - 1)


def test_adaptive_bands_are_those_of_the_past_alone():
    calibration, later = fit(noisy()), noisy(seed=1)
    day = later.dates[len(later) // 2]
    changed = replace(later, closes=np.where(later.ends > day, 7.0, later.closes))
    upto = later.dates <= day
    bands, again = (calibrate(each, calibration, "adaptive").quantiles for each in (later, changed))
    assert np.array_equal(bands[upto], again[upto]) and not np.array_equal(bands[~upto], again[~upto])
    assert np.array_equal(calibrate(later, calibration).paths, calibrate(changed, calibration).paths)


def test_a_probability_that_says_too_much_is_drawn_to_what_came():
    calibration, later = fit(noisy(noise=3.0)), noisy(seed=1, noise=3.0)
    brier = compare_calibration(later, calibration).set_index("measure").loc["brier"]
    assert brier["after"] == pytest.approx(brier["constant"], abs=0.02) and brier["change_high"] < 0 < brier["before"]
    table = measure_reliability(later, calibration)
    table["error"] = (table["forecast"] - table["share"]).abs() * table["windows"]
    error = table.groupby("when")["error"].sum() / len(later)
    assert error["after"] < 0.15 < error["before"]
    assert table.groupby("when")["windows"].sum().eq(len(later)).all()


def test_what_came_after_the_last_day_decides_nothing():
    outcomes = noisy(1 / 2)
    until = outcomes.dates[DAYS * NAMES // 2]
    calibration = fit(outcomes, until)
    assert calibration.fitted_on.until == str(until)[:10]
    assert calibration.fitted_on.windows == (outcomes.ends[:, -1] <= until).sum() < (outcomes.dates <= until).sum()
    after = outcomes.ends > until
    changed = replace(outcomes, closes=np.where(after, 7.0, outcomes.closes))
    assert fit(changed, until) == calibration
    cut = replace(
        outcomes,
        closes=np.where(after, np.nan, outcomes.closes),
        ends=np.where(after, np.datetime64("NaT"), outcomes.ends),
    )
    assert fit(cut, until) == calibration
    assert fit(changed).slopes != calibration.slopes, "it would have been noticed"


def test_the_conformity_scores_are_of_forecasts_that_the_first_half_knows_nothing_of():
    """Purged: no forecast of the first half has a bar in the second, so nothing of it can decide the first map."""
    outcomes = noisy(1 / 2)
    middle = np.unique(outcomes.dates)[DAYS // 2]
    across = (outcomes.dates < middle) & (outcomes.ends[:, -1] >= middle)
    assert across.sum() == 2 * NAMES
    changed = replace(outcomes, closes=np.where(across[:, None], 7.0, outcomes.closes))
    calibration, again = fit(outcomes), fit(changed)
    assert again.conformity == calibration.conformity and again.spreads != calibration.spreads


def test_the_order_of_forecasts_decides_nothing():
    outcomes = noisy(1 / 2)
    mixed = fit(outcomes.take(np.random.default_rng(5).permutation(len(outcomes))))
    calibration = fit(outcomes)
    np.testing.assert_allclose(mixed.spreads, calibration.spreads, rtol=1e-5)  # sums round otherwise
    np.testing.assert_allclose(mixed.slopes, calibration.slopes, rtol=1e-9)
    np.testing.assert_allclose(mixed.conformity, calibration.conformity, rtol=1e-4, atol=1e-4)


def test_forecasts_without_an_end_a_spread_or_paths_are_refused():
    outcomes = noisy()
    with pytest.raises(ValueError, match="0 forecasts have all 2 bars after them by 2019-12-31"):
        fit(outcomes, np.datetime64("2019-12-31"))
    with pytest.raises(ValueError, match="in the first half and 40 in the second; each should have 20"):
        fit(outcomes, outcomes.dates[3 * NAMES])
    with pytest.raises(ValueError, match="fitted on sample paths"):
        fit(simulated())
    paths = outcomes.paths.copy()
    paths[:, :, 1] = 1.01
    with pytest.raises(NoSpread, match="the samples coincide at step 2.*draw more samples"):
        fit(replace(outcomes, paths=paths))


def test_bars_that_did_not_come_are_left_out_of_the_comparison():
    calibration, later = fit(noisy()), noisy(seed=1)
    last = later.dates >= later.dates[-1]
    absent = np.where(last[:, None], np.nan, later.closes), np.where(last[:, None], np.datetime64("NaT"), later.ends)
    table = table_of(replace(later, closes=absent[0], ends=absent[1]), calibration)
    shorter = table_of(later.take(~last), calibration)
    assert table["after"].to_numpy() == pytest.approx(shorter["after"].to_numpy())
    assert measure(later)["crps"].shape == (len(later), 2)
