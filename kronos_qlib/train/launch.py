"""Starting the processes of a training on this machine, and what comes of them."""

import json
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from kronos_qlib.train.checkpoints import CHECKPOINTS, finished
from kronos_qlib.train.job import Job
from kronos_qlib.train.metrics import METRICS, passed_on, recorder_log, tolerant
from kronos_qlib.train.signals import TrainingStopped
from kronos_qlib.train.worker import FAILURE, FINAL

logger = logging.getLogger("qlib.KronosTrainer")
# torch's launcher takes these for itself, those that the system has.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
PATIENCE = 300  # seconds that a process has for its step and a checkpoint when it is to stop


def launch(job: Job, processes: int) -> None:
    """Run a job in several processes of this machine and wait for them; the job's networks end with the best weights.

    A process that dies is started again with all others, from the last checkpoint, `max_restarts` times. Ctrl-C and
    SIGTERM reach the processes, which save a checkpoint and end.

    Raises:
        what `Job.run` raises; RuntimeError: the processes died too often.
    """
    heeded = [
        number.name for number in SIGNALS if number.name != "SIGQUIT" and signal.getsignal(number) != signal.SIG_IGN
    ]
    options = {"shutdown_timeout": PATIENCE, "signals_to_handle": ",".join(heeded)}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"kronos-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=job.settings.max_restarts,
        **{key: value for key, value in options.items() if key in LaunchConfig.__dataclass_fields__},  # not in 2.7
    )
    logger.info(f"starting {processes} processes; they are started again up to {config.max_restarts} times if one dies")
    # Not in output_dir, whose disk may be full.
    with _handlers_kept(), job.saved() as folder, tempfile.TemporaryDirectory(prefix="kronos-") as told:
        try:
            arguments = [str(folder), told, str(os.getpid())]
            with passed_on(Path(told) / METRICS, tolerant(recorder_log(job.recorder))):
                elastic_launch(config, sys.executable)("-m", "kronos_qlib.train.worker", *arguments)
        except SignalException as stopped:
            _raise_failure(Path(told))
            raise TrainingStopped(
                f"stopped by {stopped.sigval.name}; {_newest(job)}; run the same again to go on", stopped.sigval
            ) from None
        except ChildFailedError as error:
            _raise_failure(Path(told))
            raise RuntimeError(
                f"the training processes died {config.max_restarts + 1} times ({_causes(error)}); {_newest(job)}; what "
                "they said stands above"
            ) from None
        _raise_failure(Path(told))
    job.load_best()


def _raise_failure(folder: Path) -> None:
    """Raise here what a process could not go on for and no restart would mend."""
    path = folder / FAILURE
    if path.exists():
        said = json.loads(path.read_text())
        raise {kind.__name__: kind for kind in FINAL}[said["kind"]](said["message"])


def _newest(job: Job) -> str:
    """The newest checkpoint there is, in words."""
    folders = [job.folder / stage.name / CHECKPOINTS for stage in job.stages()]
    found = [path for folder in folders for path in finished(folder)]
    return f"the last checkpoint is {found[-1]}" if found else "there is no checkpoint yet"


def _causes(error: ChildFailedError) -> str:
    return ", ".join(
        f"process {rank}: {failure.signal_name() if failure.exitcode < 0 else f'exit code {failure.exitcode}'}"
        for rank, failure in error.failures.items()
    )


@contextmanager
def _handlers_kept() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
