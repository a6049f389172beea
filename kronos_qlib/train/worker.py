"""One process of a training, as our launcher starts it (`python -m kronos_qlib.train.worker`), or as torchrun does."""

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kronos_qlib.files import whole_file
from kronos_qlib.nn.checkpoint import CheckpointError
from kronos_qlib.train.distributed import Group, local_device, process_group
from kronos_qlib.train.job import Job
from kronos_qlib.train.metrics import METRICS_FILE, file_log
from kronos_qlib.train.signals import TrainingStopped

FAILURE_FILE = "failure.json"
# What running again would not mend. A process that meets one ends with status 0, or the launcher would try again.
FINAL_ERRORS = (CheckpointError, ValueError, FloatingPointError, FileNotFoundError, TimeoutError, OSError)


def main(job_folder: Path, outbox: Path, launcher: int) -> int:
    """Run a saved job as one process of our launcher.

    Args:
        outbox: gets the metrics, and failure.json if the training failed and a restart would not mend it.
        launcher: the process id of the launcher.

    Returns:
        The exit status: 0, also for a failure, or 128 + the number of the signal that stopped the training.
    """
    configure_logging()
    try:
        with process_group() as group:
            group.run_on_first(lambda: (outbox / FAILURE_FILE).unlink(missing_ok=True))  # from before a restart
            _load_job(job_folder, group).run(group, launcher, file_log(outbox / METRICS_FILE))
    except TrainingStopped as stopped:
        return 128 + stopped.signal
    except FINAL_ERRORS as error:
        _write_failure(outbox, error)
    return 0


def run_under_torchrun(
    prepare: Callable[[], Path] | None = None, conclude: Callable[[], None] = lambda: None
) -> tuple[int, str]:
    """Run a job as one of the processes that torchrun has started, on one machine or several.

    Args:
        prepare: saves the job to a folder that all machines share and returns it; called in the first process, while
            the others, which give None, wait for it.
        conclude: called in the first process when all is trained.

    Returns:
        The exit status (0, 2 for an error that a restart would not mend, 128 + signal) and its message.
    """
    launcher = os.getppid()
    if prepare is None:
        configure_logging()
    try:
        with process_group() as group:
            _load_job(group.run_on_first(prepare), group).run(group, launcher)
            if group.is_first:
                conclude()
    except TrainingStopped as stopped:
        return 128 + stopped.signal, str(stopped)
    except FINAL_ERRORS as error:
        return 2, str(error)
    return 0, ""


def _load_job(folder: Path, group: Group) -> Job:
    """Load the job for this process's own device; an error in one process is raised in all: the first reports it."""
    try:
        job, error = Job.load(folder), None
        job = replace(job, device=local_device(job.device))
    except FINAL_ERRORS as failed:
        error = failed
    for failed in group.all_gather(error):
        if failed is not None:
            raise failed
    return job


def _write_failure(outbox: Path, error: Exception) -> None:
    kind = next(kind for kind in FINAL_ERRORS if isinstance(error, kind))
    message = error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else str(error)
    with whole_file(outbox / FAILURE_FILE) as draft:
        draft.write_text(json.dumps({"kind": kind.__name__, "message": message}) + "\n")


def configure_logging() -> None:
    """Log in the form of Qlib's own messages, without Qlib, whose import takes memory and time."""
    handler = logging.StreamHandler()
    form = (
        "[%(process)s:%(threadName)s](%(asctime)s) %(levelname)s - %(name)s - [%(filename)s:%(lineno)d] - %(message)s"
    )
    handler.setFormatter(logging.Formatter(form))
    log = logging.getLogger("qlib")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


if __name__ == "__main__":
    status = main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    logging.shutdown()
    sys.stdout.flush()
    # All is on disk. A thread of the process group that outlives the interpreter would abort the process ("terminate
    # called without an active exception", seen once), and the launcher would take it for one that died.
    os._exit(status)
