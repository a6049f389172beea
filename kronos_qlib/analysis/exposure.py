"""Residual scores: each day's ranks, less what the ranks of simple factors explain; and exposures to the factors."""

import numpy as np
import pandas as pd

from kronos_qlib.analysis.signals import daily_rank_ic
from kronos_qlib.data.factors import residuals

_NOTHING_LEFT = 0.03  # of the ranks' spread: less, one part in a thousand of the variance, is rounding and ties


def residual_scores(scores: pd.Series, factors: pd.DataFrame) -> pd.Series:
    """Regress the scores' ranks on a constant and the factors' ranks, on each day, and return the residuals.

    Both have the index (datetime, instrument). Rows without every factor are left out. A day with no more rows than
    twice the factors, or on which nothing is left of the ranks (the scores are constant, or a factor themselves), is
    left out too.
    """
    rows = factors.reindex(scores.index).replace([np.inf, -np.inf], np.nan).assign(score=scores).dropna()
    ranks = rows.groupby(level="datetime").rank()
    days = [_residual(day) for _, day in ranks.groupby(level="datetime") if len(day) > 2 * factors.shape[1]]
    return pd.concat(days) if days else scores.iloc[:0]


def exposures(scores: pd.DataFrame, factors: dict[str, pd.DataFrame]) -> pd.Series:
    """Average over days the rank correlation of scores with each factor; all are day × instrument."""
    return pd.Series({name: daily_rank_ic(scores, factor).mean() for name, factor in factors.items()}, dtype=float)


def _residual(day: pd.DataFrame) -> pd.Series:
    score = day["score"]
    left = pd.Series(residuals(score.to_numpy(), day.drop(columns="score").to_numpy()), day.index)
    return left if left.std() > _NOTHING_LEFT * max(score.std(), 1) else left.iloc[:0]
