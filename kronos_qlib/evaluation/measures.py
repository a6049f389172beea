"""Measures of forecasts: quantiles and paths against the actual closes, beside two simple forecasts.

Closes are ratios to the last close, so that instruments compare. The simple forecasts are `last_value` (a point mass
at the last close) and `volatility` (log-normal about the last close, the lookback's daily volatility times the root of
the step).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import scoringrules
from numpy.typing import NDArray
from scipy.stats import kstest, lognorm, norm
from scipy.stats import t as t_distribution

from kronos_qlib.data.windows import CLOSE, Windows
from kronos_qlib.forecast.calibration import LEAST_VOLATILITY, bar_volatility, bessel_factor
from kronos_qlib.forecast.forecaster import QUANTILES

Floats = NDArray[np.float64]

LEVELS = np.array(QUANTILES) / 100
# Each level has the weight of the levels nearest to it; a plain mean would count the tails too much.
WEIGHTS = np.diff([0.0, *(LEVELS[1:] + LEVELS[:-1]) / 2, 1.0])
BANDS = {"coverage_50": (0.25, 0.75), "coverage_90": (0.05, 0.95)}
BASELINES = "last_value", "volatility"
TERCILES = "low", "middle", "high"
PIT_BINS = np.linspace(0, 1, 21)  # all levels are edges of them
ENERGY_PATHS, ENERGY_BLOCK = 50, 32  # an energy score compares each path with each; that many windows at a time


@dataclass(frozen=True)
class Outcomes:
    """W forecasts of H bars from `samples` paths each, and the actual closes; ratios to the last close.

    dates: score dates, datetime64[ns] [W]. quantiles: of the close, [W, H, 7], at `LEVELS`. closes: actual, [W, H],
    NaN where so many bars do not follow. ends: their dates, datetime64[ns] [W, H], NaT there. volatility: of the
    lookback's daily log returns [W]. mean_return, prob_up: the scores [W]. paths: closes [W, S, H], where kept. moved:
    whether the paths were moved by their own mean, as a calibration does.
    """

    dates: NDArray[np.datetime64]
    quantiles: Floats
    closes: Floats
    ends: NDArray[np.datetime64]
    volatility: Floats
    mean_return: Floats
    prob_up: Floats
    samples: int
    paths: NDArray[np.floating] | None = None
    moved: bool = False

    def __len__(self) -> int:
        return len(self.dates)

    @property
    def horizon(self) -> int:
        """Number of bars forecast, H."""
        return self.closes.shape[1]

    @property
    def mean_close(self) -> Floats:
        """Mean close over the horizon [W], NaN unless all H bars follow."""
        return self.closes.mean(1)

    def take(self, rows: np.ndarray) -> "Outcomes":
        """Select the forecasts at `rows` (positions or a mask)."""
        arrays = {name: value[rows] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(self, **arrays)


def realised_closes(windows: Windows, horizon: int) -> tuple[Floats, NDArray[np.datetime64]]:
    """Look up the closes of the `horizon` bars after each window, ratios to its last close, and their dates.

    Returns:
        Both [W, H], of the same instrument's next bars: NaN and NaT where it has fewer.
    """
    bars, ends = windows.bars, windows.ends
    rows = ends[:, None] + np.arange(1, horizon + 1)
    known = rows < bars.offsets[bars.codes[ends] + 1][:, None]
    rows = np.where(known, rows, 0)
    close = bars.values[:, CLOSE].astype(np.float64)
    return (
        np.where(known, close[rows] / close[ends][:, None], np.nan),
        np.where(known, bars.dates[rows], np.datetime64("NaT")),
    )


def lookback_volatility(windows: Windows) -> Floats:
    """Compute the standard deviation of the bar-to-bar log returns within each lookback [W], known at its end.

    Raises:
        ValueError: a lookback of fewer than 3 bars has no such deviation.
    """
    if windows.lookback < 3:
        raise ValueError(f"a volatility needs a lookback of 3 bars or more, not {windows.lookback}")
    rows = windows.ends[:, None] + np.arange(1 - windows.lookback, 1)
    return bar_volatility(windows.bars.values[rows, CLOSE])


def volatility_terciles(outcomes: Outcomes) -> NDArray[np.object_]:
    """Name the tercile of each forecast's volatility within its day: low, middle or high [W]; no later day counts."""
    rank = pd.Series(outcomes.volatility).groupby(outcomes.dates).rank(pct=True, method="first")
    return np.array(TERCILES, object)[np.minimum((rank.to_numpy() * 3 - 1e-9).astype(int), 2)]


