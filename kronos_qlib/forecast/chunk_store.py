"""Keep the finished chunks of a forecast on disk, and find them by the digests of what decides them."""

import contextlib
import io
import json
import logging
import time
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kronos_qlib.files import is_draft, whole_file
from kronos_qlib.forecast.forecaster import schema, to_arrow
from kronos_qlib.forecast.scores import SUMMARIES
from kronos_qlib.forecast.task import DIGEST_BYTES

logger = logging.getLogger("qlib.KronosForecast")
SETTINGS, CHUNKS = "forecast.json", "chunk-*.parquet"
DRAFT_SECONDS = 3600  # an unfinished file that is older has no writer any more
CHECKSUM, KIND = b"kronos_qlib.checksum", b"blake2b:"  # key and value in the file's metadata, followed by the digest
NO_DIGEST = b"0" * 32
OPTIONAL = ("paths", *SUMMARIES)  # columns that only some tasks of the same results keep


class StoredTask(Protocol):
    """What the store asks of a task, a forecast's or another one of windows."""

    @property
    def identity(self) -> dict[str, object]:
        """What decides the results, beside the windows."""
        ...

    @property
    def digest(self) -> str:
        """Names the folder of the results."""
        ...

    def __len__(self) -> int: ...

    def window_digests(self, rows: np.ndarray) -> np.ndarray:
        """Return the digest of each window at `rows`: void [B] of DIGEST_BYTES bytes."""
        ...


def divide(missing: np.ndarray, size: int) -> list[np.ndarray]:
    """Divide the windows that are missing (bool [W]) into chunks of `size` windows: their positions.

    A chunk of which every window is missing stays what it was; the windows of other chunks are put together anew.
    """
    chunks = [np.arange(start, min(start + size, len(missing))) for start in range(0, len(missing), size)]
    whole = [rows for rows in chunks if missing[rows].all()]
    rest = [rows[missing[rows]] for rows in chunks if not missing[rows].all()]
    left = np.concatenate(rest) if rest else np.array([], np.int64)
    return whole + [left[start : start + size] for start in range(0, len(left), size)]


def read_forecasts(folder: Path, dates: np.ndarray) -> pa.Table:
    """Read the stored forecasts of some score dates.

    Args:
        folder: `cache_dir`/<digest>, the digest of the recorder's tag `forecast.digest`.
        dates: score dates, datetime64 or what numpy converts to it.

    Returns:
        All columns but `digest` and `paths`, each (datetime, instrument) once, sorted by them. Of a window that was
        stored before and after one of its bars was corrected, the forecast that was stored last.

    Raises:
        FileNotFoundError: the folder holds no chunk. OSError, pyarrow.ArrowException: a chunk cannot be read.
    """
    newest_first = sorted(folder.glob(CHUNKS), key=lambda path: (-path.stat().st_mtime_ns, path.name))
    if not newest_first:
        raise FileNotFoundError(f"{folder} holds no stored forecasts")
    wanted = pc.field("datetime").isin(pa.array(np.asarray(dates, "datetime64[ns]")))
    stored = pq.ParquetDataset(newest_first, filters=wanted, page_checksum_verification=True)
    table = stored.read([name for name in stored.schema.names if name not in ("digest", "paths")])
    keys = ["datetime", "instrument"]
    table = table.sort_by([(key, "ascending") for key in keys])  # stable: the newest of equal rows stays first
    first = np.ones(len(table), bool)
    first[1:] = np.any([pc.not_equal(table[key][1:], table[key][:-1]).to_numpy() for key in keys], axis=0)
    return table.filter(pa.array(first))


