"""Risk from sample paths: value at risk, expected shortfall, drawdown, high and low; and their backtests.

Losses are ratios to the last close, positive where money is lost. Paths are those of `KronosModel.paths`, or closes as
ratios to the last close, [W, S, H].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import xlogy
from scipy.stats import chi2

from kronos_qlib.data.windows import CLOSE, COLUMNS
from kronos_qlib.evaluation.measures import Floats, interval

RISK_LEVELS = 0.01, 0.05
DRAWDOWN = 0.1
FEWEST_IN_TAIL = 5  # paths beyond a VaR, for its shortfall to be tested
_BLOCK = 1024  # windows whose paths are worked on at a time


def value_at_risk(closes: NDArray[np.floating], level: float = 0.05) -> Floats:
    """Compute the loss that is exceeded with probability `level` at each step: [W, H] of closes [W, S, H].

    The quantile is the one that so many samples of the right distribution put at `level` on average (Hyndman & Fan
    1996, type 6), however few they are; numpy's default would be exceeded at twice 1 % with 100 samples.

    Raises:
        ValueError: fewer than 1 / `level` − 1 paths, among which there is no such loss.
    """
    _check_samples(closes, level)
    return 1 - np.quantile(np.asarray(closes, np.float64), level, axis=1, method="weibull")


def expected_shortfall(closes: NDArray[np.floating], level: float = 0.05) -> Floats:
    """Compute the mean loss of the worst share `level` of the paths at each step: [W, H] of closes [W, S, H].

    The tail mean of Acerbi & Tasche (2002): a path that only partly belongs to the tail counts in part. With few paths
    it is somewhat too small.

    Raises:
        ValueError: fewer than 1 / `level` − 1 paths.
    """
    _check_samples(closes, level)
    ordered = np.sort(np.asarray(closes, np.float64), axis=1)
    tail = level * ordered.shape[1]
    weights = np.clip(tail - np.arange(ordered.shape[1]), 0, 1)
    return 1 - np.einsum("wsh,s->wh", ordered, weights) / weights.sum()


def drawdown_probability(closes: NDArray[np.floating], drawdown: float = DRAWDOWN) -> Floats:
    """Compute the share of paths that fall by more than `drawdown` from a close before, the last one included: [W]."""
    blocks = np.array_split(closes, len(closes) // _BLOCK + 1)
    return np.concatenate([(_deepest_drawdown(block.astype(np.float64)) > drawdown).mean(-1) for block in blocks])


def expected_range(bars: NDArray[np.floating], last_close: ArrayLike) -> tuple[Floats, Floats]:
    """Compute the mean over paths [W, S, H, 6] of the highest high and of the lowest low of the horizon: both [W].

    `last_close` [W] is in the unit of the bars; the two are ratios to it.
    """
    scale = np.asarray(last_close, np.float64)
    high, low = (bars[..., COLUMNS.index(name)].astype(np.float64) for name in ("high", "low"))
    return high.max(2).mean(1) / scale, low.min(2).mean(1) / scale


def measure_risk(
    index: pd.Index,
    bars: NDArray[np.floating],
    last_close: ArrayLike,
    levels: Sequence[float] = RISK_LEVELS,
    drawdown: float = DRAWDOWN,
) -> pd.DataFrame:
    """Tabulate the risk of each window of paths, as `KronosModel.paths` gives them with their index.

        index, bars = model.paths(dataset, "test")
        risk = measure_risk(index, bars, model.forecast(dataset, "test", ["last_close"])["last_close"])

    Args:
        bars: [W, S, H, 6], price units. last_close: [W], likewise.
        levels: probabilities of a larger loss; each needs 1 / level − 1 paths.
        drawdown: a fall, as a ratio, from the highest close so far.

    Returns:
        A row per window: var_05_1 … (loss exceeded with 5 % at step 1), es_05_1 … (mean loss of the worst 5 %),
        drawdown_10 (probability of a drawdown of more than 10 % within the horizon), high, low (expected, of the
        horizon); ratios to the last close.

    Raises:
        ValueError: too few paths for a level.
    """
    closes = bars[..., CLOSE].astype(np.float64) / np.asarray(last_close, np.float64)[:, None, None]
    columns: dict[str, Floats] = {}
    for level in levels:
        for name, measure in (("var", value_at_risk), ("es", expected_shortfall)):
            steps = enumerate(measure(closes, level).T, 1)
            columns |= {f"{name}_{_percent(level)}_{step}": values for step, values in steps}
    columns[f"drawdown_{_percent(drawdown)}"] = drawdown_probability(closes, drawdown)
    columns["high"], columns["low"] = expected_range(bars, last_close)
    return pd.DataFrame(columns, index=index)


@dataclass(frozen=True)
class Backtest:
    """A likelihood ratio and the probability of a larger one if the forecast is right."""

    statistic: float
    p: float


def kupiec(hits: ArrayLike, level: float) -> Backtest:
    """Test whether losses exceed a value at risk as often as `level` says: unconditional coverage, Kupiec (1995).

    `hits` [N] are true where the loss was larger. They should be independent: of one step, and not of many instruments
    of the same days, which fall together; see `backtest_risk`. NaN without any.
    """
    hits = np.asarray(hits, bool)
    if not len(hits):
        return Backtest(np.nan, np.nan)
    return _likelihood_ratio(_likelihood(len(hits), hits.sum(), level), _likelihood(len(hits), hits.sum()), 1)


def christoffersen(hits: ArrayLike, level: float, groups: ArrayLike | None = None) -> tuple[Backtest, Backtest]:
    """Test whether a hit makes one on the next bar likelier: independence, conditional coverage, Christoffersen (1998).

    `hits` [N] are those of one-step forecasts of successive bars: of forecasts that overlap they depend on each other.
    groups: [N] label the runs of successive bars, such as the instruments; transitions are counted within a group and
    pooled. Conditional coverage tests both at once, independence and `level`, over all hits but each group's first.
    NaN without transitions.
    """
    hits = np.asarray(hits, bool)
    groups = np.zeros(len(hits), int) if groups is None else pd.factorize(np.asarray(groups))[0]
    order = np.argsort(groups, kind="stable")
    hits, groups = hits[order], groups[order]
    within = groups[1:] == groups[:-1]
    before, after = hits[:-1][within], hits[1:][within]
    if not len(after):
        return Backtest(np.nan, np.nan), Backtest(np.nan, np.nan)
    separate = sum(_likelihood((before == was).sum(), after[before == was].sum()) for was in (False, True))
    same, right = _likelihood(len(after), after.sum()), _likelihood(len(after), after.sum(), level)
    return _likelihood_ratio(same, separate, 1), _likelihood_ratio(right, separate, 2)


def exceedance_residuals(losses: ArrayLike, var: ArrayLike, shortfall: ArrayLike) -> Floats:
    """Compute loss / expected shortfall − 1 where the loss exceeds the value at risk, NaN elsewhere: [N].

    Their mean is zero if the shortfall is right, above zero if it is too small (McNeil & Frey 2000, who divide by the
    volatility instead). A shortfall of few paths is small where losses exceed the VaR: with 5 paths in the tail the
    mean of right normal forecasts is 0.05 (0.03 at 1 %), with 20 of them 0.01.
    """
    losses, var, shortfall = (np.asarray(each, np.float64) for each in (losses, var, shortfall))
    return np.where(losses > var, losses / shortfall - 1, np.nan)


def backtest_risk(
    paths: NDArray[np.floating],
    closes: Floats,
    dates: NDArray[np.datetime64],
    groups: ArrayLike,
    levels: Sequence[float] = RISK_LEVELS,
    drawdown: float = DRAWDOWN,
) -> pd.DataFrame:
    """Backtest one-step VaR and ES, and the probability of a drawdown over the horizon.

    Only the first step is tested for VaR: the hits of longer horizons overlap, and would be dependent even if right.
    Instruments fall together, so the tests of all hits together, which take them to be independent, reject too often;
    `observed_low`, `observed_high` allow for it, and `rejected_*` are the tests of each group by itself.

    Args:
        paths: closes as ratios to the last close [W, S, H]. closes: what came [W, H], NaN where it has not.
        dates: of the scores [W]. groups: [W], runs of an instrument's successive bars, in time order.
        levels: those with too few paths are left out.

    Returns:
        A row per measure (var, drawdown) and level: windows, days; expected and observed (share of hits, of drawdowns)
        with the ends of the 95 % interval of what was observed, see `interval`. Of var also the tests, each with its p:
        kupiec, independence, conditional; groups with 2 hits or more expected, and the share of them that kupiec and
        conditional coverage reject at 5 %; with 5 / level paths or more es_residual, the mean of
        `exceedance_residuals`, with its interval.
    """
    groups = pd.factorize(np.asarray(groups))[0]
    known = ~np.isnan(closes[:, 0])
    rows = []
    for level in levels:
        if paths.shape[1] + 1 < 1 / level - 1e-9:
            continue
        var, shortfall = (measure(paths[:, :, :1], level)[known, 0] for measure in (value_at_risk, expected_shortfall))
        losses = 1 - closes[known, 0]
        row = _observed("var", level, np.full(known.sum(), level), losses > var, dates[known], 1)
        row |= _tests(losses > var, level, groups[known])
        residuals = exceedance_residuals(losses, var, shortfall)
        exceeded = ~np.isnan(residuals) & (paths.shape[1] * level >= FEWEST_IN_TAIL)
        row["es_residual"] = residuals[exceeded].mean() if exceeded.any() else np.nan
        ends = interval(residuals[exceeded], dates[known][exceeded], 1)
        rows.append(row | dict(zip(("es_residual_low", "es_residual_high"), ends)))
    whole = ~np.isnan(closes).any(1)
    fell = _deepest_drawdown(closes[whole]) > drawdown
    expected = drawdown_probability(paths, drawdown)[whole]
    rows.append(_observed("drawdown", drawdown, expected, fell, dates[whole], closes.shape[1]))
    return pd.DataFrame(rows)


def _observed(
    measure: str, level: float, expected: Floats, hits: NDArray[np.bool_], dates: np.ndarray, steps: int
) -> dict[str, Any]:
    found = {"measure": measure, "level": level, "windows": len(hits), "days": len(np.unique(dates))}
    if not len(hits):
        return found
    low, high = interval(hits.astype(np.float64), dates, steps)
    return found | {
        "expected": expected.mean(),
        "observed": hits.mean(),
        "observed_low": low,
        "observed_high": high,
    }


def _tests(hits: NDArray[np.bool_], level: float, groups: NDArray[np.intp]) -> dict[str, float]:
    independence, conditional = christoffersen(hits, level, groups)
    tests = {"kupiec": kupiec(hits, level), "independence": independence, "conditional": conditional}
    row = {name: test.statistic for name, test in tests.items()} | {f"{name}_p": test.p for name, test in tests.items()}
    own = [each.to_numpy() for _, each in pd.Series(hits).groupby(groups) if level * len(each) >= 2]
    row["groups"] = len(own)
    row["rejected_kupiec"] = np.mean([kupiec(each, level).p < 0.05 for each in own]) if own else np.nan
    row["rejected_conditional"] = np.mean([christoffersen(each, level)[1].p < 0.05 for each in own]) if own else np.nan
    return row


def _likelihood(count: int, hits: int, level: float | None = None) -> float:
    """Compute the log likelihood of so many hits, each of probability `level`; of their share if that is None."""
    share = hits / max(count, 1) if level is None else level
    return float(xlogy(hits, share) + xlogy(count - hits, 1 - share))


def _likelihood_ratio(restricted: float, free: float, freedom: int) -> Backtest:
    statistic = max(2 * (free - restricted), 0.0)
    return Backtest(statistic, float(chi2.sf(statistic, freedom)))


def _deepest_drawdown(closes: Floats) -> Floats:
    """Compute the largest fall from the highest close so far, the last close (1) included: [...] of closes [..., H]."""
    highest = np.maximum(np.maximum.accumulate(closes, axis=-1), 1)
    return (1 - closes / highest).max(-1)


def _check_samples(closes: NDArray[np.floating], level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"the level of a risk should lie between 0 and 1, not {level}")
    fewest = int(np.ceil(1 / level - 1e-9)) - 1
    if closes.shape[1] < fewest:
        raise ValueError(f"a risk at {level:.2%} needs {fewest} paths or more, not {closes.shape[1]}")


def _percent(share: float) -> str:
    return f"{100 * share:04.1f}".replace(".0", "").replace(".", "_")
