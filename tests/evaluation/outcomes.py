"""Simulated forecasts, right but for their spread, and what came."""

import numpy as np
from scipy.stats import lognorm

from kronos_qlib.evaluation.measures import LEVELS, Outcomes

DAYS, NAMES, HORIZON, DAILY = 60, 40, 2, 0.02


def simulated(spread: float = 1.0, seed: int = 0, paths: int = 0) -> Outcomes:
    """Forecasts of a random walk with `spread` times its right volatility."""
    rng = np.random.default_rng(seed)
    count = DAYS * NAMES
    steps = DAILY * rng.standard_normal((count, HORIZON))
    root = np.sqrt(np.arange(1, HORIZON + 1))
    dates = np.repeat(np.arange("2020-01-01", "2020-03-01", dtype="datetime64[D]").astype("datetime64[ns]"), NAMES)
    drawn = np.exp(spread * DAILY * rng.standard_normal((count, paths, HORIZON)).cumsum(2)) if paths else None
    quantiles = lognorm.ppf(LEVELS, spread * DAILY * root[:, None])
    return Outcomes(
        dates=dates,
        quantiles=np.broadcast_to(quantiles, (count, *quantiles.shape)).copy(),
        closes=np.exp(steps.cumsum(1)),
        ends=dates[:, None] + np.arange(1, HORIZON + 1) * np.timedelta64(1, "D"),
        volatility=np.full(count, DAILY),
        mean_return=rng.standard_normal(count),
        prob_up=rng.random(count),
        samples=paths or 1000,
        paths=drawn,
    )
