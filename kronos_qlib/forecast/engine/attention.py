"""Keys and values that generation keeps, and how the samples of a window share them.

The samples of a window are so many rows of one query: their own keys lie behind the context's in one cache, and a mask
keeps each from seeing the others'. So one attention does for all, and the context is neither copied nor read again per
sample.

Shapes: L context bars, P forecast bars, H heads, D coordinates per head; G groups of n samples that share a cache.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kronos_qlib.forecast.engine.weights import Stack

GROUP = 8  # samples that share a cache at most: each looks at the others' rows too, if only to be told not to


@dataclass
class Cache:
    """Keys and values of one attention [G, L + P · n, H, D]: of the context, then of the samples, step by step."""

    k: Tensor
    v: Tensor
    length: int

    def fill(self, windows: slice, k: Tensor, v: Tensor, copies: int) -> None:
        """Take in the context's k, v [b, L, H, D] of some windows, for every group of each."""
        for cache, rows in ((self.k, k), (self.v, v)):
            cache.unflatten(0, (-1, copies))[windows, :, : self.length] = rows.unsqueeze(1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, start: int, mask: Tensor) -> Tensor:
        """Store own k, v [G, r, H, D] behind the `start` own rows there are and attend from q: [G, r, H, D]."""
        end = self.store(k, v, start)
        return self.read(q, end, mask[start:end])

    def store(self, k: Tensor, v: Tensor, start: int) -> int:
        """Put own k, v [G, r, H, D] behind the `start` own rows there are; how many there are now."""
        end = start + k.shape[1]
        rows = slice(self.length + start, self.length + end)
        self.k[:, rows], self.v[:, rows] = k, v
        return end

    def read(self, q: Tensor, filled: int, mask: Tensor) -> Tensor:
        """Attend from q [G, r, H, D], with a mask [r, L + …], to the context and the first `filled` own rows."""
        end = self.length + filled
        q, k, v = (rows.transpose(1, 2) for rows in (q, self.k[:, :end], self.v[:, :end]))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, :end] if filled else None).transpose(1, 2)


@dataclass(frozen=True)
class Layout:
    """How samples share caches: `groups` of `size` samples, `copies` groups a window, `horizon` own steps each.

    Where a window's samples do not divide well, its groups have room for a few more of them than there are.
    """

    groups: int
    size: int
    copies: int
    horizon: int

    @classmethod
    def of(cls, batch: int, samples: int, horizon: int) -> "Layout":
        size = next(size for size in range(min(samples, GROUP), 0, -1) if samples % size == 0)
        if samples > GROUP and size < GROUP // 2:
            size = -(-samples // -(-samples // GROUP))
        copies = -(-samples // size)
        return cls(batch * copies, size, copies, horizon)

    def cache(self, length: int, heads: int, width: int, like: Tensor) -> Cache:
        """An empty cache behind a context of `length` bars, of the kind of `like`."""
        rows = length + self.horizon * self.size
        both = like.new_empty(2, self.groups, rows, heads, width // heads)
        return Cache(both[0], both[1], length)

    def mask(self, length: int, like: Tensor) -> Tensor:
        """What own rows see of `length` context rows and of each other: 0 or −inf, [P · n, L + P · n].

        On the device and in the precision of `like`, the weight of what the cache keeps, and with rows that begin on
        multiples of 8: kernels of GPUs want it so.
        """
        rows = torch.arange(self.horizon * self.size, device=like.device)
        step, sample = rows // self.size, rows % self.size
        seen = (sample[:, None] == sample) & (step[:, None] >= step)
        own = like.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
        columns = length + len(rows)
        return F.pad(own, (length, -columns % 8))[:, :columns]


PREFILL_ROWS = 1440  # bars that go through the blocks together on a CPU: they should stay near its caches


def prefill(
    stack: Stack,
    x: Tensor,
    layout: Layout | None = None,
    *,
    keys_only_last: bool = False,
    projected: Tensor | None = None,
) -> tuple[Tensor, list[Cache]]:
    """Run bars x [B, L, d], from position 0 on, through the blocks: the output and, for a layout, each layer's cache.

    With keys_only_last the last block stops at its keys and values, and the output is of no use. `projected` is the
    first block's `project` of x, where it is there already.
    """
    batch, length, width = x.shape
    angles = stack.angles[:length]
    caches = [layout.cache(length, block.n_heads, width, block.qkv.weight) for block in stack.blocks] if layout else []
    size = max(1, PREFILL_ROWS // length) if x.device.type == "cpu" else batch
    outputs = []
    for start in range(0, batch, size):
        windows = slice(start, start + size)
        h = x[windows]
        for number, block in enumerate(stack.blocks):
            if keys_only_last and number == len(stack.blocks) - 1:
                caches[number].fill(windows, *block.keys(h, angles), layout.copies)
                break
            known = number == 0 and projected is not None
            q, k, v = block.heads(projected[windows] if known else block.project(h), angles)
            if layout:
                caches[number].fill(windows, k, v, layout.copies)
            attended = F.scaled_dot_product_attention(*(rows.transpose(1, 2) for rows in (q, k, v)), is_causal=True)
            h = block.rest(h, attended.transpose(1, 2))
        outputs.append(h)
    return torch.cat(outputs), caches


def extend(stack: Stack, caches: list[Cache], x: Tensor, start: int, mask: Tensor, size: int) -> Tensor:
    """Run own rows x [G, r, d], which follow `start` others, through the blocks: [G, r, d]."""
    for block, cache in zip(stack.blocks, caches, strict=True):
        angles = repeated(stack.angles, cache.length, start, x.shape[1], size)
        q, k, v = block.heads(block.project(x), angles)
        x = block.rest(x, cache.attend(q, k, v, start, mask))
    return x


def repeated(angles: Tensor, length: int, start: int, rows: int, size: int) -> Tensor:
    """The angles of own rows, of which `size` share a position, behind a context of `length` bars."""
    first = length + start // size
    return angles[first : first + rows // size].repeat_interleave(size, 0) if size > 1 else angles[first : first + rows]
