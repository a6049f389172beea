"""The C library's heap while a network trains on a CPU."""

import ctypes
import ctypes.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of glibc's mallopt
MIB = 2**20


@contextmanager
def memory_kept() -> Iterator[None]:
    """Keep freed memory for the next tensor instead of giving it back to the system, for the length of a block.

    Every operation of a training step makes tensors of some MiB. glibc fetches each from the system and gives it back
    when it is freed, and the system clears it page by page: up to a third of a step. Elsewhere nothing happens.
    """
    library = ctypes.CDLL(ctypes.util.find_library("c")) if sys.platform == "linux" else None
    if library is None or not hasattr(library, "mallopt"):
        yield
        return
    for option, value in ((_MMAP_THRESHOLD, 1024 * MIB), (_TRIM_THRESHOLD, 1024 * MIB), (_TOP_PAD, 64 * MIB)):
        library.mallopt(option, value)
    try:
        yield
    finally:
        # Where glibc's own rule, which mallopt has ended, comes to rest in a process that frees large blocks.
        for option, value in ((_MMAP_THRESHOLD, 32 * MIB), (_TRIM_THRESHOLD, 64 * MIB), (_TOP_PAD, MIB // 8)):
            library.mallopt(option, value)
        library.malloc_trim(0)
