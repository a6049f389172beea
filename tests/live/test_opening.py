"""A forecast is live if it was made before the next session opened."""

import sys
from datetime import datetime
from pathlib import Path

import pandas as pd
import pytest
from ledgers import signal_set

from kronos_qlib.data.calendar import EXCHANGES
from kronos_qlib.live.ledger import Ledger
from kronos_qlib.live.opening import HOURS, next_opening


def store_of(folder: Path, times: pd.DatetimeIndex, freq: str) -> str:
    (folder / "calendars").mkdir()
    (folder / "calendars" / f"{freq}.txt").write_text("\n".join(map(str, times)) + "\n")
    return str(folder)


@pytest.mark.parametrize(
    ("date", "region", "opens"),
    [
        ("2024-06-03", "cn", "2024-06-04 01:30"),
        ("2024-06-07", "cn", "2024-06-11 01:30"),  # a weekend, and Dragon Boat
        ("2024-06-03", "us", "2024-06-04 13:30"),
        ("2024-12-24", "us", "2024-12-26 14:30"),  # Christmas, in winter time
        ("2024-06-03", "tw", "2024-06-04 01:00"),
    ],
)
def test_it_opens_at_the_hour_of_the_regions_exchange_on_its_next_session(date: str, region: str, opens: str):
    found = next_opening(pd.Timestamp(date), "no/store", "day", region)
    assert (found.at, found.source) == (datetime.fromisoformat(opens), f"{EXCHANGES[region]} opens")


def test_without_the_exchanges_calendar_it_is_the_next_weekday_and_that_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "exchange_calendars", None)
    found = next_opening(pd.Timestamp("2024-06-07"), "no/store", "day", "cn")
    assert found.at == datetime(2024, 6, 10, 1, 30)
    assert "exchange_calendars is not installed" in found.source


def test_a_week_is_followed_by_the_next_ones_first_session():
    assert next_opening(pd.Timestamp("2024-06-03"), "no/store", "1week", "cn").at == datetime(2024, 6, 11, 1, 30)


def test_every_region_with_an_exchange_has_hours():
    assert HOURS.keys() == EXCHANGES.keys()


def test_of_a_market_that_never_closes_the_bar_that_follows_must_not_be_over(tmp_path: Path):
    store = store_of(tmp_path, pd.date_range("2024-01-01", "2024-06-08"), "day")
    assert next_opening(pd.Timestamp("2024-06-08"), store, "day", "us").at == datetime(2024, 6, 10)


def test_of_a_region_without_a_known_exchange_the_next_weekday_begins_in_utc():
    found = next_opening(pd.Timestamp("2024-06-07"), "no/store", "day", "uk")
    assert (found.at, found.source) == (datetime(2024, 6, 10), "the store's next bar begins, UTC")


def test_of_minutes_without_the_store_it_is_when_the_next_bar_would_be_over():
    found = next_opening(pd.Timestamp("2024-06-03 10:00"), "no/store", "30min", "cn")
    assert found.at == datetime(2024, 6, 3, 3)  # 11:00 in Shanghai


@pytest.mark.parametrize(
    ("bar", "until"),
    [("2024-06-03 09:30", "2024-06-03 02:30"), ("2024-06-03 14:30", "2024-06-04 01:30")],
    ids=["within the day: until the next bar is over", "the day's last bar: until the next day's first begins"],
)
def test_of_minutes_it_is_on_the_exchanges_clock(tmp_path: Path, bar: str, until: str):
    days = pd.bdate_range("2024-04-01", "2024-06-04")
    times = [day + pd.Timedelta(hours=9.5) + pd.Timedelta(minutes=30 * step) for day in days for step in range(11)]
    store = store_of(tmp_path, pd.DatetimeIndex(times), "30min")
    assert next_opening(pd.Timestamp(bar), store, "30min", "cn").at == datetime.fromisoformat(until)


@pytest.mark.parametrize(
    ("made", "live"),
    [("2024-06-03 09:00", True), ("2024-06-04 01:29:59", True), ("2024-06-04 01:30", False), ("2025-01-01", False)],
)
def test_a_set_is_live_before_that_moment_and_simulated_from_it_on(tmp_path: Path, made: str, live: bool):
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    placed = ledger.record(signal_set("2024-06-03"), made_at=datetime.fromisoformat(made), region="cn")
    assert placed.live is live
    assert bool(ledger.read()[0].loc[placed.id, "live"]) is live
    assert placed.next_session_opens_at == pd.Timestamp("2024-06-04 01:30", tz="UTC")


def test_a_named_exchange_opens_by_its_own_hours_whatever_the_region(tmp_path: Path):
    found = next_opening(pd.Timestamp("2024-04-30"), "no/store", "day", "cn", "XTKS")
    assert (found.at, found.source) == (datetime(2024, 5, 1), "XTKS opens")  # Shanghai's holiday goes on to 6 May
    store = store_of(tmp_path, pd.date_range("2024-01-01", "2024-06-08"), "day")
    assert next_opening(pd.Timestamp("2024-06-08"), store, "day", "cn", "24/7").at == datetime(2024, 6, 10)


def test_the_ledger_takes_the_exchange_of_the_signals(tmp_path: Path):
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    for seed, (exchange, live) in enumerate(((None, True), ("XTKS", False))):
        made_at = datetime(2024, 5, 1, 12)
        found = ledger.record(signal_set("2024-04-30", seed=seed, exchange=exchange), made_at, "cn")
        assert found.live is live
    assert list(ledger.read()[0]["exchange"]) == [None, "XTKS"]
