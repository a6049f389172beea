"""The sessions of a market: those of the Qlib store, and after its end those that are known in advance."""

import logging
import warnings
from collections import Counter

import numpy as np
import pandas as pd

from kronos_qlib.data.stamps import stamps

logger = logging.getLogger("qlib.SessionCalendar")
EXCHANGES = {"cn": "XSHG", "us": "XNYS", "tw": "XTAI"}
DAY = np.timedelta64(1, "D")
RECENT = 70  # of a store's last days are looked at for their pattern
WEEKEND_SHARE = 0.1  # of days on Saturdays and Sundays, above which a store is not that of its region's exchange


class SessionCalendar:
    """Gives the sessions that follow a date; they are known in advance, so that they may stamp a forecast.

    After the store's `sessions` come the days of `exchange` (a name of `exchange_calendars`, such as XSHG, XNYS or
    24/7), by default those of the `region`'s (XSHG for cn, XNYS for us, XTAI for tw). A store that trades on weekends
    is not of its region: there, and without the package, come the days of the week on which the store trades, without
    holidays. Weeks are followed by weeks. For an intraday `freq` each day has the times that are usual on that day of
    the week in the store, up to the exchange's close where it closes early; a last day that ends early goes on with
    them. What was taken is logged. `source` names the calendar in messages.

    Raises ValueError for duplicate or unsorted sessions, and for an unknown exchange if one is named.
    """

    def __init__(
        self,
        sessions: pd.DatetimeIndex | np.ndarray,
        exchange: str | None = None,
        region: str = "cn",
        freq: str = "day",
        source: str = "the calendar of the store",
    ) -> None:
        check_sessions(sessions, source)
        if exchange is not None:
            check_exchange(exchange)
        self.exchange = exchange or EXCHANGES.get(region)
        self.freq = freq
        self.source = source
        self._times = np.asarray(sessions, "datetime64[ns]")
        self._stamps = stamps(self._times)
        self._pattern = _Pattern(self._times, is_intraday(freq))
        if exchange is None and self._pattern.weekend_share > WEEKEND_SHARE:
            self.exchange = None
        self._guessing = self._begun = False

    def sessions_after(self, dates: np.ndarray | pd.DatetimeIndex, horizon: int) -> np.ndarray:
        """Return the P = `horizon` sessions that follow each date (strictly): datetime64[ns] `[B, P]`."""
        positions = self._positions_after(dates, horizon)
        return self._times[positions]

    after = sessions_after  # the former name

    def stamps_after(self, dates: np.ndarray | pd.DatetimeIndex, horizon: int) -> np.ndarray:
        """Return the stamps (see `STAMP_FIELDS`) of the P = `horizon` sessions after each date: int64 `[B, P, 5]`."""
        positions = self._positions_after(dates, horizon)
        return self._stamps[positions]

    def ends(self, times: np.ndarray | pd.DatetimeIndex) -> pd.DatetimeIndex:
        """Return when bars are complete, in UTC: those of days at the exchange's close, of minutes after so many.

        Days on which the exchange is closed, and all of a store without an exchange, end at midnight of its clock, UTC
        where it has none; a week ends with its Sunday, or with its own day if that is no Monday. Days that
        `exchange_calendars` does not know yet end at the usual close, with a warning.

        Args:
            times: sorted.

        Raises:
            ValueError: the exchange's hours are not known, for want of `exchange_calendars`.
        """
        starts = pd.DatetimeIndex(np.asarray(times, "datetime64[ns]"))
        zone, closes, bound = _closes(self.exchange, starts[0], starts[-1])
        if is_intraday(self.freq):
            local = starts + pd.Timedelta(minutes=int(self.freq.removesuffix("min") or 1))
            return local.tz_localize(zone, ambiguous=True, nonexistent="shift_forward").tz_convert("UTC")
        weeks = self.freq == "1week"
        days = starts + pd.to_timedelta(np.where(weeks & (starts.dayofweek == 0), 6, 0), "D")
        midnight = (days + pd.Timedelta(days=1)).tz_localize(zone).tz_convert("UTC")
        ends = closes.reindex(days)
        ends = ends.where(ends.notna(), midnight)
        unknown = np.zeros(len(days), bool) if bound is None else days > bound
        if unknown.any() and len(closes):
            usual = closes.iloc[-1].tz_convert(zone).tz_localize(None) - closes.index[-1]
            ends[unknown] = (days[unknown] + usual).tz_localize(zone).tz_convert("UTC")
            logger.warning(
                f"exchange_calendars knows {self.exchange} to {bound:%Y-%m-%d} only: later days are taken to end at "
                "the usual time, holidays too; bring the package up to date"
            )
        return pd.DatetimeIndex(ends)

    def _positions_after(self, dates: np.ndarray | pd.DatetimeIndex, horizon: int) -> np.ndarray:
        """Return the sessions' positions `[B, P]` in `_times`, which is first extended as far as needed."""
        dates = np.asarray(dates, "datetime64[ns]")
        if len(dates):
            while np.searchsorted(self._times, dates.max(), side="right") + horizon > len(self._times):
                self._extend()
        return np.searchsorted(self._times, dates, side="right")[:, None] + np.arange(horizon)

    def _extend(self) -> None:
        """Append the rest of the store's last day, and the sessions of the year after the last one."""
        last = self._times[-1].astype("datetime64[D]")
        early: dict[np.datetime64, _EarlyClose] = {}
        if self.freq == "1week":
            days = np.arange(last + 7 * DAY, last + 366 * DAY, 7 * DAY)
        else:
            days, early = self._days_after(last)
        rest = [] if self._begun else [last]
        times = np.concatenate([self._pattern.times(day, early.get(day)) for day in [*rest, *days]])
        times = times[times > self._times[-1]]
        self._begun = True
        self._times = np.concatenate([self._times, times])
        self._stamps = np.concatenate([self._stamps, stamps(times)])

    def _days_after(self, last: np.datetime64) -> tuple[np.ndarray, dict[np.datetime64, "_EarlyClose"]]:
        """Return the days with a session in the year after `last`, and early closes from `last` on."""
        end = last + 366 * DAY
        if not self._guessing:
            days, early, problem = _exchange_days(self.exchange, last, end)
            if len(days):
                if not self._begun:
                    logger.info(f"after {last} come the sessions of {self.exchange} (exchange_calendars)")
                return days, early
            self._guessing = True
            message = (
                f"{self.source} is known to {last} only and {problem}: the sessions after it are taken to be all "
                f"{self._pattern.name}, without holidays"
            )
            if self._pattern.weekend_share > WEEKEND_SHARE:
                logger.info(message)
            else:
                warnings.warn(
                    f"{message}. Name the exchange, install exchange_calendars, or give the store a future calendar",
                    stacklevel=5,
                )
        days = np.arange(last + DAY, end)
        return days[np.isin(_weekday(days), self._pattern.weekdays)], {}


