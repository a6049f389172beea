import logging
import time
import warnings

import numpy as np
import pandas as pd
import pytest
from stores import random_bars, sessions, use_store, write_store

from kronos_qlib.data.calendar import SessionCalendar, range_end, store_calendar
from kronos_qlib.data.stamps import stamps


def days(*names: str) -> list[np.datetime64]:
    return [np.datetime64(name, "ns") for name in names]


@pytest.fixture
def autumn() -> pd.DatetimeIndex:
    """Shanghai's sessions to the eve of the National Day week of 2025, which has holidays to 8 October."""
    return pd.bdate_range("2025-09-01", "2025-09-30")


@pytest.fixture
def no_exchange_calendars(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "exchange_calendars", None)


def test_inside_the_store_the_next_sessions_are_the_stores_own():
    calendar = SessionCalendar(pd.DatetimeIndex(["2024-01-02", "2024-01-05", "2024-01-09", "2024-01-10"]))
    after = calendar.sessions_after(np.array(days("2024-01-02", "2024-01-05")), 2)
    assert after.tolist() == np.array([days("2024-01-05", "2024-01-09"), days("2024-01-09", "2024-01-10")]).tolist()
    assert after.dtype == np.dtype("M8[ns]")


def test_a_date_that_is_no_session_is_followed_by_the_next_one():
    calendar = SessionCalendar(pd.DatetimeIndex(["2024-01-02", "2024-01-05", "2024-01-09"]))
    assert calendar.sessions_after(np.array(days("2024-01-03")), 1)[0, 0] == np.datetime64("2024-01-05")
    assert calendar.sessions_after(np.array(days("2023-01-03")), 1)[0, 0] == np.datetime64("2024-01-02")


def test_beyond_the_store_come_the_exchanges_sessions_without_its_holidays(autumn):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = SessionCalendar(autumn, region="cn").sessions_after(np.array(days("2025-09-29", "2025-09-30")), 3)
    assert after[0].tolist() == np.array(days("2025-09-30", "2025-10-09", "2025-10-10")).tolist()
    assert after[1].tolist() == np.array(days("2025-10-09", "2025-10-10", "2025-10-13")).tolist()


@pytest.mark.parametrize(
    ("choice", "expected"), [({"region": "us"}, "2025-10-01"), ({"region": "cn", "exchange": "XNYS"}, "2025-10-01")]
)
def test_the_exchange_follows_the_region_unless_named(autumn, choice, expected):
    after = SessionCalendar(autumn, **choice).sessions_after(np.array(days("2025-09-30")), 1)
    assert after[0, 0] == np.datetime64(expected)


def test_without_exchange_calendars_come_weekdays_with_one_warning(autumn, no_exchange_calendars):
    calendar = SessionCalendar(autumn, region="cn", source="calendar somewhere/day.txt")
    with pytest.warns(
        UserWarning, match="somewhere/day.txt is known to 2025-09-30 only and exchange_calendars"
    ) as warned:
        after = calendar.sessions_after(np.array(days("2025-09-30")), 4)
        calendar.sessions_after(np.array(days("2031-01-01")), 300)
    assert len(warned) == 1
    assert after[0].tolist() == np.array(days("2025-10-01", "2025-10-02", "2025-10-03", "2025-10-06")).tolist()


def test_beyond_what_the_exchange_has_announced_come_weekdays_with_one_warning(autumn):
    calendar = SessionCalendar(autumn, region="cn")
    with pytest.warns(UserWarning, match="knows XSHG to") as warned:
        after = calendar.sessions_after(np.array(days("2025-09-30", "2039-12-30")), 2)
    assert len(warned) == 1
    assert after[0, 0] == np.datetime64("2025-10-09"), "what is known of the exchange is still used"
    assert after[1].tolist() == np.array(days("2040-01-02", "2040-01-03")).tolist()


def test_stamps_after_are_the_stamps_of_the_sessions_after(autumn):
    dates = autumn[[0, 5, -1]].to_numpy()
    calendar = SessionCalendar(autumn)
    found = calendar.stamps_after(dates, 6)
    assert found.shape == (3, 6, 5) and found.dtype == np.int64
    np.testing.assert_array_equal(found, stamps(calendar.sessions_after(dates, 6)))


def test_intraday_sessions_repeat_the_last_days_times(autumn):
    times = pd.to_timedelta(["10:30:00", "11:30:00", "14:00:00", "15:00:00"])
    hours = pd.DatetimeIndex([day + time for day in autumn for time in times])
    after = SessionCalendar(hours, freq="60min").sessions_after(np.array(days("2025-09-30T14:00")), 6)[0]
    expected = ["2025-09-30 15:00", *(f"2025-10-09 {hour}" for hour in ("10:30", "11:30", "14:00", "15:00"))]
    assert after.tolist() == np.array(days(*expected, "2025-10-10 10:30")).tolist()


SHANGHAI = [
    *pd.timedelta_range("09:35:00", "11:30:00", freq="5min"),
    *pd.timedelta_range("13:05:00", "15:00:00", freq="5min"),
]


