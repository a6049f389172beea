"""One process of a training, as the launcher starts it: `python -m kronos_qlib.train.worker FOLDER TOLD LAUNCHER`."""

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from kronos_qlib.files import whole_file
from kronos_qlib.nn.checkpoint import CheckpointError
from kronos_qlib.train.distributed import Group, joined, own_device
from kronos_qlib.train.job import Job
from kronos_qlib.train.metrics import METRICS, file_log
from kronos_qlib.train.signals import TrainingStopped

FAILURE = "failure.json"
# What running again would not mend. A process that meets one ends in peace, or the launcher would try again.
FINAL = (CheckpointError, ValueError, FloatingPointError, FileNotFoundError, TimeoutError, OSError)


def main(folder: Path, told: Path, launcher: int) -> int:
    """Take part in the job in `folder`: the exit status, 0 also where `told`/failure.json says why it failed."""
    log_as_qlib_does()
    try:
        with joined() as group:
            group.once(lambda: (told / FAILURE).unlink(missing_ok=True))  # of a life before the launcher's restart
            _loaded(folder, group).run(group, launcher, file_log(told / METRICS))
    except TrainingStopped as stopped:
        return 128 + stopped.signal
    except FINAL as error:
        tell(told, error)
    return 0


def together(prepare: Callable[[], Path] | None = None, conclude: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """Take part in a training whose processes somebody else has started, on one machine or several.

    Args:
        prepare: makes the job in a folder that all machines share, in the first process; the others wait for it.
        conclude: what the first process does when all is trained.

    Returns:
        The exit status (0, 2 for an error that a restart would not mend, 128 + signal) and what is to be said.
    """
    launcher = os.getppid()
    if prepare is None:
        log_as_qlib_does()
    try:
        with joined() as group:
            _loaded(group.once(prepare), group).run(group, launcher)
            if group.first:
                conclude()
    except TrainingStopped as stopped:
        return 128 + stopped.signal, str(stopped)
    except FINAL as error:
        return 2, str(error)
    return 0, ""


def _loaded(folder: Path, group: Group) -> Job:
    """The job on this process's own device; what is wrong in one process is raised in all: the first one says it."""
    try:
        job, error = Job.load(folder), None
        job.device = own_device(job.device)
    except FINAL as failed:
        error = failed
    for failed in group.gather(error):
        if failed is not None:
            raise failed
    return job


def tell(folder: Path, error: Exception) -> None:
    """Leave word of an error for the launcher."""
    kind = next(kind for kind in FINAL if isinstance(error, kind))
    message = error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else str(error)
    with whole_file(folder / FAILURE) as draft:
        draft.write_text(json.dumps({"kind": kind.__name__, "message": message}) + "\n")


def log_as_qlib_does() -> None:
    """Show this room's messages in the form of Qlib's own, which is not imported here: it takes memory and time."""
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
    # called without an active exception", seen once), and the launcher take it for one that died.
    os._exit(status)
