"""Baseline forecasts are what their definitions say, and each is a function of its own bars up to its score date."""

from dataclasses import replace

import numpy as np
import pytest
from arch.univariate import GARCH, StudentsT, ZeroMean
from outcomes import DAILY, simulated
from scipy.stats import norm, t

from kronos_qlib.data.windows import Bars, Windows
from kronos_qlib.evaluation.baselines import (
    FORECASTS,
    KEPT,
    BaselineForecast,
    compare_baselines,
    ewma_variance,
    fit_garch,
    forecast_baselines,
    log_returns,
    range_variance,
)
from kronos_qlib.evaluation.measures import (
    LEVELS,
    crps_of_quantiles,
    diebold_mariano,
    energy_scores,
    implied_variance,
    inside,
    interval_scores,
    qlike,
    realised_closes,
)

LOOKBACK, HORIZON, COUNT = 20, 3, 420
OMEGA, ALPHA, BETA, FREEDOM = 2e-5, 0.12, 0.83, 6.0


def garch_returns(count, seed):
    """Returns of a GARCH(1,1) with Student's t: a daily volatility of 2 %."""
    rng = np.random.default_rng(seed)
    draws = rng.standard_t(FREEDOM, count) * np.sqrt(1 - 2 / FREEDOM)
    returns, variance = np.empty(count), OMEGA / (1 - ALPHA - BETA)
    for day, draw in enumerate(draws):
        returns[day] = np.sqrt(variance) * draw
        variance = OMEGA + ALPHA * returns[day] ** 2 + BETA * variance
    return returns


def market(instruments=3, count=COUNT, seed=0):
    """Bars of instruments whose returns are a GARCH's; opens and ranges are drawn about the closes."""
    rng, values = np.random.default_rng(seed), []
    for instrument in range(instruments):
        close = 10 * np.exp(np.cumsum(garch_returns(count, seed + instrument)))
        opened = close * np.exp(0.005 * rng.standard_normal(count))
        high = np.maximum(opened, close) * np.exp(0.005 * rng.random(count))
        low = np.minimum(opened, close) * np.exp(-0.005 * rng.random(count))
        values.append(np.column_stack([opened, high, low, close, close, close]))
    dates = np.busday_offset("2019-01-01", np.arange(count), roll="forward").astype("datetime64[ns]")
    return Bars(
        values=np.concatenate(values).astype(np.float32),
        stamp=np.zeros((instruments * count, 5), np.int8),
        dates=np.tile(dates, instruments),
        offsets=np.arange(instruments + 1) * count,
        instruments=tuple(f"I{number}" for number in range(instruments)),
    )


BARS = market()
DAYS = np.array([300, 301, 340, COUNT - 1])
WINDOWS = Windows(BARS, (DAYS[:, None] + BARS.offsets[:-1]).ravel(), LOOKBACK, future=0)


@pytest.fixture(scope="module")
def forecasts():
    return forecast_baselines(WINDOWS, HORIZON, list(FORECASTS))


def same(one, other):
    arrays = [(one.quantiles, other.quantiles), (one.variance, other.variance), (one.paths, other.paths)]
    return all((a is None and b is None) or np.array_equal(a, b, equal_nan=True) for a, b in arrays)


@pytest.mark.parametrize("name", FORECASTS)
def test_bars_after_the_score_date_change_no_forecast(forecasts, name):
    day = 340
    values = BARS.values.copy()
    later = np.arange(len(BARS)) % COUNT > day
    values[later] *= np.random.default_rng(5).uniform(0.5, 2, (later.sum(), 1)).astype(np.float32)
    rows = np.flatnonzero(WINDOWS.ends % COUNT <= day)
    shocked = Windows(replace(BARS, values=values), WINDOWS.ends, LOOKBACK, future=0)
    again = forecast_baselines(shocked, HORIZON, [name])[name]
    for before, after in ((forecasts[name].quantiles, again.quantiles), (forecasts[name].variance, again.variance)):
        assert np.array_equal(before[rows], after[rows], equal_nan=True)
    if name != "last_value":
        assert not same(forecasts[name], again), "forecasts of the last day would have noticed"


@pytest.mark.parametrize("name", FORECASTS)
def test_a_forecast_depends_on_its_own_window_alone(forecasts, name):
    whole = forecasts[name]
    for rows in (np.arange(len(WINDOWS))[::-1], np.array([7]), np.array([5, 2, 10])):
        part = forecast_baselines(WINDOWS.take(rows), HORIZON, [name])[name]
        kept = None if whole.paths is None else whole.paths[rows]
        assert same(part, replace(whole, quantiles=whole.quantiles[rows], variance=whole.variance[rows], paths=kept))
    alone = Bars(BARS.values[:COUNT], BARS.stamp[:COUNT], BARS.dates[:COUNT], np.array([0, COUNT]), ("I0",))
    other = forecast_baselines(Windows(alone, DAYS, LOOKBACK, future=0), HORIZON, [name])[name]
    assert np.array_equal(other.quantiles, whole.quantiles[::3]), "other instruments do not matter"


