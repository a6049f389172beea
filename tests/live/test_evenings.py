"""Evenings in a row on a demo market, append → signals → ledger, killed at random moments: the ledger is the same.

A month: `KRONOS_SLOW=1 EVENINGS=30 KILLS=5 pytest tests/live/test_evenings.py`.
"""

import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from qlib.model.trainer import task_train
from tiny import HORIZON, LOOKBACK, MODEL, TOKENIZER, use_market

from kronos_qlib.cli import main
from kronos_qlib.data.demo_market import write_demo_market
from kronos_qlib.ingest.store_files import StoreFiles
from kronos_qlib.live.ledger import Ledger

pytestmark = [pytest.mark.slow, pytest.mark.long]
EVENINGS, KILLS = int(os.environ.get("EVENINGS", 4)), int(os.environ.get("KILLS", 2))
HISTORY = 60


def write_files(folder: Path, market: Path) -> pd.DataFrame:
    """Write a demo market as a vendor would send it: a file of the history and one for each evening; return its bars.

    A suspended instrument has no row.
    """
    store = StoreFiles(market)
    calendar = store.calendar("day")
    tables = []
    for name in store.instruments():
        first, table = store.read(name, "day", ["open", "high", "low", "close", "volume"])
        table["amount"] = table["volume"] * table[["open", "high", "low", "close"]].mean(axis=1)
        table.insert(0, "symbol", name)
        table.insert(1, "date", calendar[first : first + len(table)])
        tables.append(table[table["volume"] > 0])
    rows = pd.concat(tables).sort_values(["date", "symbol"])
    rows[rows["date"] < calendar[HISTORY]].to_csv(folder / "history.csv", index=False)
    for evening in range(EVENINGS):
        rows[rows["date"] == calendar[HISTORY + evening]].to_csv(folder / f"{evening}.csv", index=False)
    return rows


def train(folder: Path, days: list[str]) -> None:
    segments = {"train": [days[15], days[35]], "valid": [days[36], days[45]], "test": [days[46], days[HISTORY - 1]]}
    networks = {"tokenizer": TOKENIZER, "model": MODEL, "device": "cpu", "dtype": "float32", "seed": 1}
    handler = {"class": "KLineHandler", "module_path": "kronos_qlib", "kwargs": {"instruments": "all"}}
    dataset = {"handler": handler, "segments": segments, "lookback": LOOKBACK, "horizon": HORIZON}
    task = {
        "model": {"class": "KronosModel", "module_path": "kronos_qlib", "kwargs": networks},
        "dataset": {"class": "KLineDataset", "module_path": "kronos_qlib", "kwargs": dataset},
        "record": [{"class": "SignalRecord", "module_path": "qlib.workflow.record_temp"}],
    }
    task["model"]["kwargs"] |= {"forecast": {"sample_count": 2, "temperature": 1.0}}
    use_market(folder / "store")
    task_train(task, experiment_name="evenings")


def run_evenings(folder: Path, uri: str, first: int, days: list[str]) -> None:
    """Run the evenings from one on, each as its cron line does, and note each that is over.

    They end past midnight: the market trades on holidays of its exchange too, and such a day's bar is complete then.
    """
    os.chdir(folder)
    for evening in range(first, EVENINGS):
        now = f"{pd.Timestamp(days[HISTORY + evening]) + pd.Timedelta(days=1):%Y-%m-%d}T01:00+08:00"
        line = f"--lock lock --log log ingest ../files/{evening}.csv store --append --then check store --recent 5"
        line += f" --then signals evenings --uri {uri} --store store --allow-missing 8 --now {now} --out {evening}.csv"
        line += " --ledger sqlite:///ledger.db"
        line += " --then ledger update --ledger sqlite:///ledger.db"
        assert main(line.split()) == 0
        Path("done").write_text(str(evening + 1))


def start(folder: Path, uri: str, days: list[str]) -> multiprocessing.Process:
    done = folder / "done"
    first = int(done.read_text() or 0) if done.exists() else 0
    process = multiprocessing.get_context("spawn").Process(target=run_evenings, args=(folder, uri, first, days))
    process.start()
    return process


def read_ledger(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    sets, rows = Ledger(f"sqlite:///{folder / 'ledger.db'}", must_exist=True).read()
    sets["store"] = [Path(store).name for store in sets["store"]]
    return sets.drop(columns="made_at"), rows.drop(columns="filled_at")


def test_evenings_that_are_killed_end_as_those_that_are_not(tmp_path, database, monkeypatch):
    (tmp_path / "files").mkdir()
    shutil.copy(database, tmp_path)
    market = write_demo_market(tmp_path / "market", instruments=8, days=HISTORY + EVENINGS, seed=3)
    bars = write_files(tmp_path / "files", market)
    days = list(StoreFiles(market).calendar("day").strftime("%Y-%m-%d"))
    monkeypatch.chdir(tmp_path)
    assert main(["ingest", "files/history.csv", "store"]) == 0
    train(tmp_path, days)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        shutil.copytree("store", folder / "store")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    started = time.monotonic()
    process = start(whole, uri, days)
    process.join()
    seconds = time.monotonic() - started
    assert process.exitcode == 0

    generator, deaths = random.Random(1), 0
    while deaths < KILLS:
        process = start(killed, uri, days)
        process.join(generator.uniform(0.3, 0.9) * seconds)
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        deaths += 1
    process = start(killed, uri, days)
    process.join()
    assert process.exitcode == 0 and deaths > 0

    sets, rows = read_ledger(whole)
    assert len(sets) == EVENINGS and list(sets["version"]) == [1] * EVENINGS
    assert list(sets["date"].dt.strftime("%Y-%m-%d")) == days[HISTORY:] and not sets["live"].any()
    for (number, name), row in rows.iterrows():
        closes = bars[(bars["symbol"] == name) & (bars["date"] >= sets.loc[number, "date"])]["close"]
        came = closes.iloc[HORIZON] / closes.iloc[0] - 1 if len(closes) > HORIZON else np.nan
        np.testing.assert_allclose(row["came"], came, rtol=1e-4, atol=1e-6)
    assert rows["came"].notna().sum() > 0 or EVENINGS <= HORIZON
    for one, other in zip((sets, rows), read_ledger(killed)):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    for evening in range(EVENINGS):
        assert (whole / f"{evening}.csv").read_text() == (killed / f"{evening}.csv").read_text()
    lines = (whole / "log").read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["ingest", "check", "signals", "ledger"] * EVENINGS
