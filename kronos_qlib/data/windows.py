"""Windows of bars: gathered from one contiguous array by index, normalised by their lookback alone."""

from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

COLUMNS = ("open", "high", "low", "close", "volume", "amount")
CLOSE = COLUMNS.index("close")
EPS = 1e-5
BLOCK = 128  # windows normalised at a time: their float64 copy then stays in the cache
KEYS_AT_ONCE = 65_536  # their labels take a hundred bytes each


def normalise(rows: np.ndarray, lookback: int, clip: float = 5.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bring windows to zero mean and unit scale per column: `(rows - mean) / (std + 1e-5)`, clipped to ±`clip`.

    `rows` is `[B, T, D]` in price units. Mean and population standard deviation are those of the first `lookback` bars
    only, in float64: what comes after them must not be seen. Returns x float32 `[B, T, D]`, mean float64 `[B, 1, D]`
    and scale float64 `[B, 1, D]` (the standard deviation + 1e-5). A constant column gives zeros.
    """
    x = np.empty(rows.shape, np.float32)
    mean = np.empty((len(rows), 1, rows.shape[2]))
    scale = np.empty_like(mean)
    for start in range(0, len(rows), BLOCK):
        block = slice(start, start + BLOCK)
        x[block], mean[block, 0], scale[block, 0] = _normalise_block(rows[block], lookback, clip)
    return x, mean, scale


def _normalise_block(rows: np.ndarray, lookback: int, clip: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # Time goes first, so that the sums over it run along contiguous memory: numpy is slow over a middle axis.
    away = rows.transpose(1, 0, 2).astype(np.float64, order="C")
    # Measured from the first bar, a constant column is exactly zero, however large: no rounding noise to magnify.
    origin = away[0].copy()
    away -= origin
    mean = away[:lookback].sum(axis=0) / lookback
    away -= mean
    squares = np.einsum("tbd,tbd->bd", away[:lookback], away[:lookback])
    scale = np.sqrt(squares / lookback) + EPS
    away *= 1 / scale
    return np.clip(away, -clip, clip, out=away).transpose(1, 0, 2), origin + mean, scale


def denormalise(x: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Undo `normalise` (but for the clipping): float64, in price units, of the broadcast shape of the three."""
    return np.asarray(x, np.float64) * scale + mean


@dataclass(frozen=True)
class Bars:
    """The valid bars of all instruments in one contiguous array, by instrument, then by time.

    values: float32 `[N, 6]`, columns `COLUMNS`. stamp: int8 `[N, 5]`. dates: datetime64[ns] `[N]`.
    offsets: int64 `[I + 1]`; rows `offsets[i]:offsets[i + 1]` are those of `instruments[i]`, which are sorted by name.
    """

    values: np.ndarray
    stamp: np.ndarray
    dates: np.ndarray
    offsets: np.ndarray
    instruments: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def codes(self) -> np.ndarray:
        """The position in `instruments` of each bar's instrument: int64 `[N]`."""
        return np.repeat(np.arange(len(self.instruments)), np.diff(self.offsets))


@dataclass(frozen=True)
class Batch:
    """Normalised windows, T = lookback + future bars each.

    x: float32 `[B, T, 6]`. stamp: int64 `[B, T, 5]`. mean, scale: float64 `[B, 1, 6]`, price units.
    last_close: float64 `[B]`, the close of the score date, price units.
    """

    x: np.ndarray
    stamp: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    last_close: np.ndarray


@dataclass(frozen=True)
class Windows:
    """Windows of `lookback` bars that end on a score date, and of the `future` bars after it (0 for scoring).

    ends: int64 `[W]`, the row in `bars.values` of each window's score date. Nothing is copied before `gather`.
    """

    bars: Bars
    ends: np.ndarray
    lookback: int
    future: int
    clip: float = 5.0

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def dates(self) -> np.ndarray:
        """Score dates: datetime64[ns] `[W]`."""
        return self.bars.dates[self.ends]

    @property
    def instruments(self) -> np.ndarray:
        """Instrument names: object `[W]`."""
        codes = self.bars.offsets.searchsorted(self.ends, side="right") - 1
        return np.array(self.bars.instruments, object)[codes]

    @cached_property
    def keys(self) -> np.ndarray:
        """A 63-bit hash of instrument and score date per window: int64 `[W]`.

        The random numbers of a forecast hang on it, so it depends on nothing else: neither order nor process.
        """
        keys = np.empty(len(self), np.int64)
        for start in range(0, len(self), KEYS_AT_ONCE):
            some = self.take(slice(start, start + KEYS_AT_ONCE))
            times = np.datetime_as_string(some.dates, unit="s")
            labels = (f"{name} {time}".encode() for name, time in zip(some.instruments, times))
            digests = b"".join(blake2b(label, digest_size=8).digest() for label in labels)
            keys[start : start + KEYS_AT_ONCE] = np.frombuffer(digests, "<u8") >> np.uint64(1)
        return keys

    def take(self, rows: np.ndarray | slice) -> "Windows":
        """The windows at `rows` (positions, a mask or a slice), in that order."""
        return replace(self, ends=self.ends[rows])

    def gather(self, rows: np.ndarray) -> Batch:
        """Copy out and normalise the windows at `rows` (int `[B]`), a function of these windows' bars alone."""
        ends = self.ends[rows]
        x, mean, scale = normalise(self.values(rows), self.lookback, self.clip)
        return Batch(x, self.stamps(rows), mean, scale, self.bars.values[ends, CLOSE].astype(np.float64))

    def values(self, rows: np.ndarray) -> np.ndarray:
        """The bars alone of the windows at `rows` (int `[B]`): float32 `[B, T, 6]`, price units."""
        return self._slices(self.bars.values, rows)

    def stamps(self, rows: np.ndarray) -> np.ndarray:
        """The stamps alone of the windows at `rows` (int `[B]`): int64 `[B, T, 5]`."""
        return self._slices(self.bars.stamp, rows).astype(np.int64)

    def _slices(self, array: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return _slices(array, self.ends[rows] - (self.lookback - 1), self.lookback + self.future)


def _slices(rows: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """`rows[start:start + length]` for each start: `[B, length, D]`. One copy per window, not one per bar."""
    width = rows.shape[1]
    flat = sliding_window_view(rows.reshape(-1), length * width)
    return flat[starts * width].reshape(len(starts), length, width)
