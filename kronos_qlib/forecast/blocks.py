"""A stack of blocks in generation: over bars from the first on, and over samples' own positions behind a context.

Shapes: B windows, L bars, d the width; G groups of n samples that share a cache, r own rows of a group.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kronos_qlib.forecast.caches import Cache, Layout
from kronos_qlib.forecast.weights import Stack

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
