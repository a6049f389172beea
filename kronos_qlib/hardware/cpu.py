"""A CPU at work: its cores side by side, and the C library's heap meanwhile."""

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of glibc's mallopt
_OLD_LIMIT = 32  # MiB: older releases of glibc refuse a larger _MMAP_THRESHOLD
MIB = 2**20

Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""As `map`: a function of each of some pieces of work, the results in the order of the pieces."""


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def side_by_side() -> Iterator[Each]:
    """For the length of a block a `map` that has as many pieces at work as torch had threads, each on one thread.

    torch would divide every operation among its threads and wait for all of them after it; and with another number of
    threads some sums are rounded otherwise. So a result does not hang on how the cores are divided.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with memory_kept():
            if threads == 1:
                yield map
            else:
                with ThreadPoolExecutor(threads, "core", initializer=lambda: torch.set_num_threads(1)) as pool:
                    yield pool.map
    finally:
        torch.set_num_threads(threads)


class _Kept:
    """How many blocks want the heap to keep its memory; the first of them tells it so and the last takes it back."""

    lock = threading.Lock()
    blocks = 0


@cache
def _c_library() -> ctypes.CDLL | None:
    """This process's own C library, where it is glibc."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


@contextmanager
def memory_kept() -> Iterator[None]:
    """Keep freed memory for the next tensor instead of giving it back to the system, for the length of a block.

    Most operations of a network make tensors of some MiB. glibc fetches each from the system and gives it back when it
    is freed, and the system clears it page by page: up to a third of the time. Elsewhere nothing happens.
    """
    library = _c_library()
    if library is None:
        yield
        return
    with _Kept.lock:
        if _Kept.blocks == 0:
            if not library.mallopt(_MMAP_THRESHOLD, 1024 * MIB):
                library.mallopt(_MMAP_THRESHOLD, _OLD_LIMIT * MIB)
            for option, value in ((_TRIM_THRESHOLD, 1024 * MIB), (_TOP_PAD, 64 * MIB)):
                library.mallopt(option, value)
        _Kept.blocks += 1
    try:
        yield
    finally:
        with _Kept.lock:
            _Kept.blocks -= 1
            if _Kept.blocks == 0:
                # Where glibc's own rule, which mallopt has ended, comes to rest in a process that frees large blocks.
                for option, value in (
                    (_MMAP_THRESHOLD, _OLD_LIMIT * MIB),
                    (_TRIM_THRESHOLD, 64 * MIB),
                    (_TOP_PAD, MIB // 8),
                ):
                    library.mallopt(option, value)
                library.malloc_trim(0)
