"""Deflated figures, track record and overfitting, against the examples of their papers and by simulation."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from scipy.special import logit
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
    # Bailey & López de Prado 2012: for a Sharpe ratio of 2 a year to be above 1 with 95 % confidence it takes 2.73
    # years of normal days, 3.24 of normal months, and 4.99 of months as of hedge funds, skewness −0.72, kurtosis 5.78.
    for a_year, skewness, kurtosis, years in ((252, 0, 3, 2.73), (12, 0, 3, 3.24), (12, -0.72, 5.78, 4.99)):
        returns = with_moments(2 / np.sqrt(a_year), 1.0, skewness, kurtosis, 600_000)
        assert minimum_track_record(returns, 1 / np.sqrt(a_year)) / a_year == pytest.approx(years, abs=0.005)
    assert minimum_track_record(returns) < minimum_track_record(returns, 0.1) < minimum_track_record(returns, 0.2)
    assert minimum_track_record(-returns) == minimum_track_record(returns, 1.0) == np.inf
    assert np.isnan(minimum_track_record(pd.Series(np.ones(50))))


def test_a_track_record_of_the_least_length_is_as_sure_as_it_says():
    returns = with_moments(0.1, 1.0, -1.0, 6.0, 5000)
    days = int(minimum_track_record(returns))
    assert deflated_sharpe(with_moments(0.1, 1.0, -1.0, 6.0, days), 1) == pytest.approx(0.95, abs=0.005)


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
    chance = [probability_of_overfitting(pd.DataFrame(rng.normal(size=(240, 6))), 8).share for _ in range(40)]
    assert np.mean(chance) == pytest.approx(0.5, abs=0.1)
    better = pd.DataFrame(rng.normal(size=(240, 6)))
    better[3] += 0.5
    found = probability_of_overfitting(better)
    assert found.share < 0.01 and (found.runs, found.days, found.blocks) == (6, 240, 16)
    assert probability_of_overfitting(better.sample(frac=1, axis=1, random_state=0)) == found


def test_overfitting_is_the_count_of_its_paper_written_out():
    daily = pd.DataFrame(np.random.default_rng(4).normal(0.02, 1, (43, 5)))
    blocks = np.array_split(np.arange(43), 4)
    below = []
    for chosen in combinations(range(4), 2):
        inside = np.concatenate([blocks[number] for number in chosen])
        outside = np.setdiff1d(np.arange(43), inside)
        best = (daily.loc[inside].mean() / daily.loc[inside].std()).idxmax()
        rank = (daily.loc[outside].mean() / daily.loc[outside].std()).rank()[best]
        below.append(logit(rank / (daily.shape[1] + 1)) <= 0)
    assert 0 < np.mean(below) < 1
    assert probability_of_overfitting(daily, 4).share == pytest.approx(np.mean(below))


def test_overfitting_needs_four_runs_that_vary_and_days():
    table = pd.DataFrame(np.random.default_rng(3).normal(size=(100, 4)))
    assert np.isfinite(probability_of_overfitting(table).share)
    for few in (table[[0, 1, 2]], table.assign(**{"3": 0.0})[[0, 1, 2, "3"]], table[:19], table[:0], pd.DataFrame()):
        assert np.isnan(probability_of_overfitting(few).share)