def measure(outcomes: Outcomes) -> dict[str, Floats]:
    """Measure every forecast, by name of the measure: [W, H], but `direction` and `up` [W]; NaN where no bar follows.

    `crps`: see `crps_of_quantiles`; over the same levels for all three forecasts. Few samples make it larger, as their
    quantiles are rough.
    `crps_paths`: of the samples themselves; `crps_fair`: the limit for many samples of the same kind (Ferro 2014); of
    moved ones, which would seem too good by about 1 / 2S of it, with the difference of two before it was scaled;
    `crps_volatility_exact`: in closed form; these three where paths are kept. `coverage_50`, `coverage_90`: whether the
    close lay in the band. `error`: close less the median. `pit`: see `pit_of_paths` and `pit_of_quantiles`.
    `direction`: whether the sign of `mean_return` was that of the mean close's return; `up`: whether that was above 0.
    """
    closes, spread = outcomes.closes, _spread(outcomes)[..., None]
    quantiles = {
        "": outcomes.quantiles,
        "_last_value": np.ones_like(outcomes.quantiles),
        "_volatility": lognorm.ppf(LEVELS, spread),
    }
    found: dict[str, Floats] = {}
    for name, values in quantiles.items():
        found[f"crps{name}"] = crps_of_quantiles(closes, values)
        found[f"error{name}"] = closes - values[..., QUANTILES.index(50)]
        for band, bounds in BANDS.items():
            found[f"{band}{name}"] = inside(closes, values, bounds)
    found["pit_volatility"] = lognorm.cdf(closes, spread[..., 0])
    if outcomes.paths is None:
        found["pit"] = pit_of_quantiles(closes, outcomes.quantiles)
    else:
        paths = outcomes.paths.swapaxes(1, 2)
        found["pit"] = pit_of_paths(closes, paths)
        found["crps_paths"] = scoringrules.crps_ensemble(closes, paths, estimator="qd")
        if outcomes.samples > 1:
            found["crps_fair"] = scoringrules.crps_ensemble(closes, paths, estimator="pwm")
        if outcomes.samples > 1 and outcomes.moved:
            half_difference = outcomes.samples * (found["crps_paths"] - found["crps_fair"])  # of two samples
            found["crps_fair"] += half_difference * (1 - 1 / bessel_factor(outcomes.samples))
        found["crps_volatility_exact"] = scoringrules.crps_lognormal(closes, 0.0, spread[..., 0])
    return found | _direction(outcomes)


def crps_of_quantiles(closes: Floats, quantiles: Floats) -> Floats:
    """Compute the continuous ranked probability score of quantiles [..., 7] for closes [...], in their unit.

    It is twice the integral of the pinball loss over all levels (Laio & Tamea 2007), here a sum over `LEVELS`.
    """
    return 2 * scoringrules.quantile_score(closes[..., None], quantiles, LEVELS) @ WEIGHTS


def _spread(outcomes: Outcomes) -> Floats:
    return outcomes.volatility[:, None] * np.sqrt(np.arange(1, outcomes.horizon + 1))


def inside(closes: Floats, quantiles: Floats, bounds: tuple[float, float]) -> Floats:
    """Say whether closes [...] lie in a band of quantiles [..., 7]: 1 or 0, NaN where no bar follows."""
    low, high = _band(quantiles, bounds)
    return np.where(np.isnan(closes), np.nan, (closes >= low) & (closes <= high))


def _band(quantiles: Floats, bounds: tuple[float, float]) -> list[Floats]:
    return [quantiles[..., QUANTILES.index(round(100 * level))] for level in bounds]


