"""KLineDataset: Qlib's dataset of windows of bars, selected by their score dates."""

import warnings
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import BeforeValidator, Field, TypeAdapter
from qlib.data.dataset import DatasetH
from qlib.data.dataset.handler import DataHandler
from qlib.utils import init_instance_by_config

from kronos_qlib.data.calendar import SessionCalendar, check_exchange, range_end, store_calendar
from kronos_qlib.data.dates import Date
from kronos_qlib.data.handler import KLineHandler
from kronos_qlib.data.windows import Bars, Normalisation, Windows, check_normalisation
from kronos_qlib.settings import MISSING, Settings, check_configuration, read_settings

LONG_GAP = 60  # sessions missed that are worth a warning: three months of days
Segment = tuple[pd.Timestamp | None, pd.Timestamp | None]
_DATE = TypeAdapter(Date, config={"arbitrary_types_allowed": True})


def check_segment(value: Any) -> Segment:
    """Check a segment, a pair of dates or a slice of them. Raises ValueError."""
    if isinstance(value, slice) and value.step is None:
        value = (value.start, value.stop)
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError("should be [start, end], either may be null")
    try:
        start, end = (_DATE.validate_python(date) for date in value)
    except ValueError as error:
        zone = "; without a time zone" if "time zone" in str(error) else ""
        raise ValueError(f"should be two dates such as [2015-01-01, 2022-12-31], either may be null{zone}") from None
    if start is not None and end is not None and start > end:
        raise ValueError("starts after it ends")
    return start, end


def _check_handler(value: Any) -> Any:
    """Check the setting `handler`. Raises ValueError."""
    if isinstance(value, (DataHandler, Mapping)):
        return check_configuration(value)
    if isinstance(value, str) and value.startswith("file://"):
        return value
    raise ValueError("should be a KLineHandler or its configuration")


def _check_exchange(value: Any) -> Any:
    """Check the setting `exchange`. Raises ValueError."""
    if isinstance(value, str):
        check_exchange(value)
    return value


def _check_times(value: Any) -> Any:
    """Check the setting `score_times`. Raises ValueError."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(time, str) for time in value):
        raise ValueError('should be a list of times of day such as ["14:55"], in quotes, or null')
    for time in value:
        try:
            pd.to_datetime(time, format="%H:%M")
        except ValueError:
            raise ValueError(f"{time!r} is no time of day such as 14:55") from None
    return list(value)


class DatasetSettings(Settings):
    """The keyword arguments of `KLineDataset`."""

    handler: Annotated[Any, BeforeValidator(_check_handler)]
    """A `KLineHandler`, its configuration, or `file://…`, a pickle of one, as Qlib's `Rolling` makes it."""
    segments: dict[str, Annotated[Any, BeforeValidator(check_segment)]] = Field(min_length=1)
    """Name → [first, last] score date, either may be null; the lookback may begin before the first."""
    lookback: int = Field(default=90, ge=2)
    """Bars that a window shows the model."""
    horizon: int = Field(default=10, ge=1)
    """Bars forecast."""
    exchange: Annotated[str | None, BeforeValidator(_check_exchange)] = None
    """The exchange whose sessions follow the end of the store, such as `XSHG`; null: the region's."""
    normalisation: Annotated[Any, BeforeValidator(check_normalisation)] = "unit_free"
    """How small prices are normalised: `unit_free`, whatever their unit, or with the absolute 1e-5 as `published`,
    which flattens prices of 1e-4 and below; other prices do not differ. Or a class of your own (class, module_path,
    kwargs), see [Extending](extending.md)."""
    max_gap: int | None = Field(default=None, ge=0)
    """Sessions that an instrument may miss between two bars of a window, suspended say; windows with a longer gap are
    left out, and counted. null: any, with a warning that counts windows over more than 60 missed sessions."""
    score_times: Annotated[list[str] | None, BeforeValidator(_check_times)] = None
    """Times of day, such as `["14:55"]`: only bars of these times are score dates, for one signal a day from bars of
    minutes. null: every bar. Training windows of the two stages end on any bar, those of a ranker on score dates."""
    fetch_kwargs: dict[str, Any] = {}
    """Arguments of the handler's `fetch`, as of Qlib's `DatasetH`."""


