"""A ledger keeps every set whole, once, and unchanged, in an SQLite file and in a real PostgreSQL."""

import os
import random
import signal
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from itertools import count
from pathlib import Path

import ledger_writers
import numpy as np
import pandas as pd
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from ledgers import SECRET, forked, new_database, postgres, signal_set, signal_table
from sqlalchemy import create_engine, text
from waiting import wait_for

from kronos_qlib.live import ledger as module
from kronos_qlib.live.ledger import VERSION_TABLE, ForecastSet, Ledger, LedgerError

_numbers = count()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/ledger.db"
    return new_database(request.getfixturevalue("server"), f"ledger_{os.getpid()}_{next(_numbers)}")


@pytest.fixture
def ledger(url: str) -> Ledger:
    return Ledger(url)


def engine_of(url: str):
    return create_engine(url.replace("postgresql:", "postgresql+psycopg:"))


def assert_whole(ledger: Ledger) -> pd.DataFrame:
    """Every set has all its rows, no row is of another set, and the versions of a date are 1, 2, 3, …"""
    sets, rows = ledger.read()
    assert rows.groupby("id").size().reindex(sets.index, fill_value=0).tolist() == sets["instruments"].tolist()
    assert set(rows.index.unique("id")) == set(sets.index[sets["instruments"] > 0])
    for _, versions in sets.groupby(["date", "experiment", "recorder", "settings_digest"])["version"]:
        assert sorted(versions) == list(range(1, len(versions) + 1))
    assert sets["content_digest"].is_unique
    return sets


def test_a_set_is_read_as_it_was_recorded(ledger: Ledger):
    signals = signal_set()
    made = datetime(2024, 6, 3, 12, tzinfo=timezone(timedelta(hours=8)))
    placed = ledger.record(signals, made_at=made, region="cn")
    assert (placed.version, placed.new, placed.live) == (1, True, True)
    sets, rows = ledger.read()
    kept = sets.loc[placed.id]
    assert kept["made_at"] == pd.Timestamp("2024-06-03 04:00")
    assert kept["next_session_opens_at"] == pd.Timestamp("2024-06-04 01:30")
    for name in "date experiment recorder store freq label horizon settings versions promised".split():
        assert kept[name] == getattr(signals, name), name
    assert (kept["weights_digest"], kept["data_digest"]) == (signals.weights_digest, signals.data_digest)
    pd.testing.assert_frame_equal(rows.loc[placed.id, list(signals.table)], signals.table, check_dtype=False)
    assert rows[["label", "came", "filled_at"]].isna().all(axis=None)


def test_of_another_model_a_set_has_a_score_and_a_rank(ledger: Ledger):
    table = signal_table()[["score", "rank"]]
    placed = ledger.record(signal_set(table=table, horizon=None, promised=None, label=None), region="cn")
    sets, rows = ledger.read()
    assert sets.loc[placed.id, ["horizon", "promised", "label"]].isna().all()
    assert rows.drop(columns=["score", "rank"]).isna().all(axis=None)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"weights_digest": "v"},
        {"data_digest": "e"},
        {"table": signal_table().drop("SH600001")},
        {"table": signal_table().drop(columns="prob_up")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_differs_is_the_next_version_and_what_does_not_is_the_set_that_is_there(ledger: Ledger, changes: dict):
    first = ledger.record(signal_set(), made_at=datetime(2024, 6, 3, 8), region="cn")
    second = ledger.record(signal_set(**changes), region="cn")
    assert (second.version, second.new) == (2, True)
    again = ledger.record(signal_set(versions={"torch": "9"}, store="elsewhere"), region="cn")
    assert (again.id, again.version, again.new, again.live) == (first.id, 1, False, True)
    assert len(assert_whole(ledger)) == 2


@pytest.mark.parametrize(
    "changes",
    [{"settings": {"seed": 2}}, {"recorder": "f"}, {"experiment": "x"}, {"date": "2024-06-04"}, {"label": "$close"}],
)
def test_another_date_run_or_setting_begins_with_version_1(ledger: Ledger, changes: dict):
    ledger.record(signal_set(), region="cn")
    assert ledger.record(signal_set(**changes), region="cn").version == 1


def test_a_filled_value_never_changes(ledger: Ledger):
    placed = ledger.record(signal_set(), region="cn")
    first = pd.DataFrame({"label": [0.1, np.nan], "came": [np.nan, np.inf]}, index=["SH600000", "SH600001"])
    assert ledger.fill(placed.id, first) == 1
    second = pd.DataFrame({"label": [0.9, 0.2], "came": [0.3, np.nan]}, index=["SH600000", "SH600001"])
    assert ledger.fill(placed.id, second, filled_at=datetime(2024, 7, 1)) == 2
    assert ledger.fill(placed.id, second) == 0
    rows = ledger.read()[1].loc[placed.id]
    assert rows["label"].dropna().to_dict() == {"SH600000": 0.1, "SH600001": 0.2}
    assert rows["came"].dropna().to_dict() == {"SH600000": 0.3}
    assert rows.loc["SH600001", "filled_at"] == datetime(2024, 7, 1)
    assert rows.loc["SH600002":, "filled_at"].isna().all()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"date": pd.Timestamp("2024-06-03", tz="UTC")}, "no time zone"),
        ({"table": signal_table().assign(weight=1.0)}, "no column 'weight'"),
        ({"table": pd.concat([signal_table(), signal_table()])}, "SH600000 twice"),
    ],
)
def test_what_is_no_signal_set_is_refused_and_nothing_written(ledger: Ledger, changes: dict, reason: str):
    with pytest.raises(ValueError, match=reason):
        ledger.record(signal_set(**changes), region="cn")
    assert ledger.read()[0].empty


