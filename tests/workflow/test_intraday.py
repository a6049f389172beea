"""Bars within a day from `demo-data` to the report: the commands that a stranger types, by qrun and compare."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from networks import MODEL, TOKENIZER
from qlib.cli.run import workflow as qrun

from kronos_qlib.analysis.results import load_runs
from kronos_qlib.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Mean of empty slice:RuntimeWarning")]  # Qlib's


@pytest.mark.parametrize(
    ("freq", "market", "days", "year"),
    [("5min", "stocks", "36", 261), ("60min", "crypto", "45", 365.25)],  # weekdays without holidays, and all days
)
def test_from_demo_data_to_the_report(freq, market, days, year, database, tmp_path, monkeypatch, capsys):
    shutil.copy(database, tmp_path)
    monkeypatch.chdir(tmp_path)
    store = ["demo-data", "store", "--freq", freq, "--market", market, "--instruments", "6", "--days", days]
    assert main(store) == 0
    assert main(["workflow", "store", "--universe", "demo", "--out", "mine.yaml"]) == 0
    text = yaml.safe_load(Path("mine.yaml").read_text())
    text["task"]["model"]["kwargs"] |= {"tokenizer": TOKENIZER, "model": MODEL, "finetune": None}
    text["task"]["model"]["kwargs"]["forecast"] |= {"sample_count": 1}
    text["task"]["dataset"]["kwargs"] |= {"lookback": 20, "horizon": 4}
    Path("mine.yaml").write_text(yaml.safe_dump(text))
    qrun("mine.yaml")
    qrun("mine_lightgbm.yaml")
    assert main(["compare", "mine", "mine_lightgbm", "--out", "out"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "lag of all rows: 4 bars, the longest horizon recorded (mine)" in printed
    assert "Rank IC by bars to come 1 bar (t) 5 bars (t)" in printed
    assert "Figures a year are of whole days or weeks, as many as the market has: mine: " in printed
    assert "Forecasts and actual bars" in Path("out/report.html").read_text()
    kronos, lightgbm = load_runs(["mine", "mine_lightgbm"])
    assert kronos.bar_freq == lightgbm.bar_freq == freq
    assert kronos.year == pytest.approx(year, rel=0.02)
    assert kronos.scores.index.equals(lightgbm.scores.index), "the same bars, the last day's too"
    compared = pd.read_csv("out/comparison.csv", index_col=0)
    assert compared.loc["mine", "kept_days"] == kronos.scores.index.unique("datetime").size
    after = kronos.report["return"] - kronos.report["bench"] - kronos.report["cost"]
    assert compared.loc["mine", "excess_return_with_cost"] == pytest.approx(
        after.groupby(after.index.date).sum().mean() * kronos.year
    )
