"""Baseline forecasts of the close, made of an instrument's own bars up to the score date, and the comparison with them.

All are centred on the last close: a mean return estimated from a year of bars is noise. A forecast depends on its own
window alone, whatever others are asked for and in whichever order.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pandas as pd
from arch.univariate import GARCH, StudentsT, ZeroMean
from numpy.typing import NDArray
from scipy.signal import lfilter
from scipy.stats import lognorm
from tqdm.auto import tqdm

from kronos_qlib.data.windows import CLOSE, COLUMNS, Bars, Windows
from kronos_qlib.evaluation.measures import (
    BANDS,
    LEAST_VOLATILITY,
    LEVELS,
    Floats,
    Outcomes,
    crps_of_quantiles,
    diebold_mariano,
    energy_scores,
    implied_variance,
    inside,
    interval,
    interval_scores,
    lookback_volatility,
    qlike,
)
from kronos_qlib.extensions import call_extension, load_extension

DECAY = 0.94  # of RiskMetrics, for daily bars
MOST_BARS = 1000  # returns behind the score date that GARCH is fitted on and historical simulation draws from
FEWEST_FITTED = 250  # returns that a GARCH is fitted on, about a year
FEWEST_RESIDUALS = 30  # standardised returns to draw from
BURN_IN = 20  # returns before the first of them
DRAWN, KEPT = 1000, 100  # paths that quantiles are taken from; of these, how many are kept
_OWN_BLOCK = 4096  # windows that a baseline of the user's own gets at a time
_BLOCK = 64  # windows simulated at a time
_GARCH, _HISTORICAL = 1, 2  # streams of random numbers


@dataclass(frozen=True)
class BaselineForecast:
    """A baseline's forecasts of W windows; closes are ratios to the last close.

    quantiles: of the close, [W, H, 7], at `LEVELS`. variance: of its log return since the last close [W, H]; NaN for a
    point forecast. paths: closes, float32 [W, 100, H], of the baselines that simulate. about: how it was made, what
    could not be, with counts.
    """

    quantiles: Floats
    variance: Floats
    paths: NDArray[np.float32] | None = None
    about: dict[str, Any] = field(default_factory=dict)


class Baseline(Protocol):
    """A baseline of the user's own, an entry of `baselines` as a configuration; its class gives it its name."""

    def __call__(self, context: Floats, horizon: int) -> Floats:
        """Forecast the closes of W windows, from each window alone.

        Args:
            context: their bars in the store's units [W, L, D], columns
                `kronos_qlib.data.windows.COLUMNS`, then those that the handler adds.
            horizon: H, bars to forecast.

        Returns:
            Quantiles of the close, in the store's units [W, H, 7], at the levels 5, 10, 25, 50, 75, 90 and 95 %,
            rising.
        """


def load_baseline(configuration: Mapping[str, Any]) -> Baseline:
    """Make a baseline of the user's own, and try it on random walks. Raises ValueError."""
    baseline: Baseline = load_extension(configuration)
    walks = 100 * np.exp(np.random.default_rng(0).normal(0, 0.01, (3, 60, len(COLUMNS))).cumsum(1))
    if not np.allclose(_own_quantiles(baseline, walks[:1], 5), _own_quantiles(baseline, walks, 5)[:1], rtol=1e-6):
        raise ValueError(f"{type(baseline).__name__} forecasts a window by the others of its block too")
    return baseline


def _own_quantiles(baseline: Baseline, context: Floats, horizon: int) -> Floats:
    quantiles = call_extension(baseline, (len(context), horizon, len(LEVELS)), context, horizon)
    if not np.isfinite(quantiles).all() or (np.diff(quantiles) < 0).any():
        raise ValueError(f"{type(baseline).__name__} returns quantiles that are not finite or do not rise")
    return quantiles


