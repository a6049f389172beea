"""The sessions of a market: those of the Qlib store, and after its end those that are known in advance."""

import warnings

import numpy as np
import pandas as pd
from qlib.config import C
from qlib.data.data import Cal

from kronos_qlib.data.stamps import stamps

EXCHANGES = {"cn": "XSHG", "us": "XNYS", "tw": "XTAI"}
DAY = np.timedelta64(1, "D")


class SessionCalendar:
    """Gives the sessions that follow a date; they are known in advance, so that they may stamp a forecast.

    After the store's `sessions` come those of `exchange` (a name of `exchange_calendars`; by default that of `region`:
    XSHG for cn, XNYS for us, XTAI for tw) if that package is installed, else all weekdays, with one warning. For an
    intraday `freq` each of them has the times of day of the store's last day. `source` names the calendar in messages.

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
        last_day = self._times[-1].astype("datetime64[D]")
        last_times = self._times[self._times >= last_day]
        self._times_of_day = last_times - last_day if is_intraday(freq) else np.zeros(1, "timedelta64[ns]")
        self._guessing = False

    def sessions_after(self, dates: np.ndarray | pd.DatetimeIndex, horizon: int) -> np.ndarray:
        """Return the P = `horizon` sessions that follow each date (strictly): datetime64[ns] `[B, P]`."""
        positions = self._positions_after(dates, horizon)
        return self._times[positions]

    def stamps_after(self, dates: np.ndarray | pd.DatetimeIndex, horizon: int) -> np.ndarray:
        """Return the stamps (see `STAMP_FIELDS`) of the P = `horizon` sessions after each date: int64 `[B, P, 5]`."""
        positions = self._positions_after(dates, horizon)
        return self._stamps[positions]

    def _positions_after(self, dates: np.ndarray | pd.DatetimeIndex, horizon: int) -> np.ndarray:
        """Return the sessions' positions `[B, P]` in `_times`, which is first extended as far as needed."""
        dates = np.asarray(dates, "datetime64[ns]")
        if len(dates):
            while np.searchsorted(self._times, dates.max(), side="right") + horizon > len(self._times):
                self._extend()
        return np.searchsorted(self._times, dates, side="right")[:, None] + np.arange(horizon)

    def _extend(self) -> None:
        """Append the sessions of the year after the last one."""
        days = self._days_after(self._times[-1].astype("datetime64[D]"))
        times = (days.astype("datetime64[ns]")[:, None] + self._times_of_day).reshape(-1)
        self._times = np.concatenate([self._times, times])
        self._stamps = np.concatenate([self._stamps, stamps(times)])

    def _days_after(self, last: np.datetime64) -> np.ndarray:
        """Return the days with a session in the year after `last`."""
        if not self._guessing:
            days, problem = _exchange_days(self.exchange, last + DAY, last + 366 * DAY)
            if len(days):
                return days
            self._guessing = True
            warnings.warn(
                f"{self.source} is known to {last} only and {problem}: the sessions after it are taken to be all "
                "weekdays, without holidays. Install exchange_calendars, or give the store a future calendar",
                stacklevel=5,
            )
        days = np.arange(last + DAY, last + 366 * DAY)
        return days[np.is_busday(days)]


def is_intraday(freq: str) -> bool:
    """Return whether bars of this Qlib frequency (day, 5min, …) are shorter than a day."""
    return freq != "day"


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
        raise ValueError(f"unknown exchange {exchange!r}; exchange_calendars knows, among others, XSHG, XNYS, XTAI")


def store_calendar(freq: str, exchange: str | None = None) -> SessionCalendar:
    """Return the calendar of the Qlib store in use, with its future sessions if the store has a file of them."""
    path = C.dpm.get_data_uri(freq) / "calendars" / f"{freq}_future.txt"
    future = path.exists()  # asking Qlib for a file that is not there costs the user two warnings
    source = f"calendar {path if future else path.with_name(f'{freq}.txt')}"
    sessions = pd.DatetimeIndex(Cal.load_calendar(freq, future=future))
    return SessionCalendar(sessions, exchange, C["region"], freq, source)


def _exchange_days(exchange: str | None, start: np.datetime64, end: np.datetime64) -> tuple[np.ndarray, str]:
    """Return the exchange's days in start … end as far as known, and what the problem is if there are none."""
    if exchange is None:
        return np.array([], "datetime64[D]"), "its region has no exchange here"
    try:
        from exchange_calendars import get_calendar
    except ImportError:
        return np.array([], "datetime64[D]"), "exchange_calendars is not installed"
    bound = type(get_calendar(exchange)).bound_max()  # holidays are announced a year at a time in some countries
    if bound is not None:
        end = min(end, np.datetime64(bound.date(), "D"))
    if start > end:
        return np.array([], "datetime64[D]"), f"exchange_calendars knows {exchange} to {end} only"
    # from a month earlier, because the package refuses a range without a session
    sessions = get_calendar(exchange, start=str(start - 31 * DAY), end=str(end)).sessions.to_numpy("datetime64[D]")
    return sessions[sessions >= start], f"exchange_calendars has no session of {exchange} in {start} to {end}"
