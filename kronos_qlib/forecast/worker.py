"""One process of a forecast: `python -m kronos_qlib.forecast.worker FOLDER CACHE_DIR DEVICE`.

It reads the number of a chunk from its standard input, writes the chunk's forecast into the cache, says so on its
standard output, and ends when nobody writes to it any more.
"""

import json
import os
import queue
import signal
import sys
import threading
import traceback
from pathlib import Path

import numpy as np
import torch

from kronos_qlib.forecast.scorer import Scorer
from kronos_qlib.forecast.store import Store
from kronos_qlib.forecast.task import Task
from kronos_qlib.nn.cpu import memory_kept


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
    with memory_kept():
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
