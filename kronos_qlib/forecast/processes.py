"""Forecast in several processes of one machine: chunks from one queue, and what happens when a process dies.

The parent starts each worker with `python -m kronos_qlib.forecast.processes FOLDER CACHE_DIR DEVICE`. A worker reads
the number of a chunk from its standard input, writes the chunk's forecast into the cache, reports on its standard
output, and ends when the parent closes its input or dies. It imports neither pandas nor Qlib and needs no main guard in
the user's script. (loky was tried: a killed worker there fails every pending chunk, without a word on which of them it
was at, and workers outlive a parent that is killed.)
"""

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from kronos_qlib.files import save_array
from kronos_qlib.forecast.chunk_store import ChunkStore
from kronos_qlib.forecast.forecaster import Forecaster
from kronos_qlib.forecast.task import Task
from kronos_qlib.hardware.cpu import retain_heap

logger = logging.getLogger("qlib.KronosForecast")
WORKER = "-m", "kronos_qlib.forecast.processes"
DEATHS = 3  # of processes on one chunk, or for each process without any chunk finished, that end the forecast


def compute_in_processes(
    task: Task,
    folder: Path,
    store: ChunkStore | None,
    chunks: list[np.ndarray],
    processes: int,
    report: Callable[[int], object],
) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Compute chunks (positions of windows), in the order in which they are finished: positions and forecasts.

    Args:
        folder: for the task and, without a store, for the chunks, while the work lasts.
        report: called with numbers of windows as they are forecast; below 0 where a process died with them.

    Raises:
        RuntimeError: processes died DEATHS times on one chunk, or in a row; or what a process raised, in its words.
    """
    task.save(folder / "task")
    for number, rows in enumerate(chunks):
        save_array(folder / "chunks" / f"{number}.npy", rows)
    cache = store or ChunkStore(folder, task)
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    reports: queue.SimpleQueue[_Report] = queue.SimpleQueue()
    for number in range(len(chunks)):
        waiting.put(number)
    processes = min(processes, len(chunks))
    threads = [max(1, torch.get_num_threads() // processes)] * processes
    for rank in range(torch.get_num_threads() - sum(threads)):
        threads[rank] += 1
    logger.info(
        f"forecasting {task.describe(chunks)} in {processes} processes on {task.device} ({task.precision}, "
        f"{'/'.join(map(str, sorted(set(threads))))} threads each)"
    )
    workers = [
        _Worker(folder, cache.folder.parent, waiting, reports, rank, threads[rank], _device(task.device, rank))
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    deaths, deaths_in_a_row = [0] * len(chunks), 0
    left = len(chunks)
    try:
        while left:
            news = reports.get()
            report(news.windows)
            if news.error is not None:
                raise RuntimeError(news.error)
            if news.death is not None:
                deaths[news.chunk] += 1
                deaths_in_a_row += 1
                if deaths[news.chunk] == DEATHS or deaths_in_a_row == DEATHS * processes:
                    same = deaths[news.chunk] == DEATHS
                    where = f"on the same {len(chunks[news.chunk])} windows" if same else "in a row"
                    raise RuntimeError(
                        f"forecasting processes died {max(deaths[news.chunk], deaths_in_a_row)} times {where} "
                        f"({news.death}); their own messages stand above, and what is finished is kept in "
                        f"{cache.folder if store else 'nothing: no cache_dir was given'}"
                    )
                logger.warning(f"a forecasting process died ({news.death}); another one takes its chunk")
                waiting.put(news.chunk)
            elif news.finished:
                rows = chunks[news.chunk]
                table = cache.load(rows)
                if table is None:  # another run may have taken it for damaged
                    reports.put(_Report(news.chunk, -len(rows), death="its chunk was gone from the folder"))
                    continue
                left, deaths_in_a_row = left - 1, 0
                if store is None:
                    cache.path(task.window_digests(rows)).unlink()
                yield rows, table
    finally:
        for worker in workers:
            worker.stop()


@dataclass(frozen=True)
class _Report:
    """What a worker reports of a chunk: windows forecast since the last report, its end, a death, or an error."""

    chunk: int
    windows: int = 0
    finished: bool = False
    death: str | None = None
    error: str | None = None


class _Worker(threading.Thread):
    """A thread that gives chunks to one process, and starts another when it dies."""

    def __init__(
        self,
        folder: Path,
        cache_dir: Path,
        waiting: "queue.SimpleQueue[int]",
        reports: "queue.SimpleQueue[_Report]",
        rank: int,
        threads: int,
        device: torch.device,
    ) -> None:
        super().__init__(name=f"forecast-{rank}", daemon=True)
        self.command = [sys.executable, *WORKER, str(folder), str(cache_dir), str(device)]
        self.threads, self.waiting, self.reports = threads, waiting, reports
        self.process: subprocess.Popen[str] | None = None
        self.stopped, self.lock = False, threading.Lock()

    def run(self) -> None:
        while not self.stopped:
            try:
                chunk = self.waiting.get(timeout=0.5)
            except queue.Empty:
                continue
            try:
                self._forecast(chunk)
            except Exception as error:  # a thread that ended silently would leave its chunk undone
                self.reports.put(_Report(chunk, error=f"{type(error).__name__}: {error}"))

    def stop(self) -> None:
        """End the process now; a chunk that it has not finished is lost."""
        with self.lock:
            self.stopped, process = True, self.process
        if process is not None:
            process.kill()
            process.wait()

    def _start(self) -> "subprocess.Popen[str] | None":
        """Return the process, started if there is none; None once the worker is stopped."""
        with self.lock:
            if self.process is None and not self.stopped:
                environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
                self.process = subprocess.Popen(
                    self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
                )
            return self.process

    def _forecast(self, chunk: int) -> None:
        process, windows = self._start(), 0
        if process is None or process.stdin is None or process.stdout is None:
            return
        try:
            process.stdin.write(f"{chunk}\n")
            process.stdin.flush()
            for line in process.stdout:
                fields = json.loads(line)
                windows += fields.get("windows", 0)
                self.reports.put(_Report(chunk, **fields))
                if "finished" in fields or "error" in fields:
                    return
        except OSError:
            pass
        status = process.wait()
        with self.lock:
            self.process = None
        if not self.stopped:
            self.reports.put(_Report(chunk, -windows, death=_cause(status)))


def _cause(status: int) -> str:
    known = {number.value: number.name for number in signal.Signals}
    return known.get(-status, f"signal {-status}") if status < 0 else f"exit code {status}"


def _device(device: torch.device, rank: int) -> torch.device:
    """Return the device of a process: each has a GPU of its own."""
    return torch.device("cuda", rank) if device.type == "cuda" and device.index is None else device


def main(folder: Path, cache_dir: Path, device: torch.device) -> None:
    """Forecast chunks, in a worker process, until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what other code prints is no report

    def report(**fields: object) -> None:
        output.write(json.dumps(fields) + "\n")

    chunks: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Thread(target=_read_chunks, args=(chunks,), daemon=True).start()
    try:
        task = Task.load(folder / "task").to(device)
        forecaster, store = Forecaster(task), ChunkStore(cache_dir, task)
    except Exception as error:
        chunks.get()
        report(error=_message(error))
        return
    with retain_heap():
        while True:
            chunk = chunks.get()
            try:
                rows = np.load(folder / "chunks" / f"{chunk}.npy")
                store.write(forecaster.table(rows, lambda count: report(windows=count)))
            except Exception as error:
                report(error=_message(error))
                continue
            report(finished=True)


def _message(error: Exception) -> str:
    """Return an error's message for the parent; of errors without a message for users the trace is printed here."""
    if isinstance(error, (ValueError, OSError, RuntimeError)):
        return str(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


def _read_chunks(chunks: "queue.SimpleQueue[int]") -> None:
    """Queue the numbers of chunks; when the parent has gone, end at once: files are whole or not there."""
    for line in sys.stdin:
        chunks.put(int(line))
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), torch.device(sys.argv[3]))
