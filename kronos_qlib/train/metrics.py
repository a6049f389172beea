"""The metrics of a training: the rows of history.csv, and the way to the recorder, also from another process."""

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
from typing import TYPE_CHECKING, Any, BinaryIO

from kronos_qlib.files import whole_file

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

logger = logging.getLogger("qlib.KronosTrainer")
HISTORY_COLUMNS = ["step", "epoch", "lr", "train_loss", "val_loss"]
METRICS_FILE, POLL_SECONDS = "metrics.jsonl", 1.0

Log = Callable[[dict[str, float], int], None]
"""A function that takes metrics by name, and the step that they are of."""


class History:
    """The rows of history.csv, one per logging step; the file is rewritten whole, so that a kill leaves no half row.

    Args:
        rows: those of the checkpoint that the training goes on from.
    """

    def __init__(self, path: Path, rows: list[dict[str, Any]]) -> None:
        self.path, self.rows = path, rows

    def append(self, row: dict[str, float]) -> None:
        """Add a row; columns that it lacks stay empty."""
        self.rows.append({key: row.get(key, "") for key in HISTORY_COLUMNS})

    def flush(self) -> None:
        """Write the file."""
        with whole_file(self.path) as draft, draft.open("w", newline="") as file:
            writer = csv.DictWriter(file, HISTORY_COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)


def read_history(path: Path, step: int) -> list[dict[str, Any]]:
    """Read the rows up to a step, of a training whose checkpoints do not hold them; those after it are taken again.

    Raises:
        ValueError: the file is damaged.
    """
    if not step or not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if int(row["step"]) <= step]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"{path}: damaged ({error}); remove it to go on without the rows so far") from error


def guarded_log(log: Log) -> Log:
    """Make a log that warns of its first failure and raises none: a recorder out of reach must not end a training."""
    failed: list[Exception] = []

    def log_or_warn(metrics: dict[str, float], step: int) -> None:
        try:
            log(metrics, step)
        except Exception as error:
            if not failed:
                logger.warning(f"the metrics of step {step} could not be recorded ({error}); the training goes on")
            failed.append(error)

    return log_or_warn


def recorder_log(recorder: dict[str, str] | None) -> Log:
    """Make a log to an MLflow run, given by its `uri` and `run_id`; None gives one that does nothing."""
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
    """Make a log to a file, for `forward_metrics` in the launcher: MLflow would take 150 MiB of another process."""

    def log(metrics: dict[str, float], step: int) -> None:
        with path.open("ab") as file:
            file.write(b"\n" + json.dumps([metrics, step]).encode() + b"\n")  # apart from one that was cut short

    return log


@contextmanager
def forward_metrics(path: Path, log: Log) -> Iterator[None]:
    """Log what a `file_log` writes to a file, as it comes, for a block; the rest of it at the block's end."""
    path.touch()
    ended = threading.Event()

    def follow() -> None:
        with path.open("rb") as file:
            while not ended.wait(POLL_SECONDS):
                _forward_lines(file, log)
            _forward_lines(file, log)

    follower = threading.Thread(target=follow, name="metrics", daemon=True)
    try:
        follower.start()
        yield
    finally:
        ended.set()
        follower.join()


def _forward_lines(file: BinaryIO, log: Log) -> None:
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
