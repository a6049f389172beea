"""What came: fills the outcomes of a ledger from a Qlib store, once its bars are there."""

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
from qlib.data import D

from kronos_qlib.data.calendar import store_calendar
from kronos_qlib.data.expressions import check_expression, sessions_ahead
from kronos_qlib.live.ledger import OUTCOME_COLUMNS, Ledger

_ARITHMETIC = re.compile(r"(?!.*(__|\.\s*[A-Za-z_]))[\w$\s.,+\-*/()<>=&|~^%]+")  # neither text nor attributes
RECENT_SESSIONS = 1000  # of a store, among which are all that may still be open
_RETURN_TOLERANCE, _PRICE_TOLERANCE = 1e-5, 1e-5  # above the rounding of a store, which keeps float32


@dataclass(frozen=True)
class Filled:
    """What `fill_outcomes` did.

    sets: that were looked at. labels, returns: values filled now. waiting: rows that still lack one. changed_outcomes,
    changed_closes: rows of which the store says now something other than what was filled, and than the last close of
    the forecast. last_bar: the store's, of the finest frequency looked at; None without sets.
    """

    sets: int = 0
    labels: int = 0
    returns: int = 0
    waiting: int = 0
    changed_outcomes: int = 0
    changed_closes: int = 0
    last_bar: pd.Timestamp | None = None

    def __add__(self, other: "Filled") -> "Filled":
        """Add up two stores' counts."""
        bars = [bar for bar in (self.last_bar, other.last_bar) if bar is not None]
        counts = {name: value + getattr(other, name) for name, value in vars(self).items() if name != "last_bar"}
        return Filled(**counts, last_bar=max(bars, default=None))


def fill_outcomes(ledger: Ledger, sets: pd.DataFrame, rows: pd.DataFrame, now: pd.Timestamp | None = None) -> Filled:
    """Fill the labels and returns of sets whose bars have come, one transaction a set, from the store Qlib is using.

    Bars of a session that is still open do not count, as what is filled never changes.

    Args:
        sets, rows: as `Ledger.read` gives them, those of this store.
        now: with a time zone; by default the time of the clock.

    Raises:
        ValueError: a label is no Qlib expression of fields, numbers and operators, or hours are not known.
    """
    done, now = Filled(), pd.Timestamp.now("UTC") if now is None else now
    for key, group in sets.groupby(["freq", "label", "horizon", "exchange"], dropna=False):
        freq, (label, horizon, exchange) = str(key[0]), (None if pd.isna(part) else part for part in key[1:])
        own = rows[rows.index.get_level_values("id").isin(group.index)]
        columns = [name for name, known in zip(OUTCOME_COLUMNS, (label, horizon)) if known is not None]
        sessions = complete_sessions(freq, exchange, now)
        came = read_outcomes(
            sorted(own.index.unique("instrument")),
            group["date"].min(),
            group["date"].max(),
            label,
            None if horizon is None else int(horizon),
            freq,
            sessions,
        )
        for set_id, date in group["date"].items():
            recorded = own.loc[set_id]
            store = came.reindex(pd.MultiIndex.from_product([[date], recorded.index])).droplevel(0)
            done += _fill(ledger, int(set_id), recorded, store, columns)
        done += Filled(last_bar=sessions[-1] if len(sessions) else None)
    return done


def complete_sessions(freq: str, exchange: str | None, now: pd.Timestamp) -> pd.DatetimeIndex:
    """Return the store's sessions whose bars are complete at a time. Raises ValueError for unknown hours."""
    sessions = pd.DatetimeIndex(D.calendar(freq=freq))
    recent = sessions[-RECENT_SESSIONS:]
    open_ = int((store_calendar(freq, exchange).ends(recent) > now).sum())
    return sessions[: len(sessions) - open_]


def read_outcomes(
    instruments: list[str],
    first: pd.Timestamp,
    last: pd.Timestamp,
    label: str | None,
    horizon: int | None,
    freq: str = "day",
    sessions: pd.DatetimeIndex | None = None,
) -> pd.DataFrame:
    """Read what came after each date, as far as the bars are there, from the store Qlib is using.

    Args:
        sessions: those whose bars count, from the store's first on; by default all of its calendar.

    Returns:
        Index (datetime, instrument), of `first` to `last`. close; label: the expression's value, NaN until the store
        has all sessions that it looks ahead; came: the return from the date's close to that of the instrument's
        `horizon`-th bar after it, NaN until that is there. Bars are those that a forecast counts: a suspended
        session, without volume, is none, unless the date's own bar has no volume either (instruments without volumes).
    """
    sessions = pd.DatetimeIndex(D.calendar(freq=freq)) if sessions is None else sessions
    fields = ["$close", "$volume"] + ([label] if label else [])
    if label:
        _check_label(label)
    end = sessions[-1] if len(sessions) else first
    bars = D.features(instruments, fields, first, end, freq=freq).swaplevel().sort_index().astype(float)
    bars.columns = ["close", "volume", "label"][: len(fields)]
    bars.index = bars.index.set_names(["datetime", "instrument"])
    traded = bars["volume"] > 0
    if horizon:
        bars["came"] = _later_return(bars["close"][traded], horizon).reindex(bars.index)
        without = _later_return(bars["close"].dropna(), horizon).reindex(bars.index)
        bars["came"] = bars["came"].where(traded, without)
    bars = bars[bars.index.get_level_values("datetime") <= last].reindex(columns=["close", *OUTCOME_COLUMNS])
    if label:
        whole = sessions[: max(len(sessions) - sessions_ahead(label), 0)]
        bars.loc[~bars.index.get_level_values("datetime").isin(whole), "label"] = np.nan
    return bars


def _later_return(closes: pd.Series, horizon: int) -> pd.Series:
    return closes.groupby(level="instrument").shift(-horizon) / closes - 1


def _fill(ledger: Ledger, set_id: int, recorded: pd.DataFrame, store: pd.DataFrame, columns: list[str]) -> Filled:
    had, has = recorded[columns], store[columns].replace([np.inf, -np.inf], np.nan)
    new = had.isna() & has.notna()
    if new.any(axis=None):
        ledger.fill(set_id, has.where(new).reindex(columns=OUTCOME_COLUMNS))
    counts = new.sum().to_dict()
    moved = (recorded["last_close"] / store["close"] - 1).abs() > _PRICE_TOLERANCE
    return Filled(
        sets=1,
        labels=int(counts.get("label", 0)),
        returns=int(counts.get("came", 0)),
        waiting=int((had.isna() & has.isna()).any(axis=1).sum()),
        changed_outcomes=int(((had - has).abs() > _RETURN_TOLERANCE).any(axis=1).sum()),
        changed_closes=int(moved.sum()),
    )


def _check_label(label: str) -> None:
    """Raise ValueError for a label that is more than arithmetic: Qlib evaluates it as Python."""
    if not _ARITHMETIC.fullmatch(label):
        raise ValueError(f"the label {label!r} of the ledger is no Qlib expression of fields, numbers and operators")
    check_expression(label)
