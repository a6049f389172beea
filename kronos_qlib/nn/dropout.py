"""Dropout whose masks can be drawn from a generator of one's own, thread by thread."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_OF_THREAD = threading.local()


@contextmanager
def drawn_from(generator: torch.Generator | None) -> Iterator[None]:
    """Draw the masks of this thread's forward passes from `generator`, on the device of the network.

    torch's own generator is one for all threads: which of them draws first would decide what each of them gets.
    """
    before, _OF_THREAD.generator = own_generator(), generator
    try:
        yield
    finally:
        _OF_THREAD.generator = before


def own_generator() -> torch.Generator | None:
    """The generator that `drawn_from` has set in this thread, or None: torch's own."""
    return getattr(_OF_THREAD, "generator", None)


class Dropout(nn.Dropout):
    """torch's dropout, its masks drawn as `drawn_from` says."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p if self.training else 0.0)


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero each element of x with probability p and scale the others by 1 / (1 − p).

    From a generator of one's own p is taken to the next 1/65536: four elements share the 64 bits of one draw, which is
    three times as fast as a draw for each.
    """
    generator = own_generator()
    if not p or generator is None:
        return F.dropout(x, p)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()].view(x.shape)
    dropped = round(p * 2**16)
    keep = bits >= dropped - 2**15
    return x * keep.to(x.dtype).mul_(2**16 / (2**16 - dropped))
