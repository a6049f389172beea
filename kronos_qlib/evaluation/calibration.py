"""Calibration of forecasts on earlier ones: the spread of their quantiles, and the probability of a rise."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import scoringrules
from sklearn.isotonic import IsotonicRegression

from kronos_qlib.evaluation.measures import Floats, Outcomes, interval, measure, summarise
from kronos_qlib.forecast.forecaster import QUANTILES

NOMINAL_COVERAGE = 0.9  # of the band from the 5 % to the 95 % quantile
COMPARED_MEASURES = "coverage_50", "coverage_90", "crps"
PROBABILITY_BINS = np.linspace(0, 1, 11)


class NoSpread(ValueError):
    """The forecasts have no spread that could be widened."""


@dataclass(frozen=True)
class Calibration:
    """A correction, fitted on earlier forecasts.

    factors: by which quantiles are spread about their median, one per step [H]. prob_up: the isotonic regression of
    the share of rises on `prob_up`. up: the share of rises. windows: number of forecasts it was fitted on. until: the
    date of the last bar that it was fitted on.
    """

    factors: Floats
    prob_up: IsotonicRegression
    up: float
    windows: int
    until: np.datetime64

    def apply(self, outcomes: Outcomes) -> Outcomes:
        """Correct forecasts; the result has no paths, which are not corrected."""
        median = outcomes.quantiles[..., QUANTILES.index(50), None]
        quantiles = median + self.factors[:, None] * (outcomes.quantiles - median)
        return replace(outcomes, quantiles=quantiles, prob_up=self.prob_up.predict(outcomes.prob_up), paths=None)


def fit_calibration(outcomes: Outcomes, until: np.datetime64) -> Calibration:
    """Fit on the forecasts of which all bars are known by `until`; later bars are not read.

    The factor of a step is the smallest with which the 90 % band covers 90 % of the closes.

    Raises:
        ValueError: no forecast has all its bars by then.
        NoSpread: the quantiles of more than 10 % of them coincide at some step.
    """
    known = outcomes.take(outcomes.ends[:, -1] <= until)
    if not len(known):
        raise ValueError(
            f"no forecast has all {outcomes.horizon} bars after it by {np.datetime_as_string(until, 'D')}: "
            "there is nothing to fit a calibration on"
        )
    rise = known.mean_close > 1
    isotonic = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(known.prob_up, rise)
    return Calibration(_factors(known), isotonic, float(rise.mean()), len(known), known.ends[:, -1].max())


def _factors(outcomes: Outcomes) -> Floats:
    low, median, high = (outcomes.quantiles[..., QUANTILES.index(level)] for level in (5, 50, 95))
    error = outcomes.closes - median
    half_width = np.where(error > 0, high - median, median - low)
    needed = np.divide(np.abs(error), half_width, out=np.where(error == 0, 0.0, np.inf), where=half_width > 0)
    factors = np.quantile(needed, NOMINAL_COVERAGE, axis=0, method="higher")
    if not np.isfinite(factors).all():
        step = int(np.flatnonzero(~np.isfinite(factors))[0]) + 1
        raise NoSpread(
            f"the quantiles of more than {1 - NOMINAL_COVERAGE:.0%} of the forecasts coincide at step {step}: "
            "there is no spread to calibrate; draw more samples"
        )
    return factors


def compare_calibration(outcomes: Outcomes, calibration: Calibration) -> pd.DataFrame:
    """Compare forecasts before and after a calibration that was not fitted on them.

    Returns:
        Rows: coverage_50, coverage_90 and crps of the quantiles for each step (1 … H) and `all`, and brier, the Brier
        score of `prob_up`. Columns: measure, step, factor, before, after; change_low and change_high, the 95 % interval
        of after − before; constant, the Brier score of the share of rises that the calibration was fitted on.
    """
    corrected = calibration.apply(outcomes)
    before, after = (measure(replace(each, paths=None)) for each in (outcomes, corrected))
    rows = []
    for step in (*range(1, outcomes.horizon + 1), None):
        mean_before, mean_after = (summarise(outcomes, values, step) for values in (before, after))
        column = slice(None) if step is None else slice(step - 1, step)
        known = ~np.isnan(outcomes.closes[:, column])
        dates = np.broadcast_to(outcomes.dates[:, None], known.shape)[known]
        for name in COMPARED_MEASURES:
            change = (after[name] - before[name])[:, column][known]
            low, high = interval(change, dates, step or outcomes.horizon)
            factor = np.nan if step is None else calibration.factors[step - 1]
            means = {"before": mean_before[name], "after": mean_after[name], "change_low": low, "change_high": high}
            rows.append({"measure": name, "step": str(step or "all"), "factor": factor} | means)
    return pd.DataFrame([*rows, _brier(outcomes, corrected, calibration.up)])


def _brier(outcomes: Outcomes, corrected: Outcomes, up: float) -> dict[str, object]:
    known = ~np.isnan(outcomes.mean_close)
    rise = (outcomes.mean_close[known] > 1).astype(float)
    probabilities = outcomes.prob_up[known], corrected.prob_up[known], np.full(known.sum(), up)
    before, after, constant = (scoringrules.brier_score(rise, np.clip(each, 0, 1)) for each in probabilities)
    low, high = interval(after - before, outcomes.dates[known], outcomes.horizon)
    means = {"before": before.mean(), "after": after.mean(), "change_low": low, "change_high": high}
    return {"measure": "brier", "step": "all"} | means | {"constant": constant.mean()}


def measure_reliability(outcomes: Outcomes, calibration: Calibration) -> pd.DataFrame:
    """Measure how often the mean close rose, by the probability forecast, before and after a calibration.

    Returns:
        A row per bin of a tenth that has forecasts: when (before, after), forecast (the mean probability), share (that
        rose), windows.
    """
    known = outcomes.take(~np.isnan(outcomes.mean_close))
    tables = []
    for when, each in (("before", known), ("after", calibration.apply(known))):
        table = pd.DataFrame({"forecast": each.prob_up, "share": known.mean_close > 1, "windows": 1})
        bins = np.minimum(np.digitize(each.prob_up, PROBABILITY_BINS[1:-1]), len(PROBABILITY_BINS) - 2)
        found = table.groupby(bins).agg({"forecast": "mean", "share": "mean", "windows": "sum"})
        tables.append(found.reset_index(drop=True).assign(when=when))
    return pd.concat(tables, ignore_index=True)[["when", "forecast", "share", "windows"]]
