"""KLineHandler: the K-lines of a universe as a Qlib data handler, and as one array of valid bars."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, cast

import numpy as np
import pandas as pd
from pydantic import BeforeValidator, Field, model_validator
from qlib.data.dataset.handler import DataHandlerLP

from kronos_qlib.data.bar_columns import check_columns, check_conditions
from kronos_qlib.data.calendar import range_end
from kronos_qlib.data.checks import Prices, check_bars, warn_of_jumps
from kronos_qlib.data.dates import Date
from kronos_qlib.data.expressions import check_expression
from kronos_qlib.data.loader import KLineLoader, Universe, member_spans
from kronos_qlib.data.stamps import stamps
from kronos_qlib.data.windows import CLOSE, COLUMNS, Bars
from kronos_qlib.nn.model import MOST_GROUPS
from kronos_qlib.settings import MISSING, Settings, read_settings

LABEL = "Ref($close, -2)/Ref($close, -1) - 1"
_LOADED = ("_data", "_infer", "_learn", "_change", "_conditions")
_DERIVED = ("_bars", "_members")


def check_universe(value: Any) -> Universe:
    """Check the setting `instruments`, and drop repeated names. Raises ValueError."""
    if isinstance(value, dict) and "market" in value:
        if not isinstance(value["market"], str) or not isinstance(value.get("filter_pipe", []), list):
            raise ValueError("should have the name of a universe as its market and a list as its filter_pipe")
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(name, str) for name in value):
        return list(dict.fromkeys(value))
    if isinstance(value, str) and value:
        return value
    raise ValueError("should be the name of a universe, a list of instruments, or a mapping with the key 'market'")


def _check_label(value: Any) -> list[str]:
    """Check the setting `label`, one Qlib expression or several. Raises ValueError."""
    labels = [value] if isinstance(value, str) else value
    if not isinstance(labels, (list, tuple)) or not labels:
        raise ValueError("should be a Qlib expression or a list of them")
    for label in labels:
        check_expression(label)
    return list(labels)


class HandlerSettings(Settings):
    """The keyword arguments of `KLineHandler`."""

    instruments: Annotated[Any, BeforeValidator(check_universe)]
    """A universe's name, a list of instruments (always members), or a stockpool configuration with filters."""
    start_time: Date = None
    """First session loaded; null: the store's first."""
    end_time: Date = None
    """Last session loaded; null: the store's last."""
    freq: str = Field(default="day", pattern=r"^(day|1week|\d*min)$")
    """`day`, `1week`, or minutes such as `5min`."""
    label: Annotated[list[str], BeforeValidator(_check_label)] = [LABEL]
    """A Qlib expression or several."""
    amount: Literal["auto", "amount", "vwap", "ohlc"] = "auto"
    """Where the amount comes from: `$amount` (`amount`), `$vwap × $volume` (`vwap`), `$volume × mean(OHLC)` (`ohlc`),
    or `auto`: the first of these that all bars of the first session have. Bars without an amount by it are dropped,
    with a warning."""
    volume: Literal["required", "optional"] = "required"
    """`required`: a bar without volume is none, as on a day without trade. `optional`, for currencies, indices and
    contracts for difference: volume and amount are 0 where they are unknown, with a warning that counts such bars."""
    prices: Prices = "positive"
    """`positive`: a price of zero or less is an error. `any`, for futures joined by differences and shares adjusted
    backwards below zero: prices have no ratios then, so KronosModel takes the scores `z_mean`, `z_last`, `z_max` and
    `z_min` or one of your own, and no calibration; ForecastRecord refuses them."""
    columns: Annotated[dict[str, Any], BeforeValidator(check_columns)] = {}
    """Further columns of a bar by name, such as `turnover: $turn`: Qlib expressions that look at no later bar, or
    classes of your own (class, module_path, kwargs), see [Extending](extending.md). A bar that lacks one is none, with
    a warning that counts such bars. The tokenizer's `d_in` must be 6 and so many more."""

    conditions: Annotated[dict[str, str], BeforeValidator(check_conditions)] = {}
    """What does not change within a window, such as `sector: $sector`: Qlib expressions of group numbers 0, 1, …, NaN
    where the group is not known, as of the score date. For own networks with the same `conditions`."""

    @model_validator(mode="after")
    def _check_order(self) -> "HandlerSettings":
        if self.start_time is not None and self.end_time is not None and self.start_time > self.end_time:
            raise ValueError(f"start_time {self.start_time:%Y-%m-%d} is after end_time {self.end_time:%Y-%m-%d}")
        return self


