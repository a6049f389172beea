"""Windows of bars: positions in one contiguous array of all bars, copied out and normalised batch by batch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from hashlib import blake2b
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from kronos_qlib.extensions import call_extension, identify, identity_of, load_extension

COLUMNS = ("open", "high", "low", "close", "volume", "amount")
CLOSE = COLUMNS.index("close")
EPS = 1e-5
SMALL_LEVEL, SMALL_STD = 1.0, 0.01  # a column whose mean or deviation is below these is small beside EPS
RELATIVE_EPS = 1e-8  # takes the place of EPS there, in units of the deviation
NamedNormalisation = Literal["unit_free", "published"]
Normalisation = NamedNormalisation | Mapping[str, Any]
"""A name, or the identified configuration of a `WindowNormalisation`."""
NORMALISE_BLOCK = 128  # windows normalised at a time: their float64 copy then stays in the processor's cache
STAMPS = 5  # columns of a stamp, before those of conditions
KEYS_BLOCK = 65_536  # windows whose keys are computed at a time: their texts take a hundred bytes each


class WindowNormalisation(Protocol):
    """A normalisation of a user's own, the setting `normalisation` of a KLineDataset as a configuration.

    It is given the lookback alone, so that it cannot look ahead; clipping, and the way back to prices, are not its own.
    """

    def __call__(self, bars: NDArray[np.float64]) -> NDArray[np.float64]:
        """Say how windows are normalised, each by itself.

        Args:
            bars: of the lookbacks, in price units [B, L, D], columns `COLUMNS`, then those that a handler adds.

        Returns:
            [B, 2, D]: what is subtracted from each column, and what it is then divided by, above 0.
        """


def check_normalisation(value: Any) -> Any:
    """Check the setting `normalisation`, and identify a class of the user's own. Raises ValueError."""
    if not isinstance(value, Mapping):
        if value not in get_args(NamedNormalisation):
            raise ValueError(f"Input should be {' or '.join(map(repr, get_args(NamedNormalisation)))}")
        return value
    if not isinstance(value.get("class"), (str, type)):
        raise ValueError("should be a name, or a configuration with the keys class, module_path and kwargs")
    identified = identify(value)
    walks = 100 * np.exp(np.random.default_rng(0).normal(0, 0.01, (3, 60, len(COLUMNS))).cumsum(1))
    both = [_own_normalisation(walks[rows], identified) for rows in (slice(3), slice(1))]
    if not np.allclose(both[0][:1], both[1], rtol=1e-6):
        raise ValueError(f"{value['class']} normalises a window by the others of its batch too")
    return identified


def normalisation_identity(normalisation: Normalisation) -> Any:
    """Return what a normalisation is, wherever the file of a user's own lies: plain data."""
    return identity_of(normalisation) if isinstance(normalisation, Mapping) else normalisation


@lru_cache(maxsize=8)
def _loaded_normalisation(text: str) -> WindowNormalisation:
    normalisation: WindowNormalisation = load_extension(json.loads(text))
    return normalisation


def _own_normalisation(bars: NDArray[np.float64], configuration: Mapping[str, Any]) -> NDArray[np.float64]:
    """Return what a normalisation of the user's own says of lookbacks [B, L, D]. Raises ValueError."""
    own = _loaded_normalisation(json.dumps(configuration, sort_keys=True))
    found = call_extension(own, (len(bars), 2, bars.shape[2]), bars)
    if not (np.isfinite(found).all() and (found[:, 1] > 0).all()):
        raise ValueError(f"{type(own).__name__} should return finite numbers, those to divide by above 0")
    return found


