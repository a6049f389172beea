"""On what a training runs: device, precision, processes, and the cores of a CPU at work side by side."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kronos_qlib.train.group import ALONE, Group
from kronos_qlib.train.heap import memory_kept

Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""As `map`: a function of each of some pieces of work, the results in the order of the pieces."""


@dataclass(frozen=True)
class Compute:
    """The device of this process, the precision of its matrix products, and the processes that it works with.

    each: a `map` for pieces of work: on a CPU as many at a time as there are cores, each by one thread. (torch would
        divide every operation among its threads and wait for all of them after it; and with another number of threads
        some sums are rounded otherwise. So a result does not hang on how the cores are divided.)
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    group: Group = ALONE
    each: Each = map

    @property
    def autocast(self) -> torch.autocast:
        """The context of a forward pass in this precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16)

    @property
    def precision(self) -> str:
        """The name of the precision."""
        return str(self.dtype).removeprefix("torch.")

    @classmethod
    @contextmanager
    def on(cls, device: torch.device, dtype: torch.dtype, group: Group = ALONE) -> Iterator["Compute"]:
        """For the length of a block. In it torch itself uses one thread of a CPU, `each` as many as torch did."""
        if device.type != "cpu":
            yield cls(device, dtype, group)
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with memory_kept():
                if threads == 1:
                    yield cls(device, dtype, group)
                else:
                    with ThreadPoolExecutor(threads, "core", initializer=lambda: torch.set_num_threads(1)) as pool:
                        yield cls(device, dtype, group, pool.map)
        finally:
            torch.set_num_threads(threads)