def interval_scores(closes: Floats, quantiles: Floats, bounds: tuple[float, float]) -> Floats:
    """Compute the interval score of a band of quantiles [..., 7]: width plus 2/α times what closes [...] miss it by.

    α is the share that should lie outside. Gneiting & Raftery 2007; less is better.
    """
    return scoringrules.interval_score(closes, *_band(quantiles, bounds), 1 - (bounds[1] - bounds[0]))


def implied_variance(quantiles: Floats, paths: NDArray[np.floating] | None = None) -> Floats:
    """Compute the variance that a forecast implies for the log return since the last close, about zero [W, H].

    From paths [W, S, H] their mean square. From quantiles [W, H, 7] that of the normal distribution nearest to them
    (least squares on the normal quantiles): what lies beyond 5 … 95 % is not known, so fat tails count too little.
    """
    if paths is not None:
        return np.square(np.log(paths.astype(np.float64))).mean(1)
    logs, scores = np.log(quantiles), norm.ppf(LEVELS)  # the scores are symmetric: their mean is zero
    return logs.mean(-1) ** 2 + (logs @ scores / (scores @ scores)) ** 2


def qlike(closes: Floats, variance: Floats) -> Floats:
    """Compute QLIKE, log variance + squared log return / variance, of closes [...], ratios to the last close.

    The ranking of variances by it is right although the squared return is a noisy stand-in (Patton 2011). Only
    differences mean something. NaN where a variance is.
    """
    variance = np.maximum(variance, LEAST_VOLATILITY**2)
    return np.log(variance) + np.log(closes) ** 2 / variance


def energy_scores(closes: Floats, paths: NDArray[np.floating] | None, moved: bool = False) -> Floats | None:
    """Compute the energy score of paths [W, S, H] for the closes [W, H]: how well whole paths are forecast.

    Gneiting & Raftery 2007, in its fair form, so that numbers of paths compare; of the first 50 paths; of `moved` ones
    with the difference of two before it was scaled, as `crps_fair` of `measure`. NaN where not all bars follow, None
    without two paths.
    """
    if paths is None or paths.shape[1] < 2:
        return None
    scaled = bessel_factor(paths.shape[1]) if moved else 1.0
    paths, scores = paths[:, :ENERGY_PATHS], np.full(len(closes), np.nan)
    rows = np.flatnonzero(~np.isnan(closes).any(1))
    for block in np.split(rows, range(ENERGY_BLOCK, len(rows), ENERGY_BLOCK)):
        plain, fair = (
            scoringrules.es_ensemble(closes[block], paths[block].astype(np.float64), estimator=kind, backend="numpy")
            for kind in ("nrg", "fair")
        )
        scores[block] = fair + paths.shape[1] * (plain - fair) * (1 - 1 / scaled)
    return scores


def _direction(outcomes: Outcomes) -> dict[str, Floats]:
    actual = outcomes.mean_close - 1
    unknown = np.isnan(actual) | (actual == 0)
    return {
        "direction": np.where(unknown, np.nan, np.sign(outcomes.mean_return) == np.sign(actual)),
        "up": np.where(unknown, np.nan, actual > 0),
    }


def pit_of_quantiles(closes: Floats, quantiles: Floats) -> Floats:
    """Compute the probability integral transform (PIT) of closes [...], linear between quantiles [..., 7].

    Beyond the outermost, and where quantiles coincide with the close, the unknown rest is drawn evenly (Czado et al.
    2009), by a fixed seed. Quantiles of few samples lie too near each other: both tails of the PIT are then too heavy.
    """
    below, upto = ((compare(quantiles, closes[..., None])).sum(-1) for compare in (np.less, np.less_equal))
    edges = np.concatenate([[0.0], LEVELS, [1.0]])
    between = (below == upto) & (below > 0) & (below < len(LEVELS))
    left, right = (
        np.take_along_axis(quantiles, np.clip(place, 0, len(LEVELS) - 1)[..., None], -1)[..., 0]
        for place in (below - 1, below)
    )
    share = np.random.default_rng(0).random(closes.shape)
    share = np.where(between, (closes - left) / np.where(between, right - left, 1.0), share)
    low = np.where(below == upto, edges[below], edges[np.minimum(below + 1, len(LEVELS))])
    high = np.where(below == upto, edges[np.minimum(below + 1, len(LEVELS) + 1)], edges[upto])
    return np.where(np.isnan(closes), np.nan, low + share * (high - low))


