"""When the session after a score date opens: a forecast made before that moment is live, a later one simulated."""

import warnings
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pandas as pd

from kronos_qlib.data.calendar import EXCHANGES, SessionCalendar, is_intraday

ROUND_THE_CLOCK = "24/7"
HOURS = {"cn": ("Asia/Shanghai", "09:30"), "us": ("America/New_York", "09:30"), "tw": ("Asia/Taipei", "09:00")}


@dataclass(frozen=True)
class Opening:
    """at: the moment, UTC without a zone. source: what it is known from, in words."""

    at: datetime
    source: str


def next_opening(date: pd.Timestamp, store: str, freq: str, region: str, exchange: str | None = None) -> Opening:
    """Find when the first bar after `date` begins, by the hours of an exchange, by default the region's.

    Where bars follow each other without a pause, round the clock or within a day, a forecast can only be made when the
    next bar has begun: there it is the moment at which that bar is over. Without the package exchange_calendars a
    session opens at the usual hour of the next weekday: earlier than in truth if that is a holiday, never later. A
    store that trades on weekends is on UTC.
    """
    calendar = SessionCalendar(_sessions(date, store, freq), exchange, region, freq)
    pauses = calendar.exchange not in (None, ROUND_THE_CLOCK)
    if calendar.exchange and pauses and not is_intraday(freq):
        after = date if freq != "1week" else date + pd.Timedelta(days=6)  # a week's bar has the date of its first day
        return _exchange_opening(after, calendar.exchange, region)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weekdays without holidays: earlier than in truth, never later
        following = pd.Timestamp(calendar.sessions_after([date], 1)[0, 0])
    step = _step(freq)
    zone = _zone(exchange) if exchange else HOURS[region][0] if pauses and region in HOURS else "UTC"
    goes_on = is_intraday(freq) or (not pauses and (region in HOURS or exchange is not None))
    if following - date > step or not goes_on:
        return Opening(_to_utc(following, zone), f"the store's next bar begins, {zone}")
    return Opening(_to_utc(following + step, zone), f"the bar that follows without a pause is over, {zone}")


def _sessions(date: pd.Timestamp, store: str, freq: str) -> pd.DatetimeIndex:
    """Read the sessions of a store; of one that is not here, take weekdays, or of minutes the next bar alone."""
    try:
        lines = (Path(store).expanduser() / "calendars" / f"{freq}.txt").read_text().splitlines()
    except OSError:
        if is_intraday(freq):
            return pd.DatetimeIndex([date, date + _step(freq)])
        return pd.bdate_range(end=date, periods=10).union([date])
    return pd.DatetimeIndex(lines)


def _zone(exchange: str) -> str:
    """Return an exchange's time zone; UTC where the package that knows it is not installed."""
    try:
        from exchange_calendars import get_calendar
    except ImportError:
        return "UTC"
    return str(get_calendar(exchange).tz)


def _step(freq: str) -> pd.Timedelta:
    """Return the time from one bar to the next where they follow without a pause."""
    if is_intraday(freq):
        return pd.Timedelta(minutes=int(freq.removesuffix("min") or 1))
    return pd.Timedelta(days=7 if freq == "1week" else 1)


def _exchange_opening(date: pd.Timestamp, exchange: str, region: str) -> Opening:
    try:
        from exchange_calendars import get_calendar
    except ImportError:
        problem = "exchange_calendars is not installed"
    else:
        calendar = get_calendar(exchange)
        if calendar.first_session <= date < calendar.last_session:
            session = calendar.date_to_session(date.normalize() + pd.Timedelta(days=1), "next")
            opens = calendar.session_open(session).tz_localize(None)
            return Opening(opens.to_pydatetime(), f"{exchange} opens")
        problem = f"exchange_calendars does not know {exchange} on that day"
    zone, hour = HOURS[region] if EXCHANGES.get(region) == exchange else (_zone(exchange), "00:00")
    day = date.normalize() + pd.offsets.BDay(1)
    opens = _to_utc(day + pd.Timedelta(f"{hour}:00"), zone)
    return Opening(opens, f"the next weekday, {hour} {zone}: {problem}")


def _to_utc(time: pd.Timestamp, zone: str) -> datetime:
    local = time.tz_localize(zone, ambiguous=True, nonexistent="shift_forward")
    return local.tz_convert("UTC").tz_localize(None).to_pydatetime()
