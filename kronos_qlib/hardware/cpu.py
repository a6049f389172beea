"""The CPU: its cores, each at a task of its own, and the heap of the C library."""

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

MIB = 2**20
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # options of glibc's mallopt
_OLD_LIMIT = 32 * MIB  # older releases of glibc refuse a larger _MMAP_THRESHOLD
_RETAINING = {_TRIM_THRESHOLD: 1024 * MIB, _TOP_PAD: 64 * MIB}
# What glibc's own rule, which a call of mallopt switches off, arrives at in a process that frees large blocks.
_RELEASING = {_MMAP_THRESHOLD: _OLD_LIMIT, _TRIM_THRESHOLD: 64 * MIB, _TOP_PAD: MIB // 8}

MapFunction = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""Applies a function to each task as `map` does, with the results in the order of the tasks."""


def cores() -> int:
    """Count the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def core_pool() -> Iterator[MapFunction]:
    """Give a `map` that works on as many tasks at once as torch had threads, each task on one thread, within a block.

    torch alone would divide every single operation among its threads and wait for the slowest after each. A task on one
    thread has no such waits; and since torch adds up in another order for another number of threads, it also has the
    same sums, bit by bit, whatever the number of cores. The heap is retained meanwhile, see `retain_heap`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with retain_heap():
            if threads == 1:
                yield map
            else:
                with ThreadPoolExecutor(threads, "core", initializer=lambda: torch.set_num_threads(1)) as pool:
                    yield pool.map
    finally:
        torch.set_num_threads(threads)


class _Heap:
    """The open blocks of `retain_heap` in this process: the first one sets the heap, the last one resets it."""

    lock = threading.Lock()
    blocks = 0


@contextmanager
def retain_heap() -> Iterator[None]:
    """Keep freed memory in the process for the next tensor, within a block; it goes back to the system at the end.

    Most operations of a network make tensors of some MiB. By default glibc fetches each from the system and returns it
    when it is freed, and the system clears it page by page: up to a third of the time. With another C library this does
    nothing.
    """
    library = _c_library()
    if library is None:
        yield
        return
    with _Heap.lock:
        if _Heap.blocks == 0:
            if not library.mallopt(_MMAP_THRESHOLD, 1024 * MIB):
                library.mallopt(_MMAP_THRESHOLD, _OLD_LIMIT)
            for option, value in _RETAINING.items():
                library.mallopt(option, value)
        _Heap.blocks += 1
    try:
        yield
    finally:
        with _Heap.lock:
            _Heap.blocks -= 1
            if _Heap.blocks == 0:
                for option, value in _RELEASING.items():
                    library.mallopt(option, value)
                library.malloc_trim(0)


@cache
def _c_library() -> ctypes.CDLL | None:
    """Return this process's own C library if it is glibc."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