def test_ewma_is_the_weighted_mean_of_squared_returns_at_the_root_of_the_step(forecasts):
    end = WINDOWS.ends[1]
    squares = np.diff(np.log(BARS.values[BARS.offsets[1] : end + 1, 3].astype(float)))[::-1] ** 2
    weights = 0.94 ** np.arange(len(squares))
    variance = weights @ squares / weights.sum()
    assert ewma_variance(BARS)[end] == pytest.approx(variance)
    expected = np.exp(np.sqrt(variance * np.arange(1, HORIZON + 1))[:, None] * norm.ppf(LEVELS))
    np.testing.assert_allclose(forecasts["ewma"].quantiles[1], expected, rtol=1e-12)
    np.testing.assert_allclose(forecasts["ewma"].variance[1], variance * np.arange(1, HORIZON + 1))


def test_historical_simulation_draws_standardised_returns_and_rescales_them(forecasts):
    end = WINDOWS.ends[4]
    variances, returns = ewma_variance(BARS), log_returns(BARS)
    days = np.arange(BARS.offsets[1] + 21, end + 1)
    pool = returns[days] / np.sqrt(variances[days - 1])
    pool = np.sqrt(variances[end]) * (pool - pool.mean())
    forecast = forecasts["historical_simulation"]
    exact = np.exp(np.quantile(pool, LEVELS, method="inverted_cdf"))
    below = (np.exp(pool)[:, None] <= forecast.quantiles[4, 0]).mean(0)
    np.testing.assert_allclose(below, LEVELS, atol=0.04)  # 1,000 draws: two standard errors are 0.03
    np.testing.assert_allclose(np.log(forecast.quantiles[4, 0]), np.log(exact), atol=0.2 * pool.std())
    growth = 0.06 * pool.var() / variances[end] + 0.94  # the volatility goes on along a path as EWMA's does
    assert forecast.variance[4] == pytest.approx(pool.var() * growth ** np.arange(HORIZON) @ np.tri(HORIZON).T)
    drawn = np.square(np.log(forecast.paths[4])).mean(0)
    assert drawn == pytest.approx(forecast.variance[4], rel=0.6), "100 paths"
    first = np.log(forecast.paths[4, :, 0])
    assert np.abs(first[:, None] - pool).min(1).max() < 1e-5, "each first step is a past return, rescaled"
    assert forecast.paths.shape == (len(WINDOWS), KEPT, HORIZON) and forecast.about["ewma_instead"] == 0


def test_the_range_variance_is_garman_klass_and_the_night():
    values = np.array([[10, 11, 9, 10.5], [10.6, 11, 10.4, 10.8], [10.7, 10.9, 10, 10.2]], np.float32)
    values = np.column_stack([values, np.ones((3, 2), np.float32)])
    dates = np.arange("2020-01-01", "2020-01-04", dtype="datetime64[D]").astype("datetime64[ns]")
    bars = Bars(values, np.zeros((3, 5), np.int8), dates, np.array([0, 3]), ("A",))
    windows = Windows(bars, np.array([2]), 3, future=0)

    def of_bar(opened, high, low, close, before):
        within = 0.5 * np.log(high / low) ** 2 - (2 * np.log(2) - 1) * np.log(close / opened) ** 2
        return np.log(opened / before) ** 2 + within

    expected = (of_bar(10.6, 11, 10.4, 10.8, 10.5) + of_bar(10.7, 10.9, 10, 10.2, 10.8)) / 2
    assert range_variance(windows)[0] == pytest.approx([expected], rel=1e-4)
    adjusted = replace(bars, values=values * np.float32(0.037))
    assert range_variance(replace(windows, bars=adjusted))[0] == pytest.approx([expected], rel=1e-4)
    values[2, 1] = 10.5  # a high below the open: the open counts as the high
    widened = (of_bar(10.6, 11, 10.4, 10.8, 10.5) + of_bar(10.7, 10.7, 10, 10.2, 10.8)) / 2
    assert range_variance(windows)[0] == pytest.approx([widened], rel=1e-4)
    values[2, 2] = -1
    variance, used = range_variance(windows)
    assert used[0] == 1 and variance[0] == pytest.approx(of_bar(10.6, 11, 10.4, 10.8, 10.5), rel=1e-4)
    values[1, 0] = np.nan
    assert np.isnan(range_variance(windows)[0][0])
    forecast = forecast_baselines(windows, 1, ["garman_klass"])["garman_klass"]
    assert forecast.about["ewma_instead"] == 1 and forecast.about["instruments_of_these"] == ["A"]
    assert forecast.variance[0, 0] == ewma_variance(bars)[2]


