"""On what a training runs: device, precision, processes, and the cores of a CPU at work side by side."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from kronos_qlib.nn.cpu import Each, side_by_side
from kronos_qlib.train.group import ALONE, Group


@dataclass(frozen=True)
class Compute:
    """The device of this process, the precision of its matrix products, and the processes that it works with.

    each: a `map` for pieces of work: on a CPU as many at a time as there are cores, each by one thread.
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
        if device.type == "cpu":
            with side_by_side() as each:
                yield cls(device, dtype, group, each)
        else:
            yield cls(device, dtype, group)
