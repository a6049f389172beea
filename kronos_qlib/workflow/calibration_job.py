"""Calibrate forecasts as the settings of a KronosModel say: the windows to fit on, the fit, its application."""

from collections.abc import Mapping, Sequence

import numpy as np
from qlib.config import C

from kronos_qlib.data.dataset import KLineDataset
from kronos_qlib.data.demo_market import is_synthetic
from kronos_qlib.data.windows import CLOSE, Windows
from kronos_qlib.evaluation.calibration import fit_calibration
from kronos_qlib.evaluation.measures import LEVELS, Outcomes, lookback_volatility, realised_closes
from kronos_qlib.forecast.calibration import BandKind, Calibration, ForecastIdentity
from kronos_qlib.forecast.forecaster import QUANTILES, quantile_columns
from kronos_qlib.forecast.scores import SCORES, scores
from kronos_qlib.workflow.settings import CalibrationSettings

BLOCK = 2048  # windows that are mapped at a time: a block of float64 bars of 20 samples takes 20 MiB for ten steps


def check_calibration(dataset: KLineDataset, settings: CalibrationSettings) -> None:
    """Raise a ValueError if no calibration can be fitted on a dataset, or it would see the test segment."""
    name, segments = settings.segment, dataset.segments
    if name not in segments:
        raise ValueError(f"KronosModel: calibration.segment: unknown segment {name!r}; known: {', '.join(segments)}")
    end, start = segments[name][1], segments.get("test", (None, None))[0]
    if "test" in segments and (end is None or start is None or end >= start):
        raise ValueError(f"KronosModel: calibration.segment: segment {name!r} should end before 'test' starts")
    if dataset.lookback < 3:
        raise ValueError(f"KronosModel: calibration needs a lookback of 3 bars or more, not {dataset.lookback}")
    calibration_windows(dataset, settings)


def calibration_windows(dataset: KLineDataset, settings: CalibrationSettings) -> Windows:
    """Select the windows that are forecast to fit a calibration: of evenly spaced days, all bars within the segment.

    Raises:
        ValueError: there is none.
    """
    windows = dataset.score_windows(settings.segment)
    _, ends = realised_closes(windows, dataset.horizon)
    windows = windows.take(ends[:, -1] <= segment_end(dataset, settings.segment))
    days = np.unique(windows.dates)
    if not len(days):
        raise ValueError(
            f"KronosModel: calibration.segment: no window of {windows.segment} has all {dataset.horizon} bars after it "
            "within the segment"
        )
    chosen = days[np.linspace(0, len(days) - 1, min(settings.days, len(days))).round().astype(int)]
    return windows.take(np.isin(windows.dates, chosen))


def segment_end(dataset: KLineDataset, segment: str) -> np.datetime64:
    """Return the last moment of a segment."""
    end = dataset.segments[segment][1]
    return (dataset.handler.dates[-1] if end is None else end).to_numpy()


def fit_on_segment(dataset: KLineDataset, segment: str, outcomes: Outcomes, identity: ForecastIdentity) -> Calibration:
    """Fit a calibration on forecasts of a segment, with paths, and what came within it.

    Raises:
        ValueError: too few forecasts; NoSpread: their samples coincide. One line, which names the segment.
    """
    synthetic = is_synthetic(C.dpm.get_data_uri(dataset.handler.freq))
    about = {"segment": segment, "freq": dataset.handler.freq, "synthetic": synthetic, "lookback": dataset.lookback}
    try:
        return fit_calibration(outcomes, segment_end(dataset, segment), identity, **about)
    except ValueError as error:
        raise type(error)(f"segment {segment!r}: {error}") from None


def drawn_outcomes(windows: Windows, horizon: int, drawn: Mapping[str, np.ndarray]) -> Outcomes:
    """Return forecasts, `last_close` and `paths` as they were drawn, with what came."""
    closes = _closes(drawn, windows, horizon)
    realised, ends = realised_closes(windows, horizon)
    return Outcomes(
        dates=windows.dates,
        quantiles=np.moveaxis(np.quantile(closes, LEVELS, axis=1), 0, -1),
        closes=realised,
        ends=ends,
        volatility=lookback_volatility(windows),
        mean_return=closes.mean((1, 2)) - 1,
        prob_up=(closes.mean(2) > 1).mean(1),
        samples=closes.shape[1],
        paths=closes,
    )


def _closes(drawn: Mapping[str, np.ndarray], windows: Windows, horizon: int) -> np.ndarray:
    """Return the closes of sample paths [W, S, P], ratios to the last close."""
    last_close = drawn["last_close"]
    bars = drawn["paths"].reshape(len(windows), -1, horizon, len(windows.bars.columns))
    return bars[..., CLOSE].astype(np.float64) / last_close[:, None, None]


def calibrated_columns(
    calibration: Calibration,
    bands: BandKind,
    horizon: int,
    windows: Windows,
    drawn: Mapping[str, np.ndarray],
    names: Sequence[str],
) -> dict[str, np.ndarray]:
    """Return the columns of a forecast, made of calibrated paths.

    Args:
        bands: adaptive ones begin with the first date of these windows.
        drawn: `last_close` and `paths` as they were drawn.
        names: `last_close`, `paths`, scores, quantiles of the close.
    """
    last_close, volatility = drawn["last_close"], lookback_volatility(windows)
    closes = _closes(drawn, windows, horizon)
    result = {"last_close": last_close}
    if "paths" in names:
        result["paths"] = np.empty_like(drawn["paths"])
    found: dict[str, list[np.ndarray]] = {name: [] for name in SCORES}
    for start in range(0, len(windows), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(windows)))
        of_block = last_close[rows], volatility[rows]
        if "paths" in names:
            bars = drawn["paths"][rows].reshape(len(rows), -1, horizon, len(windows.bars.columns))
            result["paths"][rows] = calibration.map_bars(bars, *of_block).reshape(len(rows), -1)
        closes[rows] = calibration.map_closes(closes[rows], volatility[rows])
        if any(name in SCORES for name in names):
            scale = windows.normalised(rows).scale[:, 0, CLOSE]
            prices = closes[rows] * last_close[rows, None, None]
            for name, values in scores(prices, last_close[rows], scale).items():
                found[name].append(values)
    result |= {name: np.concatenate(parts) for name, parts in found.items() if parts}
    if set(names) - result.keys():
        offsets = None
        if bands == "adaptive":
            realised, ends = realised_closes(windows, horizon)
            offsets = calibration.adaptive_offsets(closes, volatility, realised, windows.dates, ends)
        quantiles = calibration.quantiles(closes, volatility, LEVELS, offsets) * last_close[:, None, None]
        flat = quantiles.astype(np.float32).transpose(2, 1, 0).reshape(len(QUANTILES) * horizon, -1)
        result |= dict(zip(quantile_columns(horizon), flat))
    return {name: result[name] for name in names}
