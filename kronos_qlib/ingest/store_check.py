"""What is odd in a Qlib store: gaps, jumps, stale or impossible bars, units that change, members without bars."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from kronos_qlib.data.checks import CHANGE_TOLERANCE, impossible_bars
from kronos_qlib.data.windows import COLUMNS
from kronos_qlib.ingest.bars import PRICES
from kronos_qlib.ingest.store_files import StoreFiles, allowed_prices
from kronos_qlib.ingest.symbols import is_index
from kronos_qlib.ingest.tables import SourceError

STALE = 5  # bars of the same four prices, traded, one after the other
GAP = 20  # sessions without a bar, one after the other
UNIT_STEP = 5.0  # by which amount / (close × volume) steps where a unit changes
BLOCK = 20  # bars whose median shows the unit
VOLUME_STEP = 50.0  # by which the median volume steps, where there is no amount
STEADY = 4.0  # times the deviation of the logarithm of the volume on either side of such a step
LARGE_MOVE = 0.5  # close to close, where no change or factor is there to compare with
NAMED = 5


@dataclass(frozen=True)
class StoreFinding:
    """One thing that was looked at: how many bars or files are concerned, and the worst of them."""

    level: Literal["ok", "warning", "error"]
    subject: str
    text: str
    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class StoreReport:
    """What was found in a store.

    per_instrument: index instrument; bars, first, last and a count for each subject. coverage: instruments with a bar,
    by session.
    """

    store: str
    freq: str
    findings: list[StoreFinding]
    per_instrument: pd.DataFrame
    coverage: pd.Series

    @property
    def errors(self) -> int:
        """How many findings are errors."""
        return sum(finding.level == "error" for finding in self.findings)

    def to_json(self) -> str:
        """Write the report as JSON: store, freq, findings, instruments."""
        instruments = json.loads(self.per_instrument.reset_index().to_json(orient="records", date_format="iso"))
        content = {"store": self.store, "freq": self.freq, "findings": [asdict(finding) for finding in self.findings]}
        return json.dumps(content | {"instruments": instruments}, indent=2, ensure_ascii=False) + "\n"


def check_store(
    folder: Path,
    freq: str | None = None,
    progress: Callable[[list[str]], Iterator[str]] = iter,
    recent: int = 0,
) -> StoreReport:
    """Look at every bar of a store.

    Args:
        freq: which bars; by default the finest there are.
        recent: last sessions in which jumps, stale prices and steps of a unit are errors: what arrived lately is
            mended before it is used.
        progress: wraps the list of instruments, to show how far it is.

    Raises:
        SourceError: no store, or none of this frequency. ValueError: a calendar or universe that cannot be read.
    """
    store = StoreFiles(folder)
    freq = freq or store.freqs[0]
    if freq not in store.freqs:
        raise SourceError(f"{folder}: no calendar of {freq}; it has {', '.join(store.freqs)}")
    calendar = store.calendar(freq)
    since = calendar[-recent] if 0 < recent <= len(calendar) else calendar[0] if recent else None
    late: dict[str, list[str]] = {subject: [] for subject in _SUSPICIOUS}
    counts: dict[str, dict[str, Any]] = {}
    seen: dict[str, list[tuple[float, str]]] = {subject: [] for subject, _, _ in _SUBJECTS}
    damaged: list[str] = []
    coverage = pd.Series(0, calendar)
    positive = allowed_prices(folder) == "positive"
    names = store.instruments()
    for name in progress(names):
        try:
            first, bars = store.read(name, freq, (*COLUMNS, "factor", "change"))
        except SourceError as error:
            damaged.append(str(error))
            continue
        if any(column not in bars for column in PRICES):
            if len(bars):
                damaged.append(f"{name}: no {next(column for column in PRICES if column not in bars)} of {freq}")
            continue
        times = calendar[first : first + len(bars)]
        if len(times) < len(bars):
            damaged.append(f"{name}: {len(bars) - len(times)} bars lie beyond the end of the calendar, Qlib reads none")
            bars = bars.iloc[: len(times)]
        counts[name] = _count(name, bars, times, seen, positive, late, since)
        coverage.iloc[first : first + len(bars)] += bars["close"].notna().to_numpy(int)
    table = pd.DataFrame.from_dict(counts, orient="index").rename_axis("instrument")
    findings = [
        *_calendar_findings(store, freq, calendar, table),
        StoreFinding("error", "damaged files", f"{len(damaged)} files cannot be read", len(damaged), damaged[:NAMED])
        if damaged
        else StoreFinding("ok", "damaged files", "none"),
        *(_finding(subject, level, text, table, seen[subject]) for subject, level, text in _SUBJECTS),
        *(
            StoreFinding("error", f"recent {subject}", f"{len(found)} since {since}", len(found), found[:NAMED])
            for subject, found in late.items()
            if found
        ),
        *_benchmark_findings(folder, table, len(calendar)),
        *_universe_findings(store, table, calendar),
    ]
    return StoreReport(str(folder), freq, findings, table, coverage)


_SUSPICIOUS = ("jumps", "stale prices", "unit changes")  # warnings of a history, errors of what arrived lately
# subject, level, what it is
_SUBJECTS: tuple[tuple[str, Literal["warning", "error"], str], ...] = (
    ("impossible bars", "error", "prices of zero or less, infinite, or open or close outside low … high"),
    ("missing bars", "warning", f"sessions between first and last bar without one; gaps over {GAP} are named"),
    ("no volume", "warning", "bars with prices and a volume of zero: suspended, or not known"),
    (
        "jumps",
        "warning",
        "moves of the close that $change or $factor contradict, or beyond half where neither is there",
    ),
    ("stale prices", "warning", f"bars that repeat all four prices of the {STALE - 1} before them, with a volume"),
    ("unit changes", "warning", "amount / (close × volume), or the volume, steps as where a unit changes"),
)


def _count(
    name: str,
    bars: pd.DataFrame,
    times: pd.DatetimeIndex,
    seen: dict[str, list[tuple[float, str]]],
    positive: bool,
    late: dict[str, list[str]],
    since: pd.Timestamp | None,
) -> dict[str, Any]:
    """Count what is odd in the bars of an instrument, keep the worst of each kind, and what is late of some."""
    prices = bars[PRICES].to_numpy(float)
    there = ~np.isnan(prices).any(axis=1)
    rows = np.flatnonzero(there)
    if not len(rows):
        return {"bars": 0, "first": None, "last": None} | {subject: 0 for subject, _, _ in _SUBJECTS}
    prices, own = prices[rows], times[rows]
    column = {
        field: bars[field].to_numpy(float)[rows] for field in ("volume", "amount", "factor", "change") if field in bars
    }
    form = "%Y-%m-%d" if (times == times.normalize()).all() else "%Y-%m-%d %H:%M"

    def note(subject: str, at: np.ndarray, size: np.ndarray, text: Callable[[int], str]) -> int:
        for place in at[np.argsort(-size[at], kind="stable")][:NAMED]:
            seen[subject].append((float(size[place]), f"{name} {own[place].strftime(form)}{text(int(place))}"))
        if subject in late and since is not None:
            late[subject] += [f"{name} {own[place].strftime(form)}{text(int(place))}" for place in at[own[at] >= since]]
        return len(at)

    finite = np.isfinite(prices).all(axis=1)
    wrong = ~finite | ((prices <= 0).any(axis=1) & positive)
    wrong[finite] |= impossible_bars(prices[finite])
    wrong |= np.any([value < 0 for key, value in column.items() if key in ("volume", "amount")], axis=0)
    shown = lambda place: " " + ", ".join(f"{label} {value:g}" for label, value in zip(PRICES, prices[place]))  # noqa: E731
    gaps = np.diff(rows, prepend=rows[0] - 1) - 1
    note("missing bars", np.flatnonzero(gaps > GAP), gaps.astype(float), lambda place: f": {gaps[place]} before it")
    volume = column.get("volume", np.full(len(rows), np.nan))
    idle = np.flatnonzero(volume == 0)
    returns = np.full(len(rows), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        returns[1:] = np.where(prices[:-1, 3] > 0, prices[1:, 3] / prices[:-1, 3] - 1, np.nan)
    against, at = _jumps(returns, gaps, column, index=is_index(name))
    same = np.r_[False, (prices[1:] == prices[:-1]).all(axis=1)] & (volume > 0 if np.isfinite(volume).any() else True)
    run = np.arange(len(same)) - np.maximum.accumulate(np.where(~same, np.arange(len(same)), 0)) + 1
    ends = np.flatnonzero((run >= STALE) & ~np.r_[same[1:], False])
    stale = int((run >= STALE).sum() + (STALE - 1) * len(ends))
    steps = _unit_steps(prices[:, 3], volume, column.get("amount"))
    return {
        "bars": len(rows),
        "first": own[0],
        "last": own[-1],
        "impossible bars": note("impossible bars", np.flatnonzero(wrong), np.ones(len(rows)), shown),
        "missing bars": int(gaps.sum()),
        "no volume": note("no volume", idle[:1], np.full(len(rows), len(idle)), lambda _: f" first of {len(idle)}")
        and len(idle),
        "jumps": note("jumps", at, np.abs(returns - np.nan_to_num(against)), lambda p: _jump(returns[p], against[p])),
        "stale prices": note("stale prices", ends, run.astype(float), lambda place: f": {run[place]} bars") and stale,
        "unit changes": note("unit changes", np.flatnonzero(steps > 0), steps, lambda p: f": × {steps[p]:.4g}"),
    }


def _jumps(
    returns: np.ndarray, gaps: np.ndarray, column: dict[str, np.ndarray], index: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return what the moves are to be (NaN where nothing says so), and which moves are otherwise."""
    change = column.get("change", np.full(len(returns), np.nan))
    with np.errstate(invalid="ignore", divide="ignore"):
        contradicted = np.abs(returns - change) > CHANGE_TOLERANCE
        if "factor" in column:
            step = np.r_[np.nan, column["factor"][1:] / column["factor"][:-1]]
            # Where the factor changes, adjusted prices do not: a move of the factor's size was adjusted twice or not.
            twice = (
                (np.abs(step - 1) > 0.05) & (np.abs(returns) > 0.05) & (np.abs(np.log1p(returns) / np.log(step)) > 0.8)
            )
            contradicted |= np.isnan(change) & twice & (np.abs(np.log1p(returns) / np.log(step)) < 1.25)
        large = np.isnan(change) & (np.abs(returns) > LARGE_MOVE) & (gaps == 0) & (not index)
    return change, np.flatnonzero(contradicted | large)


