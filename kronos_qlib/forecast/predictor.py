"""KronosPredictor: forecast bars in a DataFrame, as a drop-in for the published predictor."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import pandas as pd
import torch

from kronos_qlib.data.stamps import stamps
from kronos_qlib.data.windows import COLUMNS, denormalise, normalise
from kronos_qlib.forecast.engine.generate import generate
from kronos_qlib.forecast.engine.sampling import Sampling
from kronos_qlib.forecast.engine.weights import NetworkWeights, check_pair, prepare_weights
from kronos_qlib.hardware.device import resolve_device, resolve_dtype
from kronos_qlib.nn import Kronos, KronosTokenizer
from kronos_qlib.nn.model import S2Rotation

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
    ) -> None:
        check_pair(tokenizer, model)
        Sampling(s2_rotation=s2_rotation)  # an unknown one is an error here, not at the first forecast
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.model, self.tokenizer = model.to(self.device).eval(), tokenizer.to(self.device).eval()
        self.max_context, self.clip, self.s2_rotation = max_context, clip, s2_rotation
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
            df: bars, oldest first: open, high, low, close, and volume and amount where known. Without volume both
                are 0; without amount it is volume × mean(open, high, low, close).
            x_timestamp: the bars' times [L]; y_timestamp: the times to forecast [pred_len].
            verbose: show a progress bar.
            seed: of the random numbers; None draws one from torch's global state, so that torch.manual_seed decides.

        Returns:
            pred_len rows indexed by y_timestamp, columns open, high, low, close, volume, amount.

        Raises:
            ValueError: a missing column, NaN or infinite values, times that are not strictly increasing or whose
                number does not fit.
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
        sampling = Sampling(sample_count, T, top_k, top_p, seed, self.s2_rotation)
        paths = self._paths(df_list, x_timestamp_list, y_timestamp_list, pred_len, sampling, verbose)
        return [
            pd.DataFrame(mean, columns=list(COLUMNS), index=pd.DatetimeIndex(y_timestamp))
            for mean, y_timestamp in zip(paths.mean(1), y_timestamp_list, strict=True)
        ]

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
        """Return the sample paths themselves: float64 [sample_count, pred_len, 6], price units; see `predict`."""
        sampling = Sampling(sample_count, T, top_k, top_p, seed, self.s2_rotation)
        return self._paths([df], [x_timestamp], [y_timestamp], pred_len, sampling, progress=False)[0]

    def _paths(
        self,
        frames: Sequence[pd.DataFrame],
        x_times: Sequence[Timestamps],
        y_times: Sequence[Timestamps],
        pred_len: int,
        sampling: Sampling,
        progress: bool,
    ) -> np.ndarray:
        """Paths [B, S, pred_len, 6] in price units."""
        if not len(frames) == len(x_times) == len(y_times) or not len(frames):
            raise ValueError("KronosPredictor: give one x_timestamp and one y_timestamp for each of at least one df")
        if len({len(frame) for frame in frames}) > 1:
            raise ValueError(f"KronosPredictor: a batch needs series of one length, not {[len(f) for f in frames]}")
        rows = np.stack([_bars(frame, f"df {i}" if len(frames) > 1 else "df") for i, frame in enumerate(frames)])
        x_index = [_times(times, rows.shape[1], "x_timestamp", "bars in df") for times in x_times]
        y_index = [_times(times, pred_len, "y_timestamp", "pred_len") for times in y_times]
        for x, y in zip(x_index, y_index, strict=True):
            if y[0] <= x[-1]:
                raise ValueError(f"KronosPredictor: y_timestamp starts at {y[0]}, not after the last bar ({x[-1]})")
        x, mean, scale = normalise(rows, rows.shape[1], self.clip)
        x_stamp, y_stamp = (torch.from_numpy(np.stack([stamps(t) for t in times])) for times in (x_index, y_index))
        weights = self._prepare_weights(rows.shape[1])
        paths = generate(weights, torch.from_numpy(x), x_stamp, y_stamp, sampling, progress=progress)
        return denormalise(paths.cpu().double().numpy(), mean[:, None], scale[:, None])

    def _prepare_weights(self, length: int) -> NetworkWeights:
        """Return the weights for series of `length` bars, prepared anew where they changed or are for shorter ones."""
        key = self.max_context, self.dtype, _fingerprint(self.tokenizer), _fingerprint(self.model)
        if self._weights is None or key != self._weights_key or length > self._weights_length:
            networks = self.tokenizer, self.model
            self._weights = prepare_weights(*networks, self.max_context, self.dtype, length)
            self._weights_key, self._weights_length = key, length
        return self._weights


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
    if not frame.columns.is_unique:
        raise ValueError(f"KronosPredictor: {name} has a column twice: {list(frame.columns)}")
    if not len(frame):
        raise ValueError(f"KronosPredictor: {name} has no bars")
    missing = [column for column in PRICES if column not in frame.columns]
    if missing:
        raise ValueError(f"KronosPredictor: {name} has no column {missing[0]!r}; it needs {PRICES}")
    frame = frame[[column for column in COLUMNS if column in frame.columns]]
    text = [column for column in frame.columns if not pd.api.types.is_numeric_dtype(frame[column].convert_dtypes())]
    if text:
        raise ValueError(f"KronosPredictor: column {text[0]!r} of {name} does not hold numbers")
    values = frame.to_numpy(np.float64)
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        where = f"column {frame.columns[column]!r}, row {frame.index[row]}"
        raise ValueError(
            f"KronosPredictor: {name} holds {values[row, column]} in {where}; fill or drop such bars first"
        )
    if VOLUME not in frame.columns:
        frame = frame[PRICES].assign(**{VOLUME: 0.0, AMOUNT: 0.0})
    elif AMOUNT not in frame.columns:
        frame = frame.assign(**{AMOUNT: frame[VOLUME] * frame[PRICES].mean(axis=1)})
    return frame[list(COLUMNS)].to_numpy(np.float64)


def _times(times: Timestamps, length: int, name: str, counted: str) -> pd.DatetimeIndex:
    """Return times as an index, checked; `counted` says in an error what their number should be."""
    try:
        index = pd.DatetimeIndex(times)
    except (TypeError, ValueError) as error:
        raise ValueError(f"KronosPredictor: {name} must be a Series or an index of times ({error})") from error
    if len(index) != length:
        raise ValueError(f"KronosPredictor: {name} holds {len(index)} times, but {counted} is {length}")
    if index.hasnans:
        raise ValueError(f"KronosPredictor: {name} holds NaT at position {int(np.argmax(index.isna()))}")
    if not (index.is_monotonic_increasing and index.is_unique):
        after = int(np.argmax(np.diff(index.asi8) <= 0)) + 1
        raise ValueError(
            f"KronosPredictor: {name} must be strictly increasing, but {index[after]} follows {index[after - 1]}"
        )
    return index
