"""Requests to stop: Ctrl-C, SIGTERM and a launcher that has ended, seen by the loop between two steps."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Windows has fewer. The last comes when a terminal is closed, unless nohup lets it be ignored.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class TrainingStopped(Exception):
    """The training stopped on request, and its state is in a checkpoint.

    Attributes:
        signal: the number of the signal that requested it.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message, signal)
        self.signal = signal

    def __str__(self) -> str:
        return self.args[0]


class StopRequest:
    """Whether this process was requested to stop, by a signal or by the end of its launcher."""

    def __init__(self, launcher: int | None) -> None:
        self._signal = 0
        self._launcher = launcher

    @property
    def signal(self) -> int:
        """The signal to stop by, 0 for none; SIGTERM if the launcher has ended."""
        if not self._signal and self._launcher is not None and os.getppid() != self._launcher:
            self._signal = signal.SIGTERM
        return self._signal

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:  # Ctrl-C once more: the user does not want to wait
            raise KeyboardInterrupt
        self._signal = number


@contextmanager
def catch_stop_signals(launcher: int | None = None) -> Iterator[StopRequest]:
    """Turn signals into a request to stop, for a block. Only a main thread can; in others signals act as before.

    Args:
        launcher: the process id of the launcher, whose end is a request too.
    """
    request = StopRequest(launcher)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    caught = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, request._receive) for number in caught}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
