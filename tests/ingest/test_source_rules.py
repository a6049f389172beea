"""What a source does not say is found from its figures, said with the figure, or asked about."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qlib.data import D
from stores_of_tests import use_store

from kronos_qlib.ingest import store as stores
from kronos_qlib.ingest.bars import read_bars
from kronos_qlib.ingest.selection import read_instrument
from kronos_qlib.ingest.store import ingest
from kronos_qlib.ingest.store_files import StoreFiles

TRUTH = pd.read_csv(Path(__file__).parent / "truth.csv", parse_dates=["time"])
PRICES = ["open", "high", "low", "close"]


def write(path: Path, **changes) -> Path:
    """Write the bars of the truth with some columns changed or added."""
    TRUTH.assign(**changes).to_csv(path, index=False)
    return path


def said(summary, word: str) -> str:
    """The one finding that begins with a word."""
    (finding,) = [finding for finding in summary.findings if finding.startswith(word)]
    return finding


# Units


def test_files_of_several_units_are_each_brought_to_shares(tmp_path):
    files = [
        write(tmp_path / "SH600001.csv"),
        write(tmp_path / "SH600002.csv", volume=TRUTH["volume"] / 100),
        write(tmp_path / "SH600003.csv", volume=TRUTH["volume"] / 100, amount=TRUTH["amount"] / 1000),
    ]
    summary = ingest(files, tmp_path / "store")
    units = sorted(finding for finding in summary.findings if finding.startswith("units"))
    assert [unit.split(" (")[0] for unit in units] == [
        "units: lots of 100 and money",
        "units: lots of 100 and thousands",
        "units: shares and money",
    ]
    assert all("in 1 of 3 files" in unit for unit in units)
    store = StoreFiles(tmp_path / "store")
    first, *others = (store.read(name, "day", ["volume", "amount"])[1] for name in store.instruments())
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-6)


def test_an_odd_file_among_many_takes_the_unit_of_the_others_and_is_named(tmp_path):
    files = [write(tmp_path / f"SH60000{number}.csv", volume=TRUTH["volume"] / 100) for number in range(10)]
    files.append(write(tmp_path / "SH900001.csv", volume=TRUTH["volume"] / 100, close=TRUTH["close"] / 7))
    TRUTH.assign(volume=TRUTH["volume"] / 100, amount=TRUTH["amount"] * 7).to_csv(files[-1], index=False)
    summary = ingest(files, tmp_path / "store")
    assert any("none fits, those of the other files are taken (SH900001.csv first)" in f for f in summary.findings)
    volumes = {
        name: StoreFiles(tmp_path / "store").read(name, "day", ["volume"])[1]["volume"][0]
        for name in ("SH600000", "SH900001")
    }
    assert volumes["SH600000"] == volumes["SH900001"] == TRUTH["volume"][0]


def test_the_price_of_an_index_decides_no_unit(tmp_path):
    files = [write(tmp_path / "SH600000.csv"), write(tmp_path / "SH000300.csv", amount=TRUTH["amount"] / 271)]
    summary = ingest(files, tmp_path / "store")
    assert "units: as given, as no bar of a share has a volume and an amount, in 1 of 2 files" in summary.findings


def test_adjusted_prices_with_raw_volumes_are_said(tmp_path):
    factor = np.where(TRUTH.index < 15, 0.2, 1.0)
    prices = {name: (TRUTH[name] * factor).round(6) for name in PRICES}
    summary = ingest([write(tmp_path / "SH600000.csv", **prices)], tmp_path / "store")
    assert "of the first bars is 4.986 times that of the last" in said(summary, "units: shares and money")


# Adjustment


FACTOR = np.where(TRUTH.index < 15, 0.5, 1.0)
RAW = {name: TRUTH[name] / FACTOR for name in PRICES} | {"volume": TRUTH["volume"] * FACTOR}  # halves at the split
CHANGE = {"pct_chg": 100 * TRUTH["close"].pct_change()}


@pytest.mark.parametrize(
    ("columns", "word"),
    [
        (RAW, "adjustment: × factor, at least 0.5"),
        (RAW | CHANGE, "adjustment: × factor, at least 0.5"),
        (CHANGE, "adjustment: prices are × factor already, as the source's own change says"),
        ({"volume": RAW["volume"]}, "adjustment: prices are × factor already and volumes are not"),
    ],
)
def test_raw_and_adjusted_prices_beside_a_factor_give_the_same_store(tmp_path, columns, word):
    summary = ingest([write(tmp_path / "A.csv", factor=FACTOR, **columns)], tmp_path / "store", unit="shares")
    assert said(summary, "adjustment").startswith(word)
    stored = StoreFiles(tmp_path / "store").read("A", "day", [*PRICES, "volume", "factor"])[1]
    expected = TRUTH[[*PRICES, "volume"]].assign(factor=FACTOR)
    np.testing.assert_allclose(stored[list(expected)], expected, rtol=1e-6)


def test_a_factor_that_no_jump_bears_out_is_multiplied_and_questioned(tmp_path):
    summary = ingest([write(tmp_path / "A.csv", factor=FACTOR)], tmp_path / "store")
    assert "does not jump where it changes: --adjust none" in said(summary, "adjustment")


@pytest.mark.parametrize(("column", "scale"), [("pct_chg", 100), ("涨跌幅", 100), ("preclose", None)])
def test_a_close_that_its_source_contradicts_is_counted(tmp_path, column, scale):
    close = TRUTH["close"].where(TRUTH.index < 20, TRUTH["close"] / 2)  # a split that nobody adjusted for
    change = TRUTH["close"].pct_change()
    values = change * scale if scale else (close / (1 + change))
    prices = {name: TRUTH[name].where(TRUTH.index < 20, TRUTH[name] / 2) for name in PRICES}
    path = write(tmp_path / "A.csv", **prices, volume=TRUTH["volume"] * 2, **{column: values})
    summary = ingest([path], tmp_path / "store", unit="shares")
    (found,) = [finding for finding in summary.findings if "otherwise than the source's own change" in finding]
    assert f"on 1 bars, A {TRUTH['time'][20]}" in found
    stored = StoreFiles(tmp_path / "store").read("A", "day", ["change"])[1]["change"]
    np.testing.assert_allclose(stored[1:], change[1:], atol=1e-6)  # the source's own: `check` finds the jump, too


# Label of the bar


@pytest.mark.parametrize(("first", "moved", "word"), [("09:35", 5, "end"), ("09:30", 0, "start"), ("10:00", 0, "")])
def test_bars_are_stored_at_their_start_where_the_first_of_the_day_tells(tmp_path, first, moved, word):
    times = [
        day + pd.Timedelta(f"{first}:00") + step * pd.Timedelta("5min")
        for day in pd.bdate_range("2024-01-02", periods=5)
        for step in range(6)
    ]
    summary = ingest([write(tmp_path / "SH600000.csv", time=times[: len(TRUTH)])], tmp_path / "store")
    assert said(summary, "label of a bar").startswith(f"label of a bar: {f'its {word}' if word else 'not known'}")
    stored = StoreFiles(tmp_path / "store").calendar("5min")
    assert stored[0] == times[0] - pd.Timedelta(minutes=moved)
    given = ingest([tmp_path / "SH600000.csv"], tmp_path / "given", label="end")
    assert pd.Timestamp(given.first) == times[0] - pd.Timedelta(minutes=5)


def test_bars_of_minutes_and_weeks_have_days_beside_them(tmp_path):
    times = [
        day + pd.Timedelta("09:30:00") + step * pd.Timedelta("5min")
        for day in pd.bdate_range("2024-01-02", periods=5)
        for step in range(6)
    ]
    minutes = TRUTH.assign(time=times[: len(TRUTH)], amount=TRUTH["close"] * TRUTH["volume"])
    minutes.to_csv(tmp_path / "SH600000.csv", index=False)
    ingest([tmp_path / "SH600000.csv"], tmp_path / "store", unit="shares")
    store = StoreFiles(tmp_path / "store")
    assert store.freqs == ["5min", "day"]
    first, days = store.read("SH600000", "day", [*PRICES, "volume", "amount", "vwap", "change"])
    by_day = minutes.groupby(pd.DatetimeIndex(minutes["time"]).normalize())
    joins = {"open": "first", "high": "max", "low": "min", "close": "last", "volume": "sum", "amount": "sum"}
    expected = by_day.agg(joins)
    assert first == 0 and store.calendar("day").tolist() == expected.index.tolist()
    np.testing.assert_allclose(days[[*joins]].to_numpy(), expected.to_numpy(), rtol=1e-6)
    np.testing.assert_allclose(days["vwap"], expected["amount"] / expected["volume"], rtol=1e-5)
    np.testing.assert_allclose(days["change"].iloc[1:], expected["close"].pct_change().iloc[1:], atol=1e-6)

    weeks = TRUTH.assign(time=pd.date_range("2020-01-03", periods=len(TRUTH), freq="W-FRI"))
    weeks.to_csv(tmp_path / "AAPL.csv", index=False)
    summary = ingest([tmp_path / "AAPL.csv"], tmp_path / "weeks", unit="shares")
    store = StoreFiles(tmp_path / "weeks")
    assert summary.freq == "1week" and store.freqs == ["1week", "day"], "days that are weeks by name come last"
    tables = [store.read("AAPL", freq, [*PRICES, "volume"])[1] for freq in store.freqs]
    pd.testing.assert_frame_equal(*tables)


def test_what_a_few_appended_bars_do_not_tell_is_that_of_the_store(tmp_path):
    times = [
        day + pd.Timedelta("09:35:00") + step * pd.Timedelta("5min")
        for day in pd.bdate_range("2024-01-02", periods=5)
        for step in range(6)
    ]
    whole = TRUTH.assign(time=times[: len(TRUTH)])
    whole.to_csv(tmp_path / "SH600000.csv", index=False)
    ingest([tmp_path / "SH600000.csv"], tmp_path / "whole")
    whole.iloc[:25].to_csv(tmp_path / "SH600000.csv", index=False)
    ingest([tmp_path / "SH600000.csv"], tmp_path / "store")
    whole.iloc[26:27].to_csv(tmp_path / "SH600000.csv", index=False)  # one bar of 09:45, named by its end
    summary = ingest([tmp_path / "SH600000.csv"], tmp_path / "store", append=True)
    assert summary.freq == "5min" and pd.Timestamp(summary.last) == times[26] - pd.Timedelta("5min")
    whole.iloc[25:].to_csv(tmp_path / "SH600000.csv", index=False)
    ingest([tmp_path / "SH600000.csv"], tmp_path / "store", append=True)
    stores_found = [StoreFiles(tmp_path / name).read("SH600000", "5min", PRICES)[1] for name in ("store", "whole")]
    np.testing.assert_array_equal(*stores_found)


# Symbols


def test_a_bare_code_of_an_index_is_asked_about_or_told_by_its_price(tmp_path):
    with pytest.raises(ValueError, match=r"000300 is the index SH000300 or the share SZ000300; .* --symbols 000300=SH"):
        read_bars(write(tmp_path / "000300.csv"))
    assert read_bars(tmp_path / "000300.csv", symbols={"000300": "SH000300"}).bars["instrument"][0] == "SH000300"
    share = read_bars(write(tmp_path / "000905.csv"))
    assert share.bars["instrument"][0] == "SZ000905" and any("(median close" in text for text in share.findings)
    index = read_bars(write(tmp_path / "000905.csv", **{name: TRUTH[name] * 500 for name in PRICES}))
    assert index.bars["instrument"][0] == "SH000905"


def test_zeros_that_a_spreadsheet_has_lost_are_put_back_where_the_columns_are_chinese(tmp_path):
    names = {"time": "日期", "open": "开盘", "high": "最高", "low": "最低", "close": "收盘", "volume": "成交量"}
    table = TRUTH.drop(columns="amount").rename(columns=names).assign(股票代码=1)
    table.to_csv(tmp_path / "excel.csv", index=False, encoding="gbk")
    read = read_bars(tmp_path / "excel.csv")
    assert read.bars["instrument"][0] == "SZ000001"
    assert any("symbol 1 is taken for 000001" in finding for finding in read.findings)
    TRUTH.assign(symbol=7203).to_csv(tmp_path / "tokyo.csv", index=False)
    assert read_bars(tmp_path / "tokyo.csv").bars["instrument"][0] == "7203"


# Times


@pytest.mark.parametrize("form", ["%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%d-%m-%Y 15:00", "%Y/%m/%d", "%d-%b-%Y"])
def test_dates_of_all_customs_are_read_right_or_not_at_all(tmp_path, form):
    read = read_bars(write(tmp_path / "A.csv", time=TRUTH["time"].dt.strftime(form)))
    assert read.bars["time"].dt.normalize().to_list() == TRUTH["time"].to_list() and read.rejected.empty


def test_dates_that_may_be_read_in_two_ways_are_asked_about(tmp_path):
    few = TRUTH.iloc[:6]  # 2 to 9 January
    few.assign(time=few["time"].dt.strftime("%d/%m/%Y")).to_csv(tmp_path / "A.csv", index=False)
    with pytest.raises(ValueError, match=r"A.csv: time holds dates in which day and month cannot be told: .* --dates"):
        read_bars(tmp_path / "A.csv")
    assert read_bars(tmp_path / "A.csv", dates="day").bars["time"].to_list() == few["time"].to_list()
    both = TRUTH["time"].dt.strftime("%d/%m/%Y").where(TRUTH.index % 2 == 0, TRUTH["time"].dt.strftime("%m/%d/%Y"))
    with pytest.raises(ValueError, match="some with the day first, some with the month"):
        read_bars(write(tmp_path / "A.csv", time=both))
    with pytest.raises(ValueError, match="years of two digits"):
        read_bars(write(tmp_path / "A.csv", time=TRUTH["time"].dt.strftime("%d/%m/%y")))


def test_no_later_bar_decides_which_columns_an_earlier_forecast_sees(tmp_path):
    at = TRUTH["time"].iloc[19]
    whole = TRUTH.assign(amount=TRUTH["amount"].where(TRUTH.index < 25))
    whole.to_csv(tmp_path / "A.csv", index=False)
    seen = read_instrument(str(tmp_path / "A.csv"), until=at).bars.loc[:at]
    TRUTH.iloc[:20].to_csv(tmp_path / "A.csv", index=False)
    pd.testing.assert_frame_equal(seen, read_instrument(str(tmp_path / "A.csv")).bars, check_freq=False)


def test_hours_that_a_clock_shows_twice_are_kept_in_utc(tmp_path):
    times = pd.date_range("2024-10-26 22:00", periods=len(TRUTH), freq="30min", tz="UTC").tz_convert("Europe/Berlin")
    TRUTH.assign(time=times).to_parquet(tmp_path / "A.parquet")
    read = read_bars(tmp_path / "A.parquet")
    assert len(read.bars) == len(TRUTH) and read.rejected.empty and read.zone == "UTC"
    assert any("shows some times twice" in finding for finding in read.findings)
    kept = read_bars(tmp_path / "A.parquet", tz="Asia/Shanghai")
    assert kept.bars["time"][0] == pd.Timestamp("2024-10-27 06:00")


def test_a_bar_that_stands_again_is_rejected_by_file_and_line(tmp_path):
    again = TRUTH.iloc[[4, 7]]
    pd.concat([TRUTH, again]).to_csv(tmp_path / "A.csv", index=False)
    write(tmp_path / "B.csv", symbol="A", close=TRUTH["close"] * 1.001)
    summary = ingest([tmp_path / "A.csv", tmp_path / "B.csv"], tmp_path / "store")
    rejected = pd.read_csv(tmp_path / "store" / "rejected.csv")
    assert summary.bars == len(TRUTH) and summary.rejected == len(rejected) == 2 + len(TRUTH)
    assert rejected["line"].tolist()[:2] == [6, 9]
    assert (rejected["file"] == "A.csv").all() and rejected["reason"].str.contains("stands again").all()


# Benchmark, base


def test_a_benchmark_is_in_the_store_and_not_in_all(tmp_path):
    write(tmp_path / "AAPL.csv")
    write(tmp_path / "spx.csv", symbol="^GSPC")
    ingest([tmp_path / "AAPL.csv"], tmp_path / "store", benchmark=str(tmp_path / "spx.csv"))
    store = StoreFiles(tmp_path / "store")
    assert store.instruments() == ["AAPL", "^GSPC"]
    assert store.universe("all")["instrument"].tolist() == ["AAPL"]
    assert json.loads((tmp_path / "store" / "ingest.json").read_text())["benchmark"] == "^GSPC"
    with pytest.raises(ValueError, match="--benchmark SPY: neither a file nor an instrument"):
        ingest([tmp_path / "AAPL.csv"], tmp_path / "other", benchmark="SPY")


def test_new_bars_of_another_base_are_brought_to_the_store_s_if_asked(tmp_path):
    ingest([write(tmp_path / "A.csv")], tmp_path / "whole")
    TRUTH.iloc[:20].to_csv(tmp_path / "A.csv", index=False)
    ingest([tmp_path / "A.csv"], tmp_path / "store")
    old = {path: path.read_bytes()[4:] for path in (tmp_path / "store").rglob("*.bin")}
    halved = {name: TRUTH[name] * 0.5 for name in PRICES} | {"volume": TRUTH["volume"] * 2}
    TRUTH.assign(**halved).iloc[10:].to_csv(tmp_path / "A.csv", index=False)
    with pytest.raises(ValueError, match="history has changed.*--rebase"):
        ingest([tmp_path / "A.csv"], tmp_path / "store", append=True)
    summary = ingest([tmp_path / "A.csv"], tmp_path / "store", append=True, rebase=True)
    assert "re-based: prices of 1 instruments to those of the store, A × 2 first" in summary.findings
    for path, content in old.items():
        assert path.read_bytes()[4:].startswith(content), "old bars are as they were"
    new, whole = (StoreFiles(tmp_path / name).read("A", "day", [*PRICES, "volume"])[1] for name in ("store", "whole"))
    np.testing.assert_allclose(new, whole, rtol=1e-6)
    TRUTH.assign(**halved | {"close": TRUTH["close"] * np.linspace(0.5, 0.51, len(TRUTH))}).iloc[10:].to_csv(
        tmp_path / "A.csv", index=False
    )
    with pytest.raises(ValueError, match="no constant factor|outside low"):
        ingest([tmp_path / "A.csv"], tmp_path / "store", append=True, rebase=True)


def test_bars_with_and_without_a_factor_are_not_mixed(tmp_path):
    ingest([write(tmp_path / "A.csv", factor=1.0)], tmp_path / "store")
    with pytest.raises(ValueError, match="only the store has a factor"):
        ingest([write(tmp_path / "A.csv")], tmp_path / "store", append=True)


def test_members_of_a_universe_may_be_written_with_commas_a_header_and_an_open_end(tmp_path):
    write(tmp_path / "SH600000.csv")
    (tmp_path / "members.csv").write_text("code,in,out\n600000.SH,2024-01-03,2024-01-10\nsh.600000,2024-01-15,\n")
    ingest([tmp_path / "SH600000.csv"], tmp_path / "store", universes={"mine": tmp_path / "members.csv"})
    last = str(TRUTH["time"].iloc[-1].date())
    lines = (tmp_path / "store" / "instruments" / "mine.txt").read_text().splitlines()
    assert lines == ["SH600000\t2024-01-03\t2024-01-10", f"SH600000\t2024-01-15\t{last}"]
    for text, message in (
        ("600000.SH,2024-02-01,2024-01-01\n", "line 1 is no symbol"),
        ("code,in,out\n", "no members"),
    ):
        (tmp_path / "members.csv").write_text(text)
        with pytest.raises(ValueError, match=rf"--universe mine: .*members.csv: {message}"):
            ingest([tmp_path / "SH600000.csv"], tmp_path / "other", universes={"mine": tmp_path / "members.csv"})
        assert not (tmp_path / "other").exists()


# Many files


def test_many_files_are_read_by_processes_into_the_same_store(tmp_path, monkeypatch):
    files = [write(tmp_path / f"SH60000{number}.csv", close=TRUTH["close"] + number / 1000) for number in range(5)]
    ingest(files, tmp_path / "one")
    monkeypatch.setattr(stores, "MANY_FILES", 2)
    ingest(files, tmp_path / "several", progress=True)
    one, several = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("one", "several")
    )
    assert one == several
    (tmp_path / "SH600003.csv").write_bytes(b"neither\nbars\n")
    with pytest.raises(ValueError, match=r"SH600003.csv: its first line names no column of a bar"):
        ingest(files, tmp_path / "none")
    assert not (tmp_path / "none").exists()


# What is accepted comes back


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    closes=st.lists(st.floats(1e-12, 1e12), min_size=2, max_size=12),
    volumes=st.lists(st.floats(0, 1e15), min_size=12, max_size=12),
    kind=st.sampled_from(["csv", "parquet"]),
)
def test_what_was_accepted_comes_back_from_qlib_as_the_float32_of_the_number(tmp_path_factory, closes, volumes, kind):
    folder = tmp_path_factory.mktemp("numbers")
    days = pd.bdate_range("2024-01-01", periods=len(closes))
    frame = pd.DataFrame({"date": days, "close": closes, "volume": volumes[: len(closes)]})
    frame["open"] = frame["close"]
    frame["high"], frame["low"] = frame["close"] * 1.5, frame["close"] * 0.5
    frame.to_csv(folder / "A.csv", index=False) if kind == "csv" else frame.to_parquet(folder / "A.parquet")
    summary = ingest([folder / f"A.{kind}"], folder / "store")
    assert summary.bars + summary.rejected == len(frame)
    use_store(folder / "store", "day")
    found = D.features(["A"], ["$open", "$high", "$low", "$close", "$volume"]).droplevel("instrument")
    kept = frame.set_index("date").loc[found.index, [*PRICES, "volume"]]
    np.testing.assert_array_equal(found.to_numpy(), kept.to_numpy(np.float32))