def test_garch_goes_on_from_the_fit_before_the_month_as_arch_would(forecasts):
    row = np.flatnonzero(WINDOWS.ends == 340)[0]
    month = BARS.dates[340].astype("datetime64[M]")
    before = np.flatnonzero(BARS.dates[:COUNT] < month)[-1]
    returns = 100 * log_returns(BARS)[1:341]
    settings = {"volatility": GARCH(1, 0, 1), "distribution": StudentsT(), "rescale": False}
    fitted = ZeroMean(returns[:before], **settings).fit(disp="off")
    fixed = ZeroMean(returns, **settings).fix(fitted.params)
    expected = fixed.forecast(horizon=HORIZON).variance.to_numpy()[-1].cumsum() / 1e4
    np.testing.assert_allclose(forecasts["garch_t"].variance[row], expected, rtol=0.02)
    spread = np.sqrt(expected[0]) * np.sqrt(1 - 2 / fitted.params["nu"]) * t.ppf(LEVELS, fitted.params["nu"])
    drawn = np.log(forecasts["garch_t"].quantiles[row, 0])
    np.testing.assert_allclose(drawn, spread, atol=0.2 * np.sqrt(expected[0]))


def test_garch_finds_the_parameters_of_the_process():
    omega, alpha, beta, freedom, _ = fit_garch(garch_returns(6000, seed=1))
    assert alpha == pytest.approx(ALPHA, abs=0.03) and beta == pytest.approx(BETA, abs=0.06)
    assert omega / (1 - alpha - beta) == pytest.approx(OMEGA / (1 - ALPHA - BETA), rel=0.3)
    assert 4.5 < freedom < 8


def test_garch_beats_a_constant_volatility_where_the_variance_moves():
    bars = market(instruments=3, count=600, seed=10)
    days = np.arange(400, 599)
    windows = Windows(bars, (days[:, None] + bars.offsets[:-1]).ravel(), LOOKBACK, future=0)
    closes, _ = realised_closes(windows, 1)
    garch = forecast_baselines(windows, 1, ["garch_t"])["garch_t"]
    constant = np.full(closes.shape, log_returns(bars)[1:400].var())
    assert garch.about["fits"] == 3 * 10 and garch.about["ewma_instead"] == 0
    assert (qlike(closes, garch.variance) - qlike(closes, constant)).mean() < -0.05
    assert inside(closes, garch.quantiles, (0.05, 0.95)).mean() == pytest.approx(0.9, abs=0.02)


def test_young_and_motionless_instruments_fall_back_to_ewma_and_are_named():
    bars = market(instruments=2, count=45)
    bars.values[45:, :] = 10
    windows = Windows(bars, np.array([44, 89]), LOOKBACK, future=0)
    found = forecast_baselines(windows, 2, ["garch_t", "historical_simulation"])
    garch, history = found["garch_t"], found["historical_simulation"]
    assert garch.about["fits"] == 0 and garch.about["instruments_of_these"] == ["I0", "I1"]
    assert history.about["ewma_instead"] == 2, "24 standardised returns are too few"
    variance = ewma_variance(bars)[44]
    assert garch.variance[0] == pytest.approx([variance, 2 * variance])
    assert np.log(history.quantiles[0, 0, [1, 5]]) == pytest.approx(
        np.sqrt(variance) * norm.ppf([0.1, 0.9]), abs=0.15 * np.sqrt(variance)
    )
    assert np.allclose(garch.quantiles[1], 1)


def test_an_unknown_baseline_is_named():
    with pytest.raises(ValueError, match="unknown baseline 'arima'; known: last_value, volatility, ewma"):
        forecast_baselines(WINDOWS, HORIZON, ["arima"])


def test_diebold_mariano_with_the_correction_of_harvey_leybourne_and_newbold():
    rng = np.random.default_rng(0)
    daily, steps = 0.1 + np.convolve(rng.standard_normal(62), [1, 0.5, 0.25], "valid"), 3
    days, d = len(daily), daily - daily.mean()
    variance = (d @ d + 2 * d[1:] @ d[:-1] + 2 * d[2:] @ d[:-2]) / days
    factor = np.sqrt((days + 1 - 2 * steps + steps * (steps - 1) / days) / days)
    expected = factor * daily.mean() / np.sqrt(variance / days)
    names = np.repeat(daily, 4) + np.tile([-2.0, -1, 1, 2], days)  # four instruments, whose mean is the day's
    statistic, p = diebold_mariano(names, np.repeat(np.arange(days), 4), steps)
    assert statistic == pytest.approx(expected) and p == pytest.approx(2 * t.sf(abs(expected), days - 1))
    assert np.isnan(diebold_mariano(daily[:14], np.arange(14), 3)).all(), "14 days are too few for 3 steps"
    assert np.isnan(diebold_mariano(np.ones(60), np.arange(60), 1)).all()


