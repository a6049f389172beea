"""A universe → its instruments, ranked by their forecasts of one date: a job in parts, so that others may go first."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import pandas as pd

from kronos_qlib.data.calendar import sessions_after_bars
from kronos_qlib.data.windows import CLOSE
from kronos_qlib.web.commands import hidden_folders, run_command
from kronos_qlib.web.forecasts import are_days, as_text, check_size, draw_paths, read_date
from kronos_qlib.web.jobs import Report
from kronos_qlib.web.keeping import Keeper, StoreForecast, digest_bars, score
from kronos_qlib.web.networks import NamedNetwork, Networks
from kronos_qlib.web.problems import Problem
from kronos_qlib.web.schema import MarketQuestion
from kronos_qlib.web.settings import Limits
from kronos_qlib.web.sources import Origin, Sources
from kronos_qlib.workflow.named_predictor import most_lookback

PART = 16  # instruments that are forecast before others may go first
TOGETHER = 8  # of them that go through the networks at once
SPARKLINE = 40  # closes
_RANGES = (("50", "q25", "q75"), ("90", "q05", "q95"))


@dataclass(frozen=True)
class PreparedMarket:
    """A question with its date and the instruments that may have a bar of it."""

    question: MarketQuestion
    sources: Sources
    network: NamedNetwork
    date: pd.Timestamp
    calendar: pd.DatetimeIndex
    instruments: list[str]

    @property
    def digest(self) -> str:
        """A digest of the question, its members, and the sizes and times of the files of their bars."""
        asked = self.question.model_dump(exclude={"top"})
        files = [self.sources.state(self.question.store, name) for name in self.instruments]
        known = ("market", asked, self.network.digest, str(self.date), len(self.calendar), self.instruments, files)
        return blake2b(repr(known).encode(), digest_size=16).hexdigest()


def prepare(question: MarketQuestion, sources: Sources, networks: Networks, limits: Limits) -> PreparedMarket:
    """Find the date, the members and the network of a question. Raises Problem."""
    network = networks.network(question.model)
    store = sources.store(question.store)
    if question.instruments is not None:
        known = set(store.instruments())
        names = sorted({name.upper() for name in question.instruments})
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise Problem(404, f"The store {question.store} has no instrument {unknown[0] if unknown else ''!r}.")
    else:
        sources.members(question.store, question.universe)
        names = []
    sessions = sources.sessions(question.store, read_date(question.at))
    date = sessions[-1]
    if question.instruments is None:
        spans = store.universe(question.universe)
        member = spans[(spans["first"] <= date) & (spans["last"] >= date.normalize())]
        names = sorted(member["instrument"].str.upper().unique())
    if not names:
        raise Problem(422, f"The universe {question.universe} has no member on {date.date()}.")
    check_size(question, limits, len(names))
    return PreparedMarket(question, sources, network, date, sessions, names)


def answer(
    asked: PreparedMarket, report: Report, give_way: Callable[[], None], keeper: Keeper | None = None
) -> dict[str, Any]:
    """Rank the instruments by the mean of the returns that their paths have; `give_way` is called between parts."""
    question = asked.question
    drawn = _Drawn()
    left: list[str] = []
    room = min(question.lookback, most_lookback(asked.network.predictor, question.horizon))
    sessions: dict[str | None, pd.DatetimeIndex] = {}
    ready: dict[str | None, list[tuple[str, pd.DataFrame]]] = {}
    for name, bars in _bars(asked, room, left):
        exchange = asked.sources.exchange_of(name)
        if exchange not in sessions:
            sessions[exchange] = sessions_after_bars(asked.calendar, question.horizon, exchange)
        waiting = ready.setdefault(exchange, [])
        waiting.append((name, bars))
        if len(waiting) == PART:
            drawn.add(asked, ready.pop(exchange), sessions[exchange], report)
            give_way()
    for exchange, waiting in ready.items():
        drawn.add(asked, waiting, sessions[exchange], report)
        give_way()
    kept, note = drawn.keep(asked, list(sessions), keeper)
    rows = sorted(drawn.rows, key=lambda row: (-row["score"], row["instrument"]))
    for rank, row in enumerate(rows, 1):
        row["rank"] = rank
    return {
        "digest": asked.digest,
        "store": question.store,
        "universe": None if question.instruments is not None else question.universe,
        "date": as_text(asked.calendar[-1:], are_days(asked.calendar))[0],
        "model": asked.network.name,
        "seen": room,
        "horizon": question.horizon,
        "top": question.top,
        "rows": rows,
        "left_out": left[:100],
        "left_out_total": len(left),
        "notes": [asked.network.note, *([note] if note else [])],
        "ledger": kept,
    }


def rank_by_run(
    run: Mapping[str, Any], store: str, date: str, sources: Sources, uri: str, ledger: str | None, report: Report
) -> dict[str, Any]:
    """Rank a store's instruments by a finished run, `kronos-qlib signals`, in the form of a market's ranking.

    Args:
        run: as `list_runs` has it. date: a session of the store.

    Raises:
        Problem: the run cannot score the date.
    """
    folder = sources.store(store).folder
    arguments = ["signals", "--json", f"--store={folder}", f"--uri={uri}", f"--date={date}"]
    arguments += [*(["--no-ledger"] if ledger is None else []), "--", run["id"]]
    environment = {} if ledger is None else {"KRONOS_LEDGER": ledger}
    found = run_command(arguments, report, {str(folder): store} | hidden_folders(uri, ledger), environment)
    rows = [_row(row, store, pd.Timestamp(found["date"]), sources) for row in found["signals"]]
    return {
        "digest": found["data_digest"],
        "store": store,
        "universe": None,
        "date": found["date"].removesuffix(" 00:00:00"),
        "model": None,
        "run": run["experiment"],
        "seen": None,
        "horizon": found["horizon"],
        "rows": sorted(rows, key=lambda row: (row["rank"], row["instrument"])),
        "left_out": [],
        "left_out_total": 0,
        "notes": [f"The run {run['experiment']}, recorder {run['id'][:8]}."],
        "ledger": found.get("ledger"),
    }


def _bars(asked: PreparedMarket, room: int, left: list[str]) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield each instrument that has a bar of the date and enough before it; the others are added to `left`."""
    for name in asked.instruments:
        try:
            bars = asked.sources.bars(asked.question.store, name, asked.date).bars.bars.loc[: asked.date]
        except Problem as problem:
            left.append(f"{name}: {problem.detail}")
            continue
        if not len(bars) or bars.index[-1] != asked.date:
            left.append(f"{name}: no bar of the date")
        elif bars["close"].iloc[-1] <= 0:
            left.append(f"{name}: a last close of 0 or less, of which there are no returns")
        elif len(bars) < room:
            left.append(f"{name}: {len(bars)} bars, fewer than {room}")
        else:
            yield name, bars.iloc[-room:]


