"""Forecasting in several processes of one machine: chunks from one queue, and what happens when a process dies."""

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
from typing import IO

import numpy as np
import pyarrow as pa
import torch

from kronos_qlib.files import save_array
from kronos_qlib.forecast.chunk_store import Store
from kronos_qlib.forecast.forecaster import Scorer
from kronos_qlib.forecast.task import Task
from kronos_qlib.hardware.cpu import retain_heap

logger = logging.getLogger("qlib.KronosForecast")
WORKER = "-m", "kronos_qlib.forecast.processes"
DEATHS = 3  # of processes on one chunk, or for each process without any chunk finished, until all is given up


def compute_in_processes(
    task: Task,
    folder: Path,
    store: Store | None,
    missing: list[np.ndarray],
    processes: int,
    done: Callable[[int], object],
) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Positions and forecasts of chunks, in the order in which they are finished.

    Args:
        folder: for the task and, without a store, for the chunks, while the work lasts.

    Raises:
        RuntimeError: processes died DEATHS times on one chunk, or again and again; or what a process raised, told in
            its words.
    """
    task.save(folder / "task")
    for number, rows in enumerate(missing):
        save_array(folder / "chunks" / f"{number}.npy", rows)
    own = store is None
    chunks = store or Store(folder, task)
    work: queue.SimpleQueue[int] = queue.SimpleQueue()
    news: queue.SimpleQueue[_News] = queue.SimpleQueue()
    for number in range(len(missing)):
        work.put(number)
    processes = min(processes, len(missing))
    threads = [max(1, torch.get_num_threads() // processes)] * processes
    for extra in range(torch.get_num_threads() - sum(threads)):
        threads[extra] += 1
    logger.info(
        f"forecasting {task.told(missing)} in {processes} processes on {task.device} ({task.precision}, "
        f"{'/'.join(map(str, sorted(set(threads))))} threads each)"
    )
    workers = [
        _Worker(folder, chunks.folder.parent, work, news, rank, threads[rank], _device(task.device, rank))
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    deaths, in_vain = dict.fromkeys(range(len(missing)), 0), 0
    left = len(missing)
    try:
        while left:
            said = news.get()
            done(said.windows)
            if said.error is not None:
                raise RuntimeError(said.error)
            if said.died is not None:
                deaths[said.chunk] += 1
                in_vain += 1
                if deaths[said.chunk] == DEATHS or in_vain == DEATHS * processes:
                    where = f"on the same {len(missing[said.chunk])} windows" if deaths[said.chunk] == DEATHS else ""
                    raise RuntimeError(
                        f"forecasting processes died {max(deaths[said.chunk], in_vain)} times {where or 'in a row'} "
                        f"({said.died}); what they said stands above, and what is finished is kept in "
                        f"{'nothing: no cache_dir was given' if own else chunks.folder}"
                    )
                logger.warning(f"a forecasting process died ({said.died}); its chunk goes to another")
                work.put(said.chunk)
            elif said.finished:
                rows = missing[said.chunk]
                table = chunks.load(rows)
                if table is None:  # another run may have taken it for damaged
                    news.put(_News(said.chunk, windows=-len(rows), died="its chunk was gone from the folder"))
                    continue
                left, in_vain = left - 1, 0
                if own:
                    chunks.path(task.window_digests(rows)).unlink()
                yield rows, table
    finally:
        for worker in workers:
            worker.stop()


@dataclass(frozen=True)
class _News:
    """What a worker has to tell of a chunk."""

    chunk: int
    windows: int = 0  # that are done since the last news
    finished: bool = False
    died: str | None = None
    error: str | None = None


class _Worker(threading.Thread):
    """A thread that keeps one process at work, and starts another when it dies."""

    def __init__(
        self,
        folder: Path,
        cache_dir: Path,
        work: "queue.SimpleQueue[int]",
        news: "queue.SimpleQueue[_News]",
        rank: int,
        threads: int,
        device: torch.device,
    ) -> None:
        super().__init__(name=f"forecast-{rank}", daemon=True)
        self.command = [sys.executable, *WORKER, str(folder), str(cache_dir), str(device)]
        self.threads, self.work, self.news = threads, work, news
        self.process: subprocess.Popen[str] | None = None
        self.stopped, self.lock = False, threading.Lock()

    def run(self) -> None:
        while not self.stopped:
            try:
                chunk = self.work.get(timeout=0.5)
            except queue.Empty:
                continue
            try:
                self._forecast(chunk)
            except Exception as error:  # a thread that ends unheard would leave its chunk to nobody
                self.news.put(_News(chunk, error=f"{type(error).__name__}: {error}"))

    def stop(self) -> None:
        """End the process now; a chunk that it has not finished is lost."""
        with self.lock:
            self.stopped, process = True, self.process
        if process is not None:
            process.kill()
            process.wait()

    def _living(self) -> subprocess.Popen[str] | None:
        """The process, started if there is none; None once all is to end."""
        with self.lock:
            if self.process is None and not self.stopped:
                environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
                self.process = subprocess.Popen(
                    self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
                )
            return self.process

    def _forecast(self, chunk: int) -> None:
        process, told = self._living(), 0
        if process is None:
            return
        try:
            _say(process.stdin, str(chunk))
            for line in process.stdout:
                said = json.loads(line)
                told += said.get("windows", 0)
                self.news.put(_News(chunk, **said))
                if "finished" in said or "error" in said:
                    return
        except OSError:
            pass
        status = process.wait()
        with self.lock:
            self.process = None
        if not self.stopped:
            self.news.put(_News(chunk, windows=-told, died=_cause(status)))


def _say(pipe: IO[str], line: str) -> None:
    pipe.write(line + "\n")
    pipe.flush()


def _cause(status: int) -> str:
    known = {number.value: number.name for number in signal.Signals}
    return known.get(-status, f"signal {-status}") if status < 0 else f"exit code {status}"


def _device(device: torch.device, rank: int) -> torch.device:
    """The device of a process: each has a GPU of its own."""
    return torch.device("cuda", rank) if device.type == "cuda" and device.index is None else device


def main(folder: Path, cache_dir: Path, device: torch.device) -> None:
    """Work on chunks until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who gives the orders
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what anybody else prints is no answer

    def say(**news: object) -> None:
        answers.write(json.dumps(news) + "\n")

    orders: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    try:
        task = Task.load(folder / "task").on(device)
        scorer, store = Scorer(task), Store(cache_dir, task)
    except Exception as error:
        orders.get()
        say(error=_told(error))
        return
    with retain_heap():
        while True:
            chunk = orders.get()
            try:
                rows = np.load(folder / "chunks" / f"{chunk}.npy")
                store.write(scorer.table(rows, lambda count: say(windows=count)))
            except Exception as error:
                say(error=_told(error))
                continue
            say(finished=True)


def _told(error: Exception) -> str:
    """What whoever gives the orders is to say; errors that nobody wrote for a reader have their trace printed here."""
    if isinstance(error, (ValueError, OSError, RuntimeError)):
        return str(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


def _listen(orders: "queue.SimpleQueue[int]") -> None:
    """Pass on orders; when the one who gives them has gone, end at once: files are whole or not there."""
    for line in sys.stdin:
        orders.put(int(line))
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), torch.device(sys.argv[3]))
