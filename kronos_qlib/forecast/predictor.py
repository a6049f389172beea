"""KronosPredictor: forecast bars in a DataFrame, as a drop-in for the published predictor."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeAlias, get_args

import numpy as np
import pandas as pd
import torch

from kronos_qlib.data.checks import impossible_bars
from kronos_qlib.data.columns import find_columns, is_rate, plain_name, unused_columns
from kronos_qlib.data.dates import read_times
from kronos_qlib.data.stamps import stamps
from kronos_qlib.data.windows import (
    CLOSE,
    COLUMNS,
    NamedNormalisation,
    Normalisation,
    check_normalisation,
    denormalise,
    normalisation_identity,
    normalise,
)
from kronos_qlib.forecast.calibration import Calibration, ForecastIdentity, bar_volatility, load_calibration
from kronos_qlib.forecast.engine.generate import generate
from kronos_qlib.forecast.engine.sampling import Sampling, is_number, is_whole
from kronos_qlib.forecast.engine.weights import (
    NetworkWeights,
    beyond_training,
    check_max_context,
    check_pair,
    prepare_weights,
)
from kronos_qlib.hardware.device import resolve_device, resolve_dtype
from kronos_qlib.nn import Kronos, KronosTokenizer
from kronos_qlib.nn.model import S2Rotation

logger = logging.getLogger("qlib.KronosForecast")
PRICES, VOLUME, AMOUNT = list(COLUMNS[:4]), COLUMNS[4], COLUMNS[5]
Timestamps: TypeAlias = "pd.Series | pd.DatetimeIndex"


class KronosPredictor:
    """Forecast K-lines in price units.

    The weights are prepared for generation at the first forecast and kept; a fingerprint at each forecast notices
    weights that have changed since, however they were changed.

    Args:
        model: a Kronos network; it is moved to the device.
        tokenizer: its tokenizer.
        device: "cpu", "cuda", "cuda:1", "mps"; None takes the best there is.
        max_context: bars the model sees at most.
        clip: normalised bars are clipped to ± this.
        dtype: of the matrix products: None is float32; "bfloat16", "auto".
        s2_rotation: "reference" forecasts as published, "aligned" as trained.
        anchor: measure paths from the last bar as the tokenizer decodes it, so that its error there is not forecast.
        calibration: a fitted one or its calibration.json, applied to every forecast: to paths and their mean, and to
            the quantiles of the close with its conformal offsets. A line of the log says what it was fitted on; frames
            name it in `attrs["calibration"]`. None: forecasts as they are drawn.
        normalisation: of small prices: "unit_free", whatever their unit, or with the absolute 1e-5 as "published"; see
            `kronos_qlib.data.windows.normalise`; or the configuration of a `WindowNormalisation`.
        columns: names of the columns that bars have beyond the six, of a tokenizer of more; frames have them under
            these names, and so have forecasts.

    Raises:
        ValueError: networks that do not belong together or are in each other's place, an option out of range, a
            calibration that is damaged or of other weights; one line. A forecast drawn otherwise than those that the
            calibration was fitted on, or of more steps, is refused too.
    """

    def __init__(
        self,
        model: Kronos,
        tokenizer: KronosTokenizer,
        device: str | torch.device | None = None,
        max_context: int = 512,
        clip: float = 5,
        *,
        dtype: str | torch.dtype | None = None,
        s2_rotation: S2Rotation = "reference",
        normalisation: Normalisation = "unit_free",
        anchor: bool = False,
        calibration: Calibration | str | Path | None = None,
        columns: Sequence[str] = (),
    ) -> None:
        self.columns = (*COLUMNS, *columns)
        try:
            check_pair(tokenizer, model)
            if isinstance(columns, str) or len(set(self.columns)) != tokenizer.d_in:
                raise ValueError(
                    f"the tokenizer's d_in is {tokenizer.d_in}; bars have {len(COLUMNS)} columns, and columns should "
                    f"name the {max(0, tokenizer.d_in - len(COLUMNS))} others, not {columns!r}"
                )
            check_max_context(max_context, model)
            Sampling(
                s2_rotation=s2_rotation, anchor=anchor
            )  # an unknown one is an error here, not at the first forecast
        except ValueError as error:
            raise ValueError(f"KronosPredictor: {error}") from None
        trained = tokenizer.config.get("columns")
        if trained is not None and trained != list(columns):
            raise ValueError(
                f"KronosPredictor: the tokenizer was trained on the columns {', '.join(trained)}, in this order"
            )
        if model.conditions:
            raise ValueError("KronosPredictor: takes no model with conditions; forecast with KronosModel")
        if not is_number(clip) or clip <= 0:
            raise ValueError(f"KronosPredictor: clip is {clip!r}; it must be a number above 0")
        try:
            normalisation = check_normalisation(normalisation)
        except ValueError as error:
            names = " or ".join(get_args(NamedNormalisation))
            own = str(error) if isinstance(normalisation, Mapping) else f"use {names}"
            raise ValueError(f"KronosPredictor: normalisation is {normalisation!r}; {own}") from None
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.model, self.tokenizer = model.to(self.device).eval(), tokenizer.to(self.device).eval()
        self.max_context, self.clip, self.s2_rotation, self.anchor = max_context, clip, s2_rotation, anchor
        self.normalisation: Normalisation = normalisation
        self.calibration: Calibration | None = None
        if calibration is not None:
            try:
                self.calibration = (
                    calibration if isinstance(calibration, Calibration) else load_calibration(calibration)
                )
            except ValueError as error:
                raise ValueError(f"KronosPredictor: {error}") from None
            self._check_calibration(own_weights(tokenizer, model), 1)
            logger.info(f"KronosPredictor: forecasts are calibrated, {self.calibration.describe()}")
        self._weights: NetworkWeights | None = None
        self._weights_key: tuple[object, ...] = ()
        self._weights_length = 0

    def predict(
        self,
        df: pd.DataFrame,
        x_timestamp: Timestamps,
        y_timestamp: Timestamps,
        pred_len: int,
        T: float = 1.0,
        top_k: int = 0,
        top_p: float = 0.9,
        sample_count: int = 1,
        verbose: bool = True,
        seed: int | None = None,
    ) -> pd.DataFrame:
        """Forecast the mean of `sample_count` sample paths.

        Args:
            df: bars, oldest first: open, high, low, close, and volume and amount where known, under the names of
                `kronos_qlib.data.columns.NAMES`. An unknown volume is 0; an unknown amount is volume × mean(open, high,
                low, close). A warning names columns that are not used and counts bars that are impossible.
            x_timestamp: the bars' times [L]; y_timestamp: the times to forecast [pred_len]; see
                `kronos_qlib.data.dates.read_times`. Both have a time zone or neither has; the stamps are of the clock
                of the bars' zone.
            verbose: show a progress bar.
            seed: of the random numbers; None draws one from torch's global state, so that torch.manual_seed decides.
                The numbers of a series depend on it, on the bars' times and on which bars rise and fall, so they are
                the same alone and in a batch, and in every currency.

        Returns:
            pred_len rows indexed by y_timestamp, columns open, high, low, close, volume, amount.

        Raises:
            ValueError: a missing column, NaN or infinite values, numbers that are no times, times that are not strictly
                increasing, whose number does not fit or of which only one side has a time zone, an option out of range.
        """
        frames = self.predict_batch(
            [df], [x_timestamp], [y_timestamp], pred_len, T, top_k, top_p, sample_count, verbose, seed
        )
        return frames[0]

    def predict_batch(
        self,
        df_list: Sequence[pd.DataFrame],
        x_timestamp_list: Sequence[Timestamps],
        y_timestamp_list: Sequence[Timestamps],
        pred_len: int,
        T: float = 1.0,
        top_k: int = 0,
        top_p: float = 0.9,
        sample_count: int = 1,
        verbose: bool = True,
        seed: int | None = None,
    ) -> list[pd.DataFrame]:
        """Forecast several series of equal length in one pass; see `predict`."""
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        sampling = Sampling(sample_count, T, top_k, top_p, seed, self.s2_rotation, anchor=self.anchor)
        paths, y_times = self._paths(df_list, x_timestamp_list, y_timestamp_list, pred_len, sampling, verbose)
        return [self._named(pd.DataFrame(mean, t, list(self.columns))) for mean, t in zip(paths.mean(1), y_times)]

    def predict_paths(
        self,
        df: pd.DataFrame,
        x_timestamp: Timestamps,
        y_timestamp: Timestamps,
        pred_len: int,
        *,
        T: float = 1.0,
        top_k: int = 0,
        top_p: float = 0.9,
        sample_count: int = 1,
        seed: int = 0,
    ) -> np.ndarray:
        """Return the sample paths themselves: float64 [sample_count, pred_len, D], price units; see `predict`."""
        sampling = Sampling(sample_count, T, top_k, top_p, seed, self.s2_rotation, anchor=self.anchor)
        paths, _ = self._paths([df], [x_timestamp], [y_timestamp], pred_len, sampling, progress=False)
        return paths[0]

    def predict_paths_batch(
        self,
        df_list: Sequence[pd.DataFrame],
        x_timestamp_list: Sequence[Timestamps],
        y_timestamp_list: Sequence[Timestamps],
        pred_len: int,
        *,
        T: float = 1.0,
        top_k: int = 0,
        top_p: float = 0.9,
        sample_count: int = 1,
        seed: int = 0,
        batch_size: int = 1,
        report_share: Callable[[float], None] = lambda share: None,
    ) -> np.ndarray:
        """Return the sample paths of several series of equal length: float64 [B, sample_count, pred_len, D].

        Args:
            batch_size: series that go through the networks together; such batches, and with 1 also parts of many
                samples, go side by side on the cores. With 1 the paths of a series are the same, to the last bit,
                alone and among others, on one core and on many.
            report_share: called in any thread with the share that is done. An error that it raises ends the forecast.
        """
        sampling = Sampling(sample_count, T, top_k, top_p, seed, self.s2_rotation, anchor=self.anchor)
        paths, _ = self._paths(
            df_list, x_timestamp_list, y_timestamp_list, pred_len, sampling, False, batch_size, report_share
        )
        return paths

    def predict_df(
        self,
        df: pd.DataFrame,
        future_df: pd.DataFrame | None = None,
        *,
        prediction_length: int | None = None,
        id_column: str = "item_id",
        timestamp_column: str = "timestamp",
        target: str | Sequence[str] = "close",
        quantile_levels: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        exchange: str | None = None,
        T: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        sample_count: int = 100,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Forecast the quantiles of many series at once: one long frame in, one out, as chronos-forecasting does.

        Args:
            df: bars of all series, a row each, with their series and their times; other columns as of `predict`.
            future_df: series and times to forecast; without it they are the `prediction_length` sessions that follow
                each series: those of `exchange`, or of the pattern of its bars (`kronos_qlib.data.calendar`).
            target: the columns of a bar whose quantiles are returned.
            T, top_k, top_p, sample_count, seed: see `predict`. All tokens are drawn from by default: quantiles are to
                be calibrated, which a mean need not be.

        Returns:
            A row for each series, time and target, in the order of `df`: id_column, timestamp_column, target_name,
            predictions (the median), and a column for each level, such as "0.1". Bars are possible, see
            `kronos_qlib.forecast.possible_bars`. With a calibration quantiles of the close have conformal offsets.

        Raises:
            ValueError: a column is missing, neither future_df nor prediction_length is given, or what `predict` raises.
        """
        columns = [target] if isinstance(target, str) else list(target)
        unknown = [column for column in columns if column not in self.columns]
        levels = [float(level) for level in quantile_levels]
        if unknown or not columns or not levels or not all(0 < level < 1 for level in levels):
            raise ValueError(
                f"KronosPredictor: target should name columns of {list(self.columns)}, and quantile_levels lie within "
                "0 … 1"
            )
        if (future_df is None) == (prediction_length is None):
            raise ValueError("KronosPredictor: give either future_df or prediction_length")
        series = _split(df, "df", id_column, timestamp_column)
        if future_df is None:
            futures = {
                name: _sessions_after(part[timestamp_column], prediction_length, exchange)
                for name, part in series.items()
            }
        else:
            parts = _split(future_df, "future_df", id_column, timestamp_column)
            lacking = [name for name in series if name not in parts]
            if lacking:
                raise ValueError(f"KronosPredictor: future_df has no times of {id_column} {lacking[0]!r}")
            futures = {name: parts[name][timestamp_column] for name in series}
        sampling = Sampling(sample_count, T, top_k, top_p, seed, self.s2_rotation, anchor=self.anchor)
        rows: dict[object, pd.DataFrame] = {}
        groups: dict[tuple[int, int], list[object]] = {}
        for name, part in series.items():
            groups.setdefault((len(part), len(futures[name])), []).append(name)
        for (_, horizon), names in groups.items():
            frames = [series[name].drop(columns=[id_column, timestamp_column]) for name in names]
            x_times = [series[name][timestamp_column] for name in names]
            paths, y_times = self._paths(
                frames, x_times, [futures[name] for name in names], horizon, sampling, progress=False
            )
            for name, own, times, frame in zip(names, possible_bars(paths), y_times, frames):
                rows[name] = self._quantile_rows(own, times, columns, levels, frame).assign(**{id_column: name})
        first = {"time": timestamp_column}
        found = pd.concat([rows[name] for name in series], ignore_index=True).rename(columns=first)
        order = [id_column, timestamp_column, *(c for c in found if c not in (id_column, timestamp_column))]
        return self._named(found[order])

    def _named(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Name the calibration of a forecast, if there is one, in the frame's attributes."""
        if self.calibration is not None:
            frame.attrs["calibration"] = self.calibration.describe()
        return frame

    def _quantile_rows(
        self, paths: np.ndarray, times: pd.DatetimeIndex, columns: Sequence[str], levels: Sequence[float], bars: Any
    ) -> pd.DataFrame:
        """Tabulate the quantiles of some columns of paths [S, P, D], a row for each time and column."""
        tables = []
        for column in columns:
            values = paths[..., self.columns.index(column)]
            if self.calibration is not None and column == "close":
                quantiles = self.close_quantiles(values, bars, [0.5, *levels])
            else:
                quantiles = np.quantile(values, [0.5, *levels], axis=0)
            named = {"time": times, "target_name": column, "predictions": quantiles[0]}
            tables.append(pd.DataFrame(named | {f"{level:g}": row for level, row in zip(levels, quantiles[1:])}))
        return pd.concat(tables, ignore_index=True)

    def close_quantiles(self, closes: np.ndarray, bars: pd.DataFrame, levels: Sequence[float]) -> np.ndarray:
        """Return the quantiles [K, P] of forecast closes [S, P], with the conformal offsets of the calibration, if any.

        Args:
            bars: those that were forecast from.
        """
        if self.calibration is None:
            return np.quantile(closes, levels, axis=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it was said when they were forecast from
            known = self._bars(bars, "df")[None, :, CLOSE]
        every, place = np.unique([0.5, *levels], return_inverse=True)
        ratios = closes[None] / known[:, -1]
        return self.calibration.quantiles(ratios, bar_volatility(known), every)[0].T[place[1:]] * known[0, -1]

    def _paths(
        self,
        frames: Sequence[pd.DataFrame],
        x_times: Sequence[Timestamps],
        y_times: Sequence[Timestamps],
        pred_len: int,
        sampling: Sampling,
        progress: bool,
        batch_size: int | None = None,
        report_share: Callable[[float], None] = lambda share: None,
    ) -> tuple[np.ndarray, list[pd.DatetimeIndex]]:
        """Return paths [B, S, pred_len, D] in price units and the times of each series' forecast."""
        for name, values in (("df_list", frames), ("x_timestamp_list", x_times), ("y_timestamp_list", y_times)):
            if not isinstance(values, (list, tuple)) or not values or len(values) != len(frames):
                raise ValueError(f"KronosPredictor: {name} should be a list with one entry for each df, at least one")
        if not is_whole(pred_len) or pred_len < 1:
            raise ValueError(f"KronosPredictor: pred_len is {pred_len!r}; it must be a whole number, at least 1")
        names = [f"df {i}" if len(frames) > 1 else "df" for i in range(len(frames))]
        series = [self._bars(frame, name) for frame, name in zip(frames, names)]
        if len({len(rows) for rows in series}) > 1:
            raise ValueError(
                f"KronosPredictor: a batch needs series of one length, not {[len(rows) for rows in series]}"
            )
        rows = np.stack(series)
        if self.calibration is not None:
            drawn = {name: getattr(sampling, name) for name in ForecastIdentity.model_fields if hasattr(sampling, name)}
            drawn["filter"], drawn["normalisation"] = None, normalisation_identity(self.normalisation)
            self._check_calibration(drawn, pred_len)
            self._check_lookback(rows.shape[1])
        beyond = beyond_training(self.model, min(rows.shape[1] + pred_len, self.max_context))
        if beyond:
            warnings.warn(f"KronosPredictor: {beyond}", stacklevel=4)
        times = [_pair_of_times(x, y, rows.shape[1], pred_len) for x, y in zip(x_times, y_times)]
        keys = [_key(bars, x) for bars, (x, _) in zip(rows, times)]
        clocks = [(x, y if x.tz is None else y.tz_convert(x.tz)) for x, y in times]
        x, mean, scale = normalise(rows, rows.shape[1], self.clip, self.normalisation)
        x_stamp, y_stamp = (torch.from_numpy(np.stack([stamps(index) for index in side])) for side in zip(*clocks))
        weights = self._prepare_weights(rows.shape[1])
        options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "report_share": report_share}
        paths = generate(weights, torch.from_numpy(x), x_stamp, y_stamp, sampling, keys, **options)
        bars = denormalise(paths.cpu().double().numpy(), mean[:, None], scale[:, None])
        if self.calibration is not None:
            bars = self.calibration.map_bars(bars, rows[:, -1, CLOSE], bar_volatility(rows[..., CLOSE]))
        return bars, [y for _, y in times]

    def _bars(self, frame: pd.DataFrame, name: str) -> np.ndarray:
        """Return the columns [L, D] of a frame, volume and amount completed."""
        more = list(self.columns[len(COLUMNS) :])
        if not more or not isinstance(frame, pd.DataFrame):
            return _bars(frame, name)
        missing = [column for column in more if column not in frame]
        if missing:
            raise ValueError(f"KronosPredictor: {name} has no column {missing[0]!r}; it needs {more}")
        values = _numbers(frame[more], name)
        return np.hstack([_bars(frame.drop(columns=more), name), values])

    def _check_calibration(self, identity: Mapping[str, Any], horizon: int) -> None:
        """Raise a ValueError if the calibration is of forecasts with another identity, in what is given of it."""
        if self.calibration is not None:
            try:
                self.calibration.check(self.calibration.identity.model_copy(update=dict(identity)), horizon)
            except ValueError as error:
                raise ValueError(f"KronosPredictor: {error}") from None

    def _check_lookback(self, length: int) -> None:
        """Raise a ValueError if so many bars have no volatility; warn if the calibration is of another lookback."""
        fitted = self.calibration.fitted_on.lookback if self.calibration is not None else length
        if length < 3:
            raise ValueError(
                f"KronosPredictor: a calibration needs 3 bars or more to see their volatility, not {length}"
            )
        if fitted != length:
            warnings.warn(
                f"KronosPredictor: the calibration was fitted on lookbacks of {fitted} bars, not {length}", stacklevel=5
            )

    def _prepare_weights(self, length: int) -> NetworkWeights:
        """Return the weights for series of `length` bars, prepared anew where they changed or are for shorter ones."""
        key = self.max_context, self.dtype, _fingerprint(self.tokenizer), _fingerprint(self.model)
        if self._weights is None or key != self._weights_key or length > self._weights_length:
            networks = self.tokenizer, self.model
            if self.calibration is not None:  # they may have changed since it was checked
                self._check_calibration(own_weights(*networks), 1)
            self._weights = prepare_weights(*networks, self.max_context, self.dtype, length)
            self._weights_key, self._weights_length = key, length
        return self._weights


def own_weights(tokenizer: KronosTokenizer, model: Kronos) -> dict[str, str]:
    """Return the part of a `ForecastIdentity` that the weights are."""
    return ForecastIdentity.of(tokenizer, model, Sampling()).model_dump(include={"tokenizer", "model", "quantizer"})


def possible_bars(paths: np.ndarray) -> np.ndarray:
    """Return paths [..., D] whose bars are possible; the close is unchanged.

    The high is raised to the larger of open and close, the low lowered to the smaller, and a negative volume or amount
    becomes 0: the network draws the columns of a bar freely.
    """
    bars = paths.copy()
    bars[..., 1] = paths[..., [0, 1, 3]].max(axis=-1)
    bars[..., 2] = paths[..., [0, 2, 3]].min(axis=-1)
    bars[..., 4:6] = np.maximum(paths[..., 4:6], 0)
    return bars


def _split(frame: pd.DataFrame, name: str, id_column: str, timestamp_column: str) -> dict[object, pd.DataFrame]:
    """Divide a long frame by series, in their order."""
    if not isinstance(frame, pd.DataFrame):
        raise ValueError(f"KronosPredictor: {name} should be a DataFrame, not a {type(frame).__name__}")
    for column in (id_column, timestamp_column):
        if column not in frame.columns:
            raise ValueError(f"KronosPredictor: {name} has no column {column!r}; it has {list(frame.columns)}")
    return dict(iter(frame.groupby(id_column, sort=False, dropna=False)))


def _sessions_after(times: Any, horizon: int | None, exchange: str | None) -> pd.DatetimeIndex:
    """Return the sessions that follow a series' last bar, with its time zone."""
    from kronos_qlib.data.calendar import sessions_after_bars

    if not is_whole(horizon) or horizon is None or horizon < 1:
        raise ValueError(f"KronosPredictor: prediction_length is {horizon!r}; it must be a whole number, at least 1")
    index = _times(times, len(times), "timestamps", "the number of bars")
    after = sessions_after_bars(index.tz_localize(None), horizon, exchange)
    return after if index.tz is None else after.tz_localize(index.tz, nonexistent="shift_forward", ambiguous=False)


def _fingerprint(network: torch.nn.Module) -> tuple[object, ...]:
    """Return a network's device, and of each tensor the sum of its words and how often torch changed it in place.

    The sum takes one pass over the memory. It notices writes that torch does not count (to `.data`, by numpy); the
    count notices values that have only changed places.
    """
    sums, counts = [], []
    for tensor in network.state_dict().values():
        word = torch.int32 if tensor.element_size() % 4 == 0 else torch.int16
        sums.append(tensor.reshape(-1).view(word).sum(dtype=torch.int64))
        counts.append(None if tensor.is_inference() else tensor._version)
    return sums[0].device, tuple(torch.stack(sums).tolist()), tuple(counts)


def _bars(frame: pd.DataFrame, name: str) -> np.ndarray:
    """Return the six columns [L, 6] of a frame, the missing ones completed."""
    if not isinstance(frame, pd.DataFrame):
        raise ValueError(f"KronosPredictor: {name} should be a DataFrame of bars, not a {type(frame).__name__}")
    if frame.columns.nlevels > 1:
        raise ValueError(
            f"KronosPredictor: {name} has columns of {frame.columns.nlevels} levels; select one instrument"
        )
    if not frame.columns.is_unique:
        raise ValueError(f"KronosPredictor: {name} has a column twice: {list(frame.columns)}")
    if not len(frame):
        raise ValueError(f"KronosPredictor: {name} has no bars")
    try:
        columns = find_columns(frame.columns)
    except ValueError as error:
        raise ValueError(f"KronosPredictor: {name}: {error}") from None
    missing = [column for column in PRICES if column not in columns]
    if missing:
        raise ValueError(f"KronosPredictor: {name} has no column {missing[0]!r}; it needs {PRICES}")
    every, labels = frame.columns, [columns[column] for column in COLUMNS if column in columns]
    frame = frame[labels]
    bars = pd.DataFrame(_numbers(frame, name), columns=[column for column in COLUMNS if column in columns])
    if plain_name(columns.get(AMOUNT, "")) == "turnover" and is_rate(bars[AMOUNT], bars["close"], bars.get(VOLUME)):
        del bars[AMOUNT], columns[AMOUNT]
    unused = unused_columns(every, columns)
    if unused:
        _warn(f"{name} has columns that are not used: {', '.join(map(repr, unused))}")
    impossible = impossible_bars(bars[PRICES].to_numpy())
    if impossible.any():
        first = frame.index[int(np.argmax(impossible))]
        _warn(
            f"{name} has {impossible.sum()} bars whose open or close lies outside low … high, the first in row {first}"
        )
    if VOLUME not in bars:
        bars[VOLUME] = 0.0
    if AMOUNT not in bars:
        bars[AMOUNT] = bars[VOLUME] * bars[PRICES].mean(axis=1)
    return bars[list(COLUMNS)].to_numpy(np.float64)


def _numbers(frame: pd.DataFrame, name: str) -> np.ndarray:
    """Return the values of a frame, float64. Raises ValueError for what is no finite number."""
    for label in frame.columns:
        if not _holds_numbers(frame[label]):
            raise ValueError(f"KronosPredictor: column {label!r} of {name} does not hold numbers")
    values = frame.convert_dtypes().to_numpy(np.float64, na_value=np.nan)
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        where = f"column {frame.columns[column]!r}, row {frame.index[row]}"
        raise ValueError(
            f"KronosPredictor: {name} holds {values[row, column]} in {where}; fill or drop such bars first"
        )
    return values


def _holds_numbers(column: pd.Series) -> bool:
    """Return whether a column holds real numbers, or objects that are; truth values are none."""
    try:
        dtype = column.convert_dtypes().dtype
    except (TypeError, ValueError):  # complex numbers
        return False
    return pd.api.types.is_any_real_numeric_dtype(dtype) and not pd.api.types.is_bool_dtype(dtype)


def _pair_of_times(
    x: Timestamps, y: Timestamps, length: int, pred_len: int
) -> tuple[pd.DatetimeIndex, pd.DatetimeIndex]:
    """Return the times of the bars and of the forecast, checked; both have a time zone or neither has."""
    x, y = _times(x, length, "x_timestamp", "the number of bars in df"), _times(y, pred_len, "y_timestamp", "pred_len")
    if (x.tz is None) != (y.tz is None):
        zoned, other = ("x_timestamp", "y_timestamp") if y.tz is None else ("y_timestamp", "x_timestamp")
        raise ValueError(
            f"KronosPredictor: {zoned} has the time zone {x.tz or y.tz} and {other} has none; "
            "give a zone to both or to neither"
        )
    if y[0] <= x[-1]:
        raise ValueError(f"KronosPredictor: y_timestamp starts at {y[0]}, not after the last bar ({x[-1]})")
    return x, y


def _times(times: Timestamps, length: int, name: str, counted: str) -> pd.DatetimeIndex:
    """Return times as an index, checked; `counted` says in an error what their number should be."""
    try:
        index = read_times(times, name)
    except ValueError as error:
        raise ValueError(f"KronosPredictor: {error}") from None
    if len(index) != length:
        raise ValueError(f"KronosPredictor: {name} holds {len(index)} times, but {counted} is {length}")
    if not (index.is_monotonic_increasing and index.is_unique):
        after = int(np.argmax(np.diff(index.asi8) <= 0)) + 1
        raise ValueError(
            f"KronosPredictor: {name} must be strictly increasing, but {index[after]} follows {index[after - 1]}"
        )
    return index


def _key(bars: np.ndarray, times: pd.DatetimeIndex) -> int:
    """Return the key of a series' random numbers: 63 bits of its times and of which of its values rise and fall.

    Values themselves would make the numbers depend on the unit of the prices.
    """
    steps = np.sign(np.diff(bars, axis=0)).astype(np.int8)
    digest = blake2b(times.as_unit("ns").asi8.tobytes() + steps.tobytes(), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1


def _warn(message: str) -> None:
    warnings.warn(f"KronosPredictor: {message}", stacklevel=7)