def _row(row: dict[str, Any], store: str, date: pd.Timestamp, sources: Sources) -> dict[str, Any]:
    try:
        closes = sources.bars(store, row["instrument"]).bars.bars["close"].loc[:date].iloc[-SPARKLINE:].tolist()
    except Problem:  # a store whose instruments' folders have other names
        closes = []
    return {
        "instrument": row["instrument"],
        "rank": int(row["rank"]),
        "score": row["score"],
        "prob_up": row.get("prob_up"),
        "last_close": row.get("last_close") or (closes[-1] if closes else None),
        "median": row.get("q50"),
        **{f"range_{name}": [row[low], row[high]] if low in row else None for name, low, high in _RANGES},
        "sparkline": closes,
    }


@dataclass
class _Drawn:
    """What was drawn so far, part by part: a row for each instrument, its paths of the close, digests of the bars."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    closes: list[np.ndarray] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)

    def add(
        self, asked: PreparedMarket, part: list[tuple[str, pd.DataFrame]], times: pd.DatetimeIndex, report: Report
    ) -> None:
        total, done, share = len(asked.instruments), len(self.rows), len(part) / len(asked.instruments)
        frames = [bars for _, bars in part]

        def report_part(own: float) -> None:
            report(done / total + own * share)

        paths = draw_paths(asked.network.predictor, frames, [times] * len(part), asked.question, report_part, TOGETHER)
        close = paths[..., CLOSE]
        last = np.array([float(bars["close"].iloc[-1]) for bars in frames])
        ends = close[:, :, -1] / last[:, None] - 1
        bands = np.quantile(ends, [0.05, 0.25, 0.5, 0.75, 0.95], axis=1)
        found = score(close, last)
        self.closes.append(close.copy())  # the other columns need not stay
        self.digests.append(digest_bars(frames))
        self.rows += [
            {
                "instrument": name,
                "score": float(found[place]),
                "prob_up": float((ends[place] > 0).mean()),
                "last_close": float(last[place]),
                "median": float(bands[2, place]),
                "range_50": [float(bands[1, place]), float(bands[3, place])],
                "range_90": [float(bands[0, place]), float(bands[4, place])],
                "sparkline": bars["close"].iloc[-SPARKLINE:].astype(float).tolist(),
            }
            for place, (name, bars) in enumerate(part)
        ]

    def keep(
        self, asked: PreparedMarket, exchanges: list[str | None], keeper: Keeper | None
    ) -> tuple[dict[str, Any] | None, str]:
        """Keep the ranking in the ledger, if there is one; instruments of two exchanges have no hours in common."""
        if keeper is None or not self.rows:
            return None, ""
        store = asked.sources.store(asked.question.store)
        origin = Origin(store.folder, store.freqs[0], exchanges[0] if len(exchanges) == 1 else None)
        names, last = [row["instrument"] for row in self.rows], np.array([row["last_close"] for row in self.rows])
        question, closes = asked.question.model_dump(), np.concatenate(self.closes)
        digest = blake2b(" ".join(self.digests).encode(), digest_size=16).hexdigest()
        return keeper.keep(StoreForecast(asked.network, origin, asked.date, names, closes, last, question, digest))
