"""Bars → a Qlib store, written aside and moved into place."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from kronos_qlib.data.checks import check_universe_file
from kronos_qlib.ingest.bars import PRICES, read_bars
from kronos_qlib.ingest.rules import ADJUST, UNITS, Finding, find_adjustment, find_frequency, find_unit
from kronos_qlib.ingest.tables import SourceError

KINDS = (".csv", ".txt", ".tsv", ".parquet", ".feather", ".arrow", ".zip", ".gz")
FIELDS = ("open", "high", "low", "close", "volume", "amount", "factor", "change")
REJECTED, ABOUT = "rejected.csv", "ingest.json"
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)$", re.IGNORECASE)  # no folder on Windows may be called so


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
    findings: list[str] = field(default_factory=list)


def source_files(sources: Sequence[Path]) -> list[Path]:
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
            if name.lower().endswith(KINDS) and not name.startswith(".")
        ]
        if not inside:
            raise SourceError(f"{source}: holds no file of bars ({', '.join(KINDS)})")
        found |= dict.fromkeys(sorted(inside))
    return list(found)


def ingest(
    sources: Sequence[Path],
    store: Path,
    *,
    columns: Mapping[str, str] | None = None,
    unit: str = "auto",
    adjust: str = "auto",
    freq: str = "auto",
    tz: str | None = None,
    universes: Mapping[str, Path] | None = None,
    append: bool = False,
) -> IngestSummary:
    """Read bars and write them as a Qlib store, whole or not at all.

    The store gets open, high, low, close (× factor), volume (÷ factor), amount (money), factor where it is known, and
    change (close to close, a ratio); universe `all` and those given; rejected.csv and ingest.json, what was found.

    Args:
        unit, adjust, freq, tz: what `kronos_qlib.ingest.rules` would find; a time zone, to whose clock times with a
            zone are brought.
        universes: files of name, first and last date, by the universe's name.
        append: add bars to a store that is there. Bars that it has must be the same.

    Raises:
        SourceError: a source cannot be read, or the store holds other bars of the same time. FileExistsError: there is
            something at `store`. ValueError: a rule finds nothing.
    """
    if unit != "auto" and unit not in UNITS:
        raise ValueError(f"--unit {unit!r} is unknown; use auto, {', '.join(UNITS)}")
    if adjust not in ADJUST:
        raise ValueError(f"--adjust {adjust!r} is unknown; use {', '.join(ADJUST)}")
    store = Path(os.path.abspath(store.expanduser()))
    before = _read_store(store) if append else None
    if not append and (store.is_file() or (store.is_dir() and any(store.iterdir()))):
        raise FileExistsError(f"{store} is not empty; name another folder, or add bars to a store by --append")
    files = source_files(sources)
    read = [read_bars(path, columns) for path in files]
    summary = IngestSummary(store, files=len(files))
    for part in read:
        summary.findings += [finding for finding in part.findings if finding not in summary.findings]
    bars = pd.concat([_on_clock(part.bars, part.zone, tz) for part in read], ignore_index=True)
    rejected = pd.concat([part.rejected for part in read], ignore_index=True)
    bars = bars.sort_values(["instrument", "time"], kind="stable", ignore_index=True)
    twice = bars.duplicated(["instrument", "time"], keep="last")
    if twice.any():
        summary.findings.append(f"{twice.sum():,} bars of several files are of the same time; the last is taken")
        bars = bars[~twice].reset_index(drop=True)
    found_freq = Finding(freq, f"frequency: {freq}, as given") if freq != "auto" else find_frequency(bars)
    found_unit = Finding(unit, f"units: {UNITS[unit][3]}, as given") if unit != "auto" else find_unit(bars)
    found_adjust = Finding(adjust, f"adjustment: {adjust}, as given") if adjust != "auto" else find_adjustment(bars)
    summary.findings += [found.text for found in (found_freq, found_unit, found_adjust)]
    summary.freq = found_freq.value
    bars = _in_shares(bars, found_unit.value)
    bars = _adjusted(bars, found_adjust.value)
    if before is not None:
        bars = _joined(before, bars, store, summary)
    stored = bars["close"].astype(np.float32).astype(float)  # so that bars added later get the same
    bars["change"] = stored.groupby(bars["instrument"], sort=False).pct_change(fill_method=None)
    summary.instruments, summary.bars = bars["instrument"].nunique(), len(bars)
    summary.rejected = len(rejected)
    summary.first, summary.last = (str(bars["time"].agg(end)) for end in ("min", "max"))
    _write(bars, rejected, store, summary, universes or {})
    return summary


def _on_clock(bars: pd.DataFrame, zone: str | None, tz: str | None) -> pd.DataFrame:
    if zone is None or tz is None:
        return bars
    moved = bars["time"].dt.tz_localize(zone).dt.tz_convert(tz).dt.tz_localize(None)
    return bars.assign(time=moved)


def _in_shares(bars: pd.DataFrame, unit: str) -> pd.DataFrame:
    _, volume, amount, _ = UNITS[unit]
    for column, scale in (("volume", volume), ("amount", amount)):
        if column in bars and scale != 1:
            bars[column] *= scale
    return bars


def _adjusted(bars: pd.DataFrame, adjust: str) -> pd.DataFrame:
    if adjust == "none":
        return bars.drop(columns=[column for column in ("adjusted_close", "factor") if column in bars])
    if adjust not in bars:
        raise ValueError(f"--adjust {adjust}: the sources have no such column")
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


def _joined(before: pd.DataFrame, bars: pd.DataFrame, store: Path, summary: IngestSummary) -> pd.DataFrame:
    """Add new bars to those of a store, whose own stay as they are."""
    both = before.merge(bars, on=["instrument", "time"], suffixes=("", "_new"))
    for column in PRICES:
        differs = ~np.isclose(both[column], both[f"{column}_new"].astype(np.float32), rtol=1e-5, equal_nan=True)
        if differs.any():
            row = both[differs].iloc[0]
            raise SourceError(
                f"{store}: {row['instrument']} {row['time']} has {column} {row[column]:g} in the store and "
                f"{row[f'{column}_new']:g} in the sources ({differs.sum()} such bars): history has changed, perhaps it "
                "was adjusted anew; ingest all of it into another folder"
            )
    known = pd.MultiIndex.from_frame(before[["instrument", "time"]])
    new = bars[~pd.MultiIndex.from_frame(bars[["instrument", "time"]]).isin(known)]
    summary.findings.append(f"{len(new):,} new bars, {len(bars) - len(new):,} were there already")
    joined = pd.concat([before.drop(columns="change", errors="ignore"), new], ignore_index=True)
    return joined.sort_values(["instrument", "time"], ignore_index=True)


def _read_store(store: Path) -> pd.DataFrame:
    """Read all bars of a store that `ingest` has written."""
    about = store / ABOUT
    if not about.is_file():
        raise SourceError(f"{store}: no {ABOUT}, so it is no store that ingest has written; --append adds to such only")
    freq = json.loads(about.read_text())["freq"]
    times = pd.DatetimeIndex((store / "calendars" / f"{freq}.txt").read_text().split("\n")[:-1])
    tables = []
    for line in (store / "instruments" / "all.txt").read_text().splitlines():
        name = line.split("\t")[0]
        columns = {}
        for path in (store / "features" / name.lower()).glob(f"*.{freq}.bin"):
            values = np.fromfile(path, "<f4")
            columns[path.name.split(".")[0]] = values[1:]
            start = int(values[0])
        table = pd.DataFrame(columns, copy=False)
        table.insert(0, "time", times[start : start + len(table)])
        table.insert(0, "instrument", name)
        tables.append(table[table["close"].notna()])
    return pd.concat(tables, ignore_index=True)


def _write(
    bars: pd.DataFrame, rejected: pd.DataFrame, store: Path, summary: IngestSummary, universes: Mapping[str, Path]
) -> None:
    store.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{store.name}."
    with tempfile.TemporaryDirectory(prefix=prefix, suffix=".tmp", dir=store.parent) as scratch:
        draft = Path(scratch) / "store"
        for name in ("calendars", "instruments", "features"):
            (draft / name).mkdir(parents=True)
        calendar = np.unique(bars["time"].to_numpy("datetime64[ns]"))
        form = "%Y-%m-%d" if summary.freq == "day" else "%Y-%m-%d %H:%M:%S"
        if summary.freq == "day":
            bars = bars.assign(time=bars["time"].dt.normalize())
            calendar = np.unique(calendar.astype("datetime64[D]").astype("datetime64[ns]"))
        texts = pd.DatetimeIndex(calendar).strftime(form)
        (draft / "calendars" / f"{summary.freq}.txt").write_text("".join(f"{text}\n" for text in texts))
        rows = np.searchsorted(calendar, bars["time"].to_numpy("datetime64[ns]"))
        names, starts = np.unique(bars["instrument"].to_numpy(str), return_index=True)
        ends = [*starts[1:], len(bars)]
        fields = {name: bars[name].to_numpy("<f4") for name in FIELDS if name in bars}
        lines = []
        for name, start, end in zip(names.tolist(), starts, ends):
            first, last = int(rows[start]), int(rows[end - 1])
            folder = draft / "features" / f"{'_qlib_' if _RESERVED.fullmatch(name) else ''}{name}".lower()
            folder.mkdir()
            for column, values in fields.items():
                own = np.full(last - first + 2, np.nan, "<f4")
                own[0] = first
                own[1 + rows[start:end] - first] = values[start:end]
                own.tofile(folder / f"{column}.{summary.freq}.bin")
            lines.append(f"{name}\t{texts[first]}\t{texts[last]}\n")
        (draft / "instruments" / "all.txt").write_text("".join(lines))
        for name, path in universes.items():
            _write_universe(draft, name, path, set(names.tolist()), summary)
        rejected.to_csv(draft / REJECTED, index=False)
        about = {"freq": summary.freq, "findings": summary.findings}
        (draft / ABOUT).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n")
        if store.is_dir():  # empty, or a store that bars were added to
            store.rename(Path(scratch) / "former")
        try:
            draft.rename(store)
        except OSError:
            if (Path(scratch) / "former").exists():
                (Path(scratch) / "former").rename(store)
            raise


def _write_universe(draft: Path, name: str, path: Path, known: set[str], summary: IngestSummary) -> None:
    if not re.fullmatch(r"[a-z0-9_]+", name) or name == "all":
        raise ValueError(f"--universe {name!r}: a universe's name is small letters, digits and _, and not all")
    if not path.is_file():
        raise SourceError(f"--universe {name}: {path}: no such file")
    check_universe_file(path)
    shutil.copyfile(path, draft / "instruments" / f"{name}.txt")
    members = {line.split("\t")[0] for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()}
    lacking = sorted(members - known)
    if lacking:
        summary.findings.append(
            f"universe {name}: {len(lacking)} of {len(members)} members have no bars, {lacking[0]} first: results on "
            "it are flattered if they have left the market"
        )
