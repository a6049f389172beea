"""What generation remembers between steps, in two forms with one protocol.

`SharedContext` keeps keys and values: the context is computed once, and the samples of a window share it. It serves
until the window slides. `SlidingContext` serves a single sample beyond max_context: the window slides, positions
restart, and every step is a pass over all bars in the window. (Several samples share a `SharedContext` there too, made
anew at each step, because the context is most of what they compute.)

Shapes beside those of `kronos_qlib.forecast`: G groups of n samples that share a cache, T bars within max_context; in
einsum's subscripts h heads and i their coordinates.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kronos_qlib.forecast.engine.attention import CacheLayout, extend, prefill, repeat_angles
from kronos_qlib.forecast.engine.weights import ModelWeights, rotate_neighbours, unit_scale


class Context(Protocol):
    """The windows of a batch as the model sees them at one step of generation.

    A step is `append` (but for the first), `s1_logits`, a draw, `s2_logits`, a draw.
    """

    steps: int
    """Own steps appended so far."""

    def serves(self, prefix: int) -> bool:
        """Say whether it can go on when `prefix` bars of the context are still within max_context."""
        ...

    def append(self, x: Tensor) -> None:
        """Take the input embeddings x [G, s, n, d] of s more steps."""
        ...

    def s1_logits(self) -> Tensor:
        """Compute the s1 logits of the newest position: float32 [G, 1 or n, 2^s1_bits]."""
        ...

    def s2_logits(self, s1: Tensor) -> Tensor:
        """Compute the s2 logits given the s1 [G, n] just drawn: float32 [G, n, 2^s2_bits]."""
        ...


class SharedContext:
    """Keys and values of the transformer and of the s2 cross-attention; the samples of a window share its prefix."""

    def __init__(self, model: ModelWeights, x: Tensor, layout: CacheLayout, aligned: bool) -> None:
        """Run the context's embeddings x [B, L, d] through the model and keep its keys and values."""
        length = x.shape[1]
        self.model, self.layout, self.aligned, self.steps = model, layout, aligned, 0
        self.mask = layout.mask(length, model.cross_kv.weight)
        h, self.caches = prefill(model.stack, x, layout)
        h = model.normalise(h)
        k, v = model.cross_kv(h).chunk(2, dim=-1)
        if aligned:
            k = rotate_neighbours(k, model.cross_angles[:length])
        self.cross = layout.empty_cache(length, model.cross_heads, h.shape[-1], k)
        self.cross.fill(slice(None), *self._heads(k, v), layout.groups_per_window)
        # The output at the newest position: [G, 1, d] while the samples share it, then [G, n, d].
        self.last = h[:, -1:].repeat_interleave(layout.groups_per_window, 0)

    def serves(self, prefix: int) -> bool:
        """See `Context`: only while all of its bars are within max_context, for keys are kept by position."""
        return prefix == self.cross.length

    def append(self, x: Tensor) -> None:
        """See `Context`."""
        size, start = self.layout.group_size, self.steps * self.layout.group_size
        h = self.model.normalise(extend(self.model.stack, self.caches, x.flatten(1, 2), start, self.mask, size))
        k, v = self.model.cross_kv(h).chunk(2, dim=-1)
        if self.aligned:
            k = rotate_neighbours(k, repeat_angles(self.model.cross_angles, self.cross.length, start, k.shape[1], size))
        self.cross.append(*self._heads(k, v), start)
        self.last, self.steps = h[:, -size:], self.steps + x.shape[1]

    def s1_logits(self) -> Tensor:
        """See `Context`."""
        return self.model.proj_s1(self.last).float()

    def s2_logits(self, s1: Tensor) -> Tensor:
        """See `Context`."""
        q = F.embedding(s1, self.model.cross_query)
        if self.aligned:
            position = self.cross.length + self.steps - 1
            q = rotate_neighbours(q, self.model.cross_angles[position : position + 1])
        own = self.steps * self.layout.group_size
        q = q.unflatten(-1, (self.model.cross_heads, -1)).to(self.cross.k.dtype)
        attended = self.cross.attend(q, own, self.mask[own - self.layout.group_size : own])
        h = self.last + self.model.cross_out(attended.flatten(-2))
        return self.model.proj_s2(unit_scale(h, self.model.dep_eps)).float()

    def _heads(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        heads = self.model.cross_heads
        return k.unflatten(-1, (heads, -1)), v.unflatten(-1, (heads, -1))


class SlidingContext:
    """The input embeddings of windows that slide by one bar a step, one sample each.

    Two things save work in a pass. The first block's queries, keys and values do not depend on positions until they
    are rotated, so they are kept from pass to pass. The s2 cross-attention has one query, so it goes through the keys'
    weights, and what it attends to through the values', instead of every position through both. (With s2_rotation
    "aligned" keys are rotated by their positions, so those are computed.)
    """

    def __init__(self, model: ModelWeights, x: Tensor, horizon: int, max_context: int, aligned: bool) -> None:
        """Keep the context's embeddings x [B, L, d], with room for `horizon` steps."""
        windows, self.length, width = x.shape
        self.model, self.max_context, self.aligned, self.steps = model, max_context, aligned, 0
        self.x = x.new_empty(windows, self.length + horizon, width)
        like = model.stack.blocks[0].qkv.weight
        self.projection = like.new_empty(windows, self.length + horizon, 3 * width)
        self._store(0, x)

    def serves(self, prefix: int) -> bool:
        """See `Context`: always, for every pass begins at position 0."""
        return True

    def append(self, x: Tensor) -> None:
        """See `Context`; a group is a window here, and n is 1."""
        self._store(self.length + self.steps, x.squeeze(2))
        self.steps += x.shape[1]

    def _store(self, start: int, x: Tensor) -> None:
        rows = slice(start, start + x.shape[1])
        self.x[:, rows], self.projection[:, rows] = x, self.model.stack.blocks[0].project(x)

    def s1_logits(self) -> Tensor:
        """See `Context`; this is the pass over all bars within max_context."""
        end = self.length + self.steps
        rows = slice(end - self.max_context, end)
        h, _ = prefill(self.model.stack, self.x[:, rows], projection=self.projection[:, rows])
        self.h = self.model.normalise(h)  # float32 [B, T, d]
        return self.model.proj_s1(self.h[:, -1:]).float()

    def s2_logits(self, s1: Tensor) -> Tensor:
        """See `Context`."""
        model, h = self.model, self.h
        heads, width = model.cross_heads, h.shape[-1]
        w_k, w_v = (model.cross_kv.rows(slice(start, start + width)) for start in (0, width))
        q = F.embedding(s1, model.cross_query)
        if self.aligned:
            angles = model.cross_angles[: h.shape[1]]
            q, k = (rotate_neighbours(rows, turns) for rows, turns in ((q, angles[-1:]), (w_k(h).float(), angles)))
            scores = torch.einsum("bohi,bthi->bht", *(rows.unflatten(-1, (heads, -1)) for rows in (q, k)))
        else:  # the keys' bias adds the same to all scores of a head
            q = q.to(w_k.weight.dtype).unflatten(-1, (heads, -1))
            scores = torch.einsum("bohi,hid->bhd", q, w_k.weight.unflatten(0, (heads, -1))).float() @ h.mT
        shares = (scores * (width // heads) ** -0.5).softmax(-1)
        attended = (shares @ h).to(w_v.weight.dtype)
        attended = torch.einsum("bhd,hid->bhi", attended, w_v.weight.unflatten(0, (heads, -1))).flatten(-2) + w_v.bias
        last = h[:, -1:] + model.cross_out(attended.unsqueeze(1))
        return model.proj_s2(unit_scale(last, model.dep_eps)).float()
