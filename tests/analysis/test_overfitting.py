"""Deflated figures, track record and overfitting, against the examples of their papers and by simulation."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from kronos_qlib.analysis.overfitting import (
    deflated_mean,
    deflated_sharpe,
    expected_maximum,
    minimum_track_record,
    probability_of_overfitting,
)
from kronos_qlib.analysis.significance import newey_west_t


def with_moments(mean: float, deviation: float, skewness: float, kurtosis: float, days: int) -> pd.Series:
    """Returns of three values, two of them rare, that have these moments."""
    middle = np.sqrt(kurtosis - skewness**2 * 3 / 4)
    up, down = skewness / 2 + middle, skewness / 2 - middle
    p_up, p_down = 1 / (up * (up - down)), 1 / (down * (down - up))
    counts = np.round(np.array([p_up, p_down]) * days).astype(int)
    values = np.concatenate([np.full(counts[0], up), np.full(counts[1], down), np.zeros(days - counts.sum())])
    values = (values - values.mean()) / values.std(ddof=1)
    return pd.Series(mean + deviation * values)


def test_the_papers_example_of_a_deflated_sharpe_ratio():
    # Bailey & López de Prado 2014: 5 years of 250 days, Sharpe 2.5 a year, skewness −3, kurtosis 10, 100 trials whose
    # ratios have a variance of ½ a year: SR0 = 0.1132 a day, and the deflated ratio is 0.9004.
    deviation = np.sqrt(0.5 / 250)
    assert expected_maximum(100, deviation) == pytest.approx(0.1132, abs=5e-5)
    returns = with_moments(2.5 / np.sqrt(250), 1.0, -3.0, 10.0, 1250)
    assert returns.skew() == pytest.approx(-3, abs=0.1) and returns.kurt() + 3 == pytest.approx(10, abs=0.3)
    assert deflated_sharpe(returns, 100, deviation) == pytest.approx(0.9004, abs=0.01)
    assert (
        deflated_sharpe(returns, 1) > deflated_sharpe(returns, 10, deviation) > deflated_sharpe(returns, 100, deviation)
    )


def test_the_papers_example_of_a_track_record():
    # Bailey & López de Prado 2012: Sharpe 2 a year by daily normal returns is above 0 with 95 % confidence after 0.68
    # years; with skewness −0.72 and kurtosis 5.78 of months it takes longer.
    rng = np.random.default_rng(0)
    normal = rng.normal(size=200_000)
    normal = pd.Series(2 / np.sqrt(250) + (normal - normal.mean()) / normal.std(ddof=1))
    assert minimum_track_record(normal) / 250 == pytest.approx(0.68, abs=0.02)
    skewed = with_moments(2 / np.sqrt(250), 1.0, -3.0, 10.0, 1250)
    assert minimum_track_record(skewed) > minimum_track_record(normal)
    assert minimum_track_record(-normal) == np.inf and np.isnan(minimum_track_record(pd.Series(np.ones(50))))


def test_the_expected_maximum_is_that_of_drawn_maxima():
    draws = np.random.default_rng(0).normal(size=(20_000, 30)).max(axis=1)
    assert expected_maximum(30, 1.0) == pytest.approx(draws.mean(), rel=0.02)
    assert expected_maximum(1, 1.0) == 0.0


def test_the_best_of_many_scores_without_skill_does_not_stand_and_a_skilled_one_does():
    rng = np.random.default_rng(1)
    stands, alone = [], []
    for _ in range(200):
        best = max((pd.Series(days) for days in rng.normal(0, 0.1, (20, 120))), key=pd.Series.mean)
        stands.append(deflated_mean(best, 5, 20))
        alone.append(deflated_mean(best, 5, 1))
    assert np.mean(np.array(stands) > 0.95) < 0.15 < 0.6 < np.mean(np.array(alone) > 0.95)
    assert deflated_mean(pd.Series(rng.normal(0.05, 0.1, 250)), 5, 20) > 0.99
    daily = pd.Series(rng.normal(0.01, 0.1, 250))
    assert deflated_mean(daily, 5, 1) == pytest.approx(norm.cdf(newey_west_t(daily, 5)))
    assert np.isnan(deflated_mean(daily[:10], 5, 3))


def test_overfitting_is_a_half_by_chance_and_none_where_one_run_is_better():
    rng = np.random.default_rng(2)
    chance = [probability_of_overfitting(pd.DataFrame(rng.normal(size=(240, 6))), 8) for _ in range(40)]
    assert np.mean(chance) == pytest.approx(0.5, abs=0.1)
    better = pd.DataFrame(rng.normal(size=(240, 6)))
    better[3] += 0.5
    assert probability_of_overfitting(better) < 0.01
    assert probability_of_overfitting(better.sample(frac=1, axis=1, random_state=0)) == probability_of_overfitting(
        better
    )


def test_overfitting_needs_four_runs_that_vary_and_days():
    table = pd.DataFrame(np.random.default_rng(3).normal(size=(100, 4)))
    assert np.isfinite(probability_of_overfitting(table))
    assert np.isnan(probability_of_overfitting(table[[0, 1, 2]]))
    assert np.isnan(probability_of_overfitting(table.assign(**{"3": 0.0})[[0, 1, 2, "3"]]))
    assert np.isnan(probability_of_overfitting(table[:19]))
