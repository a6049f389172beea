"""Risk is read off paths as its definitions say, and right forecasts pass its backtests."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2, norm

from kronos_qlib.evaluation.risk import (
    backtest_risk,
    christoffersen,
    drawdown_probability,
    exceedance_residuals,
    expected_range,
    expected_shortfall,
    kupiec,
    measure_risk,
    value_at_risk,
)

VOLATILITY = 0.02


def normal_paths(windows, samples, horizon, seed):
    steps = VOLATILITY * np.random.default_rng(seed).standard_normal((windows, samples, horizon))
    return 1 + steps.cumsum(2)


def test_var_and_shortfall_of_many_paths_are_those_of_the_distribution():
    closes = normal_paths(1, 200_000, 2, seed=0)
    root = np.sqrt([1, 2])
    for level in (0.01, 0.05):
        var = -norm.ppf(level) * VOLATILITY * root
        shortfall = norm.pdf(norm.ppf(level)) / level * VOLATILITY * root
        assert value_at_risk(closes, level)[0] == pytest.approx(var, rel=0.02)
        assert expected_shortfall(closes, level)[0] == pytest.approx(shortfall, rel=0.02)


def test_the_shortfall_counts_a_path_that_belongs_to_the_tail_in_part():
    closes = np.array([0.8, 0.9, 1.0, *np.ones(27)])[None, :, None]
    assert expected_shortfall(closes, 0.05) == pytest.approx((0.2 + 0.5 * 0.1) / 1.5)  # one and a half of 30 paths
    assert value_at_risk(closes, 0.05) == pytest.approx(1 - (0.8 + 0.55 * 0.1))  # of order 31 × 0.05 = 1.55


@pytest.mark.parametrize("samples", [20, 99, 100])
def test_few_paths_of_the_right_distribution_are_exceeded_as_often_as_said(samples):
    level = 0.05 if samples < 99 else 0.01
    var = value_at_risk(normal_paths(40_000, samples, 1, seed=samples), level)[:, 0]
    assert norm.cdf(-var / VOLATILITY).mean() == pytest.approx(level, rel=0.05)


def test_too_few_paths_for_a_level_are_refused():
    with pytest.raises(ValueError, match="a risk at 1.00% needs 99 paths or more, not 20"):
        value_at_risk(normal_paths(1, 20, 1, seed=0), 0.01)
    with pytest.raises(ValueError, match="between 0 and 1, not 1.5"):
        expected_shortfall(normal_paths(1, 20, 1, seed=0), 1.5)


def test_a_drawdown_is_a_fall_from_the_highest_close_the_last_one_included():
    closes = np.array([[[0.95, 0.89, 1.0], [1.2, 1.1, 1.07], [1.3, 1.2, 1.18], [0.9, 1.0, 1.1]]])
    # 11 % from the last close; 10.8 % from 1.2; 9.2 % from 1.3; exactly 10 %, which is not more.
    assert drawdown_probability(closes[:, :3], 0.1) == pytest.approx([2 / 3])
    assert drawdown_probability(closes, 0.12) == [0]


def test_the_expected_range_is_the_mean_of_each_paths_extremes():
    bars = np.zeros((1, 2, 2, 6))
    bars[0, :, :, 1] = [[11, 12], [13, 10]]
    bars[0, :, :, 2] = [[9, 8], [9.5, 9]]
    high, low = expected_range(bars, [10.0])
    assert high == pytest.approx([1.25]) and low == pytest.approx([0.85])


def test_the_table_has_a_row_per_window():
    bars = 10 * np.repeat(normal_paths(3, 30, 2, seed=1)[..., None], 6, axis=3)
    index = pd.Index(["A", "B", "C"])
    table = measure_risk(index, bars, np.full(3, 10.0), levels=[0.05])
    names = ["var_05_1", "var_05_2", "es_05_1", "es_05_2", "drawdown_10", "high", "low"]
    assert list(table) == names and table.index.equals(index)
    assert table["var_05_2"].to_numpy() == pytest.approx(value_at_risk(bars[..., 3] / 10)[:, 1])
    assert (table["es_05_1"] >= table["var_05_1"]).all() and (table["low"] < table["high"]).all()


@pytest.mark.parametrize(
    ("days", "level", "accepted"),
    # The regions in which Kupiec (1995, table 3) does not reject at 5 %: fewer than 7 of 255, and so on.
    [
        (255, 0.01, range(1, 7)),
        (510, 0.01, range(2, 11)),
        (1000, 0.01, range(5, 17)),
        (255, 0.05, range(7, 21)),
        (1000, 0.05, range(38, 65)),
    ],
)
def test_kupiec_rejects_where_the_paper_does(days, level, accepted):
    passed = [count for count in range(1, 100) if kupiec(np.arange(days) < count, level).p > 0.05]
    assert passed == list(accepted)


def test_kupiec_without_a_hit_and_without_a_day():
    assert kupiec(np.zeros(100), 0.05).statistic == pytest.approx(-200 * np.log(0.95))
    assert np.isnan(kupiec([], 0.05).p)


def test_christoffersen_counts_transitions_within_each_group():
    first, second = np.array([0, 0, 1, 1, 0, 0, 0, 0]), np.array([1, 0, 0, 0, 1, 0])
    # From no hit: to none 4 and 2 times, to one 1 and 1 times; from a hit: to none 1 and 2, to one 1 and 0.
    counts = {(0, 0): 6, (0, 1): 2, (1, 0): 3, (1, 1): 1}
    free = 6 * np.log(6 / 8) + 2 * np.log(2 / 8) + 3 * np.log(3 / 4) + 1 * np.log(1 / 4)
    same = 9 * np.log(9 / 12) + 3 * np.log(3 / 12)
    right = 9 * np.log(0.9) + 3 * np.log(0.1)
    assert sum(counts.values()) == 12
    hits, groups = np.concatenate([first, second]), ["A"] * 8 + ["B"] * 6
    independence, conditional = christoffersen(hits, 0.1, groups)
    assert independence.statistic == pytest.approx(2 * (free - same))
    assert conditional.statistic == pytest.approx(2 * (free - right))
    assert conditional.p == pytest.approx(chi2.sf(2 * (free - right), 2))
    order = np.argsort(np.concatenate([np.arange(8), np.arange(6)]), kind="stable")  # by day, as windows are
    assert christoffersen(hits[order], 0.1, np.array(groups)[order]) == (independence, conditional)
    assert np.isnan(christoffersen([True], 0.1)[0].p)


def test_right_forecasts_are_rejected_about_as_often_as_the_tests_say():
    hits = np.random.default_rng(3).random((500, 1000)) < 0.05
    for rejected in (
        np.mean([kupiec(each, 0.05).p < 0.05 for each in hits]),
        np.mean([christoffersen(each, 0.05)[0].p < 0.05 for each in hits]),
        np.mean([christoffersen(each, 0.05)[1].p < 0.05 for each in hits]),
    ):
        assert 0.02 < rejected < 0.1  # known to be a little too many for Christoffersen's


def test_clustered_hits_are_not_independent():
    hits = np.tile([1, 1, 1, *np.zeros(57)], 20)
    assert kupiec(hits, 0.05).p > 0.9
    independence, conditional = christoffersen(hits, 0.05)
    assert independence.p < 1e-6 and conditional.p < 1e-6


def test_exceedances_are_measured_by_the_shortfall():
    residuals = exceedance_residuals([0.03, 0.01, 0.06], [0.02] * 3, [0.04] * 3)
    assert residuals == pytest.approx([-0.25, np.nan, 0.5], nan_ok=True)


def backtested(spread=1.0, samples=500, days=200, names=10):
    paths = 1 + spread * (normal_paths(days * names, samples, 3, seed=4) - 1)
    closes = normal_paths(1, days * names, 3, seed=5)[0]
    dates = np.repeat(np.arange(days).astype("datetime64[D]").astype("datetime64[ns]"), names)
    return backtest_risk(paths, closes, dates, np.tile(np.arange(names), days), drawdown=0.05), closes


def test_the_right_paths_pass_every_backtest():
    table, closes = backtested()
    assert table["measure"].to_list() == ["var", "var", "drawdown"] and table["level"].to_list() == [0.01, 0.05, 0.05]
    assert (table["observed_low"] < table["expected"]).all() and (table["expected"] < table["observed_high"]).all()
    var = table[table["measure"] == "var"]
    assert (var[["kupiec_p", "independence_p", "conditional_p"]] > 0.01).all(axis=None)
    assert (var["es_residual_low"] < 0).all() and (var["es_residual_high"] > 0).all()
    assert (var["groups"] == 10).all() and (var["rejected_kupiec"] <= 0.3).all()
    assert var["observed"].iloc[1] == pytest.approx((1 - closes[:, 0] > 1.645 * VOLATILITY).mean(), abs=0.01)


def test_paths_that_are_too_narrow_fail_them():
    var = backtested(spread=0.6)[0].query("measure == 'var'")
    assert (var["observed_low"] > var["expected"]).all() and (var["kupiec_p"] < 1e-6).all()
    assert (var["es_residual_low"] > 0).all() and (var["rejected_kupiec"] > 0.7).all()


def test_levels_with_too_few_paths_are_left_out_and_shortfalls_of_few_not_tested():
    table = backtested(samples=20)[0]
    assert table["level"].to_list() == [0.05, 0.05] and table["es_residual"].isna().all()
    assert backtested(samples=100)[0]["es_residual"].notna().to_list() == [False, True, False]


def test_few_paths_in_the_tail_make_the_shortfall_look_too_small_by_as_much_as_said():
    losses, paths = 1 - normal_paths(1, 40_000, 1, seed=8)[0, :, 0], normal_paths(40_000, 100, 1, seed=9)
    residuals = exceedance_residuals(losses, value_at_risk(paths)[:, 0], expected_shortfall(paths)[:, 0])
    assert np.nanmean(residuals) == pytest.approx(0.05, abs=0.025)