class KLineHandler(DataHandlerLP):
    """Qlib's data handler for open, high, low, close, volume, amount and label of all that is ever in a universe.

    Histories are whole; `members` is a mask beside them. The data have column groups `feature` and `label` (LABEL0 …),
    index (datetime, instrument) sorted, float32; there are no processors, so raw, infer and learn data are the same. A
    pickle keeps the settings only: the data are loaded again when first used.

    instruments: a universe's name, a list of instruments (always members), or a stockpool config with filters.
    start_time, end_time: the range loaded, inclusive; null is the store's own end.
    freq: day, 1week, or minutes such as 5min.
    label: a Qlib expression or several.
    amount: where the amount comes from: `$amount`, `$vwap × $volume` (vwap), `$volume × mean(OHLC)` (ohlc), or the
        first of these that all bars of the first session have (auto: no later bar must decide it). It is one rule for
        the whole run, logged and kept in `amount_rule`; bars without an amount by it are dropped, with a warning.
    volume: required, or optional for instruments without volume: theirs is 0 then, and so is the amount.
    prices: positive, or any, which lets them be zero or less.
    conditions: expressions of group numbers by name, for networks with conditions.
    columns: further columns by name: Qlib expressions, or configurations of a `bar_columns.BarColumn`.

    Raises ValueError (FileNotFoundError for a missing store), one line, for wrong settings, an unknown universe, a
    missing field, an empty result; `bars` raises it for bars that no market prints.
    """

    instruments: Universe
    start_time: pd.Timestamp | None
    end_time: pd.Timestamp | None
    _data: pd.DataFrame
    _change: pd.DataFrame
    _conditions: pd.DataFrame
    _bars: Bars | None
    _members: np.ndarray | None
    prices: Prices = "positive"  # of handlers pickled before there was a choice

    def __init__(
        self,
        instruments: Universe = MISSING,
        start_time: Any = None,
        end_time: Any = None,
        freq: str = "day",
        label: str | list[str] = LABEL,
        amount: str = "auto",
        volume: str = "required",
        prices: str = "positive",
        columns: Mapping[str, Any] | None = None,
        conditions: Mapping[str, str] | None = None,
        **unknown: Any,
    ) -> None:
        values = {"instruments": instruments, "start_time": start_time, "end_time": end_time}
        values |= {"freq": freq, "label": label, "amount": amount, "volume": volume}
        values |= {"prices": prices, "columns": {} if columns is None else columns}
        values |= {"conditions": {} if conditions is None else conditions, **unknown}
        settings = read_settings(HandlerSettings, "KLineHandler", values)
        self.freq, self.prices = settings.freq, settings.prices
        super().__init__(
            settings.instruments,
            settings.start_time,
            range_end(settings.end_time, self.freq),
            data_loader=KLineLoader(
                settings.freq, settings.label, settings.amount, settings.volume, settings.columns, settings.conditions
            ),
        )

    @property
    def amount_rule(self) -> str | None:
        """Return where the amount comes from: `amount`, `vwap` or `ohlc`; None before `auto` has loaded anything."""
        return self.data_loader.amount_rule

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the names of a bar's columns: the six, then the settings' own."""
        return COLUMNS + tuple(self.data_loader.columns)

    @property
    def conditions(self) -> tuple[str, ...]:
        """Return the names of the conditions."""
        return tuple(self.data_loader.conditions)

    @property
    def dates(self) -> pd.DatetimeIndex:
        """Return the sessions on which any instrument has data."""
        return self._data.index.levels[0]

    def bars(self) -> Bars:
        """Return the valid bars: those with all columns and, unless volume is optional, one other than zero.

        They are selected once, with warnings of instruments that have none and of returns that disagree with `$change`.

        Raises:
            ValueError: a bar that no market prints, see `checks`.
        """
        if self._bars is None:
            index = self._data.index  # sorted by (datetime, instrument)
            order = np.argsort(index.codes[1], kind="stable")
            sessions, names = (codes[order] for codes in index.codes)
            values = self._data["feature"].to_numpy(np.float32)[order]
            traded = values[:, COLUMNS.index("volume")] != 0
            optional = self.data_loader.volume == "optional"
            valid = ~np.isnan(values).any(axis=1) & (traded | optional)
            bars = _bars_of(index.levels, sessions[valid], names[valid], values[valid], self.columns)
            if self.conditions:
                groups = _groups_of(self._conditions.to_numpy()[order[valid]], bars, self.conditions)
                bars = replace(bars, stamp=np.concatenate([bars.stamp, groups], axis=1))
            _warn_of_instruments_without_bars(self._data["feature"], bars.instruments)
            if optional:
                _warn_of_bars_without_volume(bars)
            check_bars(bars, self.prices)
            warn_of_jumps(bars, _returns(names, values[:, CLOSE])[valid], self._change.to_numpy()[order[valid]])
            self._bars = bars
        return self._bars

    def members(self) -> np.ndarray:
        """Return whether the instrument of each of the `bars` is in the universe on the bar's date: bool `[N]`."""
        if self._members is None:
            bars = self.bars()
            spans = member_spans(self.instruments, self.start_time, self.end_time, self.freq)
            mask = np.zeros(len(bars), bool)
            for name, start, stop in zip(bars.instruments, bars.offsets[:-1], bars.offsets[1:]):
                dates = bars.dates[start:stop]
                for begin, end in spans[name]:
                    last = cast(pd.Timestamp, range_end(end, self.freq))
                    mask[start:stop] |= (dates >= begin.to_numpy()) & (dates <= last.to_numpy())
            self._members = mask
        return self._members

    def config(self, **kwargs: Any) -> None:
        """Change instruments, start_time or end_time, upon which the data are loaded anew, or what a pickle keeps."""
        ours = {key: kwargs.pop(key) for key in ("instruments", "start_time", "end_time") if key in kwargs}
        unknown = set(kwargs) - {"dump_all", "exclude", "include", "recursive", "processor_kwargs"}
        if unknown:
            raise ValueError(
                f"KLineHandler: unknown key {sorted(unknown)[0]!r} of config; known: instruments, start_time, end_time"
            )
        if ours:
            now = {"instruments": self.instruments, "start_time": self.start_time, "end_time": self.end_time}
            settings = read_settings(HandlerSettings, "KLineHandler", now | ours)
            self.instruments, self.start_time = settings.instruments, settings.start_time
            self.end_time = range_end(settings.end_time, self.freq)
            self._forget()
        super().config(**kwargs)

    def setup_data(self, *args: Any, **kwargs: Any) -> None:
        """Load the data, or load them anew; Qlib calls this with its `init_type` from the constructor and a dataset."""
        self._forget()
        super().setup_data(*args, **kwargs)
        self._change = self._data.pop(("check", "change"))  # for the checks alone, not part of what is fetched
        if self.conditions:  # likewise
            self._conditions = self._data["condition"]
            self._data = self._data.drop(columns="condition", level=0)

    def _forget(self) -> None:
        """Drop what was loaded and what was made of it."""
        for name in (*_LOADED, *_DERIVED):
            self.__dict__.pop(name, None)

    def __getattr__(self, name: str) -> Any:
        # Python asks here for missing attributes only: after unpickling the data are missing until they are first used.
        if name in _LOADED:
            self.setup_data(init_type=self.IT_LS)
            return self.__dict__[name]
        if name in _DERIVED:
            return None
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _bars_of(
    levels: Sequence[pd.Index], sessions: np.ndarray, names: np.ndarray, values: np.ndarray, columns: tuple[str, ...]
) -> Bars:
    """Make bars of rows sorted by (instrument, datetime); an instrument without any is left out.

    Args:
        levels: of the table's index: all sessions, all names. sessions, names: which of them each row is of [N].
    """
    kept, counts = np.unique(names, return_counts=True)
    dates = levels[0].to_numpy("datetime64[ns]")
    return Bars(
        values=values,
        stamp=stamps(dates).astype(np.int8)[sessions],
        dates=dates[sessions],
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        instruments=tuple(levels[1][kept]),
        columns=columns,
    )


