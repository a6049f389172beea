"""Ctrl-C, SIGTERM and a launcher that is gone: seen by the loop between two steps, never in the middle of one."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Windows has fewer. The last is a terminal that is gone, unless nohup made it of no account.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class TrainingStopped(Exception):
    """The training was asked to stop and its state is in a checkpoint.

    Attributes:
        signal: the number of the signal that asked.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message, signal)
        self.signal = signal

    def __str__(self) -> str:
        return self.args[0]


class StopRequest:
    """Whether somebody asked this process to stop."""

    def __init__(self, parent: int | None) -> None:
        self.signal = 0
        self._parent = parent

    def asked(self) -> int:
        """The signal to stop by, 0 for none; a process whose launcher is gone stops too."""
        if not self.signal and self._parent is not None and os.getppid() != self._parent:
            self.signal = signal.SIGTERM
        return self.signal

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:  # Ctrl-C once more: they do not want to wait
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def stop_requests(parent: int | None = None) -> Iterator[StopRequest]:
    """Note signals instead of dying by them while the block runs. Only a main thread can; elsewhere they stay as is.

    Args:
        parent: the process id of the launcher whose end is to be noticed.
    """
    request = StopRequest(parent)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, request._receive) for number in heeded}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