def pit_of_paths(closes: Floats, paths: NDArray[np.floating]) -> Floats:
    """Compute the randomised rank of closes [...] among samples [..., S]: uniform for the right forecast, for any S.

    See Czado et al. 2009; the draws have a fixed seed.
    """
    below, upto = ((compare(paths, closes[..., None])).sum(-1) for compare in (np.less, np.less_equal))
    drawn = np.random.default_rng(0).random(closes.shape) * (upto - below + 1)
    return np.where(np.isnan(closes), np.nan, (below + drawn) / (paths.shape[-1] + 1))


def perfect_coverage(samples: int) -> dict[str, float]:
    """Compute the coverage that the bands have when so many samples are of the right distribution.

    The quantile p of S samples is of expected probability ((S − 1) p + 1) / (S + 1), being interpolated between order
    statistics (Hyndman & Fan 1996, type 7; exact for a uniform distribution): few samples make narrow bands.
    """
    return {name: (high - low) * (samples - 1) / (samples + 1) for name, (low, high) in BANDS.items()}


def interval(values: Floats, dates: np.ndarray, steps: int) -> tuple[float, float]:
    """Compute the 95 % interval of the mean of values [N], by the standard error of Driscoll & Kraay (1998).

    Values of one day depend on each other, and so do those of days less than `steps` apart, whose horizons overlap.
    The weights of the lags fall to zero, so there are twice as many as days overlap, 2 × (`steps` − 1). Student's t, of
    the number of days. NaN for fewer than 5 × `steps` days.
    """
    from statsmodels.regression.linear_model import OLS  # takes half a second, which a training need not wait for

    days, time = np.unique(dates, return_inverse=True)
    if len(days) < max(5 * steps, 2):
        return np.nan, np.nan
    lags = {"time": time, "maxlags": 2 * (steps - 1)}
    fit = OLS(values, np.ones(len(values))).fit(cov_type="hac-groupsum", cov_kwds=lags)
    margin = t_distribution.ppf(0.975, len(days) - 1) * fit.bse[0]
    return float(fit.params[0] - margin), float(fit.params[0] + margin)


def diebold_mariano(differences: Floats, dates: np.ndarray, steps: int) -> tuple[float, float]:
    """Test whether the mean of loss differences [N] of forecasts `steps` ahead is zero: t and its two-sided p.

    Diebold & Mariano (1995) on the mean difference of each day, with the correction for few days and Student's t of
    Harvey, Leybourne & Newbold (1997). The variance counts autocovariances up to lag `steps` − 1 in full; where their
    sum is not positive, by Bartlett's weights. NaN for fewer than 5 × `steps` days or without variance.
    """
    from statsmodels.tsa.stattools import acovf

    daily = pd.Series(differences).groupby(np.asarray(dates)).mean().to_numpy()
    days = len(daily)
    if days < max(5 * steps, 2) or np.ptp(daily) == 0:
        return np.nan, np.nan
    covariances = acovf(daily, nlag=steps - 1, fft=False)
    lags = np.arange(1, steps)
    variance = covariances[0] + 2 * covariances[1:].sum()
    if variance <= 0:
        variance = covariances[0] + 2 * (1 - lags / steps) @ covariances[1:]
    correction = (days + 1 - 2 * steps + steps * (steps - 1) / days) / days
    t = daily.mean() / np.sqrt(variance / days) * np.sqrt(correction)
    return float(t), float(2 * t_distribution.sf(abs(t), days - 1))


def summarise_steps(outcomes: Outcomes, measured: Mapping[str, Floats]) -> pd.DataFrame:
    """Summarise each step, 1 … H, in a row, see `summarise`; a step without any actual close has none."""
    steps = {step: summarise(outcomes, measured, step=step) for step in range(1, outcomes.horizon + 1)}
    return pd.DataFrame.from_dict(
        {step: row for step, row in steps.items() if row["evaluated_windows"]}, orient="index"
    ).rename_axis("step")


