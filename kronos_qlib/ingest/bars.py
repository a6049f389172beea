"""Tables of users' files → bars by instrument and time, and what was found and left out on the way."""

import contextlib
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from kronos_qlib.data.checks import impossible_bars
from kronos_qlib.data.columns import find_columns, is_rate, plain_name
from kronos_qlib.data.dates import read_times
from kronos_qlib.data.windows import COLUMNS
from kronos_qlib.ingest.symbols import instrument_name
from kronos_qlib.ingest.tables import MISSING, RawTable, SourceError, read_tables

PRICES = list(COLUMNS[:4])
RATE_BARS = 100  # by which it is decided whether a turnover is a rate
_ISO = re.compile(r"\d{4}-\d\d-\d\d($|[ T]\d\d:)")
# Of a bar's time, the surest first; a date and a time of day in two columns are put together.
TIMES = (
    *("datetime", "timestamp", "timestamps", "date", "trade_date", "tradedate", "day", "日期", "时间", "time"),
    *("open_time", "window_start", "index", "unnamed:_0", "column_1"),
)
EXTRAS = {  # of a bar, for its adjustment
    "adjusted_close": ("adjclose", "adj_close", "adjusted_close"),
    "factor": ("factor", "adj_factor"),
}
SYMBOLS = ("symbol", "instrument", "ts_code", "order_book_id", "ticker", "code", "股票代码")


@dataclass(frozen=True)
class SourceBars:
    """The bars of a file.

    bars: columns instrument, time (datetime64[ns], the clock of the source), open, high, low, close, volume, amount as
        far as the file has them, float64, and adjusted_close and factor likewise; sorted by instrument and time, each
        pair once; prices whole.
    rejected: file, line and reason of each row that is no bar.
    findings: what was found, in words, with the figure behind it.
    zone: the time zone of the clock, or None.
    """

    bars: pd.DataFrame
    rejected: pd.DataFrame
    findings: list[str]
    zone: str | None = None


def read_bars(path: Path, columns: Mapping[str, str] | None = None) -> SourceBars:
    """Read the bars of a file.

    Args:
        columns: names in the file by column of a bar (`close`, `time`, `instrument` …), where they are foreign.

    Raises:
        SourceError: the file holds no bars; one line that names it.
    """
    parts = [_table_bars(table, columns or {}) for table in read_tables(path)]
    bars = pd.concat([part.bars for part in parts], ignore_index=True)
    rejected = pd.concat([part.rejected for part in parts], ignore_index=True)
    if bars.empty:
        reason = f"; {len(rejected)} rows rejected, the first: {rejected['reason'].iloc[0]}" if len(rejected) else ""
        raise SourceError(f"{path}: no bars{reason}")
    bars = bars.sort_values(["instrument", "time"], kind="stable")
    twice = bars.duplicated(["instrument", "time"], keep="last")
    findings = list(dict.fromkeys(finding for part in parts for finding in part.findings))
    if twice.any():
        first = bars[twice].iloc[0]
        findings.append(
            f"{twice.sum()} bars stand twice, {first['instrument']} {first['time']} first; the last of each is taken"
        )
    return SourceBars(bars[~twice].reset_index(drop=True), rejected, findings, parts[0].zone)


def _table_bars(table: RawTable, given: Mapping[str, str]) -> SourceBars:
    where = table.name if table.name == table.path.name else f"{table.path}:{table.name}"
    for column, name in given.items():
        if name not in table.columns:
            raise SourceError(f"{where}: no column {name!r} for {column}; it has {', '.join(table.columns)[:200]}")
    try:
        found = {column: str(label) for column, label in find_columns(table.columns).items()}
    except ValueError as error:
        raise SourceError(f"{where}: {error}") from None
    found |= {column: name for column, name in given.items() if column in COLUMNS}
    ticks = next((name for name in table.columns if plain_name(name) == "tickvol"), None)
    if ticks is not None and "volume" not in given and not _numbers(table.columns[found["volume"]])[0].any():
        found["volume"] = ticks  # MetaTrader counts ticks where it knows no volume
    lacking = [column for column in PRICES if column not in found]
    if lacking:
        raise SourceError(
            f"{where}: no column for {lacking[0]}; it has {', '.join(table.columns)[:200]} (--map {lacking[0]}=NAME)"
        )
    rows = len(next(iter(table.columns.values())))
    faults: list[tuple[np.ndarray, str]] = []
    values: dict[str, np.ndarray] = {}
    for column in COLUMNS:
        if column in found:
            values[column], bad = _numbers(table.columns[found[column]])
            faults.append((bad, f"{column} is no number"))
            if column in PRICES:
                faults.append((~np.isfinite(values[column]), f"no {column}"))
    named = {plain_name(column): column for column in table.columns}
    for column, names in EXTRAS.items():
        label = next((named[name] for name in names if name in named), None)
        if label is not None:
            values[column], _ = _numbers(table.columns[label])
    times, zone, findings = _times(table, given, where)
    faults.append((np.isnat(times), "no time"))
    instruments = _instruments(table, given, rows)
    faults.append((instruments == "", "no instrument"))
    prices = np.stack([values[column] for column in PRICES], axis=1)
    faults.append((prices.min(axis=1) <= 0, "a price of zero or less"))
    faults.append((impossible_bars(prices), "open or close outside low … high"))
    bad = np.any([wrong for wrong, _ in faults], axis=0)
    findings.append(f"columns: {', '.join(f'{column} = {found[column]}' for column in found)}")
    frame = pd.DataFrame({"instrument": instruments, "time": times, **values}, copy=False)
    rejected = pd.DataFrame(table.rejected, columns=["line", "reason"])
    if bad.any():
        frame = frame[~bad]
        reasons = np.select([wrong[bad] for wrong, _ in faults], [reason for _, reason in faults], "")
        lines = np.arange(rows + len(rejected)) + table.first_line
        own = pd.DataFrame({"line": np.setdiff1d(lines, rejected["line"])[bad], "reason": reasons})
        rejected = pd.concat([own, rejected], ignore_index=True)
    first = frame.nsmallest(RATE_BARS, "time")  # no later bar decides what an earlier one means
    if plain_name(found.get("amount", "")) == "turnover" and is_rate(
        first["amount"], first["close"], first.get("volume")
    ):
        findings.append("turnover is a rate, as its values are below price × volume: no amount")
        frame = frame.drop(columns="amount")
    rejected.insert(0, "file", where)
    return SourceBars(frame, rejected, findings, zone)


