"""Bars → a Qlib store, written aside and moved into place."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pyarrow as pa
from joblib import Parallel, delayed
from tqdm import tqdm

from kronos_qlib.data.checks import Prices
from kronos_qlib.extensions import identify
from kronos_qlib.ingest.bars import PRICES, SourceBars, concatenated, once_each, read_bars
from kronos_qlib.ingest.rules import (
    ADJUST,
    LABELS,
    UNITS,
    Finding,
    commonest,
    find_adjustment,
    find_contradictions,
    find_frequency,
    find_label,
    find_unit,
    summarise,
)
from kronos_qlib.ingest.store_files import ABOUT, StoreFiles, folder_name
from kronos_qlib.ingest.symbols import instrument_name
from kronos_qlib.ingest.tables import SourceError, load_reader

KINDS = (".csv", ".txt", ".tsv", ".parquet", ".feather", ".arrow", ".zip", ".gz")
FIELDS = ("open", "high", "low", "close", "volume", "amount", "factor", "change", "vwap")
REJECTED = "rejected.csv"
MANY_FILES = 100  # from which on several processes read them
_NUMBERS = ("open", "high", "low", "close", "volume", "amount", "factor", "change")


@dataclass
class IngestSummary:
    """What became of the sources: findings in words, counts, and where the store is."""

    store: Path
    freq: str = ""
    files: int = 0
    instruments: int = 0
    bars: int = 0
    rejected: int = 0
    first: str = ""
    last: str = ""
    label: str = ""
    prices: str = "positive"
    benchmark: str | None = None
    findings: list[str] = field(default_factory=list)


def source_files(sources: Sequence[Path], kinds: tuple[str, ...] = KINDS) -> list[Path]:
    """List the files of some files and folders, by their kind; a link that leads in a circle is followed once.

    Raises:
        SourceError: a source is not there, or holds no file of bars.
    """
    found: dict[Path, None] = {}
    for source in sources:
        if source.is_file():
            found[source] = None
            continue
        if not source.is_dir():
            raise SourceError(f"{source}: no such file or folder")
        inside = [
            Path(folder) / name
            for folder, _, names in os.walk(source)  # follows no link to a folder
            for name in names
            if name.lower().endswith(kinds) and not name.startswith(".")
        ]
        if not inside:
            raise SourceError(f"{source}: holds no file of bars ({', '.join(kinds) or 'any'})")
        found |= dict.fromkeys(sorted(inside))
    return list(found)


def ingest(
    sources: Sequence[Path],
    store: Path,
    *,
    columns: Mapping[str, str] | None = None,
    symbols: Mapping[str, str] | None = None,
    unit: str = "auto",
    adjust: str = "auto",
    freq: str = "auto",
    label: str = "auto",
    tz: str | None = None,
    dates: str | None = None,
    reader: Mapping[str, Any] | None = None,
    prices: str | None = None,
    universes: Mapping[str, Path] | None = None,
    benchmark: str | None = None,
    append: bool = False,
    rebase: bool = False,
    progress: bool = False,
) -> IngestSummary:
    """Read bars and write them as a Qlib store, whole or not at all.

    The store gets open, high, low, close (× factor), volume (÷ factor), amount (money), vwap where there is an amount,
    factor where it is known, and change (close to close, a ratio: the source's own where it says one); universe `all`
    and those given; rejected.csv and ingest.json, what was found. Bars have the times of their starts.

    Args:
        columns, symbols, tz, dates, reader, prices: see `read_bars`; with a reader all files of a folder are read.
        unit, adjust, freq, label: what `kronos_qlib.ingest.rules` would find.
        universes: files of name, first and last date, by the universe's name.
        benchmark: a file of an index's bars, or one of the instruments: it is not in the universe `all`.
        append: add bars to a store that is there. Bars that it has must be the same.
        rebase: with append, bring new bars to the base of the store's prices where they differ by a constant factor.
        progress: show a bar.

    Raises:
        SourceError: a source cannot be read, or the store holds other bars of the same time. FileExistsError: there is
            something at `store`. ValueError: a rule finds nothing.
    """
    for name, value, known in (
        ("unit", unit, ("auto", *UNITS)),
        ("adjust", adjust, ADJUST),
        ("label", label, LABELS),
        ("prices", prices or "positive", get_args(Prices)),
    ):
        if value not in known:
            raise ValueError(f"--{name} {value!r} is unknown; use {', '.join(known)}")
    if rebase and not append:
        raise ValueError("--rebase goes with --append")
    if freq != "auto" and not re.fullmatch(r"day|1week|[1-9]\d*min", freq):
        raise ValueError(f"--freq {freq!r} is unknown; use auto, day, 1week, or minutes such as 5min")
    store = Path(os.path.abspath(store.expanduser()))
    before, about = _read_store(store) if append else (None, {})
    if prices is not None and prices != about.get("prices", "positive" if append else prices):
        raise ValueError(f"--prices {prices}: {store} was written with {about.get('prices', 'positive')}")
    prices = about.get("prices", prices) or "positive"
    if not append and (store.is_file() or (store.is_dir() and any(store.iterdir()))):
        raise FileExistsError(f"{store} is not empty; name another folder, or add bars to a store by --append")
    index = Path(benchmark) if benchmark and Path(benchmark).is_file() else None
    if reader is not None:
        reader = identify(reader)
        load_reader(reader)  # one that cannot be made is an error before anything is read
    files = source_files([*sources, *([index] if index else [])], KINDS if reader is None else ("",))
    read = _read_all(files, columns or {}, tz, symbols or {}, dates, reader, prices, progress)
    summary = IngestSummary(store, files=len(files), prices=prices)
    for part in read:
        summary.findings += [finding for finding in part.findings if finding not in summary.findings]
    rejected = pd.concat([part.rejected for part in read], ignore_index=True)
    parts = [part.bars for part in read]
    named = index and parts[files.index(index)]["instrument"].cat.categories[0]
    del read
    _to_shares(parts, files, unit, summary)
    _adjust(parts, adjust, summary)
    parts = [part.astype(dict.fromkeys(part.columns.intersection(_NUMBERS), "float32")) for part in parts]
    bars = concatenated(parts)
    del parts
    bars, twice = once_each(bars)
    if len(twice):
        summary.findings.append(
            f"{len(twice):,} bars stand in several files, the last is taken: {twice['reason'].iloc[0]} first"
        )
        rejected = pd.concat([rejected, twice], ignore_index=True)
    bars = bars.drop(columns=["file", "line"])
    if before is not None:  # a day or two tell neither
        freq = about["freq"] if freq == "auto" else freq
        label = about.get("label") or label if label == "auto" else label
    found = Finding(freq, f"frequency: {freq}, as given") if freq != "auto" else find_frequency(bars)
    summary.freq = found.value
    summary.findings.append(found.text)
    bars = _at_starts(bars, label, summary)
    if before is not None:
        if about["freq"] != summary.freq:
            raise SourceError(f"{store}: the store has bars of {about['freq']}, the sources of {summary.freq}")
        bars = _joined(before, bars, store, summary, rebase)
    _add_change(bars)
    if "amount" in bars and "volume" in bars:
        with np.errstate(divide="ignore", invalid="ignore"):
            vwap = (bars["amount"].astype(float) / bars["volume"].where(bars["volume"] > 0)).astype(np.float32)
        within = (vwap > 0.5 * bars["close"]) & (vwap < 2 * bars["close"])
        bars["vwap"] = vwap.where(within)
    names = bars["instrument"].cat.categories.tolist()
    summary.benchmark = _benchmark(named or benchmark, names) or about.get("benchmark")
    summary.instruments, summary.bars, summary.rejected = len(names), len(bars), len(rejected)
    summary.first, summary.last = (str(bars["time"].agg(end)) for end in ("min", "max"))
    _write(bars, rejected, store, summary, universes or {}, about.get("universes", []))
    return summary


def _add_change(bars: pd.DataFrame) -> None:
    """Add the change from close to close, a ratio, where the source says none."""
    close, code = bars["close"].to_numpy(float), bars["instrument"].cat.codes.to_numpy()
    change = np.full(len(bars), np.nan, np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):  # no ratio where prices are zero or less
        known = (code[1:] == code[:-1]) & (close[1:] > 0) & (close[:-1] > 0)
        change[1:] = np.where(known, close[1:] / close[:-1] - 1, np.nan)
    said = bars["change"].to_numpy(np.float32) if "change" in bars else np.full(len(bars), np.nan, np.float32)
    bars["change"] = np.where(np.isnan(said), change, said)


def _read_all(
    files: Sequence[Path],
    columns: Mapping[str, str],
    tz: str | None,
    symbols: Mapping[str, str],
    dates: str | None,
    reader: Mapping[str, Any] | None,
    prices: str,
    progress: bool,
) -> list[SourceBars]:
    """Read files one after the other, or many in several processes."""
    processes = pa.cpu_count() if len(files) >= MANY_FILES else 1
    run = Parallel(n_jobs=processes, return_as="generator", pre_dispatch="4*n_jobs")
    jobs = run(delayed(read_bars)(path, columns, tz, symbols, dates, reader, prices) for path in files)
    return list(tqdm(jobs, "reading", len(files), unit="file", disable=None if progress else True, leave=False))


def _to_shares(parts: Sequence[pd.DataFrame], files: Sequence[Path], unit: str, summary: IngestSummary) -> None:
    """Bring the volumes of each file to shares, its amounts to money.

    Raises:
        ValueError: the figure of a file fits no unit, and the other files do not agree on one.
    """
    if unit != "auto":
        summary.findings.append(f"units: {UNITS[unit][3]}, as given")
        found = [Finding(unit, "")] * len(parts)
    else:
        found = [find_unit(part) for part in parts]
        common = commonest([finding.value for finding in found])
        unknown = [place for place, finding in enumerate(found) if finding.value == "?"]
        if unknown and common is None:
            path, figure = files[unknown[0]], found[unknown[0]].figure
            raise ValueError(
                f"units: {path}: the median of amount / (close × volume) is {figure:.4g}, which fits none of "
                f"{', '.join(UNITS)}; name one by --unit"
            )
        for place in unknown:
            text = f"units: none fits, those of the other files are taken ({files[unknown[0]].name} first)"
            found[place] = Finding(str(common), text, found[place].figure)
        summary.findings += summarise(found)
    for part, finding in zip(parts, found):
        _, volume, amount, _ = UNITS[finding.value or "shares"]
        for column, scale in (("volume", volume), ("amount", amount)):
            if column in part and scale != 1:
                part[column] *= scale


def _adjust(parts: list[pd.DataFrame], adjust: str, summary: IngestSummary) -> None:
    """Adjust the prices and volumes of each file."""
    found = [find_adjustment(part) if adjust == "auto" else Finding(adjust, "") for part in parts]
    summary.findings += summarise(found) if adjust == "auto" else [f"adjustment: {adjust}, as given"]
    contradictions, first = 0, ""
    for place, finding in enumerate(found):
        parts[place] = _adjusted(parts[place], finding.value)
        count, text = find_contradictions(parts[place])
        contradictions, first = contradictions + count, first or text
    if contradictions:
        summary.findings.append(
            f"adjustment: the close moves otherwise than the source's own change says on {contradictions:,} bars, "
            f"{first} first: prices are not adjusted there, or wrongly"
        )


def _adjusted(bars: pd.DataFrame, adjust: str) -> pd.DataFrame:
    if adjust == "none":
        return bars.drop(columns=[column for column in ("adjusted_close", "factor") if column in bars])
    if adjust in ("given", "prices given"):
        if adjust == "prices given":
            bars["volume"] /= bars["factor"]
        return bars
    if adjust not in bars:
        raise ValueError(f"--adjust {adjust}: {bars['file'].cat.categories[0]} has no such column")
    factor = bars["adjusted_close"] / bars["close"] if adjust == "adjusted_close" else bars["factor"]
    bad = ~(factor > 0)
    if bad.any():
        row = bars[bad].iloc[0]
        raise SourceError(f"{row['instrument']} {row['time']}: no {adjust} to adjust by ({bad.sum()} such bars)")
    bars[PRICES] = bars[PRICES].mul(factor, axis=0)
    if "volume" in bars:
        bars["volume"] /= factor
    bars["factor"] = factor
    return bars.drop(columns="adjusted_close", errors="ignore")


def _at_starts(bars: pd.DataFrame, label: str, summary: IngestSummary) -> pd.DataFrame:
    """Name each bar by its start, days by their date."""
    if not summary.freq.endswith("min"):
        days = bars["time"].dt.normalize()
        twice = pd.DataFrame({"instrument": bars["instrument"], "time": days}).duplicated()
        if twice.any():
            row = bars[twice].iloc[0]
            where = f"{row['instrument']} {row['time']}"
            raise SourceError(f"{where}: a second bar of this day; name the frequency by --freq")
        return bars.assign(time=days)
    given = Finding(label, f"label of a bar: its {label}, as given")
    found = find_label(bars, summary.freq) if label == "auto" else given
    summary.findings.append(found.text)
    summary.label = found.value
    length = pd.Timedelta(minutes=int(summary.freq.removesuffix("min")))
    return bars.assign(time=bars["time"] - length) if found.value == "end" else bars


def _benchmark(name: str | None, names: Sequence[str]) -> str | None:
    if name is None or name in names:
        return name
    wanted = instrument_name(name)
    if wanted not in names:
        raise SourceError(f"--benchmark {name}: neither a file nor an instrument of the sources")
    return wanted


def _joined(
    before: pd.DataFrame, bars: pd.DataFrame, store: Path, summary: IngestSummary, rebase: bool
) -> pd.DataFrame:
    """Add new bars to those of a store, whose own stay as they are."""
    for column in ("volume", "amount", "factor"):
        if (column in before) != (column in bars):
            one = "the store has" if column in before else "the sources have"
            raise SourceError(f"{store}: only {one} a {column}: ingest all of it into another folder")
    both = before.merge(bars, on=["instrument", "time"], suffixes=("", "_new"))
    if rebase and len(both):
        bars = _rebased(both, bars, summary)
        both = before.merge(bars, on=["instrument", "time"], suffixes=("", "_new"))
    for column in PRICES:
        differs = ~np.isclose(both[column], both[f"{column}_new"], rtol=1e-5, equal_nan=True)
        if differs.any():
            row = both[differs].iloc[0]
            raise SourceError(
                f"{store}: {row['instrument']} {row['time']} has {column} {row[column]:g} in the store and "
                f"{row[f'{column}_new']:g} in the sources ({differs.sum()} such bars): history has changed. If it was "
                "adjusted anew, --rebase brings the new bars to the store's base; or ingest all into another folder"
            )
    whole = concatenated([before, bars])
    whole["instrument"] = whole["instrument"].cat.reorder_categories(sorted(whole["instrument"].cat.categories))
    whole = whole.drop_duplicates(["instrument", "time"], keep="first")
    new = len(whole) - len(before)
    summary.findings.append(f"{new:,} new bars, {len(bars) - new:,} were there already")
    return whole.sort_values(["instrument", "time"], ignore_index=True)


def _rebased(both: pd.DataFrame, bars: pd.DataFrame, summary: IngestSummary) -> pd.DataFrame:
    """Multiply the prices of each instrument's new bars by what the store's are of them.

    Raises:
        SourceError: the ratio is not the same on all bars that both have, so it is no new base.
    """
    ratio = both["close"].astype(float) / both["close_new"]
    groups = ratio.groupby(both["instrument"], observed=True)
    scale, apart = groups.median(), groups.max() / groups.min()
    wrong = apart[apart > 1 + 1e-4]
    if len(wrong):
        raise SourceError(
            f"--rebase: {wrong.index[0]}: the store's closes are {groups.min()[wrong.index[0]]:.6g} … "
            f"{groups.max()[wrong.index[0]]:.6g} of the sources', no constant factor: a price was corrected"
        )
    moved = scale[np.abs(scale - 1) > 1e-6]
    own = bars["instrument"].map(moved).astype(float).fillna(1.0).to_numpy()
    bars = bars.copy()
    for column in [*PRICES, *(["factor"] if "factor" in bars else [])]:
        bars[column] = (bars[column] * own).astype(np.float32)
    if "volume" in bars:
        bars["volume"] = (bars["volume"] / own).astype(np.float32)
    if len(moved):
        first = f"{moved.index[0]} × {moved.iloc[0]:.6g} first"
        summary.findings.append(f"re-based: prices of {len(moved):,} instruments to those of the store, {first}")
    return bars


def _read_store(store: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read all bars of a store that `ingest` has written, and what it said of them."""
    path = store / ABOUT
    if not path.is_file():
        raise SourceError(f"{store}: no {ABOUT}, so it is no store that ingest has written; --append adds to such only")
    about, files = json.loads(path.read_text()), StoreFiles(store)
    times = files.calendar(about["freq"])
    tables, names = [], files.instruments()
    for number, name in enumerate(names):
        first, table = files.read(name, about["freq"], FIELDS)
        table.insert(0, "time", times[first : first + len(table)])
        table.insert(0, "instrument", pd.Categorical.from_codes(np.full(len(table), number), names))
        tables.append(table[table["close"].notna()])
    return pd.concat(tables, ignore_index=True), about


def _write(
    bars: pd.DataFrame,
    rejected: pd.DataFrame,
    store: Path,
    summary: IngestSummary,
    universes: Mapping[str, Path],
    former: Sequence[str],
) -> None:
    store.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{store.name}."
    with tempfile.TemporaryDirectory(prefix=prefix, suffix=".tmp", dir=store.parent) as scratch:
        draft = Path(scratch) / "store"
        for name in ("calendars", "instruments", "features"):
            (draft / name).mkdir(parents=True)
        spans = _write_bars(draft, bars, summary.freq)
        if summary.freq != "day":  # Qlib's backtests ask for the benchmark's days first, whatever their frequency
            _write_bars(draft, _days(bars), "day")
            summary.findings.append(
                f"bars of day, made of those of {summary.freq}, lie beside them, for Qlib's backtests"
            )
        lines = [f"{name}\t{first}\t{last}\n" for name, first, last in spans if name != summary.benchmark]
        (draft / "instruments" / "all.txt").write_text("".join(lines))
        for name in former:
            shutil.copyfile(store / "instruments" / f"{name}.txt", draft / "instruments" / f"{name}.txt")
        for name, path in universes.items():
            _write_universe(draft, name, path, {name for name, _, _ in spans}, summary)
        rejected.to_csv(draft / REJECTED, index=False)
        about = {
            "freq": summary.freq,
            "label": summary.label,
            "prices": summary.prices,
            "benchmark": summary.benchmark,
            "universes": sorted({*former, *universes}),
            "findings": summary.findings,
        }
        (draft / ABOUT).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n")
        if store.is_dir():  # empty, or a store that bars were added to
            store.rename(Path(scratch) / "former")
        try:
            draft.rename(store)
        except OSError:
            if (Path(scratch) / "former").exists():
                (Path(scratch) / "former").rename(store)
            raise


def _write_bars(draft: Path, bars: pd.DataFrame, freq: str) -> list[tuple[str, str, str]]:
    """Write the calendar and the binary files of some bars, and return each instrument's first and last time."""
    form = "%Y-%m-%d %H:%M:%S" if freq.endswith("min") else "%Y-%m-%d"
    calendar = np.unique(bars["time"].to_numpy("datetime64[ns]"))
    texts = pd.DatetimeIndex(calendar).strftime(form)
    (draft / "calendars" / f"{freq}.txt").write_text("".join(f"{text}\n" for text in texts))
    rows = np.searchsorted(calendar, bars["time"].to_numpy("datetime64[ns]"))
    codes, names = bars["instrument"].cat.codes.to_numpy(), bars["instrument"].cat.categories
    starts = np.flatnonzero(np.r_[True, codes[1:] != codes[:-1]])
    fields = {name: bars[name].to_numpy("<f4") for name in FIELDS if name in bars}
    spans = []
    for start, end in zip(starts, [*starts[1:], len(bars)]):
        name, first, last = names[codes[start]], int(rows[start]), int(rows[end - 1])
        folder = draft / "features" / folder_name(name)
        folder.mkdir(exist_ok=True)
        for column, values in fields.items():
            own = np.full(last - first + 2, np.nan, "<f4")
            own[0] = first
            own[1 + rows[start:end] - first] = values[start:end]
            own.tofile(folder / f"{column}.{freq}.bin")
        spans.append((name, texts[first], texts[last]))
    return spans


def _days(bars: pd.DataFrame) -> pd.DataFrame:
    """Join the bars of each instrument's days, which are those of the calendar: a night session is of two."""
    joins = {"open": "first", "high": "max", "low": "min", "close": "last", "factor": "last"}
    kept = {
        column: joins.get(column, "sum") for column in FIELDS if column in bars and column not in ("change", "vwap")
    }
    keys = [bars["instrument"], bars["time"].dt.normalize().rename("time")]
    days = bars.groupby(keys, observed=True, sort=False).agg(kept).reset_index()
    _add_change(days)
    if "vwap" in bars:
        money = (bars["vwap"] * bars["volume"]).groupby(keys, observed=True, sort=False).sum(min_count=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            days["vwap"] = money.to_numpy() / days["volume"].where(days["volume"] > 0)
    return days


def _write_universe(draft: Path, name: str, path: Path, known: set[str], summary: IngestSummary) -> None:
    if not re.fullmatch(r"[a-z0-9_]+", name) or name == "all":
        raise ValueError(f"--universe {name!r}: a universe's name is small letters, digits and _, and not all")
    if not path.is_file():
        raise SourceError(f"--universe {name}: {path}: no such file")
    spans = _read_spans(path, f"--universe {name}", summary.last)
    late = " 23:59:59" if summary.freq.endswith("min") else ""  # the last day is a member's to its last minute
    text = "".join(f"{member}\t{first:%Y-%m-%d}\t{last:%Y-%m-%d}{late}\n" for member, first, last in spans)
    (draft / "instruments" / f"{name}.txt").write_text(text)
    members = {member for member, _, _ in spans}
    lacking = sorted(members - known)
    if lacking:
        summary.findings.append(
            f"universe {name}: {len(lacking)} of {len(members)} members have no bars, {lacking[0]} first: results on "
            "it are flattered if they have left the market"
        )


def _read_spans(path: Path, where: str, end: str) -> list[tuple[str, pd.Timestamp, pd.Timestamp]]:
    """Read members of a universe: symbol, first and last date, by tabs, commas or semicolons; no last date is open.

    A first line of names is skipped. Raises ValueError for a line that is no span.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise SourceError(f"{where}: {path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    spans = []
    for number, line in enumerate(lines, 1):
        symbol, *dates = [cell.strip() for cell in re.split(r"[\t,;]", line)]
        if not line.strip():
            continue
        first, last = (pd.to_datetime(date, errors="coerce") for date in [*dates, "", ""][:2])
        if number == 1 and not any(re.search(r"\d", date) for date in dates):
            continue
        last = pd.Timestamp(end).normalize() if len(dates) < 2 or not dates[1] else last
        if not symbol or pd.isna(first) or pd.isna(last) or first > last:
            raise SourceError(f"{where}: {path}: line {number} is no symbol, first and last date: {line!r:.80}")
        spans.append((instrument_name(symbol), first, last))
    if not spans:
        raise SourceError(f"{where}: {path}: no members")
    return spans
