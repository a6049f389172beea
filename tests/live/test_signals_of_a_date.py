"""`kronos-qlib signals` on a small market: the backtest's scores, the latest complete bar, faults."""

import json
import resource
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from finished_runs import DATE, Place, bars_file, change_bars
from qlib.data import D
from qlib.workflow import R
from tiny import HORIZON, LOOKBACK, SEGMENTS

from kronos_qlib import KLineDataset, KLineHandler
from kronos_qlib.cli import main
from kronos_qlib.live.ledger import Ledger
from kronos_qlib.live.signals import StoreLacksBars, _load_lookbacks, latest_complete, make_signals

EXAMPLES = Path(__file__).parents[2] / "examples"


def recorded(place: Place, name: str) -> pd.Series:
    return place.open(name).found.read("pred.pkl").xs(DATE, level="datetime")


@pytest.mark.parametrize("name", ["kronos", "lightgbm"])
def test_signals_of_a_date_are_the_scores_of_the_backtest(place, capsys, name):
    found = make_signals(place.open(name), DATE)
    expected = recorded(place, name)
    pd.testing.assert_series_equal(found.table["score"], expected.rename("score"), check_exact=True)
    assert "are those of the run's test segment, to the last bit" in capsys.readouterr().err
    best = found.table["rank"].idxmin()
    assert found.table.loc[best, "score"] == found.table["score"].max() and found.table["rank"].min() == 1


def test_kronos_signals_have_quantiles_of_the_return_and_the_settings_of_the_run(place):
    run = place.open("kronos")
    found = make_signals(run, DATE)
    model, dataset = run.load_model(), run.load_dataset()
    dataset.config(segments={"test": (DATE, DATE)})
    forecast = model.forecast(dataset).droplevel("datetime")
    expected = forecast[f"q90_{HORIZON}"] / forecast["last_close"] - 1
    pd.testing.assert_series_equal(found.table["q90"], expected, check_names=False)
    assert found.horizon == HORIZON and found.settings["portfolio"]["strategy"]["kwargs"]["topk"] == 3
    scores, labels = (run.found.read(name) for name in ("pred.pkl", "label.pkl"))
    both = pd.DataFrame({"score": scores, "label": labels}).dropna()
    daily = both.groupby("datetime").apply(lambda day: day["score"].corr(day["label"], method="spearman"))
    assert found.promised["rank_ic"] == pytest.approx(daily.mean())
    assert found.promised["days"] == len(daily.dropna())


@pytest.mark.parametrize("name", ["kronos", "lightgbm"])
def test_later_bars_change_no_signal(place, runs, name):
    before = make_signals(place.open(name), DATE)
    for folder in (place.store / "features").iterdir():
        for field in ("open", "high", "low", "close"):
            change_bars(place.store, folder.name, field, DATE + pd.Timedelta(days=1), 3.0)
    after = make_signals(place.open(name), DATE)
    pd.testing.assert_frame_equal(before.table, after.table, check_exact=True)
    assert before.data_digest == after.data_digest
    for folder in (place.store / "features").iterdir():
        change_bars(place.store, folder.name, "close", DATE - pd.Timedelta(days=5), 1.001)
    assert make_signals(place.open(name), DATE).data_digest != before.data_digest


def test_an_instrument_that_was_suspended_for_long_has_its_signal_still(place):
    expected = make_signals(place.open("kronos"), DATE).table
    name = expected.index[0]
    calendar = pd.DatetimeIndex((place.store / "calendars/day.txt").read_text().split())
    path = bars_file(place.store, name, "volume")
    content, end = np.fromfile(path, "<f4"), calendar.get_loc(DATE)
    content[1 + end - 60 - int(content[0]) : 1 + end - 2 - int(content[0])] = 0  # far more than is read at first
    content.tofile(path)
    run = place.open("kronos")
    found = make_signals(run, DATE).table
    dataset = run.load_dataset()
    dataset.config(segments={"test": (DATE, DATE)})
    scores = run.load_model().predict(dataset).droplevel("datetime")
    pd.testing.assert_series_equal(found["score"], scores, check_exact=True)
    assert name in found.index and found.loc[name, "score"] != expected.loc[name, "score"]


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ("2018-08-10 15:00+08:00", "2018-08-10"),
        ("2018-08-10 07:00+00:00", "2018-08-10"),
        ("2018-08-10 14:59+08:00", "2018-08-09"),
        ("2018-08-10 02:59-04:00", "2018-08-09"),
        ("2018-08-13 14:59+08:00", "2018-08-10"),
        ("2018-08-14 14:59+08:00", "2018-08-13"),
    ],
)
def test_a_bar_counts_when_the_exchange_has_closed(place, now, expected):
    run = place.open("kronos")
    assert latest_complete(run, run.load_dataset(), pd.Timestamp(now)) == pd.Timestamp(expected)


