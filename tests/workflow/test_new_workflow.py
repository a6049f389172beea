"""`kronos-qlib workflow` writes files that run, cut by the store's own dates, for its own market."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kronos_qlib.cli import main
from kronos_qlib.ingest.store import ingest
from kronos_qlib.workflow.check import WorkflowCheck
from kronos_qlib.workflow.new_workflow import EXAMPLES, copy_examples, example_names
from kronos_qlib.workflow.workflow_file import read_workflow

DAYS = pd.bdate_range("2022-01-03", periods=300)


def make_store(folder: Path, names: list[str], times: pd.DatetimeIndex, **options) -> Path:
    tables = []
    for number, name in enumerate(names):
        random = np.random.default_rng(number)
        close = 10 * np.exp(np.cumsum(random.normal(0, 0.01, len(times))))
        table = pd.DataFrame({"symbol": name, "time": times, "open": close, "close": close})
        table["high"], table["low"] = close * 1.01, close * 0.99
        tables.append(table.assign(volume=random.lognormal(8, 0.3, len(times))))
    pd.concat(tables).to_csv(folder / "bars.csv", index=False)
    ingest([folder / "bars.csv"], folder / "store", **options)
    return folder / "store"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def task_of(path: str) -> dict:
    return read_workflow(Path(path))["task"]


def backtest_of(task: dict) -> dict:
    return task["record"][-1]["kwargs"]["config"]["backtest"]


CHINA = ["SH600000", "SZ000001", "SH600001", "SZ300001", "SH600519"]
CRYPTO_TIMES = pd.date_range("2024-01-01", periods=40 * 96, freq="15min")


@pytest.mark.parametrize(
    ("names", "times", "region", "limit", "exchange", "windows", "freq"),
    [
        (CHINA, DAYS, "cn", 0.095, "XSHG", (90, 10), "day"),
        (["AAPL", "MSFT", "GOOG"], DAYS, "us", None, None, (90, 10), "day"),
        (["BTC/USDT", "ETH/USDT"], CRYPTO_TIMES, "us", None, "24/7", (75, 25), "15min"),
    ],
)
def test_a_store_of_each_market_gets_files_that_check_finds_nothing_against(
    tmp_path, capsys, names, times, region, limit, exchange, windows, freq
):
    store = make_store(tmp_path, names, times)
    assert main(["workflow", str(store), "--out", "mine.yaml"]) == 0
    task = task_of("mine.yaml")
    settings = task["dataset"]["kwargs"]
    assert (settings["lookback"], settings["horizon"]) == windows and settings.get("exchange") == exchange
    assert read_workflow(Path("mine.yaml"))["qlib_init"]["region"] == region
    backtest = backtest_of(task)
    assert backtest["exchange_kwargs"]["limit_threshold"] == limit and backtest["exchange_kwargs"]["freq"] == freq
    end = pd.Timestamp(settings["segments"]["test"][1])
    assert end == times[times.normalize() == end.normalize()][-1] and pd.Timestamp(backtest["end_time"]) == end
    for file in ("mine.yaml", "mine_lightgbm.yaml", "mine_reversal.yaml"):
        check = WorkflowCheck(Path(file))
        errors = [finding.text for finding in check.findings() if finding.level == "error"]
        assert errors == []
    assert (
        "next: kronos-qlib check mine.yaml; qrun mine.yaml; qrun mine_lightgbm.yaml; qrun mine_reversal.yaml"
        in capsys.readouterr().out
    )


def test_segments_follow_each_other_and_leave_what_labels_and_forecasts_need(tmp_path):
    store = make_store(tmp_path, CHINA, DAYS)
    main(["workflow", str(store), "--out", "mine.yaml"])
    segments = task_of("mine.yaml")["dataset"]["kwargs"]["segments"]
    train, valid, test = (
        [DAYS.get_loc(pd.Timestamp(date)) for date in segments[name]] for name in ("train", "valid", "test")
    )
    assert train[0] == 90 and valid[0] == train[1] + 1 and test[0] == valid[1] + 1
    assert test[1] == len(DAYS) - 1 - 12, "ten bars of a forecast and two of the label come after it"
    days = test[1] - train[0] + 1
    assert (train[1] - train[0] + 1) / days == pytest.approx(0.65, abs=0.01)


def test_the_benchmark_is_that_of_ingest_the_index_or_the_mean_of_all(tmp_path):
    store = make_store(tmp_path, ["AAPL", "MSFT", "SPY"], DAYS, benchmark="SPY")
    main(["workflow", str(store), "--out", "a.yaml"])
    assert backtest_of(task_of("a.yaml"))["benchmark"] == "SPY"
    (tmp_path / "china").mkdir()
    store = make_store(tmp_path / "china", [*CHINA, "SH000300"], DAYS)
    main(["workflow", str(store), "--out", "b.yaml"])
    assert backtest_of(task_of("b.yaml"))["benchmark"] == "SH000300"
    (tmp_path / "mean").mkdir()
    store = make_store(tmp_path / "mean", CHINA, DAYS)
    main(["workflow", str(store), "--out", "c.yaml"])
    assert backtest_of(task_of("c.yaml"))["benchmark"] == sorted(CHINA)


def test_instruments_without_volume_get_an_optional_one(tmp_path):
    times = DAYS
    table = pd.DataFrame({"date": times, "open": 1.1, "high": 1.2, "low": 1.0, "close": 1.1})
    table.to_csv(tmp_path / "EURUSD.csv", index=False)
    ingest([tmp_path / "EURUSD.csv"], tmp_path / "store")
    main(["workflow", str(tmp_path / "store"), "--out", "fx.yaml"])
    assert task_of("fx.yaml")["dataset"]["kwargs"]["handler"]["kwargs"]["volume"] == "optional"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "huge"], "--model 'huge' is unknown"),
        (["--region", "moon"], "--region 'moon' is unknown"),
        (["--freq", "5min"], "no bars of 5min; it has day"),
        (["--universe", "csi300"], "no universe 'csi300'; it has all"),
        (["--benchmark", "SPX"], "--benchmark SPX: .* has no bars of it"),
        (["--out", "bars.csv"], "should be NAME.yaml"),
    ],
)
def test_what_is_not_there_is_named_and_nothing_is_written(tmp_path, capsys, options, message):
    store = make_store(tmp_path, CHINA, DAYS)
    before = sorted(tmp_path.iterdir())
    assert main(["workflow", str(store), *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert sorted(tmp_path.iterdir()) == before


def test_a_store_of_too_few_days_and_a_file_that_is_there_are_refused(tmp_path, capsys):
    store = make_store(tmp_path, CHINA, DAYS[:120])
    assert main(["workflow", str(store)]) == 2
    assert "120 days leave 18 to train and test on" in capsys.readouterr().err
    (tmp_path / "long").mkdir()
    store = make_store(tmp_path / "long", CHINA, DAYS)
    assert main(["workflow", str(store)]) == 0 and Path("store.yaml").exists()
    assert main(["workflow", str(store)]) == 2
    assert "store.yaml is there already" in capsys.readouterr().err


# Those of the package


def test_the_package_s_workflows_are_copied_with_their_base(tmp_path):
    assert [path.name for path in copy_examples(["kronos_csi300_nano"], tmp_path)] == [
        "kronos_csi300_nano.yaml",
        "base_csi300.yaml",
    ]
    assert main(["workflow", "--copy", "all"]) == 0
    copies, own = (
        {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.yaml")}
        for folder in (Path("workflows"), EXAMPLES)
    )
    assert copies == own
    assert set(example_names()) == {name.removesuffix(".yaml") for name in copies if not name.startswith("base_")}
    assert main(["workflow", "--copy", "all"]) == 0, "equal files are no trouble"


def test_a_copy_overwrites_nothing(tmp_path, capsys):
    (tmp_path / "base_demo.yaml").write_text("mine")
    assert main(["workflow", "--copy", "kronos_demo", "--out", str(tmp_path)]) == 2
    assert "base_demo.yaml is there already, and is another" in capsys.readouterr().err
    assert (tmp_path / "base_demo.yaml").read_text() == "mine" and not (tmp_path / "kronos_demo.yaml").exists()
    assert main(["workflow", "--copy", "nothing"]) == 2
    assert "--copy 'nothing' is unknown; use all, or some of kronos_5min," in capsys.readouterr().err