def intraday(first: str, last: str, times: list[pd.Timedelta], freq: str = "B") -> pd.DatetimeIndex:
    """All bars from a first to a last time."""
    days = pd.date_range(pd.Timestamp(first).normalize(), pd.Timestamp(last).normalize(), freq=freq)
    bars = pd.DatetimeIndex([day + time for day in days for time in times])
    return bars[(bars >= first) & (bars <= last)]


def after(calendar: SessionCalendar, date: str, horizon: int) -> list[str]:
    found = calendar.sessions_after(np.array([date], "datetime64[ns]"), horizon)[0]
    return pd.DatetimeIndex(found).strftime("%m-%d %H:%M").to_list()


@pytest.mark.parametrize("end", ["10:30", "09:35", "11:30", "13:05", "14:55", "15:00"])
def test_a_store_that_ends_within_a_session_goes_on_with_it(end):
    """Wherever it ends: what follows is what a store with the whole day and the days after it would give."""
    bars = intraday("2024-07-01", f"2024-08-02 {end}", SHANGHAI)
    found = after(SessionCalendar(bars, region="cn", freq="5min"), f"2024-08-02 {end}", 120)
    whole = intraday("2024-07-01", "2024-08-08 15:00", SHANGHAI)
    assert found == whole[whole > f"2024-08-02 {end}"][:120].strftime("%m-%d %H:%M").to_list()


def test_a_half_day_is_no_typical_day():
    hours = list(pd.timedelta_range("10:30:00", "16:00:00", freq="30min"))
    bars = intraday("2024-06-03", "2024-07-03 13:00", hours)  # New York closed at 13:00 on that day
    calendar = SessionCalendar(bars, region="us", freq="30min")
    found = after(calendar, "2024-07-03 13:00", 13)
    assert found[0] == "07-05 10:30" and found[-2:] == ["07-05 16:00", "07-08 10:30"], "4 July is a holiday"


def test_the_exchange_s_early_closes_are_kept():
    hours = list(pd.timedelta_range("10:00:00", "16:00:00", freq="30min"))
    bars = intraday("2024-10-01", "2024-11-27 16:00", hours)
    found = after(SessionCalendar(bars, region="us", freq="30min"), "2024-11-27 16:00", 14)
    assert [time for time in found if time.startswith("11-29")][-1] == "11-29 13:00", "the day after Thanksgiving"


def test_a_market_of_seven_days_has_seven_days(caplog):
    """A store that trades on weekends is not New York's, whatever the region of Qlib says."""
    days = pd.date_range("2024-01-01", "2024-08-02")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for exchange in (None, "24/7"):
            calendar = SessionCalendar(days, exchange, region="us")
            assert after(calendar, "2024-08-02", 3) == ["08-03 00:00", "08-04 00:00", "08-05 00:00"]
        hours = list(pd.timedelta_range("00:00:00", "23:00:00", freq="1h"))
        calendar = SessionCalendar(intraday("2024-07-01", "2024-08-02 10:00", hours, "D"), region="us", freq="60min")
        assert after(calendar, "2024-08-02 10:00", 16) == [
            *(f"08-02 {hour}:00" for hour in range(11, 24)),
            *(f"08-03 0{hour}:00" for hour in range(3)),
        ]


def test_a_market_of_other_days_of_the_week_keeps_them():
    days = pd.date_range("2024-01-01", "2024-08-01")  # Riyadh trades from Sunday to Thursday
    calendar = SessionCalendar(days[days.dayofweek.isin([6, 0, 1, 2, 3])], region="us")
    assert after(calendar, "2024-08-01", 6) == [f"08-{day:02d} 00:00" for day in (4, 5, 6, 7, 8, 11)]


def test_which_sessions_were_taken_is_logged(autumn, caplog):
    with caplog.at_level("INFO", "qlib.SessionCalendar"):
        logger = logging.getLogger("qlib.SessionCalendar")
        logger.addHandler(caplog.handler)
        try:
            SessionCalendar(autumn, region="cn").sessions_after(autumn[-1:], 1)
            days = pd.date_range("2024-01-01", "2024-08-02")
            SessionCalendar(days, region="us").sessions_after(days[-1:], 1)
        finally:
            logger.removeHandler(caplog.handler)
    assert "come the sessions of XSHG (exchange_calendars)" in caplog.text
    assert "taken to be all days" in caplog.text


def test_sixty_thousand_dates_take_well_under_a_second():
    calendar = SessionCalendar(sessions(2600, "2015-01-05"))
    dates = np.random.default_rng(0).choice(sessions(2500, "2015-01-05").to_numpy(), 60_000)
    began = time.process_time()
    assert calendar.stamps_after(dates, 10).shape == (60_000, 10, 5)
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["2024-01-02", "2024-01-03", "2024-01-03"], "day.txt .* has 2024-01-03 00:00:00 twice"),
        (["2024-01-02", "2024-01-04", "2024-01-03"], "day.txt .* has 2024-01-03 00:00:00 after 2024-01-04"),
        ([], "day.txt is empty"),
    ],
)
def test_a_calendar_out_of_order_is_an_error_that_names_it_and_the_date(names, message):
    with pytest.raises(ValueError, match=message):
        SessionCalendar(pd.DatetimeIndex(names), source="calendar some/day.txt")


