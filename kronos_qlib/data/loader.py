"""KLineLoader: reads a Qlib store into one table of K-lines: six columns, label, one rule for the amount."""

import functools
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from qlib.config import C
from qlib.data import D
from qlib.data.data import Cal, ExpressionD
from qlib.data.dataset.loader import DataLoader
from qlib.log import get_module_logger
from qlib.utils import code_to_fname

from kronos_qlib.data.bar_columns import load_column
from kronos_qlib.data.calendar import check_sessions
from kronos_qlib.data.checks import check_bins, check_calendar_file, check_universe_file
from kronos_qlib.data.expressions import named_fields
from kronos_qlib.data.windows import COLUMNS
from kronos_qlib.extensions import call_extension

Universe = str | list[str] | dict[str, Any]
Spans = dict[str, list[tuple[pd.Timestamp, pd.Timestamp]]]

RAW = ("$open", "$high", "$low", "$close", "$volume")
OPTIONAL = ("$amount", "$vwap", "$change")
AMOUNT_RULES = {"amount": "$amount", "vwap": "$vwap × $volume", "ohlc": "$volume × mean(OHLC)"}


class KLineLoader(DataLoader):
    """Loads open, high, low, close, volume, amount and labels of every instrument that is ever in a universe.

    `amount` is a rule for the amount (`amount`, `vwap`, `ohlc`) or `auto`: the first of them whose fields the bars of
    the first session have. That rule is kept in `amount_rule`, so that a pickled loader never changes it. With `volume`
    optional, volume and amount are 0 in bars that have prices and no volume. `columns` are further ones by name: Qlib
    expressions, or configurations of a `BarColumn`. `conditions` are expressions of the numbers of groups by name.
    """

    volume = "required"  # of loaders pickled before there was a choice
    columns: Mapping[str, Any] = MappingProxyType({})  # likewise
    conditions: Mapping[str, str] = MappingProxyType({})  # likewise

    def __init__(
        self,
        freq: str,
        label: list[str],
        amount: str,
        volume: str = "required",
        columns: Mapping[str, Any] = MappingProxyType({}),
        conditions: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.freq = freq
        self.label = label
        self.amount = amount
        self.volume = volume
        self.columns, self.conditions = dict(columns), dict(conditions)
        self.amount_rule: str | None = None if amount == "auto" else amount

    def load(
        self, instruments: Universe, start_time: pd.Timestamp | None = None, end_time: pd.Timestamp | None = None
    ) -> pd.DataFrame:
        """Load full histories from start_time to end_time, not cut to membership; warn of instruments without bars.

        Returns:
            float32, index (datetime, instrument) sorted; columns `("feature", open … amount)` and those of `columns`,
            `("label", "LABEL0" …)`, `("condition", …)`, and `("check", "change")`, the store's own `$change`, NaN where
            it has none.

        Raises:
            ValueError: the store has no such universe, frequency or field, or no bars in the range.
            FileNotFoundError: there is no store.
        """
        names = sorted(member_spans(instruments, start_time, end_time, self.freq))
        stored = _stored(names, self.freq)
        self._check_files(names)
        # Given as a list, the instruments keep their full histories: Qlib cuts a universe to its members' spans.
        expressions = {name: column for name, column in self.columns.items() if isinstance(column, str)}
        # A label or a column may be a field.
        fields = list(dict.fromkeys([*RAW, *stored, *self.label, *expressions.values(), *self.conditions.values()]))
        raw = read_fields(names, fields, start_time, end_time, self.freq)
        raw[[field for field in OPTIONAL if field not in stored]] = np.float32(np.nan)
        where = f"universe {_title(instruments)} in store {store_folder(self.freq)}"
        if raw.empty:
            calendar = D.calendar(freq=self.freq)
            raise ValueError(
                f"KLineHandler: no bars of {where} between {start_time} and {end_time}; "
                f"the store's calendar runs from {calendar[0]} to {calendar[-1]}"
            )
        without = sorted(set(names) - set(raw.index.levels[0]))
        if without:
            warnings.warn(
                f"KLineHandler: {len(without)} of {len(names)} instruments of {where} have no bars: "
                f"{', '.join(without[:5])}{', …' if len(without) > 5 else ''}",
                stacklevel=2,
            )
        needed = RAW if self.volume == "required" else RAW[:4]
        for field in needed:
            if raw[field].isna().all():
                raise ValueError(f"KLineHandler: field {field} is missing: no instrument of {where} has it")
        if self.volume == "required":
            _check_volume(raw, where)
        found = ""
        if self.amount_rule is None:
            self.amount_rule, found = _first_amount_rule(raw)
        _check_amount(raw, self.amount_rule, where)
        get_module_logger("KLineHandler").info(f"amount = {AMOUNT_RULES[self.amount_rule]} for {where}{found}")

        columns = {("feature", name): raw[field] for name, field in zip(COLUMNS, RAW)}
        columns["feature", "amount"] = _amount(raw, self.amount_rule)
        if self.volume == "optional":
            without = raw[list(RAW[:4])].notna().all(axis=1) & (raw["$volume"].isna() | (raw["$volume"] == 0))
            for name in ("volume", "amount"):
                columns["feature", name] = columns["feature", name].mask(without, 0.0)
        columns |= self._own_columns(columns, {name: raw[text] for name, text in expressions.items()}, where)
        columns |= {("label", f"LABEL{i}"): raw[expression] for i, expression in enumerate(self.label)}
        columns["check", "change"] = raw["$change"]
        columns |= {("condition", name): raw[text] for name, text in self.conditions.items()}
        return _by_time(columns, raw.index)

    def _own_columns(
        self, six: Mapping[tuple[str, str], pd.Series], expressed: Mapping[str, pd.Series], where: str
    ) -> dict[tuple[str, str], pd.Series]:
        """Return the columns beyond the six, NaN where a bar has none; warn of such bars.

        Raises ValueError where no bar has one.
        """
        if not self.columns:
            return {}
        bars = pd.concat({name: column for (_, name), column in six.items()}, axis=1)
        valid = bars.notna().all(axis=1) & ((bars["volume"] != 0) | (self.volume == "optional"))
        known = bars[valid].sort_index()
        result = {}
        for name, column in self.columns.items():
            if isinstance(column, str):
                values = expressed[name].astype(float)
            else:
                values = _computed(name, column, known).reindex(bars.index)
            values = values.where(np.isfinite(values))
            lacking = valid & values.isna()
            if lacking.sum() == valid.sum():
                raise ValueError(f"KLineHandler: columns: {name}: no bar of {where} has it")
            if lacking.any():
                instrument, date = lacking.index[lacking.argmax()]
                warnings.warn(
                    f"KLineHandler: {lacking.sum():,} of {valid.sum():,} bars of {where} have no {name} and are "
                    f"dropped, {instrument} {date} first",
                    stacklevel=4,
                )
            result["feature", name] = values
        return result

    def _check_files(self, names: list[str]) -> None:
        """Check the files of the fields that are read, and that those of labels and columns are there.

        Raises ValueError.
        """
        folder = store_folder(self.freq)
        calendar = folder / "calendars" / f"{self.freq}.txt"
        texts = {"conditions": list(self.conditions.values())}
        texts |= {"columns": [text for text in self.columns.values() if isinstance(text, str)], "label": self.label}
        named = {key: sorted({field for text in own for field in named_fields(text)}) for key, own in texts.items()}
        read = {field[1:] for field in (*RAW, *OPTIONAL)}.union(*named.values())
        check_bins(folder, self.freq, names, read, calendar)
        if not any((folder / "features" / code_to_fname(name).lower()).is_dir() for name in names):
            return  # that there are no bars is said by who reads them
        elsewhere = {
            field
            for own in texts.values()
            for text in own
            if "ChangeInstrument" in text
            for field in named_fields(text)
        }
        for key, field in ((key, field) for key, fields in named.items() for field in fields):
            if field in elsewhere:  # it may be another instrument's alone
                continue
            files = (folder / "features" / code_to_fname(name).lower() / f"{field}.{self.freq}.bin" for name in names)
            if not any(path.exists() for path in files):
                raise ValueError(
                    f"KLineHandler: {key}: field ${field} is missing: no instrument of store {folder} has it"
                )


def _by_time(columns: Mapping[tuple[str, str], pd.Series], index: pd.MultiIndex) -> pd.DataFrame:
    """Make a float32 table sorted by (datetime, instrument) of columns sorted by (instrument, datetime)."""
    order = np.argsort(index.codes[1], kind="stable")
    swapped = pd.MultiIndex(
        levels=index.levels[::-1],
        codes=[codes[order] for codes in index.codes[::-1]],
        names=index.names[::-1],
        verify_integrity=False,
    )
    return pd.DataFrame({name: each.to_numpy(np.float32)[order] for name, each in columns.items()}, swapped)


def _computed(name: str, configuration: Mapping[str, Any], bars: pd.DataFrame) -> pd.Series:
    """Compute a column of the user's own from the bars, instrument by instrument. Raises ValueError."""
    column, parts = load_column(configuration), []
    for instrument, own in bars.groupby(level=0, sort=False):
        try:
            parts.append(call_extension(column, (len(own),), own.to_numpy(np.float64)))
        except ValueError as error:
            raise ValueError(f"KLineHandler: columns: {name}: {instrument}: {error}") from None
    return pd.Series(np.concatenate(parts) if parts else [], bars.index)


def read_fields(
    names: list[str], fields: list[str], start_time: pd.Timestamp | None, end_time: pd.Timestamp | None, freq: str
) -> pd.DataFrame:
    """Read fields and expressions as Qlib's `D.features` does, in less than half the time.

    Qlib makes a time object of every bar of every instrument; here bars keep their number in the calendar. Expressions
    are Qlib's; fields of a store of files are read from these at once, which Qlib opens four times for each.

    Returns:
        float32, index (instrument, datetime) sorted, a column per field; instruments without bars are not in it.
    """
    parts, counts, rows = [np.empty((0, len(fields)), np.float32)], [], [np.empty(0, np.int64)]
    wanted = Cal.calendar(start_time, end_time, freq)
    first = Cal.calendar(freq=freq).searchsorted(wanted[0]) if len(wanted) else 0
    stored = _files_of_fields(fields, freq)
    for name in names if len(wanted) else ():
        series = [
            _read_field(stored[field] / code_to_fname(name).lower(), field, freq, first, len(wanted))
            if field in stored
            else ExpressionD.expression(name, field, wanted[0], wanted[-1], freq)
            for field in fields
        ]
        index = series[0].index
        if any(not index.equals(each.index) for each in series[1:]):
            index = functools.reduce(pd.Index.union, (each.index for each in series))
            series = [each.reindex(index) for each in series]
        counts.append(len(index))
        rows.append(index.to_numpy(np.int64))
        parts.append(np.stack([each.to_numpy(np.float32) for each in series], axis=1))
    sessions, numbers = np.concatenate(rows), np.array(counts, np.int64)
    calendar, have = pd.DatetimeIndex(Cal.calendar(freq=freq)), np.flatnonzero(numbers)
    used = np.zeros(len(calendar), bool)
    used[sessions] = True
    index = pd.MultiIndex(
        levels=[pd.Index(names, dtype=object)[have], calendar[used]],
        codes=[np.repeat(np.arange(len(have)), numbers[have]), (used.cumsum() - 1)[sessions]],
        names=["instrument", "datetime"],
        verify_integrity=False,
    )
    return pd.DataFrame(np.concatenate(parts), index, fields)


def _files_of_fields(fields: list[str], freq: str) -> dict[str, Path]:
    """Return the folder of the files of fields that are no expressions; none where Qlib reads them otherwise."""
    if C.feature_provider != "LocalFeatureProvider" or C.expression_provider != "LocalExpressionProvider":
        return {}
    folder = store_folder(freq) / "features"
    return {field: folder for field in fields if re.fullmatch(r"\$[A-Za-z_]\w*", field)}


def _read_field(folder: Path, field: str, freq: str, first: int, count: int) -> pd.Series:
    """Read a field's bars among `count` sessions from number `first` on, by their numbers; float32."""
    path = folder / f"{field[1:].lower()}.{freq.lower()}.bin"
    try:
        content = np.fromfile(path, "<f4")
    except FileNotFoundError:
        content = np.empty(0, "<f4")
    if len(content) < 2:
        return pd.Series(np.empty(0, np.float32), pd.RangeIndex(0))
    start = int(content[0])
    values = content[1 + max(first - start, 0) : 1 + max(first + count - start, 0)]
    begin = max(first, start)
    return pd.Series(values, pd.RangeIndex(begin, begin + len(values)))


def store_folder(freq: str) -> Path:
    """Return the folder of the Qlib store in use for this frequency.

    Raises ValueError before `qlib.init` or if the store has no such frequency, FileNotFoundError if it does not exist.
    """
    if not C.registered:
        raise ValueError("KLineHandler: Qlib is not initialised; call qlib.init(provider_uri=…, region=…) first")
    folder = Path(C.dpm.get_data_uri(freq))
    if not folder.is_dir():
        raise FileNotFoundError(f"KLineHandler: there is no Qlib store at {folder}; set provider_uri (QLIB_DATA)")
    calendars = folder / "calendars"
    if not (calendars / f"{freq}.txt").is_file():
        known = sorted(path.stem for path in calendars.glob("*.txt") if not path.stem.endswith("_future"))
        raise ValueError(f"KLineHandler: store {folder} has no calendar for freq {freq!r}; it has {', '.join(known)}")
    return folder


def member_spans(
    instruments: Universe, start_time: pd.Timestamp | None, end_time: pd.Timestamp | None, freq: str
) -> Spans:
    """Return the instruments that are ever in the universe between two times, each with its spans of membership.

    A list of instruments is a universe whose members never change. Raises ValueError for an unknown or empty universe.
    """
    folder = store_folder(freq)
    check_calendar_file(folder / "calendars" / f"{freq}.txt")
    check_sessions(Cal.load_calendar(freq, future=False), f"calendar {folder / 'calendars' / f'{freq}.txt'}")
    if isinstance(instruments, list):
        always = [(pd.Timestamp.min, pd.Timestamp.max)]
        return dict.fromkeys(instruments, always)
    config = D.instruments(instruments) if isinstance(instruments, str) else {"filter_pipe": [], **instruments}
    _check_market(config["market"], folder)
    check_universe_file(folder / "instruments" / f"{config['market'].lower()}.txt")
    spans = D.list_instruments(config, start_time, end_time, freq)
    if not spans:
        raise ValueError(
            f"KLineHandler: universe {_title(instruments)} of store {folder} has no member "
            f"between {start_time} and {end_time}"
        )
    return spans


def _check_market(market: str, folder: Path) -> None:
    """Check that the store has this universe; Qlib would create an empty file for it and then fail on that."""
    known = sorted(path.stem for path in (folder / "instruments").glob("*.txt") if path.stat().st_size)
    if market.lower() not in known:
        raise ValueError(f"KLineHandler: unknown universe {market!r}; store {folder} has {', '.join(known) or 'none'}")


def _stored(names: list[str], freq: str) -> list[str]:
    """Return the optional fields that any of these instruments has; Qlib takes long to find that a file is missing."""
    folders = [store_folder(freq) / "features" / code_to_fname(name).lower() for name in names]
    return [field for field in OPTIONAL if any((path / f"{field[1:]}.{freq}.bin").exists() for path in folders)]


def _first_amount_rule(raw: pd.DataFrame) -> tuple[str, str]:
    """Return the first rule that serves every bar of the first session with trade, and what was found there, in words.

    No later bar must decide it.
    """
    dates, traded = raw.index.get_level_values(1), _with_trade(raw)
    if not traded.any():
        return "ohlc", " (auto: no bar has a volume)"
    day = dates[traded].min()
    first = raw[traded & (dates == day)]
    rule = next(rule for rule in AMOUNT_RULES if not _lacks_amount(first, rule).any())
    lacking = [f"{_lacks_amount(first, other).sum()} lack {AMOUNT_RULES[other]}" for other in AMOUNT_RULES]
    before = lacking[: list(AMOUNT_RULES).index(rule)]
    found = f"of the {len(first)} bars of {day.date()} " + (", ".join(before) or f"none lacks {AMOUNT_RULES[rule]}")
    return rule, f" (auto: {found})"


def _check_amount(raw: pd.DataFrame, rule: str, where: str) -> None:
    """Raise if a rule serves no bar of an instrument, warn if it does not serve some bars."""
    lacking = _lacks_amount(raw, rule)
    per_instrument = pd.DataFrame({"lacking": lacking, "bars": _with_trade(raw)}).groupby(level=0).sum()
    never = per_instrument.query("lacking == bars and bars > 0").index
    if len(never):
        raise ValueError(
            f"KLineHandler: amount = {AMOUNT_RULES[rule]} needs fields that {len(never)} instruments of {where} "
            f"do not have, {never[0]} first; choose another rule for `amount`"
        )
    if lacking.any():
        name, date = lacking.index[lacking.argmax()]
        warnings.warn(
            f"KLineHandler: {lacking.sum()} bars of {where} have no amount = {AMOUNT_RULES[rule]} and are dropped, "
            f"{name} {date.date()} first",
            stacklevel=3,
        )


def _check_volume(raw: pd.DataFrame, where: str) -> None:
    """Raise if no bar has a volume, warn of instruments that never have one."""
    bars = pd.DataFrame({"bars": raw[list(RAW[:4])].notna().all(axis=1), "traded": _with_trade(raw)})
    per_instrument = bars.groupby(level=0).sum()
    never = per_instrument.query("bars > 0 and traded == 0")
    if not len(never):
        return
    advice = "for currencies, indices and contracts for difference set volume: optional"
    if not per_instrument["traded"].any():
        raise ValueError(f"KLineHandler: none of the {never['bars'].sum():,} bars of {where} has a volume; {advice}")
    warnings.warn(
        f"KLineHandler: {len(never)} instruments of {where} never have a volume and are left out, {never.index[0]} "
        f"first; {advice}",
        stacklevel=3,
    )


def _with_trade(raw: pd.DataFrame) -> pd.Series:
    """Mark the bars that have all prices and a volume other than zero."""
    return raw[list(RAW)].notna().all(axis=1) & (raw["$volume"] != 0)


def _lacks_amount(raw: pd.DataFrame, rule: str) -> pd.Series:
    """Mark the bars that have prices and volume but no amount by this rule."""
    return _with_trade(raw) & _amount(raw, rule).isna()


def _amount(raw: pd.DataFrame, rule: str) -> pd.Series:
    if rule == "amount":
        return raw["$amount"]
    # adjusted price × adjusted volume is the money traded, whatever the factor; float64 for the products
    price = raw["$vwap"] if rule == "vwap" else _mean_price(raw[list(RAW[:4])])
    return raw["$volume"].astype(float) * price.abs()  # money, where prices joined by differences are below zero


def _mean_price(prices: pd.DataFrame) -> pd.Series:
    """Return the mean of each row's known values, float64; as pandas' own, which is slow over columns."""
    mean = functools.reduce(pd.Series.add, (prices[field].astype(float) for field in prices)) / prices.shape[1]
    lacking = mean.isna()
    if lacking.any():
        mean[lacking] = prices[lacking].astype(float).mean(axis=1)
    return mean


def _title(instruments: Universe) -> str:
    if isinstance(instruments, list):
        return f"of {len(instruments)} listed instruments"
    return repr(instruments if isinstance(instruments, str) else instruments["market"])
