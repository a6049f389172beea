"""What came is read from the store as Qlib says it, once it is there, and never changed."""

import shutil
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import qlib
from ledgers import LABEL, QUANTILES, signal_set
from qlib.data import D

from kronos_qlib.data.calendar import store_calendar
from kronos_qlib.data.demo_market import write_demo_market
from kronos_qlib.live.ledger import Ledger, digest_of_content
from kronos_qlib.live.outcomes import fill_outcomes, read_outcomes
from kronos_qlib.live.signal_set import SignalSet

DAYS, HORIZON = 120, 5
WEEK_TO_COME = "Mean(Ref($close, -5), 5)/$close - 1"  # whose mean Qlib takes of fewer closes where fewer have come


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo market in which one instrument is suspended for three sessions."""
    folder = write_demo_market(tmp_path_factory.mktemp("demo") / "market", instruments=12, days=DAYS, seed=5)
    for field, name in ((0.0, "volume"), (None, "close")):
        file = folder / "features" / "demo0002" / f"{name}.day.bin"
        content = np.fromfile(file, "<f4")
        first = 1 + 75 - int(content[0])
        content[first : first + 3] = content[first - 1] if field is None else field
        content.tofile(file)
    return folder


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(f"sqlite:///{tmp_path}/ledger.db")


def use(store: Path) -> pd.DatetimeIndex:
    qlib.init(provider_uri=str(store), region="cn", kernels=1, logging_level=50, clear_mem_cache=True)
    return pd.DatetimeIndex(D.calendar())


def as_of(market: Path, folder: Path, sessions: int) -> Path:
    """The store as it was after so many sessions."""
    shutil.copytree(market, folder)
    calendar = folder / "calendars" / "day.txt"
    calendar.write_text("\n".join(calendar.read_text().splitlines()[:sessions]) + "\n")
    for file in (folder / "features").glob("*/*.day.bin"):
        content = np.fromfile(file, "<f4")
        content[: 1 + max(sessions - int(content[0]), 0)].tofile(file)
    return folder


def reversal(date: pd.Timestamp, label: str = LABEL) -> SignalSet:
    """A signal set made of the bars up to a date."""
    names = D.list_instruments(D.instruments("demo"), date, date, as_list=True)
    bars = D.features(sorted(names), ["$close", "Ref($close, 10)/$close", "$volume"], date, date).droplevel(1)
    bars = bars.set_axis(["last_close", "score", "volume"], axis=1)
    table = bars[bars["volume"] > 0].dropna().drop(columns="volume").astype(float)
    table["rank"] = table["score"].rank(ascending=False)
    table[QUANTILES] = np.tile(np.linspace(-0.05, 0.05, 7), (len(table), 1))
    return signal_set(date, table=table, label=label, horizon=HORIZON)


def fill(ledger: Ledger):
    return fill_outcomes(ledger, *ledger.read())


def bars_of(name: str) -> pd.Series:
    """Closes of an instrument's sessions with a trade."""
    bars = D.features([name], ["$close", "$volume"]).droplevel(0)
    return bars["$close"][bars["$volume"] > 0].astype(float)


def test_outcomes_are_qlibs_labels_and_the_returns_over_an_instruments_own_bars(market: Path, ledger: Ledger):
    sessions = use(market)
    dates = sessions[60:100:3]
    for date in dates:
        ledger.record(reversal(date), region="cn")
    done = fill(ledger)
    sets, rows = ledger.read()
    named = rows.reset_index().assign(date=lambda rows: rows["id"].map(sets["date"]))
    expected = D.features(sorted(named["instrument"].unique()), [LABEL], dates[0], dates[-1])[LABEL]
    labels = expected.reindex(pd.MultiIndex.from_frame(named[["instrument", "date"]])).to_numpy(float)
    np.testing.assert_array_equal(named["label"].to_numpy(float), labels)
    suspended = 0
    for name, own in named.groupby("instrument"):
        closes = bars_of(name)
        for date, came in zip(own["date"], own["came"]):
            later = closes[closes.index > date]
            assert len(later) >= HORIZON or np.isnan(came)
            if len(later) >= HORIZON:
                assert came == pytest.approx(later.iloc[HORIZON - 1] / closes[date] - 1, abs=1e-12)
                suspended += later.index[HORIZON - 1] > sessions[sessions.get_loc(date) + HORIZON]
    assert suspended > 0, "no bar was put off by a suspension: the market tests nothing"
    assert (done.labels, done.returns) == (np.isfinite(labels).sum(), named["came"].notna().sum())
    assert (done.sets, done.changed_outcomes, done.changed_closes) == (len(dates), 0, 0)