def _jump(move: float, said: float) -> str:
    return f": {move:+.1%}" + ("" if np.isnan(said) else f", $change {said:+.1%}")


def _unit_steps(close: np.ndarray, volume: np.ndarray, amount: np.ndarray | None) -> np.ndarray:
    """Return by which factor the unit steps at each bar, 0 where it does not: medians of the bars before and after."""
    steps = np.zeros(len(close))
    with np.errstate(divide="ignore", invalid="ignore"):
        known = amount is not None and np.isfinite(amount).any()
        level = np.log(amount / (close * volume)) if known else np.log(volume)
    level[~np.isfinite(level)] = np.nan
    rows = np.flatnonzero(~np.isnan(level))
    if len(rows) < 2 * BLOCK:
        return steps
    median = pd.Series(level[rows]).rolling(BLOCK).median().to_numpy()
    before, after = median[BLOCK - 1 : -BLOCK], median[2 * BLOCK - 1 :]
    distance = np.abs(after - before)
    limit = np.log(UNIT_STEP if known else VOLUME_STEP)
    over = distance > limit
    if not known:  # a young share's volume grows by as much, but not from one steady level to another
        spread = pd.Series(level[rows]).rolling(BLOCK).std().to_numpy()
        over &= distance > STEADY * np.maximum(spread[BLOCK - 1 : -BLOCK], spread[2 * BLOCK - 1 :])
    starts = np.flatnonzero(over & ~np.r_[False, over[:-1]])
    for start in starts:  # of each run of bars that see the step, the one that sees most of it
        end = start + int(np.argmin(np.r_[over[start:], False]))
        at = start + int(np.argmax(distance[start:end]))
        steps[rows[at + BLOCK]] = np.exp(distance[at])
    return steps


