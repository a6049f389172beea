"""Evenings in a row, append → signals → ledger, killed at random moments: the ledger is that of evenings undisturbed.

A month: `KRONOS_SLOW=1 EVENINGS=30 KILLS=5 pytest tests/live/test_evenings.py`.
"""

import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import exchange_calendars
import numpy as np
import pandas as pd
import pytest
from qlib.model.trainer import task_train
from tiny import HORIZON, LOOKBACK, MODEL, TOKENIZER, use_market

from kronos_qlib.cli import main
from kronos_qlib.live.ledger import Ledger

pytestmark = [pytest.mark.slow, pytest.mark.long]
EVENINGS, KILLS = int(os.environ.get("EVENINGS", 4)), int(os.environ.get("KILLS", 2))
HISTORY = 60
INSTRUMENTS = [f"SH60000{number}" for number in range(6)]
SESSIONS = exchange_calendars.get_calendar("XSHG", start="2024-01-01", end="2024-12-31").sessions


def write_files(folder: Path) -> None:
    """Write a file of the history and one for each evening, as a vendor would send them."""
    rng = np.random.default_rng(5)
    tables = []
    for name in INSTRUMENTS:
        close = 10 * np.exp(np.cumsum(rng.normal(0, 0.02, HISTORY + EVENINGS)))
        open_ = close * np.exp(rng.normal(0, 0.01, len(close)))
        high, low = np.maximum(open_, close) * 1.01, np.minimum(open_, close) / 1.01
        table = pd.DataFrame({"open": open_, "high": high, "low": low, "close": close}).round(2)
        table["volume"] = rng.integers(1_000, 9_000, len(close)) * 100
        table["amount"] = (table["volume"] * table[["open", "high", "low", "close"]].mean(axis=1)).round(2)
        table.insert(0, "symbol", name)
        table.insert(1, "date", SESSIONS[: len(close)].strftime("%Y-%m-%d"))
        tables.append(table)
    rows = pd.concat(tables)
    number = rows.groupby("symbol").cumcount()
    rows[number < HISTORY].to_csv(folder / "history.csv", index=False)
    for evening in range(EVENINGS):
        rows[number == HISTORY + evening].to_csv(folder / f"{evening}.csv", index=False)


def train(folder: Path) -> None:
    days = SESSIONS.strftime("%Y-%m-%d")
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


def run_evenings(folder: Path, uri: str, first: int) -> None:
    """Run the evenings from one on, each as its cron line does, and note each that is over."""
    os.chdir(folder)
    for evening in range(first, EVENINGS):
        now = f"{SESSIONS[HISTORY + evening]:%Y-%m-%d}T20:00+08:00"
        line = f"--lock lock --log log ingest ../files/{evening}.csv store --append --then check store --recent 5"
        line += f" --then signals evenings --uri {uri} --store store --now {now} --out {evening}.csv --ledger sqlite:///ledger.db"
        line += " --then ledger update --ledger sqlite:///ledger.db"
        assert main(line.split()) == 0
        Path("done").write_text(str(evening + 1))


def start(folder: Path, uri: str) -> multiprocessing.Process:
    done = folder / "done"
    first = int(done.read_text() or 0) if done.exists() else 0
    process = multiprocessing.get_context("spawn").Process(target=run_evenings, args=(folder, uri, first))
    process.start()
    return process


def read_ledger(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    sets, rows = Ledger(f"sqlite:///{folder / 'ledger.db'}", must_exist=True).read()
    sets["store"] = [Path(store).name for store in sets["store"]]
    return sets.drop(columns="made_at"), rows.drop(columns="filled_at")


def test_evenings_that_are_killed_end_as_those_that_are_not(tmp_path, database, monkeypatch):
    (tmp_path / "files").mkdir()
    shutil.copy(database, tmp_path)
    write_files(tmp_path / "files")
    monkeypatch.chdir(tmp_path)
    assert main(["ingest", "files/history.csv", "store"]) == 0
    train(tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        shutil.copytree("store", folder / "store")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    started = time.monotonic()
    process = start(whole, uri)
    process.join()
    seconds = time.monotonic() - started
    assert process.exitcode == 0

    generator, deaths = random.Random(1), 0
    while deaths < KILLS:
        process = start(killed, uri)
        process.join(generator.uniform(0.3, 0.9) * seconds)
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        deaths += 1
    process = start(killed, uri)
    process.join()
    assert process.exitcode == 0 and deaths > 0

    sets, rows = read_ledger(whole)
    assert len(sets) == EVENINGS and list(sets["version"]) == [1] * EVENINGS
    assert list(sets["date"]) == list(SESSIONS[HISTORY : HISTORY + EVENINGS]) and not sets["live"].any()
    filled = rows["came"].notna().groupby(level="id").all()
    assert list(filled) == [True] * (EVENINGS - HORIZON) + [False] * HORIZON
    for one, other in zip((sets, rows), read_ledger(killed)):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    for evening in range(EVENINGS):
        assert (whole / f"{evening}.csv").read_text() == (killed / f"{evening}.csv").read_text()
    lines = (whole / "log").read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["ingest", "check", "signals", "ledger"] * EVENINGS
