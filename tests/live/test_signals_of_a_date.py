"""`kronos-qlib signals` on a small market: the backtest's scores, the latest complete bar, faults, Qlib's orders."""

import copy
import json
import logging
import resource
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from qlib.backtest import backtest
from qlib.data import D
from qlib.model.trainer import task_train
from qlib.workflow import R
from tiny import HORIZON, LOOKBACK, MODEL, SEGMENTS, TOKENIZER, use_market

from kronos_qlib import KLineDataset, KLineHandler
from kronos_qlib.cli import main
from kronos_qlib.data.demo_market import write_demo_market
from kronos_qlib.live.ledger import Ledger
from kronos_qlib.live.orders import Holdings, make_orders, read_holdings
from kronos_qlib.live.run import LiveRun, open_run
from kronos_qlib.live.signal_set import SignalSet
from kronos_qlib.live.signals import StoreLacksBars, _load_lookbacks, latest_complete, make_signals

EXAMPLES = Path(__file__).parents[2] / "examples"
DATE = pd.Timestamp("2018-07-18")
STRATEGY = {
    "class": "TopkDropoutStrategy",
    "module_path": "qlib.contrib.strategy",
    "kwargs": {"signal": "<PRED>", "topk": 3, "n_drop": 1, "hold_thresh": 2},
}
EXCHANGE = {"freq": "day", "deal_price": "open", "limit_threshold": 0.095, "open_cost": 0.001, "close_cost": 0.002}
BACKTEST = {
    "start_time": "2018-06-19",
    "end_time": "2018-07-30",
    "account": 1_000_000,
    "benchmark": "DEMOINDEX",
    "exchange_kwargs": EXCHANGE | {"min_cost": 5},
}
RECORDS = [
    {"class": "SignalRecord", "module_path": "qlib.workflow.record_temp"},
    {
        "class": "PortAnaRecord",
        "module_path": "qlib.workflow.record_temp",
        "kwargs": {"config": {"strategy": STRATEGY, "backtest": BACKTEST}},
    },
]


def kronos_task() -> dict:
    networks = {"tokenizer": TOKENIZER, "model": MODEL, "device": "cpu", "dtype": "float32", "seed": 1}
    model = networks | {"forecast": {"sample_count": 2, "temperature": 1.0}}
    handler = {"class": "KLineHandler", "module_path": "kronos_qlib", "kwargs": {"instruments": "demo"}}
    dataset = {"handler": handler, "segments": SEGMENTS, "lookback": LOOKBACK, "horizon": HORIZON}
    return {
        "model": {"class": "KronosModel", "module_path": "kronos_qlib", "kwargs": model},
        "dataset": {"class": "KLineDataset", "module_path": "kronos_qlib", "kwargs": dataset},
        "record": RECORDS,
    }


def lightgbm_task() -> dict:
    """LightGBM on a few columns of Qlib's own handler, whose label is normalised by a processor."""
    loader = {
        "class": "QlibDataLoader",
        "kwargs": {
            "config": {
                "feature": (["$close/Ref($close,1)-1", "Mean($close,5)/$close", "Std($close,9)/$close"], list("abc")),
                "label": (["Ref($close,-2)/Ref($close,-1)-1"], ["LABEL0"]),
            }
        },
    }
    processors = [{"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature", "clip_outlier": True}}]
    processors[0]["kwargs"] |= {"fit_start_time": SEGMENTS["train"][0], "fit_end_time": SEGMENTS["train"][1]}
    handler = {
        "class": "DataHandlerLP",
        "module_path": "qlib.data.dataset.handler",
        "kwargs": {
            "instruments": "demo",
            "data_loader": loader,
            "infer_processors": processors,
            "learn_processors": [{"class": "DropnaLabel"}],
        },
    }
    return {
        "model": {
            "class": "LGBModel",
            "module_path": "qlib.contrib.model.gbdt",
            "kwargs": {"num_threads": 1, "min_data_in_leaf": 5, "verbosity": -1},
        },
        "dataset": {
            "class": "DatasetH",
            "module_path": "qlib.data.dataset",
            "kwargs": {"handler": handler, "segments": SEGMENTS},
        },
        "record": RECORDS,
    }


