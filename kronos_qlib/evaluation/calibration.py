"""Calibration of forecasts: fitted on earlier ones, and what it changes on later ones."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import scoringrules
from scipy.optimize import minimize_scalar

from kronos_qlib.evaluation.measures import BANDS, LEVELS, Floats, Outcomes, interval, measure
from kronos_qlib.forecast.calibration import (
    LEAST_RATIO,
    BandKind,
    Calibration,
    FittedOn,
    ForecastIdentity,
    bessel_factor,
    conformity_grid,
    conformity_scores,
)

LEAST_WINDOWS = 20  # of each half and of each tercile: fewer conformity scores have no 5 % of them beyond a band
SPREADS = 0.01, 100.0  # between which the factor is looked for
PROBABILITY_BINS = np.linspace(0, 1, 11)


class NoSpread(ValueError):
    """The forecasts have no spread that could be scaled."""


@dataclass(frozen=True)
class PathMap:
    """The map of a `Calibration` while it is fitted: terciles [0 or 2], slopes and spreads [G, P]."""

    terciles: Floats
    slopes: Floats
    spreads: Floats


def fit_calibration(
    outcomes: Outcomes,
    until: np.datetime64,
    identity: ForecastIdentity,
    segment: str,
    *,
    lookback: int,
    freq: str = "day",
    synthetic: bool = False,
) -> Calibration:
    """Fit on the forecasts of which all bars are known by `until`; later bars are not read.

    The slope of a step is the least-squares slope, through zero, of what came on the mean of the samples' log returns,
    clipped to 0 … 1: the best one for means of so many samples, whose noise is in it (more samples would deserve a
    little more). The spread is that whose CRPS is least; see `fit_map`. A map for each tercile of volatility is kept if
    on the second half of the days, purged by the horizon, those of the first half have the lesser plain CRPS. The
    conformity scores are of the second half, with the map of the first; then the map is fitted again on all.

    Args:
        outcomes: with paths, not calibrated before. identity, segment, lookback, freq, synthetic: what they are of, to
            be kept.

    Raises:
        ValueError: too few forecasts have all their bars by then, or there are no paths of two samples.
        NoSpread: the samples of a step coincide.
    """
    if outcomes.paths is None or outcomes.samples < 2:
        raise ValueError("a calibration is fitted on sample paths, at least two a forecast")
    known = outcomes.take(outcomes.ends[:, -1] <= until)
    days = np.unique(known.dates)
    middle = days[(len(days) + 1) // 2] if len(days) > 1 else until
    first, second = known.take(known.ends[:, -1] < middle), known.take(known.dates >= middle)
    if min(len(first), len(second)) < LEAST_WINDOWS:
        day = np.datetime_as_string(until, "D")
        raise ValueError(
            f"{len(known)} forecasts have all {outcomes.horizon} bars after them by {day}, of {len(days)} days: "
            f"{len(first)} in the first half and {len(second)} in the second; each should have {LEAST_WINDOWS}"
        )
    mapped = [_apply_map(fit_map(first, cuts), second) for cuts in _ways_to_divide(first)]
    losses = [scoringrules.crps_ensemble(second.closes, each.swapaxes(1, 2), estimator="qd").mean() for each in mapped]
    chosen = int(np.argmin(losses))
    grid = conformity_grid(conformity_scores(mapped[chosen], second.closes, second.volatility))
    final = fit_map(known, _ways_to_divide(known)[: chosen + 1][-1])
    about = FittedOn(
        segment=segment,
        freq=freq,
        synthetic=synthetic,
        lookback=lookback,
        samples=known.samples,
        windows=len(known),
        days=len(days),
        first=_day(days[0]),
        last=_day(days[-1]),
        until=_day(known.ends[:, -1].max()),
    )
    return Calibration(
        identity=identity,
        fitted_on=about,
        terciles=tuple(final.terciles.tolist()),
        slopes=_rows(final.slopes),
        spreads=_rows(final.spreads),
        conformity=tuple(_rows(bands) for bands in grid.transpose(1, 2, 0)),
    )


def _ways_to_divide(outcomes: Outcomes) -> list[Floats]:
    """Return the volatilities at which forecasts may be divided: nowhere, and in three equal groups if they differ."""
    cuts = np.quantile(outcomes.volatility, [1 / 3, 2 / 3])
    groups = np.bincount(np.searchsorted(cuts, outcomes.volatility), minlength=3)
    return [np.array([]), *([cuts] if groups.min() >= LEAST_WINDOWS else [])]


def fit_map(outcomes: Outcomes, terciles: Floats) -> PathMap:
    """Fit slopes and spreads, for each group of volatility that the terciles make.

    The spread k is that with the least CRPS, E|X − y| − ½ E|X − X'|, of the distribution that the samples are of, not
    of the few samples: samples moved by their own mean m are too near to each other. With x − m scaled by
    √(n / (n − 1)) they have its variance about the moved mean, so the first term is the mean of
    |slope · m + k √(n / (n − 1)) (x − m) − y|; the second, k/2 times the mean difference of two samples, needs no
    scaling. (The fair CRPS of the moved samples would be too good by about 1 / 2n of itself.)
    """
    group = np.searchsorted(terciles, outcomes.volatility)
    slopes, spreads = np.empty((2, len(terciles) + 1, outcomes.horizon))
    for number in range(len(slopes)):
        members = outcomes.take(group == number)
        logs, came = _log_closes(members), np.log(members.closes)
        mean = logs.mean(1)
        square = (mean**2).sum(0)
        ratio = np.divide((mean * came).sum(0), square, out=np.zeros_like(square), where=square > 0)
        slopes[number] = np.clip(ratio, 0, 1)
        for step in range(outcomes.horizon):
            error = came[:, step] - slopes[number, step] * mean[:, step]
            spreads[number, step] = _fit_spread(logs[:, :, step], error, step)
    return PathMap(terciles, slopes, spreads)


def _fit_spread(logs: Floats, error: Floats, step: int) -> float:
    """Fit the factor for samples [W, S] of a step and what came less the moved means [W]."""
    count = logs.shape[1]
    deviations = bessel_factor(count) * (logs - logs.mean(1, keepdims=True))
    ranks = 2 * np.arange(1, count + 1) - count - 1
    difference = 2 * (np.sort(logs, axis=1) @ ranks).mean() / (count * (count - 1))  # of two samples, on average
    if not difference > 0:
        raise NoSpread(f"the samples coincide at step {step + 1}: there is no spread to calibrate; draw more samples")

    def loss(spread: float) -> float:
        return float(np.abs(spread * deviations - error[:, None]).mean() - spread * difference / 2)

    return float(minimize_scalar(loss, bounds=SPREADS, method="bounded", options={"xatol": 1e-6}).x)


def _log_closes(outcomes: Outcomes) -> Floats:
    return np.log(np.maximum(np.asarray(outcomes.paths, np.float64), LEAST_RATIO))


def _apply_map(fitted: PathMap, outcomes: Outcomes) -> Floats:
    """Map closes of sample paths as a `Calibration` with this map would."""
    blank = Calibration.model_construct(
        terciles=tuple(fitted.terciles), slopes=_rows(fitted.slopes), spreads=_rows(fitted.spreads)
    )
    return blank.map_closes(outcomes.paths, outcomes.volatility)


def _rows(values: Floats) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, values.tolist()))


def calibrate(outcomes: Outcomes, calibration: Calibration, bands: BandKind = "split") -> Outcomes:
    """Apply a calibration to forecasts with paths; adaptive bands begin with the first of these dates."""
    closes, offsets = calibration.map_closes(outcomes.paths, outcomes.volatility), None
    if bands == "adaptive":
        known = outcomes.closes, outcomes.dates, outcomes.ends
        offsets = calibration.adaptive_offsets(closes, outcomes.volatility, *known)
    return replace(
        outcomes,
        paths=closes,
        quantiles=calibration.quantiles(closes, outcomes.volatility, LEVELS, offsets),
        mean_return=closes.mean((1, 2)) - 1,
        prob_up=(closes.mean(2) > 1).mean(1),
        moved=True,
    )


def compare_calibration(outcomes: Outcomes, calibration: Calibration) -> pd.DataFrame:
    """Compare forecasts before and after a calibration that was not fitted on them.

    Returns:
        Rows for each step (1 … H) and `all`: crps of the quantiles; crps_paths, the plain CRPS of the samples, and
        crps_fair, the limit for many of them (see `measure`); coverage_50 and coverage_90 of split conformal bands, and
        with `_adaptive` of adaptive ones; and brier, the Brier score of `prob_up`. Columns: measure, step, before,
        after; change_low and change_high, the 95 % interval of after − before; volatility, the same of historical
        volatility (for the CRPS of samples in closed form), and of each CRPS less_volatility, after less that, with
        less_volatility_low and less_volatility_high; constant, of the Brier score, that of a probability of one half.
    """
    after = measure(corrected := calibrate(outcomes, calibration))
    adaptive = measure(replace(calibrate(outcomes, calibration, "adaptive"), paths=None))
    before = measure(outcomes)
    pairs = {name: (before[name], after[name], before[f"{name}_volatility"]) for name in ("crps", *BANDS)}
    pairs |= {f"{name}_adaptive": (before[name], adaptive[name], pairs[name][2]) for name in BANDS}
    for name in ("crps_paths", "crps_fair"):
        pairs[name] = before[name], after[name], before["crps_volatility_exact"]
    rows = [
        {"measure": name, "step": str(step or "all")} | _compare(outcomes, *values, step, name.startswith("crps"))
        for name, values in pairs.items()
        for step in (*range(1, outcomes.horizon + 1), None)
    ]
    return pd.DataFrame([*rows, _brier(outcomes, corrected)])


def _compare(
    outcomes: Outcomes, before: Floats, after: Floats, simple: Floats, step: int | None, losses: bool
) -> dict[str, float]:
    """Average a measure [W, H] of one step or of all, with intervals of the differences."""
    column = slice(None) if step is None else slice(step - 1, step)
    known = ~np.isnan(outcomes.closes[:, column])
    if not known.any():
        return {}
    dates = np.broadcast_to(outcomes.dates[:, None], known.shape)[known]
    before, after, simple = (values[:, column][known] for values in (before, after, simple))
    lags = step or outcomes.horizon
    row = {"before": before.mean(), "after": after.mean(), "volatility": simple.mean()}
    row |= dict(zip(("change_low", "change_high"), interval(after - before, dates, lags)))
    if losses:
        row["less_volatility"] = (after - simple).mean()
        row |= dict(zip(("less_volatility_low", "less_volatility_high"), interval(after - simple, dates, lags)))
    return row


def _brier(outcomes: Outcomes, corrected: Outcomes) -> dict[str, object]:
    known = ~np.isnan(outcomes.mean_close)
    rise = (outcomes.mean_close[known] > 1).astype(float)
    before, after = (scoringrules.brier_score(rise, each.prob_up[known]) for each in (outcomes, corrected))
    low, high = interval(after - before, outcomes.dates[known], outcomes.horizon)
    means = {"before": before.mean(), "after": after.mean(), "change_low": low, "change_high": high}
    return {"measure": "brier", "step": "all"} | means | {"constant": 0.25}


def measure_reliability(outcomes: Outcomes, calibration: Calibration) -> pd.DataFrame:
    """Measure how often the mean close rose, by the probability forecast, before and after a calibration.

    Returns:
        A row per bin of a tenth that has forecasts: when (before, after), forecast (the mean probability), share (that
        rose), windows.
    """
    known = outcomes.take(~np.isnan(outcomes.mean_close))
    tables = []
    for when, each in (("before", known), ("after", calibrate(known, calibration))):
        table = pd.DataFrame({"forecast": each.prob_up, "share": known.mean_close > 1, "windows": 1})
        bins = np.minimum(np.digitize(each.prob_up, PROBABILITY_BINS[1:-1]), len(PROBABILITY_BINS) - 2)
        found = table.groupby(bins).agg({"forecast": "mean", "share": "mean", "windows": "sum"})
        tables.append(found.reset_index(drop=True).assign(when=when))
    return pd.concat(tables, ignore_index=True)[["when", "forecast", "share", "windows"]]


def _day(date: np.datetime64) -> str:
    return str(np.datetime_as_string(date, "D"))