_EarlyClose = tuple[np.timedelta64, np.timedelta64]
"""The time of day at which an exchange usually closes, and at which it closes on a day that ends early."""


class _Pattern:
    """The days of the week on which a store trades, and the times of day that are usual on each.

    They are those of its last `RECENT` days; the very last, which may be unfinished, counts only where it is the only
    one. On a day of the week it trades if it did at least half as often as on the commonest.
    """

    def __init__(self, times: np.ndarray, intraday: bool) -> None:
        days = times.astype("datetime64[D]")
        recent = np.unique(days)[-RECENT:]
        counts = np.bincount(_weekday(recent), minlength=7)
        self.weekdays = np.flatnonzero(2 * counts >= counts.max())
        self.weekend_share = float(counts[5:].sum() / counts.sum())
        self.name = "days" if len(self.weekdays) == 7 else "weekdays" if max(self.weekdays) < 5 else "days of its week"
        self._usual: dict[int, np.ndarray] = {}
        self._commonest = np.zeros(1, "timedelta64[ns]")
        if intraday:
            whole = recent[:-1] if len(recent) > 1 else recent
            bars = times[np.isin(days, whole)]
            offsets = bars - bars.astype("datetime64[D]")
            starts = np.flatnonzero(np.diff(bars.astype("datetime64[D]"), prepend=np.datetime64(0, "D")) != 0 * DAY)
            of_day = [tuple(part.tolist()) for part in np.split(offsets, starts[1:])]
            weekday = _weekday(np.unique(bars.astype("datetime64[D]"))).tolist()
            self._commonest = _commonest(of_day)
            for number in set(weekday):
                own = [part for part, other in zip(of_day, weekday) if other == number]
                if len(own) > 1:
                    self._usual[number] = _commonest(own)

    def times(self, day: np.datetime64, early: _EarlyClose | None) -> np.ndarray:
        """Return the times of a day with a session: datetime64[ns]."""
        offsets = self._usual.get(int(_weekday(day)), self._commonest)
        if early is not None and len(offsets) > 1:
            usual, close = early
            if offsets[-1] == usual:  # bars have the time of their end
                offsets = offsets[offsets <= close]
            elif offsets[-1] < usual:  # of their beginning; later than the close, the store is on another clock
                offsets = offsets[offsets < close]
        return day.astype("datetime64[ns]") + offsets