def test_what_has_not_come_is_filled_when_it_has_and_what_is_recorded_depends_on_no_later_bar(
    market: Path, ledger: Ledger, tmp_path: Path
):
    early = as_of(market, tmp_path / "early", 90)
    date = use(early)[-1]
    before = reversal(date)
    placed = ledger.record(before, region="cn")
    first = fill(ledger)
    assert (first.labels, first.returns, first.waiting) == (0, 0, len(before.table))
    use(as_of(market, tmp_path / "later", 92))
    second = fill(ledger)
    assert (second.labels, second.returns, second.waiting) == (len(before.table), 0, len(before.table))
    use(market)
    later = reversal(date)
    assert digest_of_content(later) == digest_of_content(before)
    assert not ledger.record(later, region="cn").new
    third = fill(ledger)
    assert (third.labels, third.returns, third.waiting) == (0, len(before.table), 0)
    rows = ledger.read()[1].loc[placed.id]
    pd.testing.assert_frame_equal(rows[list(before.table)], before.table, check_names=False)
    again = fill(ledger)
    assert (again.labels, again.returns) == (0, 0)


def test_a_label_waits_for_all_the_sessions_that_it_looks_ahead(market: Path, ledger: Ledger, tmp_path: Path):
    date = use(market)[89]
    ledger.record(reversal(date, WEEK_TO_COME), region="cn")
    use(as_of(market, tmp_path / "nearly", 94))
    raw = D.features(D.list_instruments(D.instruments("demo"), as_list=True), [WEEK_TO_COME], date, date)
    assert raw.notna().any(axis=None), "Qlib has a value too early, which is what is tested"
    assert fill(ledger).labels == 0
    use(as_of(market, tmp_path / "there", 95))
    assert fill(ledger).labels > 0


def test_a_store_that_was_written_anew_is_noticed_and_what_was_filled_stays(
    market: Path, ledger: Ledger, tmp_path: Path
):
    date = use(market)[70]
    signals = reversal(date)
    placed = ledger.record(signals, region="cn")
    fill(ledger)
    filled = ledger.read()[1].loc[placed.id, ["label", "came", "filled_at"]]
    changed = shutil.copytree(market, tmp_path / "changed")
    one, other = signals.table.index[:2]
    for name, factor in ((one, np.full(DAYS, 0.5)), (other, np.where(np.arange(DAYS) < 72, 1.0, 1.01))):
        file = changed / "features" / name.lower() / "close.day.bin"
        content = np.fromfile(file, "<f4")
        content[1:] *= factor[int(content[0]) : int(content[0]) + len(content) - 1]
        content.astype("<f4").tofile(file)
    use(changed)
    done = fill(ledger)
    assert (done.labels, done.returns) == (0, 0)
    assert (done.changed_closes, done.changed_outcomes) == (1, 1)  # another base; a return that is another one
    pd.testing.assert_frame_equal(ledger.read()[1].loc[placed.id, ["label", "came", "filled_at"]], filled)


def test_an_instrument_that_the_store_lacks_waits(market: Path, ledger: Ledger):
    date = use(market)[70]
    signals = reversal(date)
    table = signals.table.rename(index={signals.table.index[0]: "SH999999"})
    placed = ledger.record(signal_set(date, table=table, horizon=HORIZON), region="cn")
    assert fill(ledger).waiting == 1
    assert ledger.read()[1].loc[(placed.id, "SH999999"), ["label", "came"]].isna().all()


def test_without_a_label_and_a_horizon_nothing_is_filled_and_nothing_waits(market: Path, ledger: Ledger):
    date = use(market)[70]
    table = reversal(date).table[["score", "rank"]]
    ledger.record(signal_set(date, table=table, label=None, horizon=None), made_at=datetime(2018, 1, 1), region="cn")
    done = fill(ledger)
    assert (done.sets, done.labels, done.returns, done.waiting) == (1, 0, 0, 0)


@pytest.mark.parametrize("label", ["open('x','w')", "$close.__class__", "().__class__", "Ref.mro()"])
def test_a_label_of_the_database_that_is_more_than_arithmetic_is_refused(market: Path, label: str):
    use(market)
    with pytest.raises(ValueError, match="is no Qlib expression of fields, numbers and operators"):
        read_outcomes(["DEMO0001"], pd.Timestamp("2018-02-01"), pd.Timestamp("2018-02-02"), label, None)


def test_a_bar_whose_session_is_still_open_fills_nothing(market: Path, ledger: Ledger):
    sessions = use(market)
    date = sessions[-3]
    ledger.record(signal_set(date, table=reversal(date).table, label=LABEL, horizon=2))
    end = store_calendar("day").ends(sessions[-1:])[0]
    for before, filled in ((1, 0), (0, 1)):
        done = fill_outcomes(ledger, *ledger.read(), now=end - pd.Timedelta(minutes=before))
        assert (done.labels > 0, done.returns > 0) == (bool(filled), bool(filled))
        assert done.last_bar == sessions[-2 + filled]