def _finding(
    subject: str, level: Literal["warning", "error"], text: str, table: pd.DataFrame, worst: list[tuple[float, str]]
) -> StoreFinding:
    total = int(table[subject].sum()) if len(table) else 0
    if not total:
        return StoreFinding("ok", subject, f"none ({text})")
    concerned = int((table[subject] > 0).sum())
    examples = [line for _, line in sorted(worst, key=lambda pair: (-pair[0], pair[1]))[:NAMED]]
    return StoreFinding(level, subject, f"{total:,} in {concerned:,} instruments: {text}", total, examples)


def _calendar_findings(
    store: StoreFiles, freq: str, calendar: pd.DatetimeIndex, table: pd.DataFrame
) -> Iterator[StoreFinding]:
    if not calendar.is_monotonic_increasing or calendar.has_duplicates:
        yield StoreFinding("error", "calendar", f"{store.calendar_file(freq)}: dates are not in order, or stand twice")
        return
    bars = int(table["bars"].sum()) if len(table) else 0
    span = f"{calendar[0]} … {calendar[-1]}".replace(" 00:00:00", "")
    level: Literal["ok", "error"] = "ok" if bars else "error"
    yield StoreFinding(
        level, "calendar", f"{len(calendar):,} sessions of {freq}, {span}; {len(table):,} instruments, {bars:,} bars"
    )
    if not store.calendar_file(freq, future=True).is_file():
        text = f"none: a backtest must end a session before the last, {calendar[-1].date()}"
        yield StoreFinding("warning", "future calendar", text)
    if bars:
        last = pd.to_datetime(table["last"])
        left = int((last < calendar[-1]).sum())
        yield StoreFinding("ok", "last date", f"{len(last) - left:,} instruments reach it, {left:,} end earlier")


