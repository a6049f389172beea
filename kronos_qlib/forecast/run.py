"""A forecast from beginning to end: what is there already, what is left, who computes it."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tqdm.auto import tqdm

from kronos_qlib.files import scratch_folder
from kronos_qlib.forecast.chunk_store import Store, chunks
from kronos_qlib.forecast.forecaster import Scorer, part_size
from kronos_qlib.forecast.processes import compute_in_processes
from kronos_qlib.forecast.task import Task
from kronos_qlib.hardware.cpu import retain_heap

logger = logging.getLogger("qlib.KronosForecast")
SCRATCH = "kronos-"  # how the names of folders begin that last as long as a run
CHUNK = 512  # windows a file, or a part for each thread if that is more: what a killed process loses at most


@dataclass(frozen=True)
class Run:
    """How a forecast is worked on; nothing here decides what comes of it.

    cache_dir: where finished chunks are kept and looked for; None keeps nothing.
    processes: of this machine, one per GPU or cores divided. engine: "local", or "ray" for a cluster.
    """

    cache_dir: Path | None = None
    processes: int = 1
    engine: str = "local"


def forecast(task: Task, run: Run, columns: Sequence[str]) -> tuple[dict[str, np.ndarray], int]:
    """Forecast all windows of a task.

    Args:
        columns: which to bring back; all are in `cache_dir`.

    Returns:
        The columns by name, [W] (`paths`: [W, S · P · 6]), in the order of the windows, and how many of the windows
        were in `cache_dir` already.

    Raises:
        RuntimeError: processes died again and again on one chunk.
    """
    task = replace(task, part=task.part or part_size(task))
    threads = torch.get_num_threads() // run.processes if task.device.type == "cpu" else 1
    chunk = max(-(-CHUNK // task.part), threads) * task.part  # a part for every thread at least
    result = _Columns(len(task), columns)
    store, missing = Store(run.cache_dir, task) if run.cache_dir else None, []
    if store is None:
        missing = chunks(len(task), chunk)
    else:
        for rows, table in store.read(chunk, missing):
            result.put(rows, table)
    left = sum(len(rows) for rows in missing)
    resumed = len(task) - left
    if store is not None:
        logger.info(f"resumed {resumed} of {len(task)} windows from {store.folder}")
    if missing:
        with tqdm(total=len(task), initial=resumed, desc="forecast", unit="window", smoothing=0.05) as bar:
            for rows, table in _compute(task, run, store, missing, bar.update):
                result.put(rows, table)
    return result.values, resumed


def _compute(
    task: Task, run: Run, store: Store | None, missing: list[np.ndarray], done: Callable[[int], object]
) -> Iterator[tuple[np.ndarray, pa.Table]]:
    if run.engine == "ray":
        from kronos_qlib.forecast.ray_cluster import compute_on_cluster

        for rows, table in compute_on_cluster(task, missing, done):
            if store is not None:
                store.write(table)
            yield rows, table
    elif run.processes > 1:
        with scratch_folder(run.cache_dir, SCRATCH) as folder:
            yield from compute_in_processes(task, folder, store, missing, run.processes, done)
    else:
        yield from _compute_here(task, store, missing, done)


def _compute_here(
    task: Task, store: Store | None, missing: list[np.ndarray], done: Callable[[int], object]
) -> Iterator[tuple[np.ndarray, pa.Table]]:
    scorer = Scorer(task)
    logger.info(
        f"forecasting {task.told(missing)} on {task.device} ({task.precision}, {scorer.part} windows at a time, "
        f"{torch.get_num_threads()} threads)"
    )
    with retain_heap():
        for rows in missing:
            table = scorer.table(rows, done)
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