@pytest.mark.slow
def test_writers_at_once_lose_nothing_and_write_nothing_twice(url: str, tmp_path: Path):
    """Even the schema is not there when they begin."""
    gate = tmp_path / "gate"
    each = [forked(tmp_path / f"said-{n}", ledger_writers.write_versions, url, n, str(gate), 3) for n in range(3)]
    gate.touch()
    for number, process in enumerate(each):
        process.join(60)
        assert process.exitcode == 0, (tmp_path / f"said-{number}").read_text()
    sets = assert_whole(Ledger(url))
    assert sets.groupby("date").size().tolist() == [3 * 3 + 1] * len(ledger_writers.DATES)


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_whole_sets_and_goes_on_to_the_same_end(url: str, tmp_path: Path):
    chance, total = random.Random(0), 25
    ledger, before, ended = Ledger(url), 0, []
    for attempt in range(3):
        started = tmp_path / f"started-{attempt}"
        process = forked(tmp_path / "said", ledger_writers.write_in_order, url, str(started), total)
        wait_for(started.exists)
        time.sleep(chance.uniform(0, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        ended.append(process.exitcode)
        written = len(assert_whole(ledger))
        assert written >= max(before, 1)
        before = written
    assert -signal.SIGKILL in ended
    assert ledger_writers.write_in_order(url, str(tmp_path / "end"), total) == 0
    sets = assert_whole(ledger)
    undisturbed = [module.digest_of_content(signal_set(table=signal_table(number, 300))) for number in range(total)]
    assert sets.sort_values("version")["content_digest"].tolist() == undisturbed


def test_a_locked_ledger_is_one_line(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SECONDS_TO_WAIT", 1)
    ledger = Ledger(url)
    lock = "BEGIN IMMEDIATE" if url.startswith("sqlite") else "LOCK TABLE ledger_sets IN ACCESS EXCLUSIVE MODE"
    with engine_of(url).connect() as other:
        other.exec_driver_sql(lock)
        with pytest.raises(LedgerError, match="another process has locked it.*nothing was written") as said:
            ledger.record(signal_set(), region="cn")
        other.rollback()
    assert "\n" not in str(said.value) and SECRET not in str(said.value)
    assert ledger.read()[0].empty
    assert ledger.record(signal_set(), region="cn").new


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_nothing_is_half_written(tmp_path: Path):
    url, said = f"sqlite:///{tmp_path}/ledger.db", tmp_path.with_name("said")
    ledger = Ledger(url)
    ledger.record(signal_set(), region="cn")
    process = forked(said, ledger_writers.write_on_a_full_disk, url)
    process.join(60)
    assert process.exitcode == 2, said.read_text()
    assert said.read_text().count("\n") == 1 and "nothing was written" in said.read_text()
    assert len(assert_whole(ledger)) == 1
    assert ledger.record(signal_set("2024-06-04"), region="cn").new


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (f"postgresql://me:{SECRET}@127.0.0.1:1/db", "connection"),
        (f"mysql://me:{SECRET}@host/db", "SQLite or PostgreSQL, not in mysql"),
        (f"postgresql://me:{SECRET}@host:port/db", "cannot be read"),
        ("no/such/folder/ledger.db", "its folder must be there"),
    ],
)
def test_a_ledger_that_is_away_is_one_line_without_the_password(place: str, reason: str):
    with pytest.raises(LedgerError, match=reason) as said:
        Ledger(place)
    assert "\n" not in str(said.value) and SECRET not in str(said.value)


def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.db").write_text("years of work, and more than a database's first bytes " * 40)
    with pytest.raises(LedgerError, match="not a database"):
        Ledger(str(tmp_path / "thesis.db"))
    assert (tmp_path / "thesis.db").read_text().startswith("years of work")


def test_a_missing_ledger_is_not_made_by_who_only_reads(tmp_path: Path):
    with pytest.raises(LedgerError, match="there is no ledger"):
        Ledger(f"sqlite:///{tmp_path}/ledger.db", must_exist=True)
    assert not list(tmp_path.iterdir())


def test_the_name_of_a_ledger_hides_the_password(server: str):
    assert SECRET not in Ledger(new_database(server, f"named_{os.getpid()}")).name


def test_a_ledger_of_a_newer_package_is_refused(ledger: Ledger, url: str):
    with engine_of(url).begin() as connection:
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(LedgerError, match="9999, is newer than this kronos-qlib"):
        Ledger(url)


def test_the_migrations_make_the_tables_that_the_package_reads(ledger: Ledger, url: str):
    with engine_of(url).connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, "compare_type": True})
        assert compare_metadata(context, ForecastSet.metadata) == []


def test_the_tables_of_others_in_the_same_database_stay(url: str):
    with engine_of(url).begin() as connection:
        connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32))"))
        connection.execute(text("INSERT INTO alembic_version VALUES ('of_mlflow')"))
    Ledger(url).record(signal_set(), region="cn")
    with engine_of(url).connect() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).all() == [("of_mlflow",)]