def _commonest(days: list[tuple[int, ...]]) -> np.ndarray:
    """Return the commonest times of day, those of the longest day among equally common ones."""
    counts = Counter(days)
    return np.array(max(counts, key=lambda times: (counts[times], len(times))), "timedelta64[ns]")


def _weekday(days: np.ndarray | np.datetime64) -> np.ndarray:
    """Return the day of the week, Monday 0."""
    return (days.astype("datetime64[D]").astype(np.int64) + 3) % 7


def is_intraday(freq: str) -> bool:
    """Return whether bars of this Qlib frequency (day, 1week, 5min, …) are shorter than a day."""
    return freq.endswith("min")


def range_end(date: pd.Timestamp | None, freq: str) -> pd.Timestamp | None:
    """Return the last moment of a range up to `date`; for intraday bars a date without a time is a whole day."""
    if date is not None and is_intraday(freq) and date == date.normalize():
        return date + pd.Timedelta(days=1) - pd.Timedelta(1, "ns")
    return date


def check_sessions(sessions: pd.DatetimeIndex | np.ndarray, source: str) -> None:
    """Check that sessions are sorted without duplicates; a ValueError names the first place where they are not."""
    times = np.asarray(sessions, "datetime64[ns]")
    if not len(times):
        raise ValueError(f"{source} is empty")
    wrong = np.flatnonzero(times[1:] <= times[:-1])
    if len(wrong):
        this, before = pd.Timestamp(times[wrong[0] + 1]), pd.Timestamp(times[wrong[0]])
        what = f"{this} twice" if this == before else f"{this} after {before}"
        raise ValueError(
            f"{source} must be sorted without duplicates but has {what} ({len(wrong)} such places in all); "
            "rewrite the calendar, and the bars with it, for Qlib's files count sessions by position"
        )


def check_exchange(exchange: str) -> None:
    """Check that `exchange_calendars`, if installed, knows `exchange`. Raises ValueError."""
    try:
        import exchange_calendars
    except ImportError:
        return
    if exchange not in exchange_calendars.get_calendar_names():
        known = ", ".join(sorted(exchange_calendars.get_calendar_names(include_aliases=False)))
        raise ValueError(f"unknown exchange {exchange!r}; exchange_calendars knows {known}")


