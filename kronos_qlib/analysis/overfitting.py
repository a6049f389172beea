"""What the number of trials leaves of a figure: deflated Sharpe ratio and rank IC, track record, overfitting."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import kurtosis, norm, rankdata, skew

from kronos_qlib.analysis.significance import LEVEL, finite, newey_west

FEWEST_RUNS = 4  # of fewer, the best in one half of the days says little of the other
FEWEST_BLOCKS, FEWEST_DAYS_A_BLOCK = 4, 5


def expected_maximum(trials: int, deviation: float) -> float:
    """Compute the expected maximum of so many independent draws of N(0, deviation²); 0 for a single one.

    Bailey & López de Prado (2014), "The Deflated Sharpe Ratio", equation 1, an approximation by Gumbel's law.
    """
    if trials < 2:
        return 0.0
    quantiles = norm.ppf([1 - 1 / trials, 1 - 1 / (trials * np.e)])
    return float(deviation * ((1 - np.euler_gamma) * quantiles[0] + np.euler_gamma * quantiles[1]))


def deflated_sharpe(returns: pd.Series, trials: int, deviation: float | None = None) -> float:
    """Test a Sharpe ratio against what the best of `trials` has by chance, and return 1 less the one-sided p.

    Skewness and kurtosis of the returns count, autocorrelation does not. NaN with fewer than 4 days, or if all are
    equal.

    Args:
        returns: of each day, less the benchmark's; days without a value are left out.
        deviation: of the trials' Sharpe ratios, a day's; by default that of one without skill, 1 / √(days − 1).

    Source: Bailey & López de Prado (2014). With one trial it is their probabilistic Sharpe ratio of 2012.
    """
    sharpe, error, days = _sharpe(returns)
    chance = expected_maximum(trials, 1 / np.sqrt(days - 1) if deviation is None else deviation) if days > 1 else np.nan
    return float(norm.cdf((sharpe - chance) / error))


def minimum_track_record(returns: pd.Series, above: float = 0.0) -> float:
    """Compute the days after which a Sharpe ratio like this one would be above another with 95 % confidence.

    Infinite for a ratio not above it, NaN where there is none. `above` is of a day, as the ratio is. Bailey & López de
    Prado (2012), "The Sharpe Ratio Efficient Frontier".
    """
    sharpe, error, days = _sharpe(returns)
    if not sharpe > above:
        return np.nan if np.isnan(sharpe) else np.inf
    return float(1 + (days - 1) * (error * norm.ppf(LEVEL) / (sharpe - above)) ** 2)


def deflated_mean(daily: pd.Series, lag: int, trials: int, deviation: float | None = None) -> float:
    """Test the mean of `daily` rank ICs against what the best of `trials` has by chance: 1 less the one-sided p.

    It is Φ((mean − expected maximum) / standard error), with Newey and West's standard error up to `lag` days: the
    deflated Sharpe ratio's idea for a mean. NaN where `newey_west` has no t.

    Args:
        deviation: of the trials' means, which may be of other days than `daily`; by default the standard error, which
            is that of a score without skill.
    """
    t, _ = newey_west(daily, lag)
    mean = float(np.mean(finite(daily))) if np.isfinite(t) else np.nan
    error = mean / t if t else np.nan
    return float(norm.cdf((mean - expected_maximum(trials, error if deviation is None else deviation)) / error))


@dataclass(frozen=True)
class Overfitting:
    """What cross-validation says of a choice among `runs`; share: NaN where they, or the days, are too few.

    share: of the splits in which the run that is best on one half is below the median on the other.
    """

    share: float
    runs: int
    days: int
    blocks: int


def probability_of_overfitting(daily: pd.DataFrame, blocks: int = 16) -> Overfitting:
    """Compute how often the run that is best on half of the days is below the median on the other half.

    Combinatorially symmetric cross-validation: the days are cut into `blocks`, every choice of half of them is one of
    the halves, the measure is mean / standard deviation. Near ½ where the choice among the runs is by chance, near 0
    where the best run is best everywhere. Bailey, Borwein, López de Prado & Zhu (2017), "The Probability of Backtest
    Overfitting".

    Args:
        daily: day × run; days that not all runs have are left out.
        blocks: an even number; fewer if a block had fewer than 5 days.

    Returns:
        The share, NaN with fewer than 4 runs that vary, or days for fewer than 4 blocks; and what it is made of.
    """
    table = daily.loc[:, daily.nunique() > 1].dropna()
    blocks = min(blocks, len(table) // FEWEST_DAYS_A_BLOCK // 2 * 2)
    if table.shape[1] < FEWEST_RUNS or blocks < FEWEST_BLOCKS:
        return Overfitting(np.nan, table.shape[1], len(table), blocks)
    parts = np.array_split(table.to_numpy(float), blocks)
    counts = np.array([len(part) for part in parts])
    sums, squares = (np.array([(part**power).sum(axis=0) for part in parts]) for power in (1, 2))
    chosen = np.array(list(combinations(range(blocks), blocks // 2)))
    halves = np.zeros((len(chosen), blocks))
    np.put_along_axis(halves, chosen, 1.0, axis=1)
    inside, outside = (_ratios(half, counts, sums, squares) for half in (halves, 1 - halves))
    best = inside.argmax(axis=1)
    ranks = rankdata(outside, axis=1)[np.arange(len(best)), best] / (table.shape[1] + 1)
    return Overfitting(float((ranks <= 0.5).mean()), table.shape[1], len(table), blocks)


def _ratios(
    half: NDArray[np.float64], counts: NDArray[np.int64], sums: NDArray[np.float64], squares: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Compute mean / standard deviation [choices, runs] over the blocks that each choice [choices, blocks] holds."""
    days = (half @ counts)[:, None]
    mean = half @ sums / days
    return mean / np.sqrt(np.maximum(half @ squares / days - mean**2, 1e-300))


def _sharpe(returns: pd.Series) -> tuple[float, float, int]:
    """Return the Sharpe ratio of a day, its standard error (Mertens 2002), and the number of days; NaN without one."""
    values = finite(returns)
    if len(values) < 4 or np.ptp(values) == 0:
        return np.nan, np.nan, len(values)
    sharpe = values.mean() / values.std(ddof=1)
    variance = 1 - skew(values) * sharpe + (kurtosis(values, fisher=False) - 1) / 4 * sharpe**2
    return float(sharpe), float(np.sqrt(max(variance, 1e-12) / (len(values) - 1))), len(values)


def spread_of_trials(values: Sequence[float]) -> float | None:
    """Return the standard deviation of the trials' figures, or None with fewer than two of them."""
    known = [value for value in values if np.isfinite(value)]
    return float(np.std(known, ddof=1)) if len(known) > 1 else None
