"""Dropout whose masks each thread can draw from a generator of its own.

torch's global generator is shared by all threads: where several run at once, the order in which they happen to draw
would decide which numbers each of them gets, and a training could not be repeated bit by bit.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_thread = threading.local()


@contextmanager
def use_generator(generator: torch.Generator | None) -> Iterator[None]:
    """Draw this thread's dropout masks from `generator`, which is on the network's device, within a block."""
    previous, _thread.generator = current_generator(), generator
    try:
        yield
    finally:
        _thread.generator = previous


def current_generator() -> torch.Generator | None:
    """Return the generator that `use_generator` has set in this thread; None stands for torch's global one."""
    return getattr(_thread, "generator", None)


class Dropout(nn.Dropout):
    """torch's dropout, with masks from the generator of `use_generator`."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p if self.training else 0.0)


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero each element of x with probability p and scale the others by 1 / (1 − p).

    With a generator of `use_generator`, p is rounded to a multiple of 1/65536: four elements share the 64 bits of one
    draw, which is three times as fast as one draw each.
    """
    generator = current_generator()
    if not p or generator is None:
        return F.dropout(x, p)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()].view(x.shape)
    dropped = round(p * 2**16)
    keep = bits >= dropped - 2**15
    return x * keep.to(x.dtype).mul_(2**16 / (2**16 - dropped))
