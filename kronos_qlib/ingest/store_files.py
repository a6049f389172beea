"""The files of a Qlib store, read as they lie there: Qlib itself, whose import takes seconds, is not needed."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd

from kronos_qlib.data.checks import Prices, check_calendar_file, check_universe_file
from kronos_qlib.ingest.tables import SourceError

_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)$", re.IGNORECASE)  # no folder on Windows may be called so
_FUTURE = "_future"
ABOUT = "ingest.json"  # what `ingest` found, in a store that it has written


def folder_name(instrument: str) -> str:
    """Return the name of an instrument's folder under features/, as Qlib finds it."""
    return f"{'_qlib_' if _RESERVED.fullmatch(instrument) else ''}{instrument}".lower()


_ORDER = {"day": 1, "1week": 2}  # minutes come before


def is_store(folder: Path) -> bool:
    """Return whether a folder is a Qlib store: it has calendars/."""
    return (folder / "calendars").is_dir()


def allowed_prices(folder: Path) -> Prices:
    """Return which prices a store may have, as `ingest` was told; positive ones in any other store."""
    about = folder / ABOUT
    said = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    return cast(Prices, said.get("prices", "positive"))


class StoreFiles:
    """A Qlib store: calendars/<freq>.txt, instruments/<universe>.txt, features/<instrument>/<field>.<freq>.bin.

    freqs: frequencies of which there is a calendar, the finest first; but days that are bars of weeks under another
        name, as `ingest` writes them for Qlib, come last. universes: by name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = [path.stem for path in folder.glob("calendars/*.txt") if not path.stem.endswith(_FUTURE)]
        if not names:
            raise SourceError(f"{folder}: no Qlib store, which has calendars/")
        self.freqs = sorted(names, key=lambda name: (_ORDER.get(name, 0), len(name), name))
        if "1week" in names and "day" in names and self._same_calendar("1week", "day"):
            self.freqs.append(self.freqs.pop(self.freqs.index("day")))
        self.universes = sorted(path.stem for path in folder.glob("instruments/*.txt"))

    def _same_calendar(self, one: str, other: str) -> bool:
        return self.calendar_file(one).read_bytes() == self.calendar_file(other).read_bytes()

    def calendar_file(self, freq: str, future: bool = False) -> Path:
        """Return the file of a calendar, or of the sessions to come."""
        return self.folder / "calendars" / f"{freq}{_FUTURE if future else ''}.txt"

    def calendar(self, freq: str) -> pd.DatetimeIndex:
        """Read the sessions of a frequency. Raises ValueError for a line that is no date."""
        path = self.calendar_file(freq)
        check_calendar_file(path)
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        return pd.DatetimeIndex(pd.to_datetime(lines, format="ISO8601"))

    def universe(self, name: str) -> pd.DataFrame:
        """Read the spans of a universe: instrument, first, last. Raises ValueError for a line that is none."""
        path = self.folder / "instruments" / f"{name}.txt"
        if not path.is_file():
            raise SourceError(f"{self.folder}: no universe {name!r}; it has {', '.join(self.universes)}")
        check_universe_file(path)
        lines = [line.split("\t")[:3] for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        spans = pd.DataFrame(lines, columns=["instrument", "first", "last"])
        for end in ("first", "last"):
            spans[end] = pd.to_datetime(spans[end], format="mixed")
        return spans

    def instruments(self) -> list[str]:
        """List the instruments that have a folder, as Qlib names them: in capitals."""
        features = self.folder / "features"
        names = [path.name for path in features.iterdir() if path.is_dir()] if features.is_dir() else []
        return sorted(name.removeprefix("_qlib_").upper() for name in names)

    def has(self, instrument: str, field: str, freq: str) -> bool:
        """Return whether a field of an instrument is there."""
        return self._bin(instrument, field, freq).is_file()

    def read(self, instrument: str, freq: str, fields: Iterable[str]) -> tuple[int, pd.DataFrame]:
        """Read fields of an instrument: the row of the first bar in the calendar, and a column for each that is there.

        Raises:
            SourceError: a file is cut short or begins with no row of a calendar.
        """
        columns: dict[str, tuple[int, np.ndarray]] = {}
        for field in fields:
            path = self._bin(instrument, field, freq)
            if not path.is_file():
                continue
            if path.stat().st_size < 4 or path.stat().st_size % 4:
                raise SourceError(f"{path}: {path.stat().st_size} bytes are no float32 numbers, at least one")
            values = np.fromfile(path, "<f4")
            if not (values[0] >= 0 and values[0] == np.floor(values[0]) and np.isfinite(values[0])):
                raise SourceError(f"{path}: its first number, the row of its first bar, is {values[0]:g}")
            columns[field] = int(values[0]), values[1:]
        if not columns:
            return 0, pd.DataFrame()
        first = min(row for row, _ in columns.values())
        end = max(row + len(values) for row, values in columns.values())
        bars = {}
        for field, (row, values) in columns.items():
            bars[field] = np.full(end - first, np.nan, np.float32)
            bars[field][row - first : row - first + len(values)] = values
        return first, pd.DataFrame(bars, copy=False)

    def _bin(self, instrument: str, field: str, freq: str) -> Path:
        return self.folder / "features" / folder_name(instrument) / f"{field}.{freq}.bin"
