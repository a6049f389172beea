"""Finished chunks of a forecast on disk, found again by what decides them."""

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kronos_qlib.files import whole_file
from kronos_qlib.forecast.forecaster import schema
from kronos_qlib.forecast.task import DIGEST_BYTES, Task

logger = logging.getLogger("qlib.KronosForecast")
SETTINGS = "forecast.json"
WINDOW = "datetime", "instrument"  # the columns that name a window
DRAFT_SECONDS = 3600  # an unfinished file that is older has no writer any more


def chunks(count: int, size: int) -> list[np.ndarray]:
    """The positions of `count` windows, `size` at a time."""
    return [np.arange(start, min(start + size, count)) for start in range(0, count, size)]


class Store:
    """The folder `cache_dir`/<digest of weights and settings>: one Parquet file for each chunk.

    A chunk is named by the digests of its windows, so it is found by the very same windows only. Windows of which
    another chunk has the forecast (the chunk they were in has changed, or there are more of them) are found one by one.
    """

    def __init__(self, cache_dir: Path, task: Task) -> None:
        self.task, self.folder = task, cache_dir / task.digest

    def read(self, size: int, missing: list[np.ndarray]) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Positions and forecasts of all windows that are here; chunks of those that are not are put into `missing`."""
        self._remove_drafts()
        others, partly = set(self.folder.glob("chunk-*.parquet")), []
        for rows in chunks(len(self.task), size):
            digests = self.task.window_digests(rows)
            path = self.path(digests)
            table = self._load(path, digests) if path in others else None
            others.discard(path)
            if table is None:
                partly.append((rows, digests))
            else:
                yield rows, table
        if not partly:
            return
        rows, digests = (np.concatenate(parts) for parts in zip(*partly))
        absent = np.ones(len(self.task), bool)
        order = np.argsort(_text(digests), kind="stable")
        wanted = _text(digests)[order]
        for path in sorted(others):
            names = self._load(path, columns=["digest"])  # the rest is read where it is wanted
            if names is None:
                continue
            here = _text(_digests(names))
            place = np.minimum(wanted.searchsorted(here), len(wanted) - 1)
            at = rows[order[place]]
            found = np.flatnonzero((wanted[place] == here) & absent[at])
            table = self._load(path) if len(found) else None
            if table is not None:
                absent[at[found]] = False
                yield at[found], table.take(found)
        whole = [rows for rows, _ in partly if absent[rows].all()]
        pieces = [rows[absent[rows]] for rows, _ in partly if not absent[rows].all()]
        left = np.concatenate(pieces) if pieces else np.array([], np.int64)
        missing += whole + [left[start : start + size] for start in range(0, len(left), size)]

    def write(self, table: pa.Table) -> Path:
        """Put a chunk on disk, whole or not at all."""
        path = self.path(_digests(table))
        about = self.folder / SETTINGS
        if not about.exists():
            with whole_file(about) as draft:
                draft.write_text(json.dumps(self.task.identity, indent=2) + "\n")
        with whole_file(path) as draft:
            pq.write_table(table, draft, compression="zstd", write_page_checksum=True)
        return path

    def path(self, digests: np.ndarray) -> Path:
        """The file of the chunk of these windows."""
        return self.folder / f"chunk-{blake2b(digests.tobytes(), digest_size=16).hexdigest()}.parquet"

    def load(self, rows: np.ndarray) -> pa.Table | None:
        """The chunk of the windows at `rows`, or None."""
        digests = self.task.window_digests(rows)
        return self._load(self.path(digests), digests)

    def _remove_drafts(self) -> None:
        """Remove what processes that were killed had begun to write."""
        for draft in self.folder.glob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - draft.stat().st_mtime > DRAFT_SECONDS:
                    draft.unlink()

    def _load(self, path: Path, digests: np.ndarray | None = None, columns: list[str] | None = None) -> pa.Table | None:
        """A chunk that is whole and of these windows, or None; a damaged one is removed.

        One that a run without paths has left is of no use to a run that wants them, and the reverse is.
        """
        wanted = columns or schema(self.task).names
        try:
            there = pq.read_schema(path).names
            if "paths" in wanted and "paths" not in there:
                return None
            missing = [name for name in wanted if name not in there]
            if missing:
                return self._discard(path, f"it has no column {missing[0]!r}")
            table = pq.read_table(path, columns=wanted, page_checksum_verification=True, memory_map=False)
        except FileNotFoundError:
            return None
        except (OSError, pa.ArrowException) as error:
            if isinstance(error, MemoryError) or getattr(error, "errno", None):
                raise  # the system could not read it now; that says nothing of the file
            return self._discard(path, str(error).splitlines()[0])
        here = _digests(table)
        if path != self.path(here) or (digests is not None and not np.array_equal(here, digests)):
            return self._discard(path, "it holds other windows than its name says")
        return table

    def _discard(self, path: Path, why: str) -> None:
        logger.warning(f"{path} is damaged ({why}): its windows are computed anew")
        path.unlink(missing_ok=True)


def read_forecasts(folder: Path, dates: np.ndarray) -> pa.Table:
    """Read the stored forecasts of some score dates.

    Args:
        folder: `cache_dir`/<digest of a task>.
        dates: datetime64 or what numpy converts to it.

    Returns:
        The columns of a forecast without `digest` and `paths`, sorted by datetime and instrument, each window once. Of
        a window that was stored before and after one of its bars was corrected, what was stored last.

    Raises:
        FileNotFoundError: the folder holds no forecasts. OSError, pyarrow.ArrowException: they cannot be read.
    """
    chunks = sorted(folder.glob("chunk-*.parquet"), key=lambda path: (-path.stat().st_mtime_ns, path.name))
    if not chunks:
        raise FileNotFoundError(f"{folder} holds no stored forecasts (no chunk-*.parquet)")
    wanted = pc.field("datetime").isin(pa.array(np.asarray(dates, "datetime64[ns]")))
    stored = pq.ParquetDataset(chunks, filters=wanted, page_checksum_verification=True)
    table = stored.read([name for name in stored.schema.names if name not in ("digest", "paths")])
    table = table.sort_by([(name, "ascending") for name in WINDOW])  # stable: the newest of a window comes first
    first = np.ones(len(table), bool)
    first[1:] = np.any([pc.not_equal(table[name][1:], table[name][:-1]).to_numpy() for name in WINDOW], axis=0)
    return table.filter(pa.array(first))


def _digests(table: pa.Table) -> np.ndarray:
    chunks = table.column("digest").combine_chunks()
    data = chunks.buffers()[1]
    start = chunks.offset * DIGEST_BYTES
    return np.frombuffer(data, np.dtype((np.void, DIGEST_BYTES)), len(chunks), start)


def _text(digests: np.ndarray) -> np.ndarray:
    """Digests as text of fixed length, which sorts."""
    return np.ascontiguousarray(digests).view(f"S{DIGEST_BYTES}")
