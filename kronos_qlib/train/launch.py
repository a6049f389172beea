"""Starts the processes of a training on this machine, and raises here what ended them."""

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

from kronos_qlib.train.job import Job
from kronos_qlib.train.metrics import METRICS_FILE, forward_metrics, guarded_log, recorder_log
from kronos_qlib.train.signals import TrainingStopped
from kronos_qlib.train.worker import FAILURE_FILE, FINAL_ERRORS

logger = logging.getLogger("qlib.KronosTrainer")
# The signals that torch's launcher handles itself, where the system has them.
ELASTIC_SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name)
]
SHUTDOWN_SECONDS = 300  # that a process has for its step and a checkpoint when it is to stop


def launch(job: Job, processes: int) -> None:
    """Run a job in several processes of this machine and wait for them; the job's networks end with the best weights.

    A process that dies is started again with all others, from the last checkpoint, `max_restarts` times. Ctrl-C and
    SIGTERM reach the processes, which save a checkpoint and end.

    Raises:
        what `Job.run` raises; RuntimeError: the processes died too often.
    """
    passed = [
        number.name
        for number in ELASTIC_SIGNALS
        if number.name != "SIGQUIT" and signal.getsignal(number) != signal.SIG_IGN
    ]
    options = {"shutdown_timeout": SHUTDOWN_SECONDS, "signals_to_handle": ",".join(passed)}
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
    # The outbox is not in output_dir, whose disk may be full.
    with _handler_backup(), job.scratch_copy() as folder, tempfile.TemporaryDirectory(prefix="kronos-") as temporary:
        outbox = Path(temporary)
        try:
            arguments = [str(folder), str(outbox), str(os.getpid())]
            with forward_metrics(outbox / METRICS_FILE, guarded_log(recorder_log(job.recorder))):
                elastic_launch(config, sys.executable)("-m", "kronos_qlib.train.worker", *arguments)
        except SignalException as stopped:
            _raise_failure(outbox)
            raise TrainingStopped(
                f"stopped by {stopped.sigval.name}; {_name_checkpoint(job)}; run the same again to go on",
                stopped.sigval,
            ) from None
        except ChildFailedError as error:
            _raise_failure(outbox)
            raise RuntimeError(
                f"the training processes died {config.max_restarts + 1} times ({_name_causes(error)}); "
                f"{_name_checkpoint(job)}; their messages stand above"
            ) from None
        _raise_failure(outbox)
    job.load_best()


def _raise_failure(outbox: Path) -> None:
    """Raise the error that ended a process and that no restart would mend, if there was one."""
    path = outbox / FAILURE_FILE
    if path.exists():
        failure = json.loads(path.read_text())
        raise {kind.__name__: kind for kind in FINAL_ERRORS}[failure["kind"]](failure["message"])


def _name_checkpoint(job: Job) -> str:
    newest = job.newest_checkpoint()
    return f"the last checkpoint is {newest}" if newest else "there is no checkpoint yet"


def _name_causes(error: ChildFailedError) -> str:
    return ", ".join(
        f"process {rank}: {failure.signal_name() if failure.exitcode < 0 else f'exit code {failure.exitcode}'}"
        for rank, failure in error.failures.items()
    )


@contextmanager
def _handler_backup() -> Iterator[None]:
    """Restore the handlers of signals after the block, in which torch's launcher sets its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in ELASTIC_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