def summarise_groups(outcomes: Outcomes, measured: Mapping[str, Floats], groups: np.ndarray, name: str) -> pd.DataFrame:
    """Summarise each group of forecasts in a row, all steps pooled, see `summarise`; `groups` [W] are their labels."""
    rows = {}
    for group in [tercile for tercile in TERCILES if tercile in groups] or sorted(set(groups)):
        members = groups == group
        rows[group] = summarise(outcomes.take(members), {key: value[members] for key, value in measured.items()})
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(name)


def summarise(outcomes: Outcomes, measured: Mapping[str, Floats], step: int | None = None) -> dict[str, float]:
    """Average the measures over forecasts, of one step or of all steps.

    crps, mae, rmse, coverage_50 and coverage_90, and the same with `_last_value` and `_volatility`. Errors are of the
    Kronos median; the median of both simple forecasts is the last close. `crps_less_*` is the difference, below
    zero if Kronos is better. `pit_ks`: the Kolmogorov–Smirnov distance of the PIT from uniform; no p, forecasts depend
    on each other. `_low`, `_high`: see `interval`. Over all steps also `direction`, and `up`, how often the mean close
    was above the last. NaN where there is nothing to average.
    """
    column = slice(None) if step is None else slice(step - 1, step)
    cut = {name: values[:, column] for name, values in measured.items() if values.ndim == 2}
    known = ~np.isnan(outcomes.closes[:, column])
    dates = np.broadcast_to(outcomes.dates[:, None], known.shape)[known]
    values = {name: array[known] for name, array in cut.items()}
    row: dict[str, float] = {"evaluated_windows": int(known.any(1).sum()), "days": len(np.unique(dates))}
    lags = step or outcomes.horizon
    for name in (name for name in values if name.startswith("crps")):
        row[name] = _mean(values[name])
    for name in BASELINES:
        row |= _with_interval(f"crps_less_{name}", values["crps"] - values[f"crps_{name}"], dates, lags)
    for band in BANDS:
        row |= _with_interval(band, values[band], dates, lags)
        row |= {f"{band}_{name}": _mean(values[f"{band}_{name}"]) for name in BASELINES}
    for name in ("pit", "pit_volatility"):
        row[name.replace("pit", "pit_ks")] = kstest(values[name], "uniform").statistic if len(dates) else np.nan
    for name in ("", *(f"_{name}" for name in BASELINES)):
        row[f"mae{name}"] = _mean(np.abs(values[f"error{name}"]))
    for name in ("", *(f"_{name}" for name in BASELINES)):
        row[f"rmse{name}"] = np.sqrt(_mean(values[f"error{name}"] ** 2))
    if step is None:
        known = ~np.isnan(measured["direction"])
        row |= _with_interval("direction", measured["direction"][known], outcomes.dates[known], lags)
        row["up"] = _mean(measured["up"][known])
    return row


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else np.nan


def _with_interval(name: str, values: Floats, dates: np.ndarray, steps: int) -> dict[str, float]:
    low, high = interval(values, dates, steps)
    return {name: _mean(values), f"{name}_low": low, f"{name}_high": high}


def pit_histogram(measured: Mapping[str, Floats]) -> pd.DataFrame:
    """Compute the density of the PIT in 20 bins, of each step (1 … H) and of `all`; 1 everywhere if calibrated.

    Columns: step, low, high (the bin), density, density_volatility.
    """
    steps = {**{str(step + 1): slice(step, step + 1) for step in range(measured["pit"].shape[1])}, "all": slice(None)}
    tables = []
    for step, column in steps.items():
        densities = {}
        for name in ("", "_volatility"):
            pit = measured[f"pit{name}"][:, column]
            pit = pit[~np.isnan(pit)]
            counts = np.histogram(pit, PIT_BINS)[0]
            densities[f"density{name}"] = counts / max(len(pit), 1) * (len(PIT_BINS) - 1)
        tables.append(pd.DataFrame({"step": step, "low": PIT_BINS[:-1], "high": PIT_BINS[1:], **densities}))
    return pd.concat(tables, ignore_index=True)