def forecast_own_baseline(windows: Windows, horizon: int, baseline: Baseline) -> BaselineForecast:
    """Forecast by a baseline of the user's own; its variance is the one that its quantiles imply.

    Raises:
        ValueError: it fails, or returns something else than quantiles.
    """
    last_close = windows.bars.values[windows.ends, CLOSE].astype(np.float64)
    quantiles = np.concatenate(
        [
            _own_quantiles(baseline, windows.values(rows).astype(np.float64), horizon)
            for rows in np.array_split(np.arange(len(windows)), -(-len(windows) // _OWN_BLOCK))
        ]
    )
    quantiles = quantiles / last_close[:, None, None]
    return BaselineForecast(quantiles, implied_variance(quantiles), about={"method": type(baseline).__name__})


def forecast_baselines(windows: Windows, horizon: int, names: Sequence[str]) -> dict[str, BaselineForecast]:
    """Forecast the closes of the `horizon` bars after each window by each baseline of `names`.

    last_value: a point, the last close. volatility, ewma, garman_klass: log-normal, the daily variance times the step;
    of the lookback's returns, of all returns with weights that fall by 0.94 a bar (RiskMetrics 1996), of the lookback's
    ranges. garch_t: GARCH(1,1) with Student's t. historical_simulation: paths of past returns, each in units of
    the EWMA volatility before it, at today's. For the last three see `range_variance`, `forecast_garch`,
    `simulate_history`.

    Raises:
        ValueError: an unknown name; a lookback of fewer than 3 bars.
    """
    unknown = [name for name in names if name not in FORECASTS]
    if unknown:
        raise ValueError(f"unknown baseline {unknown[0]!r}; known: {', '.join(FORECASTS)}")
    return {name: FORECASTS[name](windows, horizon) for name in names}


def log_returns(bars: Bars) -> Floats:
    """Compute the log return of each bar's close over the instrument's bar before [N]; NaN at its first."""
    returns = np.diff(np.log(bars.values[:, CLOSE].astype(np.float64)), prepend=np.nan)
    returns[bars.offsets[:-1][np.diff(bars.offsets) > 0]] = np.nan
    return returns


def ewma_variance(bars: Bars) -> Floats:
    """Compute the exponentially weighted mean of squared log returns up to each bar [N]; NaN at an instrument's first.

    The weights, 0.94 to the power of a return's age, are divided by their sum: there is no start value.
    """
    squares = pd.Series(log_returns(bars) ** 2)
    means = squares.groupby(bars.codes).ewm(alpha=1 - DECAY, adjust=True).mean().to_numpy(np.float64)
    return np.maximum(means, LEAST_VOLATILITY**2)


def range_variance(windows: Windows) -> tuple[Floats, NDArray[np.intp]]:
    """Estimate the daily variance from open, high, low and close of the lookback [W].

    The estimator of Garman & Klass (1980) within a bar, plus the square of the log return from the close before to the
    open; without that, the night, the variance from close to close would be too small. A bar whose open or close lies
    outside low … high has its range widened to hold them; one with a price that is no positive number is left out. The
    scale of adjusted prices cancels within a bar.

    Returns:
        The variances, NaN where fewer than half of the lookback's bars can be used; and the number of bars used.
    """
    if windows.lookback < 3:
        raise ValueError(f"a volatility needs a lookback of 3 bars or more, not {windows.lookback}")
    prices = windows.bars.values[:, : COLUMNS.index("volume")].astype(np.float64)
    usable = (np.isfinite(prices) & (prices > 0)).all(1)
    logs = np.log(np.where(usable[:, None], prices, np.nan))
    opened, close = (logs[:, COLUMNS.index(name)] for name in ("open", "close"))
    night = opened - np.concatenate([[np.nan], close[:-1]])
    width = logs.max(1) - logs.min(1)
    squares = night**2 + 0.5 * width**2 - (2 * np.log(2) - 1) * (close - opened) ** 2
    rows = windows.ends[:, None] + np.arange(2 - windows.lookback, 1)  # the first bar has no night within the lookback
    chosen = squares[rows]
    used = np.isfinite(chosen).sum(1)
    means = np.nansum(chosen, axis=1) / np.maximum(used, 1)
    means = np.where(2 * used >= windows.lookback - 1, np.maximum(means, LEAST_VOLATILITY**2), np.nan)
    return means, used


@dataclass(frozen=True)
class _Process:
    """The variance of the next bar, and how it goes on: omega + alpha × squared return + beta × variance; all [W].

    residual: mean square of the standardised returns drawn. failed: windows that fell back to EWMA's variance.
    """

    variance: Floats
    omega: Floats
    alpha: Floats
    beta: Floats
    residual: Floats
    failed: NDArray[np.bool_]


def forecast_garch(windows: Windows, horizon: int) -> BaselineForecast:
    """Forecast by a GARCH(1,1) with Student's t and a mean of zero (Bollerslev 1987), fitted by arch.

    The parameters of an instrument's windows of a calendar month are fitted on its bars before that month, the last
    1,000 returns of them, so they do not depend on which days of the month are asked for. The variance goes on from the
    fit to the score date by the bars in between. The sum of several steps has no closed form: quantiles are those of
    1,000 paths, whose random numbers depend on the window alone; the variance is exact. With fewer than 250 returns, or
    where the fit fails, the draws are normal with EWMA's variance; counted.
    """
    bars, ends = windows.bars, windows.ends
    returns = log_returns(bars)
    found = np.full((len(ends), 5), np.nan)
    about: dict[str, Any] = {
        "method": f"GARCH(1,1), Student's t, fitted each month on the {MOST_BARS} returns before it at most; "
        f"{DRAWN} simulated paths",
        "fits": 0,
        "failed_fits": 0,
    }
    groups = pd.Series(range(len(ends))).groupby([bars.codes[ends], windows.dates.astype("datetime64[M]")])
    for (code, month), members in tqdm(groups, "garch_t: fits", unit="fit"):
        first = bars.offsets[code] + 1
        until = first + bars.dates[first : bars.offsets[code + 1]].searchsorted(month.to_datetime64())
        fitted = returns[max(first, until - MOST_BARS) : until]
        if len(fitted) < FEWEST_FITTED or not np.isfinite(fitted).all() or np.ptp(fitted) == 0:
            continue
        parameters = fit_garch(fitted)
        about["fits"] += 1
        about["failed_fits"] += parameters is None
        if parameters is not None:
            rows, (omega, alpha, beta, freedom, variance) = members.to_numpy(), parameters
            shocks = omega + alpha * returns[until - 1 : ends[rows].max() + 1] ** 2
            variances, _ = lfilter([1.0], [1.0, -beta], shocks, zi=[beta * variance])  # of the bar after each
            found[rows] = [(variances[end - until + 1], omega, alpha, beta, freedom) for end in ends[rows]]
    failed = np.isnan(found[:, 0])
    found[failed] = [0, 0, 0, 1, np.nan]
    found[failed, 0] = ewma_variance(bars)[ends[failed]]
    *parts, freedom = found.T

    def draw(window: int, random: np.random.Generator) -> Floats:
        if failed[window]:
            return random.standard_normal((horizon, DRAWN))
        return random.standard_t(freedom[window], (horizon, DRAWN)) * np.sqrt(1 - 2 / freedom[window])

    process = _Process(*parts, residual=np.ones(len(ends)), failed=failed)
    return _simulate(windows, horizon, process, draw, _GARCH, about, "garch_t: paths")


def fit_garch(returns: Floats) -> tuple[float, float, float, float, float] | None:
    """Fit a GARCH(1,1) with Student's t to log returns [N].

    Returns:
        omega, alpha, beta, the degrees of freedom, and the variance of the last return; None if the fit does not
        converge, or ends at a process whose variance explodes (alpha + beta = 1, of which it does not, is common).
    """
    scale = np.sqrt(np.mean(returns**2))
    model = ZeroMean(returns / scale, volatility=GARCH(1, 0, 1), distribution=StudentsT(), rescale=False)
    fit = model.fit(disp="off", show_warning=False, update_freq=0)
    omega, alpha, beta, freedom = (float(value) for value in fit.params)
    variance = float(fit.conditional_volatility[-1]) ** 2
    finite = np.isfinite([omega, alpha, beta, freedom, variance]).all()
    if fit.convergence_flag or not finite or alpha + beta > 1 + 1e-6 or freedom <= 2:
        return None
    return omega * scale**2, alpha, beta, freedom, variance * scale**2


def simulate_history(windows: Windows, horizon: int) -> BaselineForecast:
    """Forecast by filtered historical simulation (Hull & White 1998; Barone-Adesi, Giannopoulos & Vosper 1999).

    The last 1,000 returns of the instrument, each over the EWMA volatility before it, less their mean, are drawn with
    equal chance and multiplied by the volatility of now, which goes on along a path as EWMA's does. Quantiles are those
    of 1,000 paths, whose random numbers depend on the window alone; the variance is exact. With fewer than 30 such
    returns the draws are normal and the volatility stays as it is; counted.
    """
    bars, ends = windows.bars, windows.ends
    variances = ewma_variance(bars)
    before = np.concatenate([[np.nan], variances[:-1]])
    moved = before > LEAST_VOLATILITY**2
    standardised = np.where(moved, log_returns(bars) / np.sqrt(before), np.nan)
    begins = np.maximum(bars.offsets[bars.codes[ends]] + 1 + BURN_IN, ends + 1 - MOST_BARS)

    def pool(window: int) -> Floats:
        past = standardised[begins[window] : ends[window] + 1]
        return past[np.isfinite(past)]

    pools = (pool(window) for window in range(len(ends)))
    residual = np.array([values.var() if len(values) >= FEWEST_RESIDUALS else np.nan for values in pools])
    failed = np.isnan(residual)

    def draw(window: int, random: np.random.Generator) -> Floats:
        if failed[window]:
            return random.standard_normal((horizon, DRAWN))
        values = pool(window)
        return (values - values.mean())[random.integers(0, len(values), (horizon, DRAWN))]

    about = {"method": f"standardised returns, the last {MOST_BARS}, at the EWMA volatility; {DRAWN} simulated paths"}
    process = _Process(
        variance=variances[ends],
        omega=np.zeros(len(ends)),
        alpha=np.where(failed, 0, 1 - DECAY),
        beta=np.where(failed, 1, DECAY),
        residual=np.where(failed, 1, residual),
        failed=failed,
    )
    return _simulate(windows, horizon, process, draw, _HISTORICAL, about, "historical_simulation")


def _simulate(
    windows: Windows,
    horizon: int,
    process: _Process,
    draw: Callable[[int, np.random.Generator], Floats],
    stream: int,
    about: dict[str, Any],
    description: str,
) -> BaselineForecast:
    """Simulate paths of each window, block by block; `draw` gives their standardised returns [H, paths]."""
    count, keys = len(windows), windows.keys
    quantiles = np.empty((count, horizon, len(LEVELS)))
    kept = np.empty((count, KEPT, horizon), np.float32)
    with tqdm(total=count, desc=description, unit="window") as bar:
        for start in range(0, count, _BLOCK):
            rows = np.arange(start, min(start + _BLOCK, count))
            paths = np.stack(
                [draw(row, np.random.Generator(np.random.Philox(key=[keys[row], stream]))) for row in rows]
            )
            variance, omega, alpha, beta = (
                part[rows, None] for part in (process.variance, process.omega, process.alpha, process.beta)
            )
            for step in range(horizon):
                paths[:, step] *= np.sqrt(variance)
                variance = omega + alpha * paths[:, step] ** 2 + beta * variance
            np.exp(paths.cumsum(1, out=paths), out=paths)
            quantiles[rows] = np.moveaxis(np.quantile(paths, LEVELS, axis=-1), 0, -1)
            kept[rows] = paths[..., :KEPT].swapaxes(1, 2)
            bar.update(len(rows))
    variances = np.empty((count, horizon))
    variance = process.variance
    for step in range(horizon):
        variances[:, step] = process.residual * variance
        variance = process.omega + (process.alpha * process.residual + process.beta) * variance
    return BaselineForecast(quantiles, variances.cumsum(1), kept, about | _fallback(windows, process.failed))


def _fallback(windows: Windows, failed: NDArray[np.bool_]) -> dict[str, Any]:
    """Count the windows that fell back to EWMA, and name their instruments."""
    return {"ewma_instead": int(failed.sum()), "instruments_of_these": sorted(set(windows.take(failed).instruments))}


def _forecast_last_value(windows: Windows, horizon: int) -> BaselineForecast:
    shape = (len(windows), horizon)
    return BaselineForecast(np.ones((*shape, len(LEVELS))), np.full(shape, np.nan), about={"method": "the last close"})


def _forecast_volatility(windows: Windows, horizon: int) -> BaselineForecast:
    return _log_normal(lookback_volatility(windows) ** 2, horizon, {"method": "log-normal, the lookback's returns"})


def _forecast_ewma(windows: Windows, horizon: int) -> BaselineForecast:
    about = {"method": f"log-normal, squared returns with weights of {DECAY} to the power of their age"}
    return _log_normal(ewma_variance(windows.bars)[windows.ends], horizon, about)


def _forecast_garman_klass(windows: Windows, horizon: int) -> BaselineForecast:
    variance, used = range_variance(windows)
    failed = np.isnan(variance)
    variance = np.where(failed, ewma_variance(windows.bars)[windows.ends], variance)
    about = {"method": "log-normal, the lookback's ranges and nights, Garman & Klass"}
    about |= {"bars_left_out": int((windows.lookback - 1 - used).sum())} | _fallback(windows, failed)
    return _log_normal(variance, horizon, about)


def _log_normal(variance: Floats, horizon: int, about: dict[str, Any]) -> BaselineForecast:
    """Forecast the last close times exp(N(0, step × `variance`)), `variance` [W]."""
    variances = variance[:, None] * np.arange(1, horizon + 1)
    return BaselineForecast(lognorm.ppf(LEVELS, np.sqrt(variances)[..., None]), variances, about=about)


FORECASTS: dict[str, Callable[[Windows, int], BaselineForecast]] = {
    "last_value": _forecast_last_value,
    "volatility": _forecast_volatility,
    "ewma": _forecast_ewma,
    "garman_klass": _forecast_garman_klass,
    "garch_t": forecast_garch,
    "historical_simulation": simulate_history,
}


def compare_baselines(outcomes: Outcomes, baselines: Mapping[str, BaselineForecast]) -> pd.DataFrame:
    """Measure the model and each baseline at every step and over all of them, and the model against each.

    Returns:
        A row per forecast (`kronos`, then the baselines) and step (1 … H and `all`), with means over the forecasts
        whose bar came: crps of the quantiles, interval_50 and interval_90 (interval scores of the bands), coverage_50,
        coverage_90, qlike, and for `all` energy (of whole paths, where a baseline has them). Then crps_difference, the
        model's less the baseline's, below zero if the model is better, with the ends of its 95 % interval (see
        `interval`), and dm_t and dm_p, see `diebold_mariano`.
    """
    variance = implied_variance(outcomes.quantiles, outcomes.paths)
    forecasts = {"kronos": BaselineForecast(outcomes.quantiles, variance, outcomes.paths), **baselines}
    scores = {name: _scores(outcomes.closes, each) for name, each in forecasts.items()}
    simulated = any(each.paths is not None for each in baselines.values())
    energy = {
        name: energy_scores(outcomes.closes, each.paths if simulated else None, name == "kronos" and outcomes.moved)
        for name, each in forecasts.items()
    }
    rows = []
    for name, values in scores.items():
        for step in [*range(1, outcomes.horizon + 1), None]:
            column = slice(None) if step is None else slice(step - 1, step)
            known = ~np.isnan(outcomes.closes[:, column])
            if not known.any():
                continue
            dates = np.broadcast_to(outcomes.dates[:, None], known.shape)[known]
            row: dict[str, Any] = {"forecast": name, "step": str(step or "all")}
            row |= {"evaluated_windows": int(known.any(1).sum()), "days": len(np.unique(dates))}
            row |= {measure: float(each[:, column][known].mean()) for measure, each in values.items()}
            row["energy"] = _known_mean(energy[name]) if step is None else np.nan
            if name != "kronos":
                difference = (scores["kronos"]["crps"] - values["crps"])[:, column][known]
                lags = step or outcomes.horizon
                low, high = interval(difference, dates, lags)
                t, p = diebold_mariano(difference, dates, lags)
                row |= {"crps_difference": difference.mean(), "crps_difference_low": low, "crps_difference_high": high}
                row |= {"dm_t": t, "dm_p": p}
            rows.append(row)
    return pd.DataFrame(rows)


def _scores(closes: Floats, forecast: BaselineForecast) -> dict[str, Floats]:
    """Score a forecast by each measure but the energy score: all [W, H]."""
    found = {"crps": crps_of_quantiles(closes, forecast.quantiles)}
    for band, bounds in BANDS.items():
        found[band.replace("coverage", "interval")] = interval_scores(closes, forecast.quantiles, bounds)
    found |= {band: inside(closes, forecast.quantiles, bounds) for band, bounds in BANDS.items()}
    return found | {"qlike": qlike(closes, forecast.variance)}


def _known_mean(values: Floats | None) -> float:
    known = np.array([]) if values is None else values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan
