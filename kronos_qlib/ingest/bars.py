"""Tables of users' files → bars by instrument and time, and what was found and left out on the way."""

import contextlib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pandas.api.types import union_categoricals

from kronos_qlib.data.checks import Prices, impossible_bars
from kronos_qlib.data.columns import find_columns, is_rate, plain_name
from kronos_qlib.data.dates import read_times, year_first
from kronos_qlib.data.windows import COLUMNS
from kronos_qlib.ingest.symbols import ASKED, INDEX_PRICE, OFTEN_INDICES, SHARE_PRICE, instrument_name
from kronos_qlib.ingest.tables import MISSING, RawTable, SourceError, load_reader, read_tables

PRICES = list(COLUMNS[:4])
RATE_BARS = 100  # by which it is decided whether a turnover is a rate
_ISO = re.compile(r"\d{4}-\d\d-\d\d($|[ T]\d\d:)")
# Of a bar's time, the surest first; a date and a time of day in two columns are put together.
TIMES = (
    *("datetime", "timestamp", "timestamps", "date", "trade_date", "tradedate", "day", "日期", "时间", "time"),
    *("open_time", "window_start", "index", "unnamed:_0", "column_1"),
)
EXTRAS = {  # of a bar, for its adjustment and to check it
    "adjusted_close": ("adjclose", "adj_close", "adjusted_close"),
    "factor": ("factor", "adj_factor"),
    "percent": ("pct_chg", "pctchg", "涨跌幅"),
    "previous_close": ("pre_close", "preclose", "prev_close"),
}
LARGEST = float(np.finfo(np.float32).max)  # that a store holds
SYMBOLS = ("symbol", "instrument", "ts_code", "order_book_id", "ticker", "code", "股票代码")


@dataclass(frozen=True)
class SourceBars:
    """The bars of a file.

    bars: columns instrument (categorical), time (datetime64[ns], the clock of the source), open, high, low, close,
        volume, amount as far as the file has them, float64, and likewise adjusted_close, factor and change (close to
        close as the source says it, a ratio), file (categorical) and line; sorted by instrument and time, each pair
        once; prices whole.
    rejected: file, line and reason of each row that is no bar, or is followed by another bar of the same time.
    findings: what was found, in words, with the figure behind it.
    zone: the time zone of the clock, or None.
    """

    bars: pd.DataFrame
    rejected: pd.DataFrame
    findings: list[str]
    zone: str | None = None


def read_bars(
    path: Path,
    columns: Mapping[str, str] | None = None,
    tz: str | None = None,
    symbols: Mapping[str, str] | None = None,
    dates: str | None = None,
    reader: Mapping[str, Any] | None = None,
    prices: Prices = "positive",
) -> SourceBars:
    """Read the bars of a file.

    Args:
        columns: names in the file by column of a bar (`close`, `time`, `instrument` …), where they are foreign.
        tz: the time zone to whose clock times with a zone are brought.
        symbols: names of instruments by symbol, where a symbol's own spelling does not tell.
        dates: what stands first in dates whose year stands last, "day" or "month"; None: as they tell.
        reader: the configuration of a `SourceReader`; None: the kinds that are known.
        prices: `any` keeps bars whose prices are zero or less.

    Raises:
        SourceError: the file holds no bars; one line that names it.
    """
    tables = read_tables(path, None if reader is None else load_reader(reader))
    parts = [_table_bars(table, columns or {}, tz, symbols or {}, dates, prices) for table in tables]
    bars = concatenated([part.bars for part in parts])
    rejected = pd.concat([part.rejected for part in parts], ignore_index=True)
    if bars.empty:
        reason = f"; {len(rejected)} rows rejected, the first: {rejected['reason'].iloc[0]}" if len(rejected) else ""
        raise SourceError(f"{path}: no bars{reason}")
    findings = list(dict.fromkeys(finding for part in parts for finding in part.findings))
    bars, twice = once_each(bars)
    if len(twice):
        findings.append(f"{len(twice)} bars stand twice, the last of each is taken: {twice['reason'].iloc[0]} first")
    return SourceBars(bars, pd.concat([rejected, twice], ignore_index=True), findings, parts[0].zone)


def concatenated(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Put tables of bars one below the other; the categories of their columns are put together."""
    if len(tables) == 1:
        return tables[0]
    names = [name for name in ("instrument", "file") if name in tables[0]]
    whole = pd.concat([table.drop(columns=names) for table in tables], ignore_index=True)
    for place, name in enumerate(names):
        whole.insert(place, name, union_categoricals([table[name].array for table in tables]))
    return whole


def once_each(bars: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Sort bars by instrument and time and keep the last of each pair; the others are rejected: file, line, reason."""
    names = bars["instrument"].cat
    if list(names.categories) == sorted(names.categories):
        later, same = np.diff(bars["time"].to_numpy()) > np.timedelta64(0), np.diff(names.codes.to_numpy())
        if ((same > 0) | ((same == 0) & later)).all():
            return bars, pd.DataFrame({"file": [], "line": [], "reason": []})
    bars = bars.assign(instrument=bars["instrument"].cat.reorder_categories(sorted(bars["instrument"].cat.categories)))
    bars = bars.sort_values(["instrument", "time"], kind="stable", ignore_index=True)
    twice = bars.duplicated(["instrument", "time"], keep="last").to_numpy()
    others = bars[twice]
    reasons = [f"{name} {time} stands again" for name, time in zip(others["instrument"], others["time"])]
    rejected = pd.DataFrame({"file": others["file"].astype(str), "line": others["line"], "reason": reasons})
    return (bars[~twice].reset_index(drop=True) if twice.any() else bars), rejected


def _table_bars(
    table: RawTable,
    given: Mapping[str, str],
    tz: str | None,
    symbols: Mapping[str, str],
    dates: str | None,
    allowed: Prices,
) -> SourceBars:
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
    if "percent" in values or "previous_close" in values:
        percent, previous = values.pop("percent", None), values.pop("previous_close", None)
        values["change"] = percent / 100 if percent is not None else _change(values["close"], previous)
    if ticks is not None and "volume" not in given and found.get("volume") != ticks:
        values["ticks"], _ = _numbers(table.columns[ticks])
    times, zone, findings = _times(table, given, where, tz, dates)
    faults.append((np.isnat(times), "no time"))
    instruments = _instruments(table, given, rows, symbols, values["close"], where, findings)
    faults.append((np.asarray(instruments.isna() | (instruments == "")), "no instrument"))
    prices = np.stack([values[column] for column in PRICES], axis=1)
    if allowed == "positive":
        faults.append((prices.min(axis=1) <= 0, "a price of zero or less"))
    faults.append(
        (np.any([values[column] > LARGEST for column in COLUMNS if column in values], axis=0), "beyond float32")
    )
    faults.append((impossible_bars(prices), "open or close outside low … high"))
    bad = np.any([wrong for wrong, _ in faults], axis=0)
    findings.append(f"columns: {', '.join(f'{column} = {found[column]}' for column in found)}")
    rejected = pd.DataFrame(table.rejected, columns=["line", "reason"])
    lines = np.arange(table.first_line, table.first_line + rows + len(rejected))
    lines = np.setdiff1d(lines, rejected["line"]) if len(rejected) else lines
    file = pd.Categorical.from_codes(np.zeros(rows, int), [where])
    frame = pd.DataFrame({"instrument": instruments, "file": file, "time": times, **values}, copy=False)
    frame["line"] = lines.astype(np.int32)
    if bad.any():
        frame = frame[~bad]
        reasons = np.select([wrong[bad] for wrong, _ in faults], [reason for _, reason in faults], "")
        own = pd.DataFrame({"line": lines[bad], "reason": reasons})
        rejected = pd.concat([own, rejected], ignore_index=True)
    frame["instrument"] = frame["instrument"].cat.remove_unused_categories()
    turnover = plain_name(found.get("amount", "")) == "turnover"
    if turnover or "ticks" in frame or ("amount" in frame and (frame["amount"] == 0).any()):
        first = frame.nsmallest(RATE_BARS, "time")  # no later bar decides what an earlier one means
        if "ticks" in frame and not first["volume"].any():  # MetaTrader counts ticks where it knows no volume
            frame = frame.assign(volume=frame["ticks"])
            first = first.assign(volume=first["ticks"])
            findings.append(f"volume: {ticks}, as the volume is 0")
        if turnover and is_rate(first["amount"], first["close"], first.get("volume")):
            findings.append("turnover is a rate, as its values are below price × volume: no amount")
            frame = frame.drop(columns="amount")
        elif "amount" in frame and "volume" in frame and not first["amount"].any() and first["volume"].any():
            findings.append(f"amount is 0 on the first {len(first)} bars, beside a volume: not known")
            frame = frame.drop(columns="amount")
        frame = frame.drop(columns="ticks", errors="ignore")
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


def _change(close: np.ndarray, previous: np.ndarray | None) -> np.ndarray:
    """Return the change from the close before, as the source knows it, NaN where it says none."""
    assert previous is not None
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(previous > 0, close / previous - 1, np.nan)


def _times(
    table: RawTable, given: Mapping[str, str], where: str, tz: str | None, dates: str | None
) -> tuple[np.ndarray, str | None, list[str]]:
    """Return the bars' times on the clock of the source, NaT where there is none, its zone, and what was found.

    Times with a zone are brought to the clock of `tz`, or to UTC where their own clock shows some times twice.
    """
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
    if known.dtype == object or pd.api.types.is_string_dtype(known):
        try:
            known = year_first(known, f"{where}: {chosen}", dates)
        except ValueError as error:
            raise SourceError(str(error)) from None
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
    findings = [str(warning.message) for warning in said]
    if index.tz is not None:
        own = str(index.tz)
        index = index.tz_convert(tz or own)
        if index.tz_localize(None).nunique() < index.nunique():
            index = index.tz_convert("UTC")
        kept = "the bars keep its clock" if str(index.tz) == own else f"the bars have the clock of {index.tz}"
        if str(index.tz) not in (own, tz):
            kept += f", as that of {tz or own} shows some times twice"
        findings.append(f"{where}: {chosen} has the time zone {own}; {kept}")
    zone = str(index.tz) if index.tz is not None else None
    times = np.full(len(values), np.datetime64("NaT"), "datetime64[ns]")
    times[known.index[~bad]] = index.tz_localize(None).to_numpy("datetime64[ns]")
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


def _instruments(
    table: RawTable,
    given: Mapping[str, str],
    rows: int,
    symbols: Mapping[str, str],
    close: np.ndarray,
    where: str,
    findings: list[str],
) -> pd.Series:
    """Return the names of the rows' instruments, categorical; "" or NaN where a row has none."""
    names = {plain_name(column): column for column in reversed(table.columns)}
    chosen = given.get("instrument") or next((names[name] for name in SYMBOLS if name in names), None)
    if chosen is None:
        text = pd.Series(pd.Categorical.from_codes(np.zeros(rows, int), [_stem(table.name)]))
    else:
        text = table.columns[chosen].to_pandas().astype(str).str.strip()
        text = text.where(~text.isin(MISSING), "").astype("category")
    chinese = any(name in names for name in ("日期", "时间", "开盘", "ts_code"))
    found = {}
    for number, symbol in enumerate(text.cat.categories):
        padded = symbol
        if symbol.isdigit() and len(symbol) < 5 and chinese:  # as a spreadsheet leaves 000001
            padded = symbol.zfill(6)
            findings.append(f"{where}: symbol {symbol} is taken for {padded}, whose leading zeros were lost")
        name = symbols.get(symbol)
        if name is None and padded in OFTEN_INDICES:
            name = _index_or_share(padded, close[np.asarray(text.cat.codes) == number], where, findings)
        found[symbol] = name or instrument_name(padded)
    codes, unique = pd.factorize(np.array([found[symbol] for symbol in text.cat.categories], object))
    own = np.asarray(text.cat.codes)
    return pd.Series(pd.Categorical.from_codes(np.where(own >= 0, codes[own], -1), unique))


def _index_or_share(code: str, close: np.ndarray, where: str, findings: list[str]) -> str:
    """Decide by its price whether a bare code is that of an index of Shanghai or of a share of Shenzhen."""
    price = float(np.nanmedian(close)) if np.isfinite(close).any() else np.nan
    if code in ASKED or not (price < SHARE_PRICE or price > INDEX_PRICE):
        raise SourceError(
            f"{where}: {code} is the index SH{code} or the share SZ{code}; say which by --symbols {code}=SH{code}"
        )
    name = f"{'SH' if price > INDEX_PRICE else 'SZ'}{code}"
    findings.append(f"{where}: {code} is taken for {name} (median close {price:,.4g})")
    return name


def _stem(name: str) -> str:
    """Return the symbol in a file's name: Binance's BTCUSDT-1h-2024-01.csv, Kronos' XSHG_5min_600977.csv."""
    stem = re.sub(r"\.(csv|txt|parquet|feather|arrow|gz|zip|tsv)$", "", name, flags=re.IGNORECASE)
    stem = re.sub(r"\.(csv|txt)$", "", stem, flags=re.IGNORECASE)
    stem = re.sub(r"_[MHDW]\d+$", "", stem)
    stem = re.sub(r"-\d+[smhdwM](-\d{4}(-\d{2}){0,2})?$", "", stem)
    return re.sub(r"^(XSHG|XSHE)_\d*\w+?_", "", stem)
