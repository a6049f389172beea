"""Daily measures of scores against labels: information coefficients, deciles, autocorrelation of the ranks.

Scores and labels are day × instrument tables (`wide`), float, NaN where a row does not count, in both or in neither.
"""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

DECILES = 10
PASSES = 20  # orders of equal scores that are drawn
LONGEST_LAG = 60  # trading days looked ahead for the half-life
CELLS_AT_ONCE = 2_000_000  # of tables at several lags: 16 MB each


def wide(rows: pd.Series) -> pd.DataFrame:
    """Unstack a series of index (datetime, instrument): a row per day, a column per instrument."""
    return rows.unstack("instrument").sort_index()


def daily_ic(scores: pd.DataFrame, labels: pd.DataFrame) -> pd.Series:
    """Correlate scores and labels of each day, as Qlib's `calc_ic`; NaN on days where either is constant."""
    both = scores.notna() & labels.notna()
    scores, labels = scores.where(both), labels.where(both)
    varied = _varied(scores) & _varied(labels)  # by rounding, the variance of a constant need not be zero
    return scores[varied].corrwith(labels[varied], axis=1).reindex(scores.index)


def daily_rank_ic(scores: pd.DataFrame, labels: pd.DataFrame) -> pd.Series:
    """Correlate the ranks of scores and labels of each day (Spearman); NaN on days where either is constant."""
    both = scores.notna() & labels.notna()
    return daily_ic(scores.where(both).rank(axis=1), labels.where(both).rank(axis=1))


def decile_labels(scores: pd.DataFrame, labels: pd.DataFrame) -> pd.DataFrame:
    """Average the labels of each decile of the score, 1 the lowest to 10 the highest, on each day.

    Equal scores all count with their mean label, the expectation of a random order. NaN on
    days on which all scores are equal, and in tenths that no instrument falls into (of fewer than ten).
    """
    pairs = zip(scores.where(labels.notna()).to_numpy(), labels.to_numpy(np.float64))
    days = [_deciles(score[known], label[known]) for score, label in pairs for known in [~np.isnan(score)]]
    return pd.DataFrame(days, scores.index, range(1, DECILES + 1), dtype=float)


def _deciles(scores: NDArray[np.float64], labels: NDArray[np.float64]) -> NDArray[np.float64]:
    values, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
    if len(values) < 2:
        return np.full(DECILES, np.nan)
    shared = (np.bincount(group, labels) / counts)[group]
    rank = scores.argsort(kind="stable").argsort(kind="stable")
    decile = ((rank + 0.5) / len(scores) * DECILES).astype(int)
    held = np.bincount(decile, minlength=DECILES)
    total = np.bincount(decile, shared, minlength=DECILES)
    return np.divide(total, held, out=np.full(DECILES, np.nan), where=held > 0)


def monotonicity(deciles: pd.Series) -> float:
    """Correlate decile numbers and mean labels (Spearman): 1 if every decile has a higher label than the one below."""
    known = deciles.dropna()
    return float(pd.Series(known.index, known.index, dtype=float).corr(known, method="spearman"))


def rank_autocorrelation(scores: pd.DataFrame, longest: int = LONGEST_LAG) -> pd.Series:
    """Average the correlation of a day's ranks with those `lag` days later, for lags 1 … `longest` or half the days.

    NaN throughout for scores that do not vary within a day.
    """
    lags = list(range(1, min(longest, len(scores) // 2) + 1))
    at_once = max(1, CELLS_AT_ONCE // max(1, scores.size))
    some = [_at_lags(scores, lags[start : start + at_once]) for start in range(0, len(lags), at_once)]
    return pd.concat([pd.Series(dtype=float), *some]).reindex(lags)


def _at_lags(scores: pd.DataFrame, lags: list[int]) -> pd.Series:
    """Average the correlation at several lags: pandas takes as long for a table of a lag as for one of many."""
    earlier = pd.concat([scores.iloc[:-lag] for lag in lags], keys=lags)
    later = pd.concat([scores.iloc[lag:] for lag in lags], keys=lags).set_axis(earlier.index)
    return daily_rank_ic(earlier, later).groupby(level=0).mean()


def tied_share(scores: pd.DataFrame) -> float:
    """Return the share of the scores that another instrument has on the same day."""
    return sum(_tied(row) for row in scores.to_numpy(float)) / max(int(scores.notna().sum().sum()), 1)


def _tied(row: NDArray[np.float64]) -> int:
    counts = np.unique(row[~np.isnan(row)], return_counts=True)[1]
    return int(counts[counts > 1].sum())


def pass_over_ties(scores: pd.DataFrame, labels: pd.DataFrame, topk: int, seed: int = 0) -> NDArray[np.float64]:
    """Average the labels of each day's `topk` highest scores, for `PASSES` random orders of equal ones: [PASSES].

    All alike where nothing is tied; how far they lie apart is what chance has in a portfolio of the highest scores.
    """
    rng, means = np.random.default_rng(seed), np.empty((PASSES, len(scores)))
    for day, (score, label) in enumerate(zip(scores.to_numpy(float), labels.to_numpy(float))):
        known = ~np.isnan(score) & ~np.isnan(label)
        score, label = score[known], label[known]
        for number in range(PASSES):
            order = np.lexsort((rng.random(len(score)), score))
            means[number, day] = label[order[-topk:]].mean() if len(score) else np.nan
    return np.nanmean(means, axis=1)


def half_life(autocorrelation: pd.Series) -> float:
    """Count the trading days until a rank autocorrelation, 1 at lag 0, falls to a half; linear between lags.

    Infinite if it does not within the lags given; NaN if it is unknown.
    """
    known = pd.concat([pd.Series({0: 1.0}), autocorrelation])
    if autocorrelation.isna().all():
        return np.nan
    below = known.index[known <= 0.5]
    if below.empty:
        return np.inf
    lag = below[0]
    before, after = known[lag - 1], known[lag]
    return float(lag - 1 + (before - 0.5) / (before - after))


def _varied(table: pd.DataFrame) -> pd.Series:
    return table.max(axis=1) > table.min(axis=1)