@dataclass(frozen=True)
class Place:
    """A folder with mlflow.db, two finished runs in it, and a store of the bars."""

    folder: Path
    store: Path

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    def open(self, name: str, store: Path | None = None) -> LiveRun:
        found = open_run(name, self.uri, store or self.store)
        logging.getLogger("qlib").setLevel(logging.INFO)
        return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, database: Path) -> Place:
    folder = tmp_path_factory.mktemp("runs")
    shutil.copy(database, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        store = write_demo_market(folder / "market", instruments=8, days=160, seed=3)
        use_market(store)
        for name, task in (("kronos", kronos_task()), ("lightgbm", lightgbm_task())):
            task_train(copy.deepcopy(task), experiment_name=name)
    return Place(folder, store)


@pytest.fixture
def place(runs: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The runs, with a copy of the store that a test may change, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs.store, tmp_path / "store")
    return Place(runs.folder, tmp_path / "store")


def recorded(place: Place, name: str) -> pd.Series:
    return place.open(name).found.read("pred.pkl").xs(DATE, level="datetime")


def bars_file(store: Path, instrument: str, field: str) -> Path:
    return store / "features" / instrument.lower() / f"{field}.day.bin"


def change_bars(store: Path, instrument: str, field: str, first: pd.Timestamp, values: float | None) -> None:
    """Set a field from a session on; None cuts the file there."""
    path, calendar = bars_file(store, instrument, field), (store / "calendars/day.txt").read_text().split()
    content = np.fromfile(path, "<f4")
    row = calendar.index(str(first.date())) - int(content[0]) + 1
    if values is None:
        content = content[:row]
    else:
        content[row:] *= values
    content.tofile(path)


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


def signals_of(place: Place, scores: dict[str, float]) -> tuple[LiveRun, SignalSet]:
    run = place.open("kronos")
    found = make_signals(run, DATE)
    table = pd.DataFrame({"score": pd.Series(scores)}).rename_axis("instrument").sort_index()
    table["rank"] = table["score"].rank(ascending=False).astype(int)
    return run, SignalSet(**vars(found) | {"table": table})


def test_orders_are_those_that_qlib_executes_on_the_same_day(place):
    """Qlib's own backtest of one step, at the close, from the same account, with the scores of the day before."""
    names = ["DEMO0000", "DEMO0001", "DEMO0002", "DEMO0003", "DEMO0004"]
    run, signals = signals_of(place, dict(zip(names, [5.0, 4.0, 3.0, 2.0, 1.0])))
    bars = D.features(names, ["$factor", "$close", "$change"], DATE, DATE).droplevel("datetime")
    assert (bars["$change"].abs() < 0.095).all()
    holdings = Holdings(300_000.0, {"DEMO0002": 1000.0, "DEMO0003": 700.0, "DEMO0004": 500.0}, {"DEMO0003": 1})
    orders = make_orders(run, signals, holdings)

    before = D.calendar(end_time=DATE)[-2]
    index = pd.MultiIndex.from_product([[before], names], names=["datetime", "instrument"])
    strategy = copy.deepcopy(STRATEGY)
    strategy["kwargs"]["signal"] = pd.Series(signals.table["score"].to_numpy(), index)
    strategy["kwargs"]["hold_thresh"] = 0
    account = {"cash": holdings.cash}
    for name, held in holdings.shares.items():
        account[name] = {"amount": held / bars.loc[name, "$factor"], "price": bars.loc[name, "$close"]}
    executor = {"time_per_step": "day", "generate_portfolio_metrics": True}
    _, indicators = backtest(
        DATE,
        DATE,
        strategy,
        {"class": "SimulatorExecutor", "module_path": "qlib.backtest.executor", "kwargs": executor},
        benchmark="DEMOINDEX",
        account=account,
        exchange_kwargs=BACKTEST["exchange_kwargs"] | {"deal_price": "close"},
    )
    done = indicators["1day"][1].order_indicator_his[DATE].data
    amounts = dict(zip(done["deal_amount"].index.tolist(), done["deal_amount"].data))
    costs = dict(zip(done["trade_cost"].index.tolist(), done["trade_cost"].data))
    found = orders[orders["side"] != "none"].set_index("instrument")
    assert set(found.index) == set(amounts) and {"buy", "sell"} == set(found["side"])
    for name, row in found.iterrows():
        sign = 1 if row["side"] == "buy" else -1
        assert row["shares"] == pytest.approx(sign * amounts[name] * bars.loc[name, "$factor"])
        assert row["expected_cost"] == pytest.approx(costs[name])
        assert row["reference_price"] == pytest.approx(bars.loc[name, "$close"] / bars.loc[name, "$factor"], rel=1e-5)
        assert row["shares"] % 100 == pytest.approx(0, abs=1e-3) or row["side"] == "sell"


def test_what_is_at_its_limit_or_suspended_is_said_and_not_traded(place):
    names = ["DEMO0000", "DEMO0001", "DEMO0002", "DEMO0003", "DEMO0004"]
    change_bars(place.store, "DEMO0000", "change", DATE, 0.0)
    path = bars_file(place.store, "DEMO0000", "change")
    content = np.fromfile(path, "<f4")
    calendar = (place.store / "calendars/day.txt").read_text().split()
    content[1 + calendar.index(str(DATE.date())) - int(content[0])] = 0.0999
    content.tofile(path)
    for field in ("open", "close"):
        path = bars_file(place.store, "DEMO0004", field)
        content = np.fromfile(path, "<f4")
        content[1 + calendar.index(str(DATE.date())) - int(content[0])] = np.nan
        content.tofile(path)
    run, signals = signals_of(place, dict(zip(names[:4], [5.0, 4.0, 3.0, 2.0])))
    orders = make_orders(run, signals, Holdings(300_000.0, {"DEMO0004": 500.0}, {})).set_index("instrument")
    assert orders.loc["DEMO0000", "side"] == "none"
    assert orders.loc["DEMO0000", "why"] == "rank 1 of 4, not bought: limit up on 2018-07-18"
    assert orders.loc["DEMO0004", "why"] == "no score, held, suspended on 2018-07-18"
    assert orders.loc["DEMO0001", "side"] == "buy" and orders.loc["DEMO0001", "why"] == "rank 2 of 4, not held"


def test_what_was_bought_too_lately_is_kept(place):
    names = ["DEMO0000", "DEMO0001", "DEMO0002", "DEMO0003"]
    run, signals = signals_of(place, dict(zip(names, [4.0, 3.0, 2.0, 1.0])))
    held = {"DEMO0001": 100.0, "DEMO0002": 100.0, "DEMO0003": 100.0}
    for bars_held, side in ((1, set()), (2, {"DEMO0003"})):
        orders = make_orders(run, signals, Holdings(1e6, held, {"DEMO0003": bars_held}))
        assert set(orders.loc[orders["side"] == "sell", "instrument"]) == side


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "has no column instrument"),
        ("instrument,shares\nSH1,5\n", "has no row CASH"),
        ("instrument,shares\nCASH,5\nSH1,many\n", "line 3: shares of SH1 is 'many'"),
        ("instrument,shares\nCASH,5\nSH1,-1\n", "line 3: shares of SH1"),
        ("instrument,shares\nCASH,5\nSH1,1\nsh1,2\n", "SH1 is there twice"),
        ("instrument,shares,bars_held\nCASH,5,\nSH1,1,x\n", "line 3: bars_held of SH1"),
        ("", "no CSV file of holdings"),
    ],
)
def test_wrong_holdings_are_named_by_their_line(tmp_path, text, message):
    (tmp_path / "account.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_holdings(tmp_path / "account.csv")


def test_a_holding_without_any_price_is_named(place):
    run, signals = signals_of(place, {"DEMO0000": 1.0, "DEMO0001": 2.0})
    with pytest.raises(ValueError, match="holdings: SH999999 has no bar in the 60 sessions up to 2018-07-18"):
        make_orders(run, signals, Holdings(1e6, {"SH999999": 100.0}, {}))


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


@pytest.mark.parametrize("records", ["dotted", "several passes", "without kwargs", "none"])
def test_the_portfolio_is_that_of_any_of_qlibs_records_of_one(place, records):
    run, kwargs = place.open("kronos"), RECORDS[1]["kwargs"]
    record = {
        "dotted": {"class": "qlib.workflow.record_temp.PortAnaRecord", "kwargs": kwargs},
        "several passes": {"class": "MultiPassPortAnaRecord", "kwargs": kwargs | {"pass_num": 2}},
        "without kwargs": {"class": "PortAnaRecord"},
        "none": {"class": "SigAnaRecord"},
    }[records]
    run.task["record"] = [RECORDS[0], record]
    if records == "none":
        assert run.portfolio is None
    else:
        topk = 50 if records == "without kwargs" else 3  # Qlib's default
        assert run.portfolio["strategy"]["kwargs"]["topk"] == topk
        assert run.portfolio["executor"]["kwargs"]["time_per_step"] == "day"


def with_strategy(run: LiveRun, strategy: dict) -> LiveRun:
    config = {"strategy": strategy, "backtest": BACKTEST}
    run.task["record"] = [{"class": "PortAnaRecord", "kwargs": {"config": config}}]
    return run


@pytest.mark.parametrize(
    "strategy",
    [
        {"class": "TWAPStrategy", "module_path": "qlib.contrib.strategy", "kwargs": {}},
        {"class": "NoSuch", "module_path": "qlib.contrib.strategy", "kwargs": {}},
        STRATEGY | {"kwargs": {"signal": "<PRED>"}},
    ],
)
def test_a_strategy_that_cannot_decide_is_one_line(place, strategy):
    run, signals = signals_of(place, {"DEMO0000": 1.0, "DEMO0001": 2.0})
    with pytest.raises(ValueError, match=f"the strategy {strategy['class']} cannot decide on signals"):
        make_orders(with_strategy(run, strategy), signals, Holdings(1e6, {}, {}))


def test_some_instruments_without_a_factor_are_named_as_shares_cannot_be_counted(place):
    path = bars_file(place.store, "DEMO0005", "factor")
    content, calendar = np.fromfile(path, "<f4"), (place.store / "calendars/day.txt").read_text().split()
    content[1 + calendar.index(str(DATE.date())) - int(content[0])] = np.nan
    content.tofile(path)
    run, signals = signals_of(place, {f"DEMO000{number}": float(number) for number in range(6)})
    with pytest.raises(ValueError, match="1 instruments have no factor on 2018-07-18, DEMO0005"):
        make_orders(run, signals, Holdings(1e6, {"DEMO0001": 100.0}, {}))


def test_orders_on_a_bar_within_the_day_see_no_bar_after_it(place, tmp_path):
    """A strategy of days on a signal of 13:00: prices, limits and lots are those of that bar."""
    store, found = write_demo_market(tmp_path / "hours", instruments=5, days=30, freq="60min"), []
    bar = pd.Timestamp("2018-02-01 13:00")
    for later in (1.0, 1.5):
        for folder in (store / "features").iterdir():
            for freq, first in (("60min", bar + pd.Timedelta(hours=1)), ("day", bar.normalize())):
                path, calendar = folder / f"close.{freq}.bin", store / "calendars" / f"{freq}.txt"
                sessions = pd.DatetimeIndex(calendar.read_text().splitlines())
                content = np.fromfile(path, "<f4")
                content[1 + sessions.get_loc(first) - int(content[0]) :] *= later
                content.tofile(path)
        use_market({"60min": str(store), "day": str(store)})
        names = ["DEMO0000", "DEMO0001", "DEMO0002", "DEMO0003"]
        table = pd.DataFrame({"score": [4.0, 3.0, 2.0, 1.0], "rank": [1, 2, 3, 4]}, pd.Index(names, name="instrument"))
        run, signals = signals_of(place, dict(zip(names, table["score"])))
        use_market({"60min": str(store), "day": str(store)})
        signals = SignalSet(**vars(signals) | {"table": table, "date": bar, "freq": "60min"})
        found.append(make_orders(run, signals, Holdings(1e6, {"DEMO0003": 100.0}, {})))
    pd.testing.assert_frame_equal(*found)
    bars = D.features(["DEMO0000"], ["$close/$factor"], bar, bar, freq="60min")
    price = found[0].set_index("instrument").loc["DEMO0000", "reference_price"]
    assert price == pytest.approx(bars.iloc[0, 0], rel=1e-5)


def test_a_column_with_a_memory_is_computed_from_the_whole_history(place):
    place.open("kronos")
    column = {"class": "SmoothedRange", "module_path": str(EXAMPLES / "range_column.py"), "kwargs": {"half_life": 30}}
    options = {"lookback": LOOKBACK, "horizon": HORIZON, "segments": SEGMENTS | {"test": [DATE, DATE]}}
    datasets = [KLineDataset(KLineHandler("demo", columns={"range": column}), **options) for _ in range(2)]
    _load_lookbacks(datasets[0], DATE, pd.DatetimeIndex(D.calendar()))
    ours, whole = (dataset.score_windows("test") for dataset in datasets)
    rows = np.arange(len(whole))
    assert len(ours) == len(whole) and np.array_equal(ours.values(rows), whole.values(rows))
