"""Bars by name: of the stores that were named at start, and of uploads. No path is ever taken from a request."""

import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from kronos_qlib.ingest.selection import InstrumentBars, read_instrument
from kronos_qlib.ingest.store_files import StoreFiles, folder_name
from kronos_qlib.ingest.symbols import exchange_of
from kronos_qlib.ingest.tables import SourceError
from kronos_qlib.web.problems import Problem
from kronos_qlib.web.uploads import Upload, Uploads

KEPT_FILES = 8  # uploads whose bars are kept in memory


@dataclass(frozen=True)
class Origin:
    """The folder and frequency of a store, and the exchange whose sessions its bars follow; None where not known."""

    store: Path
    freq: str
    exchange: str | None


@dataclass(frozen=True)
class FoundBars:
    """The bars of an instrument.

    source: what a command would call them: `kronos-qlib forecast SOURCE`. exchange: whose sessions they follow.
    origin: where they come from, if that is a store.
    """

    bars: InstrumentBars
    source: str
    exchange: str | None
    origin: Origin | None = None


class Sources:
    """Finds bars by the name of a store or upload and an instrument.

    Args:
        exchange: whose sessions the instruments of stores follow, where their names do not tell.
    """

    def __init__(self, stores: dict[str, Path], uploads: Uploads | None = None, exchange: str | None = None) -> None:
        self.stores, self.uploads, self._exchange = stores, uploads, exchange
        self._lock = threading.Lock()
        self._read: OrderedDict[tuple[str, pd.Timestamp | None], InstrumentBars] = OrderedDict()

    def store(self, name: str) -> StoreFiles:
        """Return a store by its name. Raises Problem for another name."""
        folder = self.stores.get(name)
        if folder is None:
            known = ", ".join(self.stores) or "none"
            raise Problem(404, f"There is no store {name!r} here; those named at start: {known}.")
        with told_without_paths(folder, name):
            return StoreFiles(folder)

    def members(self, name: str, universe: str) -> list[str]:
        """List the instruments of a store's universe. Raises Problem."""
        store = self.store(name)
        if universe not in store.universes:
            raise Problem(404, f"The store {name} has no universe {universe!r}; it has {', '.join(store.universes)}.")
        with told_without_paths(store.folder, name):
            return sorted(store.universe(universe)["instrument"].str.upper().unique())

    def sessions(self, name: str, until: pd.Timestamp | None) -> pd.DatetimeIndex:
        """Return the sessions of a store's finest frequency up to a time, at least one. Raises Problem."""
        store = self.store(name)
        with told_without_paths(store.folder, name):
            calendar = store.calendar(store.freqs[0])
        sessions = calendar if until is None else calendar[calendar <= until]
        if not len(sessions):
            raise Problem(422, f"The store {name} begins on {calendar[0].date()}, after that date.")
        return sessions

    def bars(self, source: str, instrument: str | None, until: pd.Timestamp | None = None) -> FoundBars:
        """Read the bars of an instrument of a store or an upload; `until`: see `read_instrument`. Raises Problem."""
        if source in self.stores:
            return self._of_store(source, instrument or "", until)
        upload = self.uploads.find(source) if self.uploads is not None else None
        if upload is None:
            known = ", ".join(self.stores) or "none"
            raise Problem(404, f"There is no store or upload {source!r} here; stores named at start: {known}.")
        return self._of_upload(upload, instrument, until)

    def _of_store(self, name: str, instrument: str, until: pd.Timestamp | None) -> FoundBars:
        store = self.store(name)
        if not re.fullmatch(r"[^/\\\0:]{1,64}", instrument) or instrument.upper() not in store.instruments():
            raise Problem(404, f"The store {name} has no instrument {instrument!r}.")
        own = (store.folder / "features" / folder_name(instrument)).resolve()
        inside = [own, *(path.resolve() for path in own.glob("*.bin"))]
        if not all(path.is_relative_to(store.folder.resolve()) for path in inside):
            raise Problem(404, f"The bars of {instrument} lie outside the store {name} and are not read.")
        path = f"{store.folder}:{instrument.upper()}"
        with told_without_paths(store.folder, name):
            found = read_instrument(path, until=until)
        findings = [finding.replace(str(store.folder), name) for finding in found.findings]
        exchange = self.exchange_of(found.instrument)
        origin = Origin(store.folder, found.freq or store.freqs[0], exchange)
        return FoundBars(replace(found, findings=findings), path, exchange, origin)

    def state(self, name: str, instrument: str) -> list[tuple[str, int, int]]:
        """Return the files of an instrument of a store, with their sizes and when they changed."""
        folder = self.stores[name] / "features" / folder_name(instrument)
        found = [(path.name, path.stat()) for path in sorted(folder.glob("*.bin"))]
        return [(file, told.st_size, told.st_mtime_ns) for file, told in found]

    def exchange_of(self, instrument: str) -> str | None:
        """Return the exchange whose sessions an instrument of a store follows; None where that is not known."""
        return exchange_of(instrument) or self._exchange

    def _of_upload(self, upload: Upload, instrument: str | None, until: pd.Timestamp | None) -> FoundBars:
        wanted = instrument or upload.instruments[0]
        if wanted not in upload.instruments:
            raise Problem(404, f"The file {upload.name} has no instrument {wanted!r}.")
        source = f"{upload.path}:{wanted}"
        with self._lock:
            found = self._read.get((source, until))
        if found is None:
            with told_without_paths(upload.path, upload.name):
                found = read_instrument(source, until=until)
            findings = [finding.replace(str(upload.path), upload.name) for finding in found.findings]
            found = replace(found, findings=findings)
            with self._lock:
                self._read[source, until] = found
                while len(self._read) > KEPT_FILES:
                    self._read.popitem(last=False)
        return FoundBars(found, source, exchange_of(found.instrument))


@contextmanager
def told_without_paths(path: Path, name: str) -> Iterator[None]:
    """Turn an error of a reader into a Problem that says a file's name, and not where it lies."""
    try:
        yield
    except (SourceError, ValueError, OSError) as error:
        text = str(error) if isinstance(error, ValueError) else type(error).__name__
        raise Problem(422, text.replace(str(path), name).replace(str(path.parent), "…")) from None
