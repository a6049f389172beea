"""Significance of a mean of daily values: Newey–West t, stationary bootstrap, Holm's correction."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import statsmodels.api as sm
from arch.bootstrap import StationaryBootstrap, optimal_block_length
from numpy.typing import NDArray
from statsmodels.stats.multitest import multipletests

LEVEL = 0.95
_DRAWS = 2000
_FEWEST_DAYS = 20  # for the choice of a block length and for an interval to mean anything


def newey_west(daily: pd.Series, lag: int) -> tuple[float, float]:
    """Compute t of the mean of `daily` against zero and its two-sided p, robust to autocorrelation up to `lag` days.

    Days without a value are left out. Both are NaN with fewer than 4 × `lag` or 4 days, where t is too large, or if
    all days are equal. Newey & West (1987), "A Simple, Positive Semi-definite, Heteroskedasticity and
    Autocorrelation Consistent Covariance Matrix"; p by Student's t.
    """
    values = finite(daily)
    if len(values) < max(4 * lag, 4) or np.ptp(values) == 0:
        return np.nan, np.nan
    fit = sm.OLS(values, np.ones(len(values))).fit(cov_type="HAC", cov_kwds={"maxlags": lag}, use_t=True)
    return float(fit.tvalues[0]), float(fit.pvalues[0])


def newey_west_t(daily: pd.Series, lag: int) -> float:
    """Compute the t of `newey_west`."""
    return newey_west(daily, lag)[0]


def bootstrap_interval(daily: pd.Series, seed: int = 0) -> tuple[float, float]:
    """Compute the 95 % interval (low, high) of the mean of `daily` by the stationary bootstrap: of 2000 means.

    The mean block length is the one of Politis & White (2004), corrected 2009, at least a day. Days without a value are
    left out. Both ends are NaN with fewer than 20 days, or if every day is the same. The same seed gives the same ends.
    """
    values = finite(daily)
    if len(values) < _FEWEST_DAYS or np.ptp(values) == 0:
        return np.nan, np.nan
    block = float(optimal_block_length(values)["stationary"].iloc[0])
    bootstrap = StationaryBootstrap(max(block, 1.0), values, seed=seed)
    low, high = bootstrap.conf_int(np.mean, reps=_DRAWS, method="percentile", size=LEVEL)[:, 0]
    return float(low), float(high)


def holm(p_values: Sequence[float] | pd.Series) -> NDArray[np.float64]:
    """Correct p-values for multiple tests by Holm (1979); NaN stays NaN and is not counted."""
    raw = np.asarray(p_values, dtype=np.float64)
    corrected = np.full(raw.shape, np.nan)
    known = np.isfinite(raw)
    if known.any():
        corrected[known] = multipletests(raw[known], method="holm")[1]
    return corrected


def finite(daily: pd.Series) -> NDArray[np.float64]:
    """Return the values that are numbers."""
    values = daily.to_numpy(dtype=np.float64)
    return values[np.isfinite(values)]
