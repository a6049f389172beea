"""The workflows of other frequencies and markets from `demo-data` to the report: the commands that a stranger types."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from networks import MODEL, TOKENIZER
from qlib.cli.run import workflow as qrun

from kronos_qlib.analysis.results import load_runs
from kronos_qlib.cli import main
from kronos_qlib.data.demo_market import BENCHMARK, UNIVERSE

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Mean of empty slice:RuntimeWarning")]  # Qlib's


@pytest.fixture(autouse=True)
def own_folder(database, tmp_path, monkeypatch):
    shutil.copy(database, tmp_path)
    monkeypatch.chdir(tmp_path)


def database_here() -> str:
    """The address of mlflow.db here; MLflow keeps what it opened by a relative one for later tests elsewhere."""
    return f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def copied(*names: str) -> None:
    """Copy workflows of the package to here, with networks so small that nothing needs to be trained."""
    assert main(["workflow", "--copy", *names, "--out", "."]) == 0
    for path in Path.cwd().glob("*.yaml"):
        path.write_text(path.read_text().replace("sqlite:///mlflow.db", database_here()))
    for path in map(Path, [f"{name}.yaml" for name in names]):
        head, text = path.read_text(), yaml.safe_load(path.read_text().replace("{{", "<<").replace("}}", ">>"))
        if text["task"]["model"]["class"] == "KronosModel":
            text["task"]["model"]["kwargs"] |= {"tokenizer": TOKENIZER, "model": MODEL, "finetune": None}
            text["task"]["model"]["kwargs"]["forecast"] |= {"sample_count": 1}
            text["task"]["dataset"]["kwargs"] |= {"lookback": 20, "horizon": 4}
        assert "QLIB_DATA" in head
        path.write_text(yaml.safe_dump(text).replace("<<", "{{").replace(">>", "}}"))


def american_store(folder: Path) -> None:
    """Write a synthetic market with the universe and the benchmark of Qlib's American store, and some of its dates."""
    assert main(["demo-data", str(folder), "--instruments", "5", "--days", "924"]) == 0
    own = (folder / "calendars" / "day.txt").read_text().split()
    theirs = np.datetime_as_string(pd.bdate_range("2015-01-02", periods=len(own)).to_numpy(), unit="D")
    dates = dict(zip(own, theirs))
    (folder / "calendars" / "day.txt").write_text("\n".join(theirs) + "\n")
    for path in (folder / "instruments").glob("*.txt"):
        rows = [line.split("\t") for line in path.read_text().splitlines()]
        named = [["^GSPC" if name == BENCHMARK else name, *(dates[date] for date in span)] for name, *span in rows]
        path.write_text("".join("\t".join(row) + "\n" for row in named))
    (folder / "instruments" / f"{UNIVERSE}.txt").rename(folder / "instruments" / "sp500.txt")
    (folder / "features" / BENCHMARK.lower()).rename(folder / "features" / "^gspc")


@pytest.mark.parametrize(
    ("market", "options", "freq", "year"),
    [
        ("5min", ["--freq", "5min"], "5min", None),
        ("crypto_1h", ["--freq", "60min", "--market", "crypto"], "60min", 365.25),
        pytest.param("us_day", None, "day", 261, marks=pytest.mark.long),  # weekdays without holidays
    ],
)
def test_three_workflows_of_a_market_run_and_are_compared(market, options, freq, year, monkeypatch, capsys):
    if options is None:
        american_store(Path("store"))
    else:
        assert main(["demo-data", "store", "--instruments", "6", *options]) == 0
    monkeypatch.setenv("QLIB_DATA", str(Path("store").absolute()))
    names = [f"{kind}_{market}" for kind in ("kronos", "lightgbm", "reversal")]
    copied(*names)
    base, fewer = Path(f"base_{market}.yaml"), {"2008-01-02": "2015-01-02", "2020-10-30": "2018-06-29"}
    for date, other in (fewer | {"2020-11-10": "2018-07-10"}).items():  # of us_day
        base.write_text(base.read_text().replace(date, other))
    for name in names:
        qrun(f"{name}.yaml")
    assert main(["compare", *names, "--out", "out", "--uri", database_here()]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    unit = "days" if freq == "day" else "bars"
    assert f"lag of all rows: 4 {unit}, the longest horizon recorded (kronos_{market})" in printed
    assert "Forecasts and actual bars" in Path("out/report.html").read_text()
    kronos, lightgbm, rule = load_runs(names, database_here())
    assert kronos.bar_freq == lightgbm.bar_freq == rule.bar_freq == freq
    ours, theirs = (run.scores.index.get_level_values("datetime") for run in (kronos, lightgbm))
    assert ours.max() == theirs.max(), "the last day's bars too"
    compared = pd.read_csv("out/comparison.csv", index_col=0)
    assert compared.loc[names[0], "kept_days"] == kronos.scores.index.unique("datetime").size
    if year is not None:
        assert kronos.year == pytest.approx(year, rel=0.02)
        after = kronos.report["return"] - kronos.report["bench"] - kronos.report["cost"]
        assert compared.loc[names[0], "excess_return_with_cost"] == pytest.approx(
            after.groupby(after.index.date).sum().mean() * kronos.year
        )
    if freq != "day":
        assert kronos.scores.index.equals(lightgbm.scores.index)
        assert "Rank IC by bars to come 1 bar (t) 5 bars (t)" in printed
        assert f"Figures a year are of whole days or weeks, as many as the market has: kronos_{market}" in printed


def test_a_daily_signal_from_minutes_and_minutes_that_execute_a_daily_signal(monkeypatch):
    assert main(["demo-data", "store", "--instruments", "6", "--freq", "5min", "--days", "160"]) == 0
    monkeypatch.setenv("QLIB_DATA", str(Path("store").absolute()))
    names = ["nested_daily_signal", "nested_minute_execution"]
    copied(*names)
    shorter = Path("nested_minute_execution.yaml").read_text().replace("2018-08-03", "2018-06-22")
    Path("nested_minute_execution.yaml").write_text(shorter)
    for name in names:
        qrun(f"{name}.yaml")
    daily, nested = load_runs(names, database_here())
    assert set(daily.scores.index.get_level_values("datetime").strftime("%H:%M")) == {"14:55"}
    traded = daily.report["turnover"] > 0
    first = daily.scores.index.get_level_values("datetime").min().normalize()
    assert not traded[first] and traded[traded.index > first].any(), "a day's last score is traded on the next"
    minutes = pd.read_pickle(nested.artifacts / "portfolio_analysis" / "report_normal_5min.pkl")
    days = pd.read_pickle(nested.artifacts / "portfolio_analysis" / "report_normal_1day.pkl")
    spread = minutes["turnover"].groupby(minutes.index.date).agg(lambda day: (day > 0).sum())
    assert spread.max() > 10, "an order is divided over the bars of its day"
    returns = (1 + minutes["return"]).groupby(minutes.index.normalize()).prod() - 1
    np.testing.assert_allclose(returns, days["return"][returns.index], atol=2e-5)