def _numbers(values: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return numbers, NaN where there is none, and which cells hold something else."""
    if pa.types.is_floating(values.type):
        numbers = values.to_numpy().astype(float)
        return np.where(np.isinf(numbers), np.nan, numbers), np.isinf(numbers)
    if not pa.types.is_string(values.type) and not pa.types.is_large_string(values.type):
        numbers = pd.to_numeric(values.to_pandas(), errors="coerce").to_numpy(float)
        return numbers, np.zeros(len(numbers), bool)
    text = values.to_pandas().fillna("").str.strip()
    empty = text.isin(MISSING)
    plain = text.str.replace(r"^(-?\d{1,3}(?:,\d{3})+)(\.\d+)?$", lambda match: match[0].replace(",", ""), regex=True)
    numbers = pd.to_numeric(plain.str.removesuffix("%").where(~empty), errors="coerce").to_numpy(float)
    numbers = np.where(np.isfinite(numbers), numbers, np.nan)
    return numbers, np.isnan(numbers) & ~empty.to_numpy()


def _times(table: RawTable, given: Mapping[str, str], where: str) -> tuple[np.ndarray, str | None, list[str]]:
    """Return the bars' times on the clock of the source, NaT where there is none, its zone, and what was found."""
    names = {plain_name(column): column for column in reversed(table.columns)}
    chosen = given.get("time") or next((names[name] for name in TIMES if name in names), None)
    if chosen is None:
        raise SourceError(f"{where}: no column for the time; it has {', '.join(table.columns)[:200]} (--map time=NAME)")
    values = table.columns[chosen].to_pandas()
    clock = names.get("time")
    if clock in (None, chosen) and values.dtype == object and _ISO.match(str(values.iloc[0]) if len(values) else ""):
        with contextlib.suppress(ValueError):
            index = pd.DatetimeIndex(pd.to_datetime(values, format="ISO8601"))
            if index.tz is None and not index.hasnans:
                return index.to_numpy("datetime64[ns]"), None, []
    if clock is not None and clock != chosen and plain_name(chosen) != "datetime":
        both = table.columns[clock].to_pandas().astype(str).str.strip()
        if both.str.fullmatch(r"\d{14,17}").all():  # baostock: date and time of day in one
            values = both
        else:
            values = values.astype(str).str.strip() + " " + both.map(_clock)
    if pd.api.types.is_string_dtype(values) or values.dtype == object:
        values = _plain_times(values)
    empty = values.isna() | (values.astype(str).str.strip().isin(MISSING))
    known = values[~empty]
    if known.empty:
        return np.full(len(values), np.datetime64("NaT"), "datetime64[ns]"), None, []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            index = read_times(known, f"{where}: {chosen}")
            bad = pd.Series(False, index=known.index)
        except ValueError as error:
            parsed = pd.to_datetime(known, errors="coerce", format="mixed")
            bad = parsed.isna()
            if bad.mean() > 0.5:
                raise SourceError(str(error)) from None
            index = pd.DatetimeIndex(parsed[~bad])
    zone = str(index.tz) if index.tz is not None else None
    times = np.full(len(values), np.datetime64("NaT"), "datetime64[ns]")
    times[known.index[~bad]] = index.tz_localize(None).to_numpy("datetime64[ns]")
    findings = [str(warning.message) for warning in said]
    if zone:
        findings.append(f"{where}: {chosen} has the time zone {zone}; the bars keep its clock")
    return times, zone, findings


def _plain_times(values: pd.Series) -> pd.Series:
    """Write MetaTrader's 2024.01.02 and HistData's 20240102 170000 as every reader of times reads them."""
    text = values.astype(str).str.strip()
    text = text.str.replace(r"^(\d{4})\.(\d{2})\.(\d{2})", r"\1-\2-\3", regex=True)
    return text.str.replace(r"^(\d{4})(\d{2})(\d{2})[ T](\d{2}):?(\d{2}):?(\d{2})?$", _spelled, regex=True)


def _spelled(match: "re.Match[str]") -> str:
    year, month, day, hour, minute, second = match.groups()
    return f"{year}-{month}-{day} {hour}:{minute}:{second or '00'}"


def _clock(text: str) -> str:
    """Write a time of day of a column of its own: 093000, 930, 09:30."""
    digits = text.strip()
    if not digits.isdigit():
        return digits
    digits = digits.zfill(6 if len(digits) > 4 else 4)
    return ":".join(digits[place : place + 2] for place in range(0, len(digits), 2))


def _instruments(table: RawTable, given: Mapping[str, str], rows: int) -> np.ndarray:
    names = {plain_name(column): column for column in reversed(table.columns)}
    chosen = given.get("instrument") or next((names[name] for name in SYMBOLS if name in names), None)
    if chosen is None:
        return np.full(rows, instrument_name(_stem(table.name)), object)
    text = table.columns[chosen].to_pandas().astype(str).str.strip()
    known = {symbol: instrument_name(symbol) for symbol in text.unique()}
    return text.map(known).to_numpy(object)


def _stem(name: str) -> str:
    """Return the symbol in a file's name: Binance's BTCUSDT-1h-2024-01.csv, Kronos' XSHG_5min_600977.csv."""
    stem = re.sub(r"\.(csv|txt|parquet|feather|arrow|gz|zip|tsv)$", "", name, flags=re.IGNORECASE)
    stem = re.sub(r"\.(csv|txt)$", "", stem, flags=re.IGNORECASE)
    stem = re.sub(r"_[MHDW]\d+$", "", stem)
    stem = re.sub(r"-\d+[smhdwM](-\d{4}(-\d{2}){0,2})?$", "", stem)
    return re.sub(r"^(XSHG|XSHE)_\d*\w+?_", "", stem)