def normalise(
    rows: np.ndarray, lookback: int, clip: float = 5.0, normalisation: Normalisation = "unit_free"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normalise windows by column: `(rows - mean) / (std + 1e-5)`, clipped to ±`clip`.

    Mean and population standard deviation are those of the first `lookback` bars alone, in float64: what comes after
    them must not be seen. A constant column gives zeros.

    Args:
        rows: `[B, T, D]`, price units.
        normalisation: "published" adds 1e-5 to every deviation, as the model's authors do, and so flattens a column
            whose deviation is not much larger: prices of 1e-4 and below. "unit_free" adds 1e-8 of the deviation to that
            of a column whose mean is below 1 or whose deviation is below 0.01, so that the unit of a price does not
            matter there; all other columns are normalised as published, bit by bit. Or a class of the user's own.

    Returns:
        x float32 `[B, T, D]`, mean float64 `[B, 1, D]`, scale float64 `[B, 1, D]` (what is divided by).
    """
    x = np.empty(rows.shape, np.float32)
    mean = np.empty((len(rows), 1, rows.shape[2]))
    scale = np.empty_like(mean)
    for start in range(0, len(rows), NORMALISE_BLOCK):
        block = slice(start, start + NORMALISE_BLOCK)
        x[block], mean[block, 0], scale[block, 0] = _normalise_block(rows[block], lookback, clip, normalisation)
    return x, mean, scale


def _normalise_block(
    rows: np.ndarray, lookback: int, clip: float, normalisation: Normalisation
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if isinstance(normalisation, Mapping):
        prices = rows.astype(np.float64)
        centre, own_scale = _own_normalisation(prices[:, :lookback].copy(), normalisation).transpose(1, 0, 2)
        return np.clip((prices - centre[:, None]) / own_scale[:, None], -clip, clip), centre, own_scale
    # Time goes first, so that the sums over it run along contiguous memory: numpy is slow over a middle axis.
    centred = rows.transpose(1, 0, 2).astype(np.float64, order="C")
    # Measured from the first bar, a constant column is exactly zero, however large: no rounding noise to magnify.
    origin = centred[0].copy()
    centred -= origin
    mean = centred[:lookback].sum(axis=0) / lookback
    centred -= mean
    squares = np.einsum("tbd,tbd->bd", centred[:lookback], centred[:lookback])
    std = np.sqrt(squares / lookback)
    scale = std + (EPS if normalisation == "published" else _unit_free_eps(origin + mean, std))
    centred *= 1 / scale
    return np.clip(centred, -clip, clip, out=centred).transpose(1, 0, 2), origin + mean, scale


def _unit_free_eps(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Return what to add to each column's deviation; a constant column's is a hundredth of its mean here."""
    size = np.where(std > 0, std, 0.01 * np.abs(mean))
    small = (size > 0) & ((size < SMALL_STD) | (np.abs(mean) < SMALL_LEVEL))
    return np.where(small, RELATIVE_EPS * size, EPS)


def denormalise(x: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Undo `normalise` (but for the clipping): float64, price units, in the broadcast shape of the three."""
    return np.asarray(x, np.float64) * scale + mean


@dataclass(frozen=True)
class Bars:
    """The valid bars of all instruments in one contiguous array, by instrument, then by time.

    values: float32 `[N, D]`. stamp: int8 `[N, 5]`, and more columns for conditions. dates: datetime64[ns] `[N]`.
    offsets: int64 `[I + 1]`; rows `offsets[i]:offsets[i + 1]` are those of `instruments[i]`, which are sorted by name.
    columns: the names of the D columns: `COLUMNS`, then those that a handler adds.
    """

    values: np.ndarray
    stamp: np.ndarray
    dates: np.ndarray
    offsets: np.ndarray
    instruments: tuple[str, ...]
    columns: tuple[str, ...] = COLUMNS

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def codes(self) -> np.ndarray:
        """Return the position in `instruments` of each bar's instrument: int64 `[N]`."""
        return np.repeat(np.arange(len(self.instruments)), np.diff(self.offsets))


@dataclass(frozen=True)
class Batch:
    """Normalised windows of T = lookback + future bars.

    x: float32 `[B, T, D]`. stamp: int64 `[B, T, 5]`. mean, scale: float64 `[B, 1, D]`, price units.
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

    ends: int64 `[W]`, the row in `bars.values` of each window's score date. Nothing is copied before `normalised`.
    segment: what to call the segment of a dataset that the windows were selected from, in messages.
    left_out: that segment's instruments which have no window there for want of a lookback. gaps: how many of its
        windows reach over a long gap. These three say where windows come from, not what they are: `take` keeps them,
        comparing, digesting and saving pass over them.
    """

    bars: Bars
    ends: np.ndarray
    lookback: int
    future: int
    clip: float = 5.0
    normalisation: Normalisation = "unit_free"
    segment: str = field(default="", compare=False)
    left_out: tuple[str, ...] = field(default=(), compare=False)
    gaps: int = field(default=0, compare=False)

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def dates(self) -> np.ndarray:
        """Return the score dates: datetime64[ns] `[W]`."""
        return self.bars.dates[self.ends]

    @property
    def instruments(self) -> np.ndarray:
        """Return the instruments' names: object `[W]`."""
        codes = self.bars.offsets.searchsorted(self.ends, side="right") - 1
        return np.array(self.bars.instruments, object)[codes]

    @property
    def normalisation_identity(self) -> Any:
        """Return what a normalisation is, wherever the file of a user's own lies: plain data."""
        return normalisation_identity(self.normalisation)

    @cached_property
    def keys(self) -> np.ndarray:
        """Return a 63-bit hash of each window's instrument and score date: int64 `[W]`.

        The random numbers of a forecast depend on it, so it depends on nothing else: neither on order nor on process.
        """
        keys = np.empty(len(self), np.int64)
        for start in range(0, len(self), KEYS_BLOCK):
            block = self.take(slice(start, start + KEYS_BLOCK))
            times = np.datetime_as_string(block.dates, unit="s")
            labels = (f"{name} {time}".encode() for name, time in zip(block.instruments, times))
            digests = b"".join(blake2b(label, digest_size=8).digest() for label in labels)
            keys[start : start + KEYS_BLOCK] = np.frombuffer(digests, "<u8") >> np.uint64(1)
        return keys

    def take(self, rows: np.ndarray | slice) -> "Windows":
        """Return the windows at `rows` (positions, a mask or a slice), in that order."""
        return replace(self, ends=self.ends[rows])

    def normalised(self, rows: np.ndarray) -> Batch:
        """Copy out the windows at `rows` (int `[B]`) and normalise each by its own lookback."""
        ends = self.ends[rows]
        x, mean, scale = normalise(self.values(rows), self.lookback, self.clip, self.normalisation)
        return Batch(x, self.stamps(rows), mean, scale, self.bars.values[ends, CLOSE].astype(np.float64))

    def values(self, rows: np.ndarray) -> np.ndarray:
        """Copy out the bars of the windows at `rows` (int `[B]`): float32 `[B, T, D]`, price units."""
        return self._slices(self.bars.values, rows)

    def stamps(self, rows: np.ndarray) -> np.ndarray:
        """Copy out the stamps of the windows at `rows` (int `[B]`): int64 `[B, T, 5]`, conditions after the five.

        A window's conditions are those of its score date, for all of its bars.
        """
        stamps = self._slices(self.bars.stamp, rows).astype(np.int64)
        stamps[:, :, STAMPS:] = self.conditions(rows)[:, None]
        return stamps

    def conditions(self, rows: np.ndarray) -> np.ndarray:
        """Return the conditions of the windows at `rows` (int `[B]`): int64 `[B, C]`."""
        return self.bars.stamp[self.ends[rows], STAMPS:].astype(np.int64)

    def _slices(self, array: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return _slices(array, self.ends[rows] - (self.lookback - 1), self.lookback + self.future)


def _slices(rows: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Copy `rows[start:start + length]` for each start: `[B, length, D]`; one copy a window, not one a bar."""
    width = rows.shape[1]
    flat = sliding_window_view(rows.reshape(-1), length * width)
    return flat[starts * width].reshape(len(starts), length, width)
