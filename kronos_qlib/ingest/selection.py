"""The bars of one instrument, from a user's file or straight from the files of a Qlib store."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from kronos_qlib.data.windows import COLUMNS
from kronos_qlib.ingest.bars import PRICES, read_bars
from kronos_qlib.ingest.store_files import StoreFiles
from kronos_qlib.ingest.symbols import instrument_name
from kronos_qlib.ingest.tables import SourceError


@dataclass(frozen=True)
class InstrumentBars:
    """Bars of one instrument, index time, columns open, high, low, close and volume, amount where known; and findings.

    zone: the time zone of the times' clock, or None. freq: of the bars, if a store has them.
    """

    instrument: str
    bars: pd.DataFrame
    findings: list[str]
    zone: str | None = None
    freq: str | None = None


def read_instrument(
    source: str,
    columns: Mapping[str, str] | None = None,
    symbols: Mapping[str, str] | None = None,
    dates: str | None = None,
    until: pd.Timestamp | None = None,
) -> InstrumentBars:
    """Read the bars of one instrument.

    Args:
        source: a file, a file and one of its instruments after a colon, or a store and an instrument.
        columns, symbols, dates: see `read_bars`.
        until: the last time whose bars decide which columns and bars are used; later bars are there, too.

    Raises:
        SourceError: there are no such bars; one line that names the file.
    """
    path, instrument = Path(source), ""
    if not path.exists() and ":" in source:
        before, _, instrument = source.rpartition(":")
        path = Path(before)
    if path.is_dir():
        return _of_store(path, instrument, until)
    read = read_bars(path, columns, symbols=symbols, dates=dates)
    names = read.bars["instrument"].cat.categories.tolist()
    wanted = instrument_name(instrument) if instrument else names[0]
    if wanted not in names or (not instrument and len(names) > 1):
        shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        raise SourceError(f"{path}: holds {len(names)} instruments; name one as {path}:NAME, of {shown}")
    bars = read.bars[read.bars["instrument"] == wanted].set_index("time")
    bars = bars[[column for column in COLUMNS if column in bars]]
    findings = list(read.findings)
    if len(read.rejected):
        first = read.rejected.iloc[0]
        findings.append(f"{len(read.rejected)} rows are no bars, line {first['line']} first: {first['reason']}")
    if "volume" in bars and bars.loc[:until, "volume"].notna().any() and bars["volume"].isna().any():
        unknown = bars["volume"].isna()
        findings.append(f"{unknown.sum()} bars have no volume and are left out, {bars.index[unknown][0]} first")
        bars = bars[~unknown]
    for column in ("volume", "amount"):
        if column in bars and bars.loc[:until, column].isna().any():
            missing = bars.loc[:until, column].isna().sum()
            findings.append(f"{column} is missing on {missing} bars and is not used")
            bars = bars.drop(columns=column)
    return InstrumentBars(wanted, bars, findings, read.zone)


def _of_store(folder: Path, instrument: str, until: pd.Timestamp | None) -> InstrumentBars:
    """Read an instrument of a Qlib store, of its finest frequency."""
    store = StoreFiles(folder)
    if not instrument:
        raise SourceError(f"{folder}: a Qlib store; name an instrument of it as {folder}:INSTRUMENT")
    freq = next((freq for freq in store.freqs if store.has(instrument, "close", freq)), None)
    if freq is None:
        raise SourceError(f"{folder}: the store has no bars of {instrument}")
    first, bars = store.read(instrument, freq, COLUMNS)
    times = store.calendar(freq)[first : first + len(bars)]
    bars = bars.iloc[: len(times)].astype(float).set_index(times)  # Qlib does not read what lies beyond the calendar
    lacking = [column for column in PRICES if column not in bars]
    if lacking:
        raise SourceError(f"{folder}: {instrument} has no {lacking[0]} of {freq}")
    if "volume" in bars and bars.loc[:until, "volume"].gt(0).any():
        bars = bars[bars["volume"] > 0]  # a suspended day is no bar
    bars = bars[bars[PRICES].notna().all(axis=1)]
    findings = [f"{len(bars):,} bars of {freq} from the store {folder}"]
    return InstrumentBars(instrument.upper(), bars, findings, freq=freq)