def _benchmark_findings(folder: Path, table: pd.DataFrame, sessions: int) -> Iterator[StoreFinding]:
    path = folder / "ingest.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("benchmark") if path.is_file() else None
    indices = [name for name in table.index if is_index(name)] + ([named] if named in table.index else [])
    if not indices:
        yield StoreFinding("warning", "benchmark", "no index among the instruments (ingest --benchmark)")
    for name in dict.fromkeys(indices):
        missing = int(table.loc[name, "missing bars"])
        text = (
            f"{name}: {int(table.loc[name, 'bars']):,} bars for {sessions:,} sessions, {missing:,} missing between them"
        )
        yield StoreFinding("warning" if missing else "ok", "benchmark", text, missing)


def _universe_findings(store: StoreFiles, table: pd.DataFrame, calendar: pd.DatetimeIndex) -> Iterator[StoreFinding]:
    for name in store.universes:
        spans = store.universe(name)
        members = spans["instrument"].str.upper().unique()
        lacking = [member for member in members if member not in table.index or not table.loc[member, "bars"]]
        text = f"{name}: {len(members):,} instruments in {len(spans):,} spans"
        if lacking:
            text += f"; {len(lacking):,} of them have no bars: results on it are flattered if they left the market"
            yield StoreFinding("warning", "universe", text, len(lacking), lacking[:NAMED])
            continue
        last = pd.to_datetime(table["last"].reindex(members))
        if len(members) > 20 and (last == calendar[-1]).all() and (spans["last"] >= calendar[-1].normalize()).all():
            text += "; none has ever left: if these are the survivors, results on it are flattered"
            yield StoreFinding("warning", "universe", text)
            continue
        yield StoreFinding("ok", "universe", text)