def _groups_of(numbers: np.ndarray, bars: Bars, names: tuple[str, ...]) -> np.ndarray:
    """Return conditions as stamps have them, 0 where the group is not known, 1 for the first: int8 `[N, C]`.

    Raises ValueError for what is no group's number.
    """
    known = ~np.isnan(numbers)
    wrong = known & ~((numbers >= 0) & (numbers < MOST_GROUPS) & (numbers == np.floor(numbers)))
    if wrong.any():
        row, place = np.argwhere(wrong)[0]
        raise ValueError(
            f"KLineHandler: conditions: {names[place]} of {bars.instruments[bars.codes[row]]} on {bars.dates[row]} is "
            f"{numbers[row, place]:g}; groups are numbered 0 … {MOST_GROUPS - 1}"
        )
    return np.where(known, numbers + 1, 0).astype(np.int8)


def _warn_of_instruments_without_bars(rows: pd.DataFrame, kept: tuple[str, ...]) -> None:
    """Warn of instruments in the table without a single valid bar, and of the fields that they lack."""
    names = rows.index.levels[1]
    left_out = names.difference(kept)
    if len(left_out):
        empty = {name: rows.xs(name, level=1).isna().all() for name in left_out[:5]}  # which fields have no value
        named = [f"{name} (no {', '.join(f[f].index) if f.any() else 'trade'})" for name, f in empty.items()]
        warnings.warn(
            f"KLineHandler: {len(left_out)} of {len(names)} instruments are left out, they have no valid bar: "
            f"{', '.join(named)}{', …' if len(left_out) > 5 else ''}"
            + ("" if len(kept) else "; for instruments that have no volume set volume: optional"),
            stacklevel=3,
        )


def _warn_of_bars_without_volume(bars: Bars) -> None:
    without = bars.values[:, COLUMNS.index("volume")] == 0
    if without.any():
        names = [bars.instruments[code] for code in np.unique(bars.codes[without])]
        warnings.warn(
            f"KLineHandler: {without.sum():,} of {len(bars):,} bars, of {len(names)} instruments, have no volume; "
            "theirs and the amount are 0 (volume: optional): "
            f"{', '.join(names[:5])}{', …' if len(names) > 5 else ''}",
            stacklevel=3,
        )


def _returns(names: np.ndarray, close: np.ndarray) -> np.ndarray:
    """Return close-to-close returns `[N]` between an instrument's successive rows, which are successive sessions.

    A session without a close gives NaN for itself and for the next one: `$change` across a gap cannot be checked.
    """
    last_close = np.roll(close, 1)
    last_close[np.diff(names, prepend=-1) != 0] = np.nan
    last_close[~(last_close > 0)] = np.nan
    return close / last_close - 1