class ChunkStore:
    """The folder `cache_dir`/<digest of weights and settings>: one Parquet file for each chunk.

    A chunk is named by the digests of its windows, so it is found by the very same windows only. Windows that are in
    other chunks (because a window beside them has changed, or there are more windows now) are found one by one.
    """

    def __init__(self, cache_dir: Path, task: StoredTask, kinds: pa.Schema | None = None) -> None:
        """Make no folder yet; `kinds` are the columns of the task's results, by default a forecast's."""
        self.task, self.folder = task, cache_dir / task.digest
        self.kinds = schema(task) if kinds is None else kinds

    def read(self, size: int) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Read all windows that are here: positions and forecasts, chunk by chunk of `size` windows first."""
        self._remove_drafts()
        others = set(self.folder.glob(CHUNKS))
        remaining: list[np.ndarray] = []
        digests: list[np.ndarray] = []
        for rows in divide(np.ones(len(self.task), bool), size):
            chunk = self.task.window_digests(rows)
            path = self.path(chunk)
            table = self._load(path, chunk) if path in others else None
            others.discard(path)
            if table is None:
                remaining.append(rows)
                digests.append(chunk)
            else:
                yield rows, table
        if remaining:
            yield from self._search(sorted(others), np.concatenate(remaining), np.concatenate(digests))

    def _search(
        self, paths: Sequence[Path], rows: np.ndarray, digests: np.ndarray
    ) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Search chunks for the windows at `rows`, which have these digests."""
        columns = {path: self._load(path, columns=["digest"]) for path in paths}  # the others are read where wanted
        stored = {path: table.column("digest").combine_chunks() for path, table in columns.items() if table is not None}
        kind = pa.binary(DIGEST_BYTES)
        # One call for all chunks: each call makes a hash table of all that are wanted.
        place = pc.index_in(pa.chunked_array(stored.values(), kind), value_set=to_arrow(digests, kind))
        places = pc.fill_null(place, -1).to_numpy()
        absent, start = np.ones(len(rows), bool), 0
        for path, column in stored.items():
            at = places[start : start + len(column)]
            start += len(column)
            found = np.flatnonzero((at >= 0) & absent[at])
            table = self._load(path) if len(found) else None
            if table is not None:
                absent[at[found]] = False
                yield rows[at[found]], table.take(found)

    def write(self, table: pa.Table) -> Path:
        """Write a chunk, whole or not at all."""
        path = self.path(_digests(table))
        settings = self.folder / SETTINGS
        if not settings.exists():
            with whole_file(settings) as draft:
                draft.write_text(json.dumps(self.task.identity, indent=2) + "\n")
        file = io.BytesIO()
        with pq.ParquetWriter(file, table.schema, compression="zstd", write_page_checksum=True) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({CHECKSUM: KIND + NO_DIGEST})
        content, place = bytearray(file.getbuffer()), file.getvalue().rindex(KIND + NO_DIGEST) + len(KIND)
        content[place : place + len(NO_DIGEST)] = _checksum(content)
        with whole_file(path) as draft:
            draft.write_bytes(content)
        return path

    def path(self, digests: np.ndarray) -> Path:
        """Return the file of the chunk of these windows."""
        return self.folder / f"chunk-{blake2b(digests.tobytes(), digest_size=16).hexdigest()}.parquet"

    def load(self, rows: np.ndarray) -> pa.Table | None:
        """Load the chunk of the windows at `rows`; None if it is not here."""
        digests = self.task.window_digests(rows)
        return self._load(self.path(digests), digests)

    def _remove_drafts(self) -> None:
        """Remove the unfinished files of processes that were killed."""
        for draft in self.folder.glob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if is_draft(draft) and time.time() - draft.stat().st_mtime > DRAFT_SECONDS:
                    draft.unlink()

    def _load(self, path: Path, digests: np.ndarray | None = None, columns: list[str] | None = None) -> pa.Table | None:
        """Load a chunk that is whole and of these windows, or return None; a damaged one is removed.

        A chunk without paths or summaries is left alone where the task keeps them.
        """
        kinds = self.kinds
        wanted = columns or kinds.names
        try:
            file = pa.memory_map(str(path)) if columns else pa.BufferReader(content := path.read_bytes())
            if columns is None and not is_whole(content):
                self._discard(path, "its checksum is another")
                return None
            stored = pq.read_schema(file)
            if any(name in wanted and name not in stored.names for name in OPTIONAL):
                return None
            lacking = [name for name in wanted if name not in stored.names]
            if lacking:
                self._discard(path, f"it has no column {lacking[0]!r}")
                return None
            other = [name for name in wanted if stored.field(name).type != kinds.field(name).type]
            if other:
                kind = f"{stored.field(other[0]).type}, not {kinds.field(other[0]).type}"
                self._discard(path, f"its column {other[0]!r} holds {kind}")
                return None
            table = pq.read_table(file, columns=wanted, page_checksum_verification=True)
        except FileNotFoundError:
            return None
        except (OSError, pa.ArrowException) as error:
            if isinstance(error, MemoryError) or getattr(error, "errno", None):
                raise  # the system could not read it now; that says nothing of the file
            self._discard(path, str(error).splitlines()[0])
            return None
        found = _digests(table)
        if path != self.path(found) or (digests is not None and not np.array_equal(found, digests)):
            self._discard(path, "it holds other windows than its name says")
            return None
        return table

    def _discard(self, path: Path, why: str) -> None:
        logger.warning(f"{path} is damaged ({why}): its windows are computed again")
        path.unlink(missing_ok=True)


def _checksum(content: bytearray) -> bytes:
    """Return the digest of a file whose own digest is NO_DIGEST."""
    return blake2b(content, digest_size=len(NO_DIGEST) // 2).hexdigest().encode()


def is_whole(content: bytes) -> bool:
    """Whether a file has the digest that it names, or names none: pages of earlier versions have checksums only."""
    place = content.rfind(KIND) + len(KIND)
    if place < len(KIND):
        return CHECKSUM not in content
    blank = bytearray(content)
    found, blank[place : place + len(NO_DIGEST)] = content[place : place + len(NO_DIGEST)], NO_DIGEST
    return found == _checksum(blank)


def _digests(table: pa.Table) -> np.ndarray:
    column = table.column("digest").combine_chunks()
    return np.frombuffer(
        column.buffers()[1], np.dtype((np.void, DIGEST_BYTES)), len(column), column.offset * DIGEST_BYTES
    )
