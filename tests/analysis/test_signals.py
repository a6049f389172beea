import numpy as np
import pandas as pd
import pytest

from kronos_qlib.analysis import signals
from kronos_qlib.analysis.exposure import residual_scores
from kronos_qlib.analysis.portfolio import capacity
from kronos_qlib.analysis.signals import (
    daily_ic,
    daily_rank_ic,
    decile_labels,
    half_life,
    monotonicity,
    rank_autocorrelation,
    wide,
)

DAYS = pd.bdate_range("2020-01-01", periods=80, name="datetime")
NAMES = pd.Index([f"I{number:03}" for number in range(60)], name="instrument")


def _noise(seed: int) -> pd.DataFrame:
    return pd.DataFrame(np.random.default_rng(seed).normal(size=(len(DAYS), len(NAMES))), DAYS, NAMES)


def test_ic_ignores_rows_with_a_score_or_a_label_missing() -> None:
    scores, labels = _noise(0), _noise(1)
    scores.iloc[0, :5], labels.iloc[0, 3:9] = np.nan, np.nan
    both = pd.DataFrame({"score": scores.iloc[0], "label": labels.iloc[0]}).dropna()
    assert daily_ic(scores, labels).iloc[0] == pytest.approx(both.corr().iloc[0, 1])
    assert daily_rank_ic(scores, labels).iloc[0] == pytest.approx(both.corr("spearman").iloc[0, 1])


def test_ic_of_a_constant_day_is_unknown_and_not_rounding() -> None:
    scores = _noise(0)
    scores.iloc[3] = 0.1
    ic = daily_ic(scores, _noise(1))
    assert ic.isna().to_numpy().nonzero()[0].tolist() == [3]


def test_deciles_of_scores_that_are_the_labels_rise_and_hold_a_tenth_each() -> None:
    labels = _noise(0)
    deciles = decile_labels(labels, labels)
    assert (deciles.diff(axis=1).iloc[:, 1:] > 0).all().all()
    assert deciles.iloc[0, 9] == pytest.approx(labels.iloc[0].nlargest(6).mean())
    assert monotonicity(deciles.mean()) == pytest.approx(1)
    assert monotonicity(-deciles.mean()) == pytest.approx(-1)


def test_equal_scores_share_their_mean_label_whatever_their_order() -> None:
    scores, labels = _noise(0) * 0, _noise(1)
    scores.iloc[:, :9] = 1.0
    deciles = decile_labels(scores, labels).iloc[0]
    high, low = labels.iloc[0, :9].mean(), labels.iloc[0, 9:].mean()
    assert deciles[10] == pytest.approx(high)
    assert deciles[9] == pytest.approx((high + low) / 2)  # three of each
    assert deciles[:8].tolist() == pytest.approx([low] * 8)
    order = np.random.default_rng(2).permutation(len(NAMES))
    mixed = decile_labels(scores.iloc[:, order], labels.iloc[:, order])
    pd.testing.assert_series_equal(mixed.iloc[0], deciles)
    assert decile_labels(scores * 0, labels).isna().all().all()


def test_half_life_of_ranks_that_fade_by_a_known_rate() -> None:
    rng = np.random.default_rng(0)
    scores = [rng.normal(size=200)]
    for _ in range(200):
        scores.append(0.9 * scores[-1] + np.sqrt(1 - 0.9**2) * rng.normal(size=200))
    autocorrelation = rank_autocorrelation(pd.DataFrame(scores), longest=20)
    assert half_life(autocorrelation) == pytest.approx(np.log(0.5) / np.log(0.9), rel=0.1)


@pytest.mark.parametrize("cells", [1, 1000, 10**6])
def test_autocorrelation_is_the_mean_rank_ic_with_the_scores_of_a_lag_later(cells, monkeypatch) -> None:
    monkeypatch.setattr(signals, "CELLS_AT_ONCE", cells)
    scores = _noise(0).rolling(5).mean().iloc[4:]
    scores = scores.where(np.random.default_rng(1).random(scores.shape) > 0.2)
    expected = {
        lag: daily_rank_ic(scores.iloc[:-lag], scores.iloc[lag:].set_axis(scores.index[:-lag])).mean()
        for lag in range(1, 7)
    }
    pd.testing.assert_series_equal(rank_autocorrelation(scores, longest=6), pd.Series(expected))
    assert rank_autocorrelation(scores * 0, longest=6).isna().all() and rank_autocorrelation(scores[:1]).empty


def test_half_life_between_lags_never_and_unknown() -> None:
    assert half_life(pd.Series({1: 0.8, 2: 0.4})) == pytest.approx(1.75)
    assert half_life(pd.Series({1: 0.99, 2: 0.98})) == np.inf
    assert np.isnan(half_life(pd.Series({1: np.nan, 2: np.nan})))


def test_residual_keeps_what_factors_lack_and_nothing_else() -> None:
    factors = pd.DataFrame({name: _noise(seed).stack() for seed, name in enumerate(["one", "two"])})
    own = _noise(9).stack()
    left = wide(residual_scores(factors["one"] + 0.5 * factors["two"] + own, factors))
    assert daily_rank_ic(left, wide(own)).mean() > 0.9
    assert (
        abs(daily_rank_ic(left, wide(factors["one"])).mean()) < 0.06
    )  # ranks of residuals are not the residuals of ranks


def test_score_that_is_a_factor_leaves_nothing() -> None:
    factors = pd.DataFrame({name: _noise(seed).stack() for seed, name in enumerate(["one", "two"])})
    assert residual_scores(np.exp(factors["one"]), factors).empty
    assert residual_scores(0 * factors["one"], factors).empty


def test_rows_without_every_factor_are_left_out_of_the_residual() -> None:
    factors = pd.DataFrame({name: _noise(seed).stack() for seed, name in enumerate(["one", "two"])})
    factors.iloc[0, 1], factors.iloc[1, 0] = np.nan, np.inf
    assert len(residual_scores(_noise(5).stack(), factors)) == len(factors) - 2


def test_capacity_grows_with_the_market_and_not_with_the_account() -> None:
    index = pd.MultiIndex.from_product([DAYS[:20], NAMES[:5]])
    trades, amounts = pd.Series(2e6, index), pd.Series(1e8, index)
    report = pd.DataFrame({"account": 5e7}, DAYS)
    assert capacity(trades, amounts, report) == pytest.approx(0.01 * 1e8 / 2e6 * 5e7)
    assert capacity(trades, 3 * amounts, report) == pytest.approx(3 * capacity(trades, amounts, report))
    assert capacity(2 * trades, amounts, 2 * report) == pytest.approx(capacity(trades, amounts, report))
    assert np.isnan(capacity(trades, amounts.iloc[:0], report))