def test_an_unknown_exchange_is_an_error(autumn):
    with pytest.raises(ValueError, match="unknown exchange 'NOWHERE'; exchange_calendars knows .*24/7.*XNYS.*XSHG"):
        SessionCalendar(autumn, exchange="NOWHERE")


def test_the_stores_future_calendar_is_used_if_there_is_one(tmp_path):
    calendar, future = sessions(5), sessions(9).delete(6)
    use_store(write_store(tmp_path / "with", calendar, {"AAA": random_bars(5)}, future=future))
    assert store_calendar("day").sessions_after(calendar[-1:], 2)[0].tolist() == future[5:7].to_numpy("M8[ns]").tolist()
    assert "day_future.txt" in store_calendar("day").source
    use_store(write_store(tmp_path / "without", calendar, {"AAA": random_bars(5)}))
    found = store_calendar("day").sessions_after(calendar[-1:], 2)
    assert found[0].tolist() == sessions(7)[5:].to_numpy("M8[ns]").tolist()


def test_a_range_that_ends_on_a_day_ends_with_that_days_last_bar():
    assert range_end(pd.Timestamp("2024-01-02"), "day") == pd.Timestamp("2024-01-02")
    assert range_end(pd.Timestamp("2024-01-02"), "5min") > pd.Timestamp("2024-01-02 23:59")
    assert range_end(pd.Timestamp("2024-01-02 10:00"), "5min") == pd.Timestamp("2024-01-02 10:00")
    assert range_end(None, "5min") is None


def test_weeks_are_followed_by_weeks():
    calendar = SessionCalendar(pd.date_range("2025-01-03", periods=30, freq="W-FRI"), region="cn", freq="1week")
    after = calendar.sessions_after(np.array(days("2025-07-18", "2025-07-25")), 60)
    assert after[0, :2].tolist() == np.array(days("2025-07-25", "2025-08-01")).tolist()
    assert set(np.diff(after[1]).tolist()) == {np.timedelta64(7, "D").astype("m8[ns]").item()}


@pytest.mark.parametrize(
    ("exchange", "freq", "time", "end"),
    [
        ("XSHG", "day", "2024-02-08", "2024-02-08 07:00"),
        ("XSHG", "day", "2024-02-10", "2024-02-10 16:00"),  # no session: midnight in Shanghai
        ("XNYS", "day", "2024-11-27", "2024-11-27 21:00"),
        ("XNYS", "day", "2024-11-29", "2024-11-29 18:00"),  # closes early
        ("XNYS", "day", "2024-07-02", "2024-07-02 20:00"),  # summer time
        ("XSHG", "5min", "2024-02-08 14:55", "2024-02-08 07:00"),
        ("XNYS", "30min", "2024-07-02 15:30", "2024-07-02 20:00"),
        ("24/7", "60min", "2024-02-10 23:00", "2024-02-11 00:00"),
        ("24/7", "day", "2024-02-10", "2024-02-11 00:00"),
        ("XSHG", "1week", "2024-01-22", "2024-01-28 16:00"),  # a Monday: its Sunday's midnight
        ("XSHG", "1week", "2024-01-26", "2024-01-26 07:00"),  # a Friday: its own close
    ],
)
def test_a_bar_is_complete_at_its_exchange_s_close(exchange, freq, time, end):
    days = pd.bdate_range("2024-01-02", periods=40)
    times = days if freq == "day" else days[::5] if freq == "1week" else days + pd.Timedelta(hours=10)
    calendar = SessionCalendar(times, exchange, "cn", freq)
    assert calendar.ends(pd.DatetimeIndex([time])) == pd.DatetimeIndex([end], tz="UTC")


def test_a_store_that_no_exchange_keeps_ends_its_days_in_utc():
    calendar = SessionCalendar(pd.date_range("2024-01-01", periods=40), None, "us")
    assert list(calendar.ends(pd.DatetimeIndex(["2024-02-03"]))) == [pd.Timestamp("2024-02-04", tz="UTC")]


def test_days_that_the_exchange_has_not_announced_end_at_the_usual_close(caplog):
    bound = type(__import__("exchange_calendars").get_calendar("XSHG")).bound_max().tz_localize(None)
    later = pd.bdate_range(bound + pd.Timedelta(days=1), periods=3)
    calendar = SessionCalendar(pd.bdate_range(later[0] - pd.Timedelta(days=60), later[-1]), None, "cn")
    logger = logging.getLogger("qlib.SessionCalendar")
    logger.addHandler(caplog.handler)
    ends = calendar.ends(later)
    logger.removeHandler(caplog.handler)
    assert list(ends) == [day.tz_localize("UTC") + pd.Timedelta(hours=7) for day in later]
    assert f"exchange_calendars knows XSHG to {bound.date()} only" in caplog.text
