"""Score sample paths: one number of an instrument from the distribution of its next bars."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kronos_qlib.data.windows import COLUMNS
from kronos_qlib.extensions import call_extension, load_extension

Floats = NDArray[np.float64]

HORIZON_STATISTICS: dict[str, Callable[[Floats], Floats]] = {
    "mean": lambda close: close.mean(-1),
    "last": lambda close: close[..., -1],
    "max": lambda close: close.max(-1),
    "min": lambda close: close.min(-1),
}
SCORES = (
    *(f"{name}_return" for name in HORIZON_STATISTICS),
    "prob_up",
    "return_to_risk",
    *(f"z_{name}" for name in HORIZON_STATISTICS),
)
SUMMARIES = ("range", "volume_change", "skew")
BLOCK = 4096  # windows that a score of a user's own is called with at a time, at most
LEAST_RISK = 1e-6  # of the deviation that `return_to_risk` divides by: samples that all agree have none


class PathScore(Protocol):
    """A score of a user's own, the setting `score` of a KronosModel as a configuration.

    It must depend on the window alone, not on the others of its block.
    """

    def __call__(self, paths: Floats, context: Floats) -> Floats:
        """Score B windows.

        Args:
            paths: sample paths in the store's units [B, S, P, D], columns
                `kronos_qlib.data.windows.COLUMNS`, then those that the handler adds.
            context: the bars that they were forecast from [B, L, D].

        Returns:
            A finite number for each window [B]: the higher, the better.
        """


def load_score(
    configuration: Mapping[str, Any], samples: int, horizon: int, lookback: int, columns: int = len(COLUMNS)
) -> PathScore:
    """Make a score of a user's own, and try it on random walks of a forecast's shape. Raises ValueError."""
    score: PathScore = load_extension(configuration)
    random = np.random.default_rng(0)
    prices = 100 * np.exp(random.normal(0, 0.01, (3, lookback + samples * horizon, columns)).cumsum(1))
    paths, context = prices[:, lookback:].reshape(3, samples, horizon, columns), prices[:, :lookback]
    found = call_extension(score, (3,), paths, context)
    if not np.isfinite(found).all():
        raise ValueError(f"{type(score).__name__} returns what is no finite number for random walks")
    if not np.allclose(call_extension(score, (1,), paths[:1], context[:1]), found[:1], rtol=1e-6):
        raise ValueError(f"{type(score).__name__} scores a window by the others of its block too")
    return score


def scores(close: Floats, last_close: Floats, scale: Floats) -> dict[str, Floats]:
    """Compute all scores of B windows.

    Args:
        close: forecast closes in price units [B, S, P].
        last_close: the last close of each context, in price units [B].
        scale: the closes' standard deviation over the context + 1e-5, in price units [B].

    Returns:
        By name, float64 [B]. `{mean,last,max,min}_return`: average over the samples of that statistic of the close
        over the horizon / last close − 1. `prob_up`: share of samples whose mean close is above the last close.
        `return_to_risk`: average over the samples of the mean return / its population standard deviation across
        them. `z_{mean,last,max,min}`: average of (statistic − last close) / scale, the published differences.
    """
    start, scale = last_close[:, None], scale[:, None]
    statistics = {name: statistic(close) for name, statistic in HORIZON_STATISTICS.items()}  # each [B, S]
    returns = {name: statistic / start - 1 for name, statistic in statistics.items()}
    result = {f"{name}_return": value.mean(1) for name, value in returns.items()}
    result["prob_up"] = (statistics["mean"] > start).mean(1)
    result["return_to_risk"] = result["mean_return"] / np.maximum(returns["mean"].std(1), LEAST_RISK)
    return result | {f"z_{name}": ((statistic - start) / scale).mean(1) for name, statistic in statistics.items()}


def summaries(paths: Floats, last_close: Floats, mean_volume: Floats) -> dict[str, Floats]:
    """Compute what else the sample paths of B windows say of the next bars; `SUMMARIES` has the names.

    Args:
        paths: in price units [B, S, P, D], columns `kronos_qlib.data.windows.COLUMNS`.
        last_close: the last close of each context, in price units [B].
        mean_volume: mean volume of each context [B].

    Returns:
        By name, float64 [B]. `range`: average over the samples of (highest high − lowest low over the horizon) / last
        close. `volume_change`: average volume of all samples and steps / mean volume of the context − 1; NaN for a
        context without volume. `skew`: skewness (Fisher–Pearson, biased) over the samples of the close after the
        horizon, which is that of its return; NaN where the samples agree.
    """
    from scipy.stats import skew  # its import takes half a second, and only factors ask for it

    high, low, close, volume = (paths[..., COLUMNS.index(name)] for name in ("high", "low", "close", "volume"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of divisions by 0, which give NaN here
        change = volume.mean((1, 2)) / np.where(mean_volume > 0, mean_volume, np.nan) - 1
        skewness = skew(close[..., -1], axis=1)
    return {
        "range": (high.max(-1) - low.min(-1)).mean(1) / last_close,
        "volume_change": change,
        "skew": skewness,
    }