def test_a_store_that_lacks_a_complete_bar_is_refused(place):
    run = place.open("kronos")
    with pytest.raises(StoreLacksBars, match="ends on 2018-08-13; the bar of 2018-08-14 is complete since"):
        latest_complete(run, run.load_dataset(), pd.Timestamp("2018-08-14 15:00+08:00"))


def arguments(place: Place, *more: str) -> list[str]:
    return ["signals", "kronos", "--uri", place.uri, "--store", str(place.store), *more]


def test_the_command_writes_signals_orders_and_json(place, capsys):
    Path("account.csv").write_text("instrument,shares\nCASH,500000\n")
    more = ["--date", str(DATE.date()), "--out", "signals.csv", "--holdings", "account.csv", "--no-ledger"]
    assert main(arguments(place, *more)) == 0
    printed = capsys.readouterr().out
    table = pd.read_csv("signals.csv").set_index("instrument")
    pd.testing.assert_series_equal(table["score"], recorded(place, "kronos").rename("score"))
    orders = pd.read_csv("signals_orders.csv")
    assert set(orders["side"]) <= {"buy", "none"} and (orders["side"] == "buy").sum() >= 3
    assert "Orders (" in printed and f"kronos {place.open('kronos').found.run_id[:8]}, 2018-07-18" in printed
    assert main(arguments(place, *more, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["instrument"] for row in found["signals"]] == list(table.index)
    assert len(found["orders"]) == len(orders)


def test_members_without_the_bar_are_named_and_nothing_is_written(place, capsys):
    for field in ("open", "high", "low", "close", "volume", "factor", "change"):
        change_bars(place.store, "DEMO0003", field, DATE, None)
    more = ["--date", str(DATE.date()), "--out", "signals.csv", "--ledger", "sqlite:///ledger.db"]
    assert main(arguments(place, *more)) == 3
    error = capsys.readouterr().err
    assert "1 of " in error and "have no bar of 2018-07-18" in error and "DEMO0003" in error
    assert not Path("signals.csv").exists()
    assert main(arguments(place, *more, "--allow-missing", "1")) == 0
    assert "DEMO0003" not in pd.read_csv("signals.csv")["instrument"].to_list()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--date", "soon"], "--date 'soon' is no date"),
        (["--date", "2018-07-21"], "2018-07-21 is no session of the store"),
        (["--date", "2018-08-13", "--now", "2018-08-13T14:59+08:00"], "is complete at 2018-08-13 07:00 UTC only"),
        (["--out", "signals.txt"], "should end in .csv or .parquet"),
        (["--now", "2018-08-10 18:00"], "has no time zone"),
        (["--store", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(place, capsys, change, message):
    assert main([*arguments(place, "--no-ledger"), *change]) == (3 if "complete" in message else 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_universe_that_changed_and_packages_that_did_are_said(place, capsys):
    run = place.open("kronos")
    path = place.store / "instruments" / "demo.txt"
    member = recorded(place, "kronos").index[0]
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith(member)))
    run.versions["torch"] = "1.0"
    make_signals(place.open("kronos"), DATE)
    assert (
        f"1 instruments that it scored on 2018-07-18 are no members of that date now: {member}"
        in capsys.readouterr().err
    )
    make_signals(run, DATE)
    assert "the run was made with torch 1.0" in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_is_one_line_with_the_versions(place, capsys, monkeypatch):
    run = place.open("kronos")
    monkeypatch.chdir(place.folder)
    with R.start(experiment_name="broken"):
        R.save_objects(task=run.recorder.load_object("task"), dataset=run.recorder.load_object("dataset"))
        broken = place.folder / "params.pkl"
        broken.write_bytes(b"\x80\x04\x8c\x07no.such\x94\x8c\x01A\x94\x93\x94.")
        R.get_recorder().save_objects(local_path=str(broken))
    arguments = ["signals", "broken", "--uri", place.uri, "--store", str(place.store), "--date", "2018-07-18"]
    assert main([*arguments, "--no-ledger"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "params.pkl of recorder" in error and "cannot be loaded (LoadObjectError: No module named 'no'" in error


def test_a_full_disk_is_one_line_and_leaves_no_part_of_a_file(place, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        assert main(arguments(place, "--date", "2018-07-18", "--out", "out/signals.csv", "--no-ledger")) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("kronos-qlib signals: error: ") and "is that disk full?" in error
    assert not Path("out").exists()


def test_a_ledger_that_is_away_is_said_before_anything_is_scored(place, capsys):
    more = ["--date", "2018-07-18", "--out", "signals.csv", "--ledger", "sqlite:////no/such/folder/ledger.db"]
    assert main(arguments(place, *more)) == 2
    error = capsys.readouterr().err
    assert "ledger" in error and error.count("\n") == 1 and not Path("signals.csv").exists()


def test_the_clock_of_the_machine_decides_nothing(place, monkeypatch):
    run, found = place.open("kronos"), []
    for zone in ("UTC", "America/Los_Angeles", "Asia/Shanghai"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        found.append(latest_complete(run, run.load_dataset(), pd.Timestamp("2018-08-10 06:59+00:00")))
    monkeypatch.delenv("TZ")
    time.tzset()
    assert found == [pd.Timestamp("2018-08-09")] * 3


def test_a_ledger_that_is_locked_leaves_no_file(place, capsys, monkeypatch):
    monkeypatch.setattr("kronos_qlib.live.ledger.SECONDS_TO_WAIT", 0.2)
    url = f"sqlite:///{Path.cwd() / 'ledger.db'}"
    Ledger(url)
    with closing(sqlite3.connect("ledger.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert main(arguments(place, "--date", "2018-07-18", "--out", "out/signals.csv", "--ledger", url)) == 2
    assert "locked" in capsys.readouterr().err.splitlines()[-1]
    assert not list(Path("out").iterdir())
    assert main(arguments(place, "--date", "2018-07-18", "--out", "out/signals.csv", "--ledger", url, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["ledger"] | {"ledger": ""} == {
        "ledger": "",
        "set": 1,
        "version": 1,
        "new": True,
        "live": False,
    }


@pytest.mark.slow
def test_json_is_all_that_is_printed_whatever_a_model_prints_of_its_neighbours(place):
    """In a process of its own, where qlib.contrib.model is imported by the pickle."""
    line = ["signals", "lightgbm", "--uri", place.uri, "--store", str(place.store), "--date", "2018-07-18", "--json"]
    ran = subprocess.run([sys.executable, "-m", "kronos_qlib", *line, "--no-ledger"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["experiment"] == "lightgbm" and "CatBoost" in ran.stderr


def test_a_column_with_a_memory_is_computed_from_the_whole_history(place):
    place.open("kronos")
    column = {"class": "SmoothedRange", "module_path": str(EXAMPLES / "range_column.py"), "kwargs": {"half_life": 30}}
    options = {"lookback": LOOKBACK, "horizon": HORIZON, "segments": SEGMENTS | {"test": [DATE, DATE]}}
    datasets = [KLineDataset(KLineHandler("demo", columns={"range": column}), **options) for _ in range(2)]
    _load_lookbacks(datasets[0], DATE, pd.DatetimeIndex(D.calendar()))
    ours, whole = (dataset.score_windows("test") for dataset in datasets)
    rows = np.arange(len(whole))
    assert len(ours) == len(whole) and np.array_equal(ours.values(rows), whole.values(rows))