class KLineDataset(DatasetH):
    """Windows of `lookback` valid bars that end on the score dates of a segment, from a `KLineHandler`.

    segments: name → [start, end] of score dates, both inclusive, either may be null. Bars before the start are used as
        context; training windows never reach past the end.
    lookback, horizon: bars seen and bars forecast.
    exchange: whose sessions follow the end of the store's calendar (see `SessionCalendar`).
    normalisation: of small prices (see `windows.normalise`).
    max_gap: sessions that may be missing between two bars of a window; None: any.
    score_times: times of day of the bars that are score dates; None: of all.

    `prepare` is DatasetH's, so that Qlib's records find features and labels. A pickle keeps the settings only.

    Raises ValueError, one line, for wrong settings and for a segment that lies outside the data.
    """

    normalisation: Normalisation = "unit_free"  # of datasets pickled before there was a choice
    max_gap: int | None = None  # likewise
    score_times: list[str] | None = None  # likewise

    def __init__(
        self,
        handler: KLineHandler | Mapping[str, Any] = MISSING,
        segments: Mapping[str, Any] = MISSING,
        lookback: int = 90,
        horizon: int = 10,
        exchange: str | None = None,
        fetch_kwargs: Mapping[str, Any] | None = None,
        normalisation: Normalisation = "unit_free",
        max_gap: int | None = None,
        score_times: list[str] | None = None,
        **unknown: Any,
    ) -> None:
        values: dict[str, Any] = {"handler": handler, "segments": segments, "lookback": lookback, "horizon": horizon}
        values |= {
            "exchange": exchange,
            "normalisation": normalisation,
            "max_gap": max_gap,
            "score_times": score_times,
            "fetch_kwargs": {} if fetch_kwargs is None else fetch_kwargs,
        }
        values |= unknown
        settings = read_settings(DatasetSettings, "KLineDataset", values)
        self.handler = init_instance_by_config(handler, accept_types=DataHandler)
        if not isinstance(self.handler, KLineHandler):
            raise ValueError(f"KLineDataset: handler should be a KLineHandler, not a {type(self.handler).__name__}")
        self._set(settings)
        super().__init__(self.handler, self.segments, settings.fetch_kwargs)
        for name in self.segments:
            self._require_dates(name)

    def score_windows(self, segment: Any = "test") -> Windows:
        """Select one window for each score date and instrument of a segment, sorted by these.

        A score needs `lookback` valid bars that end on its date, and membership on that date; `future` is 0, so that
        the last date of the store has scores too. Instruments of the segment without any window, for want of a
        lookback, are in `left_out`, and `gaps` counts windows over long gaps; see `warn_of_left_out`.

        Args:
            segment: a name, or a pair of dates.

        Raises:
            ValueError: the segment is unknown or has no window.
        """
        return self._select(segment, future=0)

    def training_windows(self, segment: Any) -> Windows:
        """Select windows as `score_windows` does, with the horizon + 1 bars that follow, all of them in the segment.

        The lookback may reach before the segment's start.
        """
        return self._select(segment, future=self.horizon + 1)

    def warn_of_left_out(self, windows: Windows) -> None:
        """Warn of the instruments that a selection of windows has left out, once for the same windows of a dataset.

        `score_windows` and `training_windows` do not warn, because counts and checks call them too; `KronosModel` and
        `training_set` call this where they train or score.
        """
        names, messages = windows.left_out, []
        if names:
            messages.append(
                f"KLineDataset: {len(names)} instruments are left out of {windows.segment}, they never have "
                f"{windows.lookback} valid bars behind them there: {', '.join(names[:5])}"
                f"{', …' if len(names) > 5 else ''}"
            )
        if windows.gaps:
            missed = LONG_GAP if self.max_gap is None else self.max_gap
            said = "set max_gap to leave them out" if self.max_gap is None else "they are left out (max_gap)"
            messages.append(
                f"KLineDataset: {windows.gaps:,} windows of {windows.segment} reach over a gap of more than {missed} "
                f"sessions, such as a suspension; {said}"
            )
        warned = self.__dict__.setdefault("_warned", set())  # of this process: Qlib pickles no such name
        for message in messages:
            if message not in warned:
                warned.add(message)
                warnings.warn(message, stacklevel=2)

    @property
    def calendar(self) -> SessionCalendar:
        """Return the sessions of the store and those that are expected after them."""
        if not hasattr(self, "_calendar"):
            self._calendar = store_calendar(self.handler.freq, self.exchange)
        return self._calendar

    def config(self, handler_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Change settings but fetch_kwargs; the handler by `handler_kwargs`; or what a pickle keeps.

        The handler goes on loading from its own `start_time` if a later one is given, as Qlib's `PredUpdater` gives the
        first date to be scored: a window reaches `lookback` valid bars back, over suspensions of any length.
        """
        known = ("segments", "lookback", "horizon", "exchange", "normalisation", "max_gap", "score_times")
        ours = {key: kwargs.pop(key) for key in known if key in kwargs}
        unknown = set(kwargs) - {"dump_all", "exclude", "include", "recursive"}
        if unknown:
            raise ValueError(
                f"KLineDataset: unknown key {sorted(unknown)[0]!r} of config; known: handler_kwargs, {', '.join(known)}"
            )
        if ours:
            values = {key: getattr(self, key) for key in ("handler", *known)} | ours
            self._set(read_settings(DatasetSettings, "KLineDataset", values))
        if handler_kwargs and handler_kwargs.get("start_time") is not None:
            own = self.handler.start_time
            earlier = None if own is None else min(pd.Timestamp(own), pd.Timestamp(handler_kwargs["start_time"]))
            handler_kwargs = handler_kwargs | {"start_time": earlier}
        super().config(handler_kwargs=handler_kwargs, **kwargs)

    def _set(self, settings: DatasetSettings) -> None:
        """Take over settings, and drop the calendar that was made by the former ones."""
        freq = self.handler.freq
        self.segments = {name: (start, range_end(end, freq)) for name, (start, end) in settings.segments.items()}
        self.lookback = settings.lookback
        self.horizon = settings.horizon
        self.exchange = settings.exchange
        self.normalisation = settings.normalisation
        self.max_gap, self.score_times = settings.max_gap, settings.score_times
        self.__dict__.pop("_calendar", None)

    def _bounds(self, segment: Any) -> tuple[str, np.datetime64, np.datetime64]:
        """Return what to call a segment, its first and its last moment."""
        if isinstance(segment, str):
            if segment not in self.segments:
                raise ValueError(f"KLineDataset: unknown segment {segment!r}; known: {', '.join(self.segments)}")
            name, (start, end) = f"segment {segment!r}", self.segments[segment]
        else:
            try:
                start, end = check_segment(segment)
            except ValueError as error:
                raise ValueError(f"KLineDataset: segment {segment!r} {error}, or the name of a segment") from None
            name, end = "segment", range_end(end, self.handler.freq)
        first, last = (pd.Timestamp.min if start is None else start), (pd.Timestamp.max if end is None else end)
        shown = [str(date.date()) if date is not None else "…" for date in (start, end)]
        return f"{name} [{', '.join(shown)}]", first.to_numpy(), last.to_numpy()

    def _require_dates(self, segment: Any) -> None:
        """Raise a ValueError if no session of the data is in a segment."""
        name, start, end = self._bounds(segment)
        dates = self.handler.dates
        if not ((dates >= start) & (dates <= end)).any():
            raise ValueError(
                f"KLineDataset: {name} is empty: the handler's data run from {dates[0].date()} to {dates[-1].date()}"
            )

    def _select(self, segment: Any, future: int) -> Windows:
        """Select the windows of a segment whose lookback and `future` bars are there, by score date and instrument."""
        name, start, end = self._bounds(segment)
        self._require_dates(segment)
        bars, members = self.handler.bars(), self.handler.members()
        wanted = members & (bars.dates >= start) & (bars.dates <= end)
        if self.score_times is not None and not future:
            wanted &= self._at_score_times(bars)

        rows = np.arange(len(bars))
        enough = rows - bars.offsets[bars.codes] >= self.lookback - 1
        if future:
            last = np.minimum(rows + future, len(bars) - 1)
            complete = (rows + future < bars.offsets[bars.codes + 1]) & (bars.dates[last] <= end)
        else:
            complete = np.ones(len(bars), bool)

        ends = rows[wanted & enough & complete]
        if not len(ends):
            raise ValueError(
                f"KLineDataset: {name} has no window: of the {wanted.sum()} bars of members in it, "
                f"{(wanted & enough).sum()} have a lookback of {self.lookback} valid bars"
                + (f", and none has the {future} bars after it within the segment" if future else "")
            )
        bridged = self._bridges_gap(bars, ends, future)
        if self.max_gap is not None:
            ends = ends[~bridged]
            if not len(ends):
                raise ValueError(
                    f"KLineDataset: {name} has no window: each of its {len(bridged)} misses more than max_gap "
                    f"({self.max_gap}) sessions between two of its bars"
                )
        without_lookback = np.setdiff1d(bars.codes[wanted], bars.codes[wanted & enough])
        left_out = tuple(bars.instruments[code] for code in without_lookback)
        order = np.lexsort((bars.codes[ends], bars.dates[ends]))
        return Windows(
            bars,
            ends[order],
            self.lookback,
            future,
            normalisation=self.normalisation,
            segment=name,
            left_out=left_out,
            gaps=int(bridged.sum()),
        )

    def _at_score_times(self, bars: Bars) -> np.ndarray:
        """Return which bars are of the times of day that are scored: bool [N]. Raises ValueError for one without any.

        As of the whole data, so that no later segment decides what is an error.
        """
        minutes = bars.stamp[:, 0] + 60 * bars.stamp[:, 1].astype(np.int64)
        times = [(text, pd.to_datetime(text, format="%H:%M")) for text in self.score_times or ()]
        wanted = {text: 60 * time.hour + time.minute for text, time in times}
        for time, minute in wanted.items():
            if not (minutes == minute).any():
                raise ValueError(
                    f"KLineDataset: score_times: no bar is of {time}; the last of a day are mostly of "
                    f"{divmod(int(minutes.max()), 60)[0]:02d}:{int(minutes.max()) % 60:02d}"
                )
        return np.isin(minutes, list(wanted.values()))

    def _bridges_gap(self, bars: Bars, ends: np.ndarray, future: int) -> np.ndarray:
        """Return which windows reach over a gap longer than allowed, or than `LONG_GAP`: bool [W]."""
        session = self.handler.dates.to_numpy().searchsorted(bars.dates)
        missed = np.diff(session, prepend=session[0]) - 1
        missed[bars.offsets[:-1]] = 0  # before an instrument's first bar
        long = np.cumsum(missed > (LONG_GAP if self.max_gap is None else self.max_gap))
        return long[ends + future] > long[ends - self.lookback + 1]


def window_index(windows: Windows) -> pd.MultiIndex:
    """Return the windows' (datetime, instrument), by which those of a dataset are sorted."""
    return pd.MultiIndex.from_arrays([windows.dates, windows.instruments], names=["datetime", "instrument"])
