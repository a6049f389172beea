"""Waiting for what another thread or process does."""

import threading
import time
from contextlib import contextmanager


def wait_for(condition, seconds=60):
    """Come back as soon as a condition holds, with its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.002)
    return value


@contextmanager
def meanwhile(act):
    """Do something in a thread while the block runs; it must have come to its end with the block."""
    failed = []

    def run():
        try:
            act()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join(5)
    assert not thread.is_alive()
    if failed:
        raise failed[0]
