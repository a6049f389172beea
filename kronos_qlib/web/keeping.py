"""Forecasts and rankings of a store → sets of the ledger, which `kronos-qlib ledger update` fills in later."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
import pandas as pd

from kronos_qlib.analysis.bar_forecast import QUANTILES
from kronos_qlib.data.calendar import EXCHANGES, SessionCalendar
from kronos_qlib.ingest.store_files import StoreFiles
from kronos_qlib.live.ledger import Ledger, LedgerError
from kronos_qlib.live.signal_set import SignalSet
from kronos_qlib.versions import package_versions
from kronos_qlib.web.networks import NamedNetwork
from kronos_qlib.web.sources import Origin

RECENT = 1000  # sessions of a store from which the time of the next ones is known
_USUAL = {"temperature": 1, "top_p": 1, "top_k": 0}
_REGIONS = {exchange: region for region, exchange in EXCHANGES.items()}


@dataclass(frozen=True)
class StoreForecast:
    """What was forecast of N instruments of a store, all from the bar of one date.

    closes: of their paths [N, S, P]. last: their last closes [N]. question: as it was asked. data_digest: of the bars
    that the network saw.
    """

    network: NamedNetwork
    origin: Origin
    date: pd.Timestamp
    instruments: Sequence[str]
    closes: np.ndarray
    last: np.ndarray
    question: dict[str, Any]
    data_digest: str


class Keeper:
    """Writes what was forecast to a ledger, which is made where there is none. Raises ValueError if it cannot be."""

    def __init__(self, url: str) -> None:
        try:
            self._ledger = Ledger(url)
        except LedgerError as error:
            raise ValueError(str(error)) from None

    def keep(self, forecast: StoreForecast) -> tuple[dict[str, Any] | None, str]:
        """Write a forecast, and return a note on that.

        Returns:
            Its set, version, whether that is new and whether it is live, None if it was not kept; and the note.
        """
        why = _why_not(forecast.origin, forecast.date)
        if why:
            return None, f"Not kept in the ledger: {why}."
        region = _REGIONS.get(forecast.origin.exchange or "", "cn")
        try:
            kept = self._ledger.record(_signal_set(forecast), region=region)
        except (LedgerError, ValueError) as error:
            return None, f"Not kept in the ledger: {str(error).removeprefix(f'ledger {self._ledger.name}: ')}."
        kind = "live" if kept.live else "simulated, as the next session has opened"
        place = {"set": kept.id, "version": kept.version, "new": kept.new, "live": kept.live}
        return place, f"Kept in the ledger as set {kept.id}, {kind}."


def digest_bars(frames: Sequence[pd.DataFrame]) -> str:
    """Digest bars: columns, times and values."""
    digest = blake2b(digest_size=16)
    for frame in frames:
        digest.update(" ".join(frame.columns).encode())
        digest.update(pd.DatetimeIndex(frame.index).as_unit("ns").asi8.tobytes())
        digest.update(np.ascontiguousarray(frame.to_numpy(np.float64)).tobytes())
    return digest.hexdigest()


def score(closes: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return the mean return over all paths and bars [N] of closes [N, S, P] from their last closes [N]."""
    return (closes / last[:, None, None]).mean(axis=(1, 2)) - 1


def _why_not(origin: Origin, date: pd.Timestamp) -> str:
    if origin.exchange is None:
        return "the exchange is not known, whose hours tell what was forecast in time; start the server with --exchange"
    sessions = StoreFiles(origin.store).calendar(origin.freq)
    recent = sessions[sessions <= date][-RECENT:]
    try:
        end = _complete_at(tuple(recent.as_unit("ns").asi8.tolist()), origin.exchange, origin.freq)
    except ValueError as error:
        return str(error)
    return f"the bar of {date} is complete at {end:%Y-%m-%d %H:%M} UTC" if end > _now() else ""


def _now() -> pd.Timestamp:
    return pd.Timestamp.now("UTC")


@lru_cache(64)
def _complete_at(sessions: tuple[int, ...], exchange: str, freq: str) -> pd.Timestamp:
    """Return when the bar of the last session is complete; to look an exchange's hours up takes a while."""
    times = pd.DatetimeIndex(np.array(sessions, "datetime64[ns]"))
    return SessionCalendar(times, exchange, "", freq).ends(times[-1:])[0]


def _signal_set(forecast: StoreForecast) -> SignalSet:
    closes, last, question, origin = forecast.closes, forecast.last, forecast.question, forecast.origin
    horizon, returns = closes.shape[2], closes[:, :, -1] / last[:, None] - 1
    table = pd.DataFrame({"score": score(closes, last)}, pd.Index(forecast.instruments, name="instrument"))
    table["rank"] = table["score"].rank(ascending=False, method="min").astype(int)
    table["last_close"], table["prob_up"] = last, (returns > 0).mean(axis=1)
    table[[f"q{round(100 * level):02d}" for level in QUANTILES]] = np.quantile(returns, QUANTILES, axis=1).T
    left_out = ("at", "model", "source", "store", "top")  # they are said elsewhere, or decide nothing
    return SignalSet(
        date=forecast.date,
        table=table.sort_index(),
        experiment=_experiment(forecast.network.name, origin.store.name, horizon, question),
        recorder="page",
        store=str(origin.store),
        freq=origin.freq,
        label=None if "instrument" in question else f"Ref($close, -{horizon})/$close - 1",
        horizon=horizon,
        settings={"question": {name: value for name, value in question.items() if name not in left_out}},
        weights_digest=blake2b(forecast.network.digest.encode(), digest_size=16).hexdigest(),
        data_digest=forecast.data_digest,
        versions=package_versions(),
        exchange=origin.exchange,
    )


def _experiment(model: str, store: str, horizon: int, question: dict[str, Any]) -> str:
    """Name what forecasts have in common that are judged together: all that was asked but date, instrument and seed."""
    names = question.get("instruments")
    universe = (
        question.get("universe") if names is None else f"watchlist {blake2b(repr(names).encode()).hexdigest()[:6]}"
    )
    parts = [f"page {store} {model}", f"{question['lookback']} + {horizon} bars × {question['samples']}"]
    parts += [f"{name} {question[name]:g}" for name, usual in _USUAL.items() if question[name] != usual]
    return ", ".join([*parts, *([str(universe)] if "instrument" not in question else [])])