def test_diebold_mariano_rejects_equal_forecasts_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    walks = rng.standard_normal((400, 102))
    daily = walks[:, 2:] + walks[:, 1:-1] + walks[:, :-2]
    rejected = np.mean([diebold_mariano(values, np.arange(100), 3)[1] < 0.05 for values in daily])
    assert 0.03 < rejected < 0.1


def test_the_interval_score_is_the_width_and_what_the_close_misses_it_by():
    quantiles = np.array([[0.9, 0.92, 0.95, 1, 1.05, 1.08, 1.1]])
    scores = [float(interval_scores(np.array([close]), quantiles, (0.05, 0.95))) for close in (1.0, 1.13, 0.88)]
    assert scores == pytest.approx([0.2, 0.2 + 2 / 0.1 * 0.03, 0.2 + 2 / 0.1 * 0.02])


def test_the_implied_variance_of_a_log_normal_is_its_own_and_the_truth_has_the_least_qlike():
    spread = np.array([[0.01, 0.03]])
    quantiles = np.exp(spread[..., None] * norm.ppf(LEVELS))
    assert implied_variance(quantiles) == pytest.approx(spread**2)
    draws = np.exp(0.02 * np.random.default_rng(0).standard_normal((20_000, 1)))
    assert implied_variance(quantiles, draws.reshape(1, -1, 1)) == pytest.approx(0.02**2, rel=0.03)
    means = [qlike(draws, np.full(draws.shape, volatility**2)).mean() for volatility in (0.017, 0.02, 0.024)]
    assert means[1] < min(means[0], means[2])
    assert means[1] == pytest.approx(np.log(0.02**2) + 1, rel=0.01)


def test_the_energy_score_is_that_of_the_paths_and_fair():
    closes, paths = np.array([[1.0, 1.1], [1.0, np.nan]]), np.array([[[1.0, 1.0], [1.1, 1.1], [0.9, 1.2]]] * 2)
    miss = np.linalg.norm(paths[0] - closes[0], axis=1).mean()
    pairs = [np.linalg.norm(paths[0, a] - paths[0, b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    scores = energy_scores(closes, paths)
    assert scores[0] == pytest.approx(miss - np.mean(pairs) / 2) and np.isnan(scores[1])
    assert energy_scores(closes, None) is None and energy_scores(closes, paths[:, :1]) is None


@pytest.mark.parametrize("samples", [5, 20])
def test_the_energy_score_of_moved_paths_is_that_of_many_and_not_better(samples):
    """Paths moved by their own mean, and scaled to keep their spread, seem too near to what came."""
    closes = np.random.default_rng(0).normal(1, 0.1, (5000, 2))
    drawn = np.random.default_rng(1).normal(1, 0.1, (5000, samples, 2))
    paths = 1 + (drawn - drawn.mean(1, keepdims=True)) * np.sqrt(samples / (samples - 1))
    usual, expected = energy_scores(closes, paths).mean(), energy_scores(closes, drawn).mean()
    assert energy_scores(closes, paths, moved=True).mean() == pytest.approx(expected, rel=0.02)
    assert usual < expected * (1 - 0.5 / (2 * samples))


def test_the_table_compares_the_model_with_each_baseline():
    outcomes, right = simulated(spread=2.0, paths=40), simulated(seed=1, paths=40)
    variance = np.broadcast_to(DAILY**2 * np.arange(1, outcomes.horizon + 1), outcomes.closes.shape)
    truth = BaselineForecast(right.quantiles, variance)
    table = compare_baselines(outcomes, {"ewma": truth}).set_index(["forecast", "step"])
    assert list(table.index) == [(name, step) for name in ("kronos", "ewma") for step in ("1", "2", "all")]
    row, kronos = table.loc[("ewma", "all")], table.loc[("kronos", "all")]
    assert kronos["crps"] == pytest.approx(crps_of_quantiles(outcomes.closes, outcomes.quantiles).mean())
    assert row["crps_difference"] == pytest.approx(kronos["crps"] - row["crps"])
    assert row["crps_difference_low"] > 0 and row["dm_t"] > 2 and row["dm_p"] < 0.05, "twice the spread is worse"
    assert row["coverage_90"] == pytest.approx(0.9, abs=0.02) and kronos["coverage_90"] > 0.97
    assert row["interval_90"] < kronos["interval_90"] and row["qlike"] < kronos["qlike"]
    assert table.loc["kronos", ["dm_t", "crps_difference"]].isna().all(axis=None)
    assert table["energy"].isna().all(), "no baseline has paths to compare with"
    energy = compare_baselines(outcomes, {"garch_t": replace(truth, paths=right.paths)}).groupby("forecast")["energy"]
    assert 0 < energy.last()["garch_t"] < energy.last()["kronos"]