def sessions_after_bars(times: pd.DatetimeIndex, horizon: int, exchange: str | None = None) -> pd.DatetimeIndex:
    """Return the sessions that follow the last of some bars: those of an exchange, or of the bars' own pattern.

    Bars a week or a month apart are followed by bars as far apart, and so are those of a market that never closes.
    """
    distance = pd.Series(times).diff().median() if len(times) > 1 else pd.Timedelta(days=1)
    if distance >= pd.Timedelta(days=6):
        step = pd.DateOffset(months=round(distance.days / 30.4)) if distance.days > 27 else distance
        return pd.DatetimeIndex([times[-1] + step * number for number in range(1, horizon + 1)])
    if exchange == "24/7":
        return pd.DatetimeIndex([times[-1] + distance * number for number in range(1, horizon + 1)])
    freq = "day" if distance >= pd.Timedelta(hours=20) and (times == times.normalize()).all() else "1min"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weekdays without holidays are what a pattern is
        calendar = SessionCalendar(times, exchange, "", freq, "the bars")
        return pd.DatetimeIndex(calendar.sessions_after(times[-1:], horizon)[0])


def store_calendar(freq: str, exchange: str | None = None) -> SessionCalendar:
    """Return the calendar of the Qlib store in use, with its future sessions if the store has a file of them."""
    from qlib.config import C  # here, as a forecast of a file needs no Qlib, whose import takes seconds
    from qlib.data.data import Cal

    path = C.dpm.get_data_uri(freq) / "calendars" / f"{freq}_future.txt"
    future = path.exists()  # asking Qlib for a file that is not there costs the user two warnings
    source = f"calendar {path if future else path.with_name(f'{freq}.txt')}"
    sessions = pd.DatetimeIndex(Cal.load_calendar(freq, future=future))
    return SessionCalendar(sessions, exchange, C["region"], freq, source)


def _closes(
    exchange: str | None, first: pd.Timestamp, last: pd.Timestamp
) -> tuple[str, pd.Series, pd.Timestamp | None]:
    """Return an exchange's time zone, its closes in UTC by session, and the last day that is known of it, if any is.

    Without an exchange: UTC and no closes.
    """
    if exchange is None:
        return "UTC", pd.Series(dtype="datetime64[ns, UTC]"), None
    try:
        from exchange_calendars import get_calendar
    except ImportError:
        raise ValueError(
            f"the hours of {exchange} are not known without exchange_calendars: pip install 'kronos-qlib[calendars]'"
        ) from None
    # a month to either side, because the package refuses a range without a session
    bound, month = type(get_calendar(exchange)).bound_max(), pd.Timedelta(days=31)
    bound = None if bound is None else bound.tz_localize(None)
    end = last.normalize() + month if bound is None else min(last.normalize() + month, bound)
    calendar = get_calendar(exchange, start=str((min(first, end) - month).date()), end=str(end.date()))
    return str(calendar.tz), calendar.closes, bound


def _exchange_days(
    exchange: str | None, last: np.datetime64, end: np.datetime64
) -> tuple[np.ndarray, dict[np.datetime64, _EarlyClose], str]:
    """Return the exchange's days after `last` up to `end`, when it closes early from `last` on, and what is wrong."""
    none = np.array([], "datetime64[D]")
    if exchange is None:
        return none, {}, "no exchange is named and none of its region trades on its days"
    try:
        from exchange_calendars import get_calendar
    except ImportError:
        return none, {}, "exchange_calendars is not installed"
    bound = type(get_calendar(exchange)).bound_max()  # holidays are announced a year at a time in some countries
    if bound is not None:
        end = min(end, np.datetime64(bound.date(), "D"))
    if last + DAY > end:
        return none, {}, f"exchange_calendars knows {exchange} to {end} only"
    # from a month earlier, because the package refuses a range without a session
    calendar = get_calendar(exchange, start=str(last - 31 * DAY), end=str(end))
    sessions = calendar.sessions.to_numpy("datetime64[D]")
    closes = calendar.closes.dt.tz_convert(calendar.tz).dt.tz_localize(None)
    usual = pd.Timedelta(str(calendar.close_times[-1][1])).to_timedelta64()
    early = {
        day.to_numpy().astype("datetime64[D]"): (usual, (closes[day] - day).to_timedelta64())
        for day in calendar.early_closes
    }
    problem = f"exchange_calendars has no session of {exchange} in {last + DAY} to {end}"
    return sessions[sessions > last], early, problem
