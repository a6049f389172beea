"""Metrics on their way to the recorder, also from the first of several processes to their launcher."""

import csv
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from kronos_qlib.files import whole_file

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

logger = logging.getLogger("qlib.KronosTrainer")
METRICS, POLL_SECONDS = "metrics.jsonl", 1.0

Log = Callable[[dict[str, float], int], None]
"""What takes metrics by name and the step they are of."""


def tolerant(log: Log) -> Log:
    """A log whose failures are told, once, and end no training: a store of metrics may be busy or out of reach."""
    failed: list[Exception] = []

    def log_if_it_can(metrics: dict[str, float], step: int) -> None:
        try:
            log(metrics, step)
        except Exception as error:
            if not failed:
                logger.warning(f"the metrics of step {step} could not be recorded ({error}); the training goes on")
            failed.append(error)

    return log_if_it_can


def recorder_log(recorder: dict[str, str] | None) -> Log:
    """A function that logs metrics to an MLflow run as they come; without one it does nothing."""
    if recorder is None:
        return lambda metrics, step: None

    @cache
    def client() -> "MlflowClient":
        from mlflow.tracking import MlflowClient

        return MlflowClient(recorder["uri"])

    def log(metrics: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        client().log_batch(recorder["run_id"], [Metric(key, value, now, step) for key, value in metrics.items()])

    return log


def file_log(path: Path) -> Log:
    """A function that leaves metrics in a file, for `passed_on`: MLflow takes 150 MiB, which a launcher has already."""

    def log(metrics: dict[str, float], step: int) -> None:
        with path.open("ab") as file:
            file.write(b"\n" + json.dumps([metrics, step]).encode() + b"\n")  # apart from one that was cut short

    return log


@contextmanager
def passed_on(path: Path, log: Log) -> Iterator[None]:
    """For the length of a block log what `file_log` leaves in a file, as it comes, and at the end the rest of it."""
    path.touch()
    ended = threading.Event()

    def follow() -> None:
        with path.open("rb") as file:
            while not ended.wait(POLL_SECONDS):
                _pass_on(file, log)
            _pass_on(file, log)

    follower = threading.Thread(target=follow, name="metrics", daemon=True)
    try:
        follower.start()
        yield
    finally:
        ended.set()
        follower.join()


def _pass_on(file: BinaryIO, log: Log) -> None:
    """Log the whole lines that have come; one that is being written waits for the next time.

    One that was cut short, by a kill or a full disk, is left out.
    """
    while (line := file.readline()).endswith(b"\n"):
        try:
            metrics, step = json.loads(line)
        except ValueError:
            continue
        log(metrics, step)
    file.seek(-len(line), os.SEEK_CUR)


HISTORY_COLUMNS = ["step", "epoch", "lr", "train_loss", "val_loss"]


class History:
    """One row per logging step, rewritten whole so that a kill never leaves half a row.

    Args:
        step: rows after it belong to a past that a resumed training does not share; they are dropped.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.rows = path, []
        if step and path.exists():
            with path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]

    def append(self, row: dict[str, float]) -> None:
        """Add a row; what it lacks stays empty."""
        self.rows.append({key: row.get(key, "") for key in HISTORY_COLUMNS})

    def flush(self) -> None:
        """Write the file."""
        with whole_file(self.path) as draft, draft.open("w", newline="") as file:
            writer = csv.DictWriter(file, HISTORY_COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
