"""The ledger: a database of what was forecast, when and from what, and of what came.

It knows no model, no market and no statistics: `outcomes` reads what came from a Qlib store, `judgement` says what the
record is worth. The schema is made and kept up to date by Alembic, see `migrations`.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    JSON,
    Double,
    ForeignKey,
    UniqueConstraint,
    bindparam,
    create_engine,
    event,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool

from kronos_qlib.live.opening import next_opening
from kronos_qlib.live.signal_set import SignalSet

DEFAULT_URL = "sqlite:///ledger.db"
VERSION_TABLE = "ledger_version"  # of Alembic, under a name of its own: a database may hold MLflow's tables too
QUANTILE_COLUMNS = ["q05", "q10", "q25", "q50", "q75", "q90", "q95"]
SIGNAL_COLUMNS = ["score", "rank", "last_close", "prob_up", *QUANTILE_COLUMNS]
OUTCOME_COLUMNS = ["label", "came"]
SECONDS_TO_WAIT = 10  # for a lock that another process holds, and for a server to answer
_MIGRATIONS = Path(__file__).with_name("migrations")
_ONE_AT_A_TIME = 7_415_083  # any number: the advisory lock of PostgreSQL under which the schema is changed
_ATTEMPTS = 100  # to get a version's number; at each failure another writer has got one


class LedgerError(Exception):
    """The ledger cannot be read or written; the message is one line, without a password."""


class _Base(DeclarativeBase):
    pass


class ForecastSet(_Base):
    """A row of `ledger_sets`: a signal set without its rows. Times are UTC, without a zone; `date` is the store's."""

    __tablename__ = "ledger_sets"
    __table_args__ = (UniqueConstraint("date", "experiment", "recorder", "settings_digest", "version"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    date: Mapped[datetime]
    experiment: Mapped[str]
    recorder: Mapped[str]
    settings_digest: Mapped[str]
    version: Mapped[int]
    made_at: Mapped[datetime]
    live: Mapped[bool]
    next_session_opens_at: Mapped[datetime]
    opening_from: Mapped[str]
    store: Mapped[str]
    region: Mapped[str]
    exchange: Mapped[str | None]
    freq: Mapped[str]
    label: Mapped[str | None]
    horizon: Mapped[int | None]
    settings: Mapped[dict[str, Any]] = mapped_column(JSON)
    promised: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    versions: Mapped[dict[str, Any]] = mapped_column(JSON)
    weights_digest: Mapped[str]
    data_digest: Mapped[str]
    content_digest: Mapped[str] = mapped_column(unique=True)
    instruments: Mapped[int]


class Forecast(_Base):
    """A row of `ledger_forecasts`: an instrument's signal, and what came of it once that is known."""

    __tablename__ = "ledger_forecasts"

    set_id: Mapped[int] = mapped_column(ForeignKey("ledger_sets.id"), primary_key=True)
    instrument: Mapped[str] = mapped_column(primary_key=True)
    score: Mapped[float | None] = mapped_column(Double)
    rank: Mapped[float | None] = mapped_column(Double)
    last_close: Mapped[float | None] = mapped_column(Double)
    prob_up: Mapped[float | None] = mapped_column(Double)
    q05: Mapped[float | None] = mapped_column(Double)
    q10: Mapped[float | None] = mapped_column(Double)
    q25: Mapped[float | None] = mapped_column(Double)
    q50: Mapped[float | None] = mapped_column(Double)
    q75: Mapped[float | None] = mapped_column(Double)
    q90: Mapped[float | None] = mapped_column(Double)
    q95: Mapped[float | None] = mapped_column(Double)
    label: Mapped[float | None] = mapped_column(Double)
    came: Mapped[float | None] = mapped_column(Double)
    filled_at: Mapped[datetime | None]


@dataclass(frozen=True)
class Recorded:
    """Where a signal set is in the ledger.

    id, version: of the set. new: whether this call wrote it. live: whether it was made before `next_session_opens_at`
    (UTC), which is known from `opening_from`.
    """

    id: int
    version: int
    new: bool
    live: bool
    next_session_opens_at: pd.Timestamp
    opening_from: str


class Ledger:
    """A ledger in an SQLite file or a PostgreSQL database; it is made, or brought to today's schema, where it is not.

    Args:
        url: `sqlite:///ledger.db`, `postgresql://user:password@host/database` (extra `postgres`), or a file's path.
        must_exist: refuse an SQLite file that is not there instead of making it.

    Raises:
        LedgerError: here and in all methods, if the database is away, locked, full, of a newer schema or none at all.
    """

    def __init__(self, url: str = DEFAULT_URL, must_exist: bool = False) -> None:
        self._url = _read_url(url)
        self.name = self._url.render_as_string(hide_password=True)
        file = self._url.database if self._url.get_backend_name() == "sqlite" else None
        if must_exist and file and not Path(file).is_file():
            raise LedgerError(f"there is no ledger {file}; kronos-qlib signals makes one, or name another by --ledger")
        self._engine = self._make_engine()
        with self._one_line():
            self._bring_up_to_date()

    def record(self, signals: SignalSet, made_at: datetime | None = None, region: str | None = None) -> Recorded:
        """Write a signal set in one transaction, as the next version of those of its date, run and settings.

        A set that is here already, with the same settings, data, weights and rows, is not written again: its place
        is returned, so that a run that was killed can be repeated. It keeps the time at which it was first made.

        Args:
            made_at: when it was made, by default now; a time without a zone is UTC.
            region: of the market, for the hours of its exchange: cn, us, tw; by default Qlib's in use.

        Raises:
            ValueError: the set has an instrument twice, a column that the ledger has not, or a date with a zone.
        """
        made = _utc(made_at or datetime.now(timezone.utc))
        region = region or _qlib_region()
        header, rows = _header(signals), _rows(signals.table)
        opening = next_opening(signals.date, signals.store, signals.freq, region, signals.exchange)
        header |= {
            "made_at": made,
            "region": region,
            "live": made < opening.at,
            "next_session_opens_at": opening.at,
            "opening_from": opening.source,
        }
        failed = 0
        while True:
            try:
                with self._one_line("; nothing was written"), self._transaction() as connection:
                    return _insert(connection, header, rows)
            except IntegrityError as error:  # another writer took this version's number, or wrote this very set
                failed += 1
                if failed == _ATTEMPTS:
                    raise LedgerError(f"ledger {self.name}: {self._reason(error)}; nothing was written") from error

    def fill(self, set_id: int, outcomes: pd.DataFrame, filled_at: datetime | None = None) -> int:
        """Write outcomes of a set in one transaction, where there are none yet; what is filled never changes.

        Args:
            outcomes: index instrument; `label` and `came`, NaN where they are not known.

        Returns:
            The number of values written.
        """
        now, written, table = _utc(filled_at or datetime.now(timezone.utc)), 0, Forecast.__table__
        with self._one_line("; nothing was written"), self._transaction() as connection:
            for column in OUTCOME_COLUMNS:
                known = outcomes[column][np.isfinite(outcomes[column].astype(float))]
                own = [table.c.set_id == set_id, table.c.instrument == bindparam("name"), table.c[column].is_(None)]
                change = update(table).where(*own).values({column: bindparam("value"), "filled_at": now})
                values = [{"name": str(name), "value": float(value)} for name, value in known.items()]
                written += connection.execute(change, values).rowcount if values else 0
        return written

    def read(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Read everything, as of one moment.

        Returns:
            sets: index id; the columns of `ForecastSet`. rows: index (id, instrument), sorted; `SIGNAL_COLUMNS`, label:
            the value of the run's label, came: the return from the date's close to that of `horizon` bars later, both
            ratios, NaN where they are not known yet, and filled_at.
        """
        with self._one_line(), self._transaction(writes=False) as connection:
            sets = _frame(connection, ForecastSet).set_index("id")
            rows = _frame(connection, Forecast).rename(columns={"set_id": "id"}).set_index(["id", "instrument"])
        sets = sets.astype({"date": "datetime64[ns]", "made_at": "datetime64[ns]", "live": bool})
        values = [*SIGNAL_COLUMNS, *OUTCOME_COLUMNS]
        return sets.sort_index(), rows.astype(dict.fromkeys(values, float)).sort_index()

    def _make_engine(self) -> Engine:
        if self._url.get_backend_name() == "sqlite":
            engine = create_engine(self._url, poolclass=NullPool, connect_args={"timeout": SECONDS_TO_WAIT})
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
            return engine
        try:
            wait = {"connect_timeout": SECONDS_TO_WAIT}
            return create_engine(self._url, poolclass=NullPool, connect_args=wait)
        except ModuleNotFoundError as error:
            raise LedgerError(
                f"ledger {self.name}: needs the package {error.name}: pip install 'kronos-qlib[postgres]'"
            ) from None

    @contextlib.contextmanager
    def _transaction(self, writes: bool = True) -> Iterator[Connection]:
        with self._engine.connect().execution_options(writes=writes) as connection, connection.begin():
            if connection.dialect.name == "postgresql":
                connection.execute(text(f"SET LOCAL lock_timeout = '{SECONDS_TO_WAIT}s'"))
            yield connection

    @contextlib.contextmanager
    def _one_line(self, result: str = "") -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            raise
        except SQLAlchemyError as error:
            raise LedgerError(f"ledger {self.name}: {self._reason(error)}{result}") from error

    def _reason(self, error: SQLAlchemyError) -> str:
        reason = " ".join(str(getattr(error, "orig", None) or error).split())
        if self._url.password:
            reason = reason.replace(str(self._url.password), "***")
        if "database is locked" in reason or "lock timeout" in reason:
            return f"another process has locked it for more than {SECONDS_TO_WAIT} s"
        if "unable to open" in reason:
            return "the file cannot be opened; its folder must be there, and yours to write to"
        return reason

    def _bring_up_to_date(self) -> None:
        if self._is_of_today():
            return
        with self._transaction() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_ONE_AT_A_TIME})"))
            config = _alembic()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")  # nothing to do if another process has done it meanwhile
        if self._url.get_backend_name() == "sqlite":
            with contextlib.suppress(SQLAlchemyError), self._engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode = WAL")  # readers and a writer do not wait

    def _is_of_today(self) -> bool:
        scripts = ScriptDirectory.from_config(_alembic())
        with self._transaction(writes=False) as connection:
            context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
            found = context.get_current_revision()
        if found is not None and found not in {script.revision for script in scripts.walk_revisions()}:
            raise LedgerError(
                f"ledger {self.name}: its schema, {found}, is newer than this kronos-qlib; update the package"
            )
        return found == scripts.get_current_head()


def digest_of_settings(signals: SignalSet) -> str:
    """Digest what makes two forecasts of a run and date versions of each other: settings, frequency, label, horizon."""
    return _digest([signals.settings, signals.freq, signals.label, signals.horizon])


def digest_of_content(signals: SignalSet) -> str:
    """Digest all that was forecast and from what; not when, by which versions of packages, or in which folder."""
    table = signals.table.sort_index()
    values = np.where(table.isna(), np.nan, table.to_numpy(np.float64))  # all NaNs are the same bits
    digest = blake2b(np.ascontiguousarray(values).tobytes(), digest_size=16).hexdigest()
    names = [list(map(str, table.columns)), list(map(str, table.index))]
    run = [str(signals.date), signals.experiment, signals.recorder, digest_of_settings(signals)]
    return _digest([*run, signals.weights_digest, signals.data_digest, names, digest])


def _digest(content: Any) -> str:
    return blake2b(json.dumps(_plain(content), sort_keys=True).encode(), digest_size=16).hexdigest()


def _plain(value: Any) -> Any:
    """Return settings as JSON has them: keys and unknown kinds as text, no NaN, which PostgreSQL's JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _header(signals: SignalSet) -> dict[str, Any]:
    if signals.date.tz is not None:
        raise ValueError(f"a signal set's date has no time zone, but this one is {signals.date}")
    return {
        "date": signals.date.to_pydatetime(),
        "settings": _plain(signals.settings),
        "promised": _plain(signals.promised),
        "versions": _plain(signals.versions),
        "settings_digest": digest_of_settings(signals),
        "content_digest": digest_of_content(signals),
        "instruments": len(signals.table),
        **{
            name: getattr(signals, name)
            for name in ("experiment", "recorder", "store", "exchange", "freq", "label", "horizon")
        },
        **{name: getattr(signals, name) for name in ("weights_digest", "data_digest")},
    }


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    unknown = [str(column) for column in table if column not in SIGNAL_COLUMNS]
    if unknown:
        raise ValueError(f"the ledger has no column {unknown[0]!r}; a signal set has {', '.join(SIGNAL_COLUMNS)}")
    if table.index.has_duplicates:
        raise ValueError(f"the signal set has {table.index[table.index.duplicated()][0]} twice")
    values = table.reindex(columns=SIGNAL_COLUMNS).astype(float).astype(object)
    values = values.where(values.notna(), None)
    return [{"instrument": str(name), **row} for name, row in zip(values.index, values.to_dict("records"))]


def _insert(connection: Connection, header: dict[str, Any], rows: list[dict[str, Any]]) -> Recorded:
    same = select(ForecastSet).where(ForecastSet.content_digest == header["content_digest"])
    there = connection.execute(same).mappings().first()
    if there is not None:
        return _place(there, new=False)
    key = ("date", "experiment", "recorder", "settings_digest")
    versions = select(func.max(ForecastSet.version)).where(
        *(getattr(ForecastSet, name) == header[name] for name in key)
    )
    header = header | {"version": (connection.execute(versions).scalar() or 0) + 1}
    header["id"] = connection.execute(insert(ForecastSet).values(header)).inserted_primary_key[0]
    if rows:
        connection.execute(insert(Forecast), [row | {"set_id": header["id"]} for row in rows])
    return _place(header, new=True)


def _place(header: Mapping[str, Any], new: bool) -> Recorded:
    opens = pd.Timestamp(header["next_session_opens_at"], tz="UTC")
    return Recorded(header["id"], header["version"], new, bool(header["live"]), opens, header["opening_from"])


def _frame(connection: Connection, table: type[_Base]) -> pd.DataFrame:
    found = connection.execute(select(*table.__table__.columns))
    return pd.DataFrame(found.all(), columns=list(found.keys()))


def _utc(time: datetime) -> datetime:
    """Return a time in UTC without its zone, as the ledger keeps it."""
    return time.astimezone(timezone.utc).replace(tzinfo=None) if time.tzinfo else time


def _qlib_region() -> str:
    from qlib.config import C  # here, as to import Qlib takes seconds

    return str(C["region"])


def _read_url(url: str) -> URL:
    try:
        found = make_url(url if "://" in url else f"sqlite:///{url}")
    except (ArgumentError, ValueError):  # whose message would repeat the password
        raise LedgerError(
            "the ledger's URL cannot be read; use sqlite:///FILE or postgresql://USER@HOST/NAME"
        ) from None
    if found.get_backend_name() not in ("sqlite", "postgresql"):
        raise LedgerError(f"a ledger is in SQLite or PostgreSQL, not in {found.get_backend_name()}")
    return found.set(drivername="postgresql+psycopg") if found.drivername == "postgresql" else found


def _alembic() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    return config


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # Python's module would begin transactions by rules of its own
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")  # a set that is recorded survives a power cut


def _begin_sqlite(connection: Connection) -> None:
    """Begin a writing transaction as the only writer: one that became a writer later could not wait for another."""
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")
