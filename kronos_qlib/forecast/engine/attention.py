"""Attention with cached keys and values, and a stack of blocks run over a context and over what follows it.

`prefill` runs the bars of a context through the blocks and keeps their keys and values; `extend` runs the samples' own
positions behind it. The samples of a window are rows of one query: their keys lie behind the context's in one cache,
and a mask keeps each from the others'. So one attention serves all of them, and the context is neither copied nor read
again for each sample.

Shapes beside those of `kronos_qlib.forecast`: H heads, C coordinates of a head; G groups of n samples that share a
cache, r own rows (positions of samples) of a group.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kronos_qlib.forecast.engine.weights import Stack

MAX_GROUP = 8  # samples that share a cache at most: attention computes the masked scores of the others too
PREFILL_ROWS = 1440  # bars that go through the blocks together on a CPU: they should stay near its caches


@dataclass
class KVCache:
    """Keys and values of one attention [G, L + P · n, H, C]: of the context, then of the samples, step by step."""

    k: Tensor
    v: Tensor
    length: int  # context bars

    def fill(self, windows: slice, k: Tensor, v: Tensor, groups_per_window: int) -> None:
        """Store the context's k, v [b, L, H, C] of some windows, for every group of each."""
        for cache, rows in ((self.k, k), (self.v, v)):
            cache.unflatten(0, (-1, groups_per_window))[windows, :, : self.length] = rows.unsqueeze(1)

    def append(self, k: Tensor, v: Tensor, start: int) -> int:
        """Store own k, v [G, r, H, C] behind the first `start` own rows; return how many own rows there are now."""
        end = start + k.shape[1]
        rows = slice(self.length + start, self.length + end)
        self.k[:, rows], self.v[:, rows] = k, v
        return end

    def attend(self, q: Tensor, own: int, mask: Tensor) -> Tensor:
        """Attend from q [G, r, H, C], with a mask [r, L + …], to the context and the first `own` own rows."""
        end = self.length + own
        q, k, v = (rows.transpose(1, 2) for rows in (q, self.k[:, :end], self.v[:, :end]))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, :end] if own else None).transpose(1, 2)


@dataclass(frozen=True)
class CacheLayout:
    """How samples share caches: `groups` of `group_size` samples in all, `groups_per_window`, `horizon` steps each.

    Where a window's samples do not divide well, its groups have room for a few more samples than there are.
    """

    groups: int
    group_size: int
    groups_per_window: int
    horizon: int

    @classmethod
    def divide(cls, windows: int, sample_count: int, horizon: int) -> "CacheLayout":
        """Divide the samples of each window into groups of nearly MAX_GROUP."""
        size = next(size for size in range(min(sample_count, MAX_GROUP), 0, -1) if sample_count % size == 0)
        if sample_count > MAX_GROUP and size < MAX_GROUP // 2:
            size = -(-sample_count // -(-sample_count // MAX_GROUP))
        per_window = -(-sample_count // size)
        return cls(windows * per_window, size, per_window, horizon)

    def empty_cache(self, length: int, heads: int, width: int, like: Tensor) -> KVCache:
        """Make an empty cache behind a context of `length` bars, with the dtype and device of `like`."""
        rows = length + self.horizon * self.group_size
        both = like.new_empty(2, self.groups, rows, heads, width // heads)
        return KVCache(both[0], both[1], length)

    def mask(self, length: int, like: Tensor) -> Tensor:
        """Make the mask of own rows over `length` context rows and each other: 0 or −inf, [P · n, L + P · n].

        It has the device and dtype of `like`, a weight of what the cache keeps, and rows that begin on multiples of 8,
        which kernels of GPUs require.
        """
        rows = torch.arange(self.horizon * self.group_size, device=like.device)
        step, sample = rows // self.group_size, rows % self.group_size
        visible = (sample[:, None] == sample) & (step[:, None] >= step)
        own = like.new_zeros(visible.shape).masked_fill_(~visible, -torch.inf)
        columns = length + len(rows)
        return F.pad(own, (length, -columns % 8))[:, :columns]


def prefill(
    stack: Stack,
    x: Tensor,
    layout: CacheLayout | None = None,
    *,
    last_keys_only: bool = False,
    projection: Tensor | None = None,
) -> tuple[Tensor, list[KVCache]]:
    """Run bars x [B, L, d], from position 0 on, through the blocks.

    Args:
        layout: makes the caches; without it none are kept.
        last_keys_only: stop the last block at its keys and values; the output is then of no use.
        projection: the first block's `project(x)`, where it is known.

    Returns:
        The output [B, L, d] and each block's cache.
    """
    windows, length, width = x.shape
    angles = stack.angles[:length]
    caches = (
        [layout.empty_cache(length, block.n_heads, width, block.qkv.weight) for block in stack.blocks] if layout else []
    )
    size = max(1, PREFILL_ROWS // length) if x.device.type == "cpu" else windows
    outputs = []
    for start in range(0, windows, size):
        rows = slice(start, start + size)
        h = x[rows]
        for number, block in enumerate(stack.blocks):
            if layout and last_keys_only and number == len(stack.blocks) - 1:
                caches[number].fill(rows, *block.keys_and_values(h, angles), layout.groups_per_window)
                break
            known = number == 0 and projection is not None
            q, k, v = block.split_heads(projection[rows] if known else block.project(h), angles)
            if layout:
                caches[number].fill(rows, k, v, layout.groups_per_window)
            attended = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
            h = block.output(h, attended.transpose(1, 2))
        outputs.append(h)
    return torch.cat(outputs), caches


def extend(stack: Stack, caches: list[KVCache], x: Tensor, start: int, mask: Tensor, group_size: int) -> Tensor:
    """Run own rows x [G, r, d], which follow `start` others, through the blocks: [G, r, d]."""
    for block, cache in zip(stack.blocks, caches, strict=True):
        angles = repeat_angles(stack.angles, cache.length, start, x.shape[1], group_size)
        q, k, v = block.split_heads(block.project(x), angles)
        own = cache.append(k, v, start)
        x = block.output(x, cache.attend(q, own, mask[start:own]))
    return x


def repeat_angles(angles: Tensor, length: int, start: int, rows: int, group_size: int) -> Tensor:
    """Return the angles of own rows behind a context of `length` bars; `group_size` rows share a position."""
    first = length + start // group_size
    angles = angles[first : first + rows // group_size]
    return angles.repeat_interleave(group_size, 0) if group_size > 1 else angles
