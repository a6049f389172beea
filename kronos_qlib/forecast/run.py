"""Forecast or read all windows of a task: load the chunks that are finished, compute the others, collect columns."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from tqdm.auto import tqdm

from kronos_qlib.files import scratch_folder
from kronos_qlib.forecast.chunk_store import ChunkStore, divide
from kronos_qlib.forecast.embedding import Embedder, EmbeddingTask
from kronos_qlib.forecast.forecaster import Forecaster
from kronos_qlib.forecast.processes import compute_in_processes
from kronos_qlib.forecast.task import Task
from kronos_qlib.hardware.cpu import retain_heap

logger = logging.getLogger("qlib.KronosForecast")
SCRATCH = "kronos-"  # prefix of the folders that last as long as a run
CHUNK_WINDOWS = 512  # in a file, or a window batch for each thread if that is more: what a killed process loses at most
EMBEDDING_CHUNK = 2048  # windows in a file of `embed`: a few seconds' work


@dataclass(frozen=True)
class Execution:
    """How a forecast is executed; nothing here decides a score.

    cache_dir: where finished chunks are kept and looked for; None keeps nothing.
    processes: of this machine, one per GPU or cores divided. engine: "local", or "ray" for a cluster.
    """

    cache_dir: Path | None = None
    processes: int = 1
    engine: str = "local"


class Forecast(NamedTuple):
    """The forecasts of W windows, in their order.

    columns: by name, [W] each (`paths`: [W, S · P · 6]). resumed: how many of the windows were in `cache_dir`.
    """

    columns: dict[str, np.ndarray]
    resumed: int


def forecast(task: Task, execution: Execution, columns: Sequence[str]) -> Forecast:
    """Forecast all windows of a task.

    Args:
        columns: which to return; `cache_dir` has all of them.

    Raises:
        RuntimeError: processes died too often, on one chunk or in a row.
    """
    store = ChunkStore(execution.cache_dir, task) if execution.cache_dir else None

    def compute(chunks: list[np.ndarray], report: Callable[[int], object]) -> Iterator[tuple[np.ndarray, pa.Table]]:
        return _compute(task, execution, store, chunks, report)

    return _collect("forecast", len(task), forecast_chunk_size(task, execution.processes), store, columns, compute)


def embed(task: EmbeddingTask, cache_dir: Path | None, columns: Sequence[str]) -> Forecast:
    """Read all windows of a task in one pass each, here, on all cores or the GPU; columns as `EmbeddingTask.schema`."""
    store = ChunkStore(cache_dir, task, task.schema) if cache_dir else None

    def compute(chunks: list[np.ndarray], report: Callable[[int], object]) -> Iterator[tuple[np.ndarray, pa.Table]]:
        embedder = Embedder(task)
        logger.info(f"reading {sum(map(len, chunks)):,} windows × {task.windows.lookback} bars on {task.device}")
        for rows in chunks:
            table = embedder.table(rows, report)
            if store is not None:
                store.write(table)
            yield rows, table

    return _collect("read", len(task), EMBEDDING_CHUNK, store, columns, compute)


def forecast_chunk_size(task: Task, processes: int) -> int:
    """Return how many windows a chunk of a forecast has: a window batch for every thread at least."""
    threads = torch.get_num_threads() // processes if task.device.type == "cpu" else 1
    return max(-(-CHUNK_WINDOWS // task.batch_size), threads) * task.batch_size


def _collect(
    what: str,
    windows: int,
    size: int,
    store: ChunkStore | None,
    columns: Sequence[str],
    compute: Callable[[list[np.ndarray], Callable[[int], object]], Iterator[tuple[np.ndarray, pa.Table]]],
) -> Forecast:
    """Collect columns of so many windows from the store, chunk by chunk of `size`, and compute the others."""
    result, missing = _Columns(windows, columns), np.ones(windows, bool)
    if store is not None:
        for rows, table in store.read(size):
            result.put(rows, table)
            missing[rows] = False
        logger.info(f"resumed {windows - missing.sum()} of {windows} windows from {store.folder}")
    resumed = windows - int(missing.sum())
    if missing.any():
        with tqdm(total=windows, initial=resumed, desc=what, unit="window", smoothing=0.05) as bar:
            for rows, table in compute(divide(missing, size), bar.update):
                result.put(rows, table)
    return Forecast(result.values, resumed)


def _compute(
    task: Task,
    execution: Execution,
    store: ChunkStore | None,
    chunks: list[np.ndarray],
    report: Callable[[int], object],
) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Compute chunks, in any order, and store them: positions and forecasts of each."""
    if execution.engine == "ray":
        from kronos_qlib.forecast.ray_cluster import compute_on_cluster

        for rows, table in compute_on_cluster(task, chunks, report):
            if store is not None:
                store.write(table)
            yield rows, table
    elif execution.processes > 1:
        with scratch_folder(execution.cache_dir, SCRATCH) as folder:
            yield from compute_in_processes(task, folder, store, chunks, execution.processes, report)
    else:
        yield from _compute_here(task, store, chunks, report)


def _compute_here(
    task: Task, store: ChunkStore | None, chunks: list[np.ndarray], report: Callable[[int], object]
) -> Iterator[tuple[np.ndarray, pa.Table]]:
    forecaster = Forecaster(task)
    logger.info(
        f"forecasting {task.describe(chunks)} on {task.device} ({task.precision}, {task.batch_size} windows at a time, "
        f"{torch.get_num_threads()} threads)"
    )
    with retain_heap():
        for rows in chunks:
            table = forecaster.table(rows, report)
            if store is not None:
                store.write(table)
            yield rows, table


class _Columns:
    """Columns that are filled chunk by chunk."""

    def __init__(self, length: int, names: Sequence[str]) -> None:
        self.length, self.names = length, names
        self.values: dict[str, np.ndarray] = {}

    def put(self, rows: np.ndarray, table: pa.Table) -> None:
        for name in self.names:
            column = table.column(name).combine_chunks()
            if isinstance(column.type, pa.FixedSizeListType):
                values = column.flatten().to_numpy().reshape(len(rows), -1)
            else:
                values = column.to_numpy(zero_copy_only=False)
            if name not in self.values:
                self.values[name] = np.empty((self.length, *values.shape[1:]), values.dtype)
            self.values[name][rows] = values
