"""Forecasts are measured as what is known of their distribution says they should be."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scoringrules
from outcomes import DAILY, DAYS, NAMES, simulated
from scipy.stats import kstest

from kronos_qlib.data.windows import Bars, Windows
from kronos_qlib.evaluation.measures import (
    crps_of_quantiles,
    interval,
    lookback_volatility,
    measure,
    perfect_coverage,
    pit_histogram,
    pit_of_paths,
    pit_of_quantiles,
    realised_closes,
    summarise,
    summarise_groups,
    summarise_steps,
    volatility_terciles,
)


def summed_up(outcomes):
    return summarise(outcomes, measure(outcomes))


def test_the_right_forecast_is_calibrated_and_as_good_as_the_right_simple_one():
    row = summed_up(simulated())
    assert row["coverage_50"] == pytest.approx(0.5, abs=0.03) and row["coverage_90"] == pytest.approx(0.9, abs=0.02)
    assert row["coverage_90_low"] < 0.9 < row["coverage_90_high"]
    assert row["pit_ks"] < 0.03
    assert row["crps_less_volatility"] == pytest.approx(0, abs=1e-9)
    assert row["crps_less_last_value_high"] < 0, "a point is worse than the right distribution"


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_a_wrong_spread_shows_in_coverage_pit_and_crps(spread):
    row = summed_up(simulated(spread))
    assert (row["coverage_90"] < 0.6) if spread < 1 else (row["coverage_90"] > 0.98)
    assert row["pit_ks"] > 0.15
    assert row["crps_less_volatility_low"] > 0


def test_the_crps_of_the_last_value_is_its_mean_absolute_error():
    row = summed_up(simulated())
    assert row["crps_last_value"] == pytest.approx(row["mae_last_value"])
    assert row["mae_last_value"] == row["mae_volatility"] and row["rmse_last_value"] == row["rmse_volatility"]


def test_the_crps_of_quantiles_is_near_the_closed_form_and_that_of_many_paths():
    outcomes = simulated(paths=500)
    exact = scoringrules.crps_lognormal(outcomes.closes[:, 0], 0.0, DAILY).mean()
    assert crps_of_quantiles(outcomes.closes, outcomes.quantiles)[:, 0].mean() == pytest.approx(exact, rel=0.03)
    row = summarise(outcomes, measure(outcomes), step=1)
    assert row["crps_volatility_exact"] == pytest.approx(exact)
    assert row["crps_paths"] == pytest.approx(exact, rel=0.01) and row["crps_fair"] == pytest.approx(exact, rel=0.01)


def test_few_samples_cost_crps_but_not_the_fair_one():
    row = summed_up(simulated(paths=5))
    assert row["crps_paths"] > 1.1 * row["crps_volatility_exact"]
    assert row["crps_fair"] == pytest.approx(row["crps_volatility_exact"], rel=0.03)


def test_the_pit_of_few_paths_is_uniform_for_the_right_distribution():
    outcomes = simulated(paths=3)
    pit = pit_of_paths(outcomes.closes, outcomes.paths.swapaxes(1, 2))
    assert kstest(pit.ravel(), "uniform").statistic < 0.03


def test_the_pit_of_quantiles_runs_straight_between_them_and_stays_in_the_tails_beyond():
    quantiles = np.broadcast_to(np.array([1.0, 2, 3, 4, 5, 6, 7]), (6, 7))
    pit = pit_of_quantiles(np.array([1.0, 2.5, 4, 0.5, 8, np.nan]), quantiles)
    assert pit[:3] == pytest.approx([0.05, 0.175, 0.5])
    assert 0 < pit[3] < 0.05 and 0.95 < pit[4] < 1 and np.isnan(pit[5])
    assert 0.05 <= pit_of_quantiles(np.array([1.0]), np.ones((1, 7)))[0] <= 0.95, "all quantiles are the close"


@pytest.mark.parametrize("samples", [2, 5, 20])
def test_bands_of_few_samples_of_the_right_distribution_cover_too_little_as_said(samples):
    rng = np.random.default_rng(samples)
    low, high = np.quantile(rng.random((40_000, samples)), [0.05, 0.95], axis=1)
    assert perfect_coverage(samples)["coverage_90"] == pytest.approx((high - low).mean(), abs=0.005)


def two_instruments():
    dates = np.arange("2020-01-01", "2020-01-07", dtype="datetime64[D]").astype("datetime64[ns]")
    close = np.array([10, 11, 12, 13, 14, 15, 100, 90, 80, 70, 60, 50], np.float32)
    values = np.repeat(close[:, None], 6, axis=1)
    return Bars(values, np.zeros((12, 5), np.int8), np.tile(dates, 2), np.array([0, 6, 12]), ("A", "B"))


def test_what_came_is_the_same_instruments_next_bars_and_missing_at_its_end():
    closes, ends = realised_closes(Windows(two_instruments(), np.array([3, 4, 5, 9, 11]), lookback=3, future=0), 2)
    expected = [[14 / 13, 15 / 13], [15 / 14, np.nan], [np.nan, np.nan], [60 / 70, 50 / 70], [np.nan, np.nan]]
    assert closes == pytest.approx(np.array(expected), nan_ok=True)
    assert ends[0, 1] == np.datetime64("2020-01-06") and np.isnat(ends[1, 1])


def test_the_volatility_is_that_of_the_lookback_alone():
    bars = two_instruments()
    windows = Windows(bars, np.array([3]), lookback=4, future=0)
    expected = np.log(pd.Series([10.0, 11, 12, 13])).diff().std()
    assert lookback_volatility(windows) == pytest.approx([expected])
    bars.values[4:] = 1
    assert lookback_volatility(windows) == pytest.approx([expected])
    with pytest.raises(ValueError, match="lookback of 3 bars or more, not 2"):
        lookback_volatility(replace(windows, lookback=2))


def test_steps_that_have_not_come_are_not_counted():
    outcomes = simulated()
    outcomes.closes[-NAMES:, 1] = np.nan
    outcomes.closes[0] = np.nan
    table = summarise_steps(outcomes, measure(outcomes))
    assert table["evaluated_windows"].to_list() == [len(outcomes) - 1, len(outcomes) - NAMES - 1]
    assert table.notna().all(axis=None)
    outcomes.closes[:, 1] = np.nan
    assert summarise_steps(outcomes, measure(outcomes)).index.to_list() == [1]


def test_direction_counts_the_sign_of_the_mean_return_where_all_bars_came():
    outcomes = simulated()
    right = replace(outcomes, mean_return=outcomes.mean_close - 1)
    assert summed_up(right)["direction"] == 1
    row = summed_up(outcomes)
    assert row["direction_low"] < 0.5 < row["direction_high"]
    right.closes[:, 1] = np.nan
    assert np.isnan(summed_up(right)["direction"])


def test_the_interval_allows_for_what_a_day_and_overlapping_horizons_share():
    rng = np.random.default_rng(1)
    dates = np.repeat(np.arange(200), 50)
    alone, shared = rng.standard_normal(10_000), rng.standard_normal(210)
    day = np.repeat(shared[:200], 50)
    overlapping = np.repeat([shared[start : start + 10].mean() * np.sqrt(10) for start in range(200)], 50)
    width = {
        name: np.diff(interval(values, dates, steps))[0]
        for name, values, steps in (("alone", alone, 1), ("day", day, 1), ("overlapping", overlapping, 10))
    }
    assert width["alone"] == pytest.approx(2 * 1.96 / 100, rel=0.2)
    assert width["day"] == pytest.approx(2 * 1.96 / np.sqrt(200), rel=0.2)
    assert 2.2 < width["overlapping"] / width["day"] < 3.5, "the mean of ten is √10 = 3.2 times as uncertain"
    assert np.isnan(interval(alone[:2450], dates[:2450], 10)).all(), "49 days are too few for 10 steps"
    assert np.isfinite(interval(alone[:2500], dates[:2500], 10)).all()


def test_intervals_of_overlapping_horizons_cover_the_truth_about_as_often_as_they_say():
    hits = 0
    for seed in range(100):
        shocks = np.random.default_rng(seed).standard_normal(210)
        values = np.convolve(shocks, np.ones(10) / 10, "valid")
        low, high = interval(values, np.arange(len(values)), 10)
        hits += low < 0 < high
    assert hits >= 87


def test_terciles_of_volatility_are_each_days_own():
    outcomes = replace(simulated(), volatility=np.random.default_rng(2).random(DAYS * NAMES))
    terciles = volatility_terciles(outcomes)
    assert set(terciles) == {"low", "middle", "high"}
    day = pd.DataFrame({"volatility": outcomes.volatility, "tercile": terciles})[:NAMES]
    bounds = day.groupby("tercile")["volatility"].agg(["min", "max"]).loc[["low", "middle", "high"]].to_numpy().ravel()
    assert (np.diff(bounds) >= 0).all()
    outcomes.volatility[NAMES:] *= 100
    assert (volatility_terciles(outcomes)[:NAMES] == terciles[:NAMES]).all()
    table = summarise_groups(outcomes, measure(outcomes), terciles, "volatility")
    assert table.index.to_list() == ["low", "middle", "high"] and table["evaluated_windows"].sum() == len(outcomes)


def test_the_histogram_of_the_right_forecast_is_flat_and_has_an_area_of_one():
    table = pit_histogram(measure(simulated()))
    assert table["step"].unique().tolist() == ["1", "2", "all"]
    overall = table[table["step"] == "all"]
    assert (overall["density"] * (overall["high"] - overall["low"])).sum() == pytest.approx(1)
    assert overall["density_volatility"].between(0.7, 1.3).all() and overall["density"].between(0.7, 1.3).all()
