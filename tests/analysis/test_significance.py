import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from kronos_qlib.analysis.significance import bootstrap_interval, holm, newey_west, newey_west_t


def _fading(days: int, memory: float, seed: int) -> pd.Series:
    shocks = np.random.default_rng(seed).normal(size=days)
    return pd.Series(shocks).ewm(alpha=1 - memory, adjust=False).mean()


def test_without_lags_t_is_the_ordinary_one() -> None:
    daily = pd.Series(np.random.default_rng(0).normal(0.1, 1, 400))
    t, p = newey_west(daily, 0)
    plain = ttest_1samp(daily, 0)
    assert t == pytest.approx(plain.statistic, rel=0.01)
    assert p == pytest.approx(plain.pvalue, rel=0.05)


def test_t_is_the_sum_of_newey_and_west_written_out() -> None:
    daily, lag = _fading(120, 0.7, 3) + 0.2, 6
    away = (daily - daily.mean()).to_numpy()
    variance = away @ away
    for distance in range(1, lag + 1):
        variance += 2 * (1 - distance / (lag + 1)) * (away[distance:] @ away[:-distance])
    assert newey_west_t(daily, lag) == pytest.approx(daily.sum() / np.sqrt(variance))


def test_autocorrelation_lowers_t_and_widens_the_interval() -> None:
    daily = _fading(1000, 0.8, 0) + 0.1
    assert abs(newey_west_t(daily, 10)) < 0.6 * abs(newey_west_t(daily, 0))
    low, high = bootstrap_interval(daily)
    shuffled = daily.sample(frac=1, random_state=0).reset_index(drop=True)
    narrow = bootstrap_interval(shuffled)
    assert high - low > 1.5 * (narrow[1] - narrow[0])
    assert low < daily.mean() < high


@pytest.mark.slow
def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(60):
        low, high = bootstrap_interval(pd.Series(np.random.default_rng(seed).normal(size=200)))
        hits += low < 0 < high
    assert hits >= 51


def test_same_seed_same_interval_and_days_without_value_are_left_out() -> None:
    daily = _fading(100, 0.3, 1)
    gaps = daily.reindex(np.arange(-5, 100))
    assert bootstrap_interval(daily) == bootstrap_interval(gaps)
    assert bootstrap_interval(daily) != bootstrap_interval(daily, seed=1)
    assert newey_west(daily, 5) == newey_west(gaps, 5)


def test_t_needs_four_times_as_many_days_as_lags() -> None:
    daily = _fading(40, 0.3, 4)
    assert np.isfinite(newey_west(daily, 10)).all()
    assert np.isnan(newey_west(daily[:39], 10)).all()


@pytest.mark.parametrize("daily", [[], [0.1] * 50, [0.1, 0.2, 0.3], [np.nan] * 50])
def test_too_little_to_judge_is_unknown(daily: list[float]) -> None:
    assert np.isnan(newey_west(pd.Series(daily, dtype=float), 10)).all()
    assert np.isnan(bootstrap_interval(pd.Series(daily, dtype=float))).all()


def test_holm_counts_only_what_has_a_p() -> None:
    np.testing.assert_allclose(holm([0.01, np.nan, 0.04, 0.03]), [0.03, np.nan, 0.06, 0.06])
    assert np.isnan(holm([np.nan])).all()
