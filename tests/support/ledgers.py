"""Ledgers of the tests: databases to put them in, and signal sets to put into them."""

import multiprocessing
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sqlalchemy import create_engine, text

from kronos_qlib.live.signal_set import SignalSet

LABEL = "Ref($close, -2)/Ref($close, -1) - 1"
QUANTILES = ["q05", "q10", "q25", "q50", "q75", "q90", "q95"]
SECRET = "correct-horse"  # a password, which no message may show


def signal_table(seed: int = 0, instruments: int = 6) -> pd.DataFrame:
    """Signals as of a KronosModel, one of them without a prob_up."""
    random = np.random.default_rng(seed)
    names = pd.Index([f"SH{600000 + number}" for number in range(instruments)], name="instrument")
    table = pd.DataFrame({"score": random.normal(size=instruments)}, names)
    table["rank"] = table["score"].rank(ascending=False).astype(int)
    table["last_close"], table["prob_up"] = random.uniform(5, 50, instruments), 0.5
    table.loc[names[0], "prob_up"] = np.nan
    table[QUANTILES] = np.sort(random.normal(0, 0.03, (instruments, 7)), axis=1)
    return table


def signal_set(date: str | pd.Timestamp = "2024-06-03", seed: int = 0, **changes: Any) -> SignalSet:
    values = {
        "table": signal_table(seed),
        "experiment": "kronos_csi300",
        "recorder": "0123456789abcdef",
        "store": "no/such/store",
        "freq": "day",
        "label": LABEL,
        "horizon": 5,
        "settings": {"model": {"class": "KronosModel", "seed": 1}, "portfolio": None},
        "weights_digest": "w" * 32,
        "data_digest": "d" * 32,
        "versions": {"kronos-qlib": "0.1.0", "torch": None},
        "promised": {"rank_ic": 0.03, "sd": 0.1, "days": 200, "first": "2023-01-03", "last": "2023-10-31"},
    }
    return SignalSet(date=pd.Timestamp(date), **values | changes)


@contextmanager
def postgres() -> Iterator[str]:
    """Start a PostgreSQL server in a new folder and give its URL, or skip the test with the reason."""
    found = [*Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    initdb = shutil.which("initdb") or (str(max(found)) if found else None)
    if initdb is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="pip install 'kronos-qlib[postgres]'")
    user = _somebody() if os.getuid() == 0 else None  # it refuses to be root's
    folder = Path(tempfile.mkdtemp(prefix="ledger-", dir="/tmp"))  # a short path: sockets have one of 107 characters
    bin_, data = Path(initdb).resolve().parent, folder / "data"
    if user is not None:
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)

    def run(*command: str) -> None:
        done = subprocess.run(command, user=user, cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    try:
        run(str(bin_ / "initdb"), "-D", str(data), "-U", "ledger", "-A", "trust", "--no-sync", "-E", "UTF8")
        options = f"-k {folder} -c listen_addresses= -c fsync=off -c max_connections=30"
        pg_ctl = (str(bin_ / "pg_ctl"), "-D", str(data), "-l", str(folder / "log"))
        run(*pg_ctl, "-w", "-o", options, "start")
        try:
            yield f"postgresql://ledger:{SECRET}@/postgres?host={folder}"
        finally:
            run(*pg_ctl, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def _somebody() -> str:
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in known), "") or pytest.skip("no user but root")


def forked(said: Path, function: Callable[..., int], *arguments: Any) -> BaseProcess:
    """A process that calls a function, with all that it prints in the file `said`; it ends with the status returned.

    It is a copy of this one, which has no connection open: to import the ledger anew would take seconds.
    """
    process = multiprocessing.get_context("fork").Process(target=_call, args=(said, function, arguments))
    process.start()
    return process


def _call(said: Path, function: Callable[..., int], arguments: tuple[Any, ...]) -> None:
    with said.open("wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # pytest has put its own there
    sys.exit(function(*arguments))


def new_database(server: str, name: str) -> str:
    """Make an empty schema in the database of a server, and give the URL of a ledger in it."""
    engine = create_engine(server.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {name}"))
    engine.dispose()
    return f"{server}&options=-csearch_path%3D{name}"
