"""A single sample beyond max_context: the window slides, positions restart, and every step is a pass over all of it.

What a pass leaves out: the first block's queries, keys and values hang on no position before they are turned, so they
are kept from pass to pass. And the s2 cross-attention looks at the output once, from one position: its query goes
through the keys' weights and what it finds through the values', instead of every position through both. (With
s2_rotation "aligned" keys are turned by their positions, so those are made.)

Shapes: B windows, L context bars, T bars in sight, d the width; in subscripts h heads and i their coordinates.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kronos_qlib.forecast.engine.attention import Cache, Layout, extend, prefill, repeated
from kronos_qlib.forecast.engine.weights import ModelWeights, turn, unit_scale


class Slide:
    """What generation remembers of windows that slide: input embeddings, and what the first block makes of each.

    To be used as `ContextState` is: `append` what has been drawn, then `s1_logits`, then `s2_logits`.
    """

    h: Tensor  # the newest pass's output, float32 [B, T, d]

    def __init__(self, model: ModelWeights, x: Tensor, horizon: int, limit: int, aligned: bool) -> None:
        """Begin with the context's embeddings x [B, L, d], with room for `horizon` steps; `limit` bars are in sight."""
        batch, self.length, width = x.shape
        self.model, self.limit, self.aligned = model, limit, aligned
        self.filled = 0  # own steps
        self.x = x.new_empty(batch, self.length + horizon, width)
        like = model.stack.blocks[0].qkv.weight
        self.projected = like.new_empty(batch, self.length + horizon, 3 * width)
        self._store(0, x)

    def append(self, x: Tensor) -> None:
        """Take in the own positions x [B, s, 1, d] of s more steps."""
        self._store(self.length + self.filled, x.squeeze(2))
        self.filled += x.shape[1]

    def _store(self, start: int, x: Tensor) -> None:
        rows = slice(start, start + x.shape[1])
        self.x[:, rows], self.projected[:, rows] = x, self.model.stack.blocks[0].project(x)

    def s1_logits(self) -> Tensor:
        """Make a pass over the bars in sight: float32 [B, 1, 2^s1_bits]."""
        end = self.length + self.filled
        seen = slice(end - self.limit, end)
        h, _ = prefill(self.model.stack, self.x[:, seen], projected=self.projected[:, seen])
        self.h = self.model.normed(h)
        return self.model.proj_s1(self.h[:, -1:]).float()

    def s2_logits(self, s1: Tensor) -> Tensor:
        """Float32 [B, 1, 2^s2_bits] given the s1 [B, 1] just drawn."""
        model, h = self.model, self.h
        heads, width = model.cross_heads, h.shape[-1]
        w_k, w_v = (model.cross_kv.part(slice(start, start + width)) for start in (0, width))
        q = F.embedding(s1, model.cross_query)
        if self.aligned:
            angles = model.cross_angles[: h.shape[1]]
            q, k = (turn(rows, turns) for rows, turns in ((q, angles[-1:]), (w_k(h).float(), angles)))
            scores = torch.einsum("bohi,bthi->bht", *(rows.unflatten(-1, (heads, -1)) for rows in (q, k)))
        else:  # the keys' bias adds the same to all scores of a head
            q = q.to(w_k.weight.dtype).unflatten(-1, (heads, -1))
            scores = torch.einsum("bohi,hid->bhd", q, w_k.weight.unflatten(0, (heads, -1))).float() @ h.mT
        weights = (scores * (width // heads) ** -0.5).softmax(-1)
        found = (weights @ h).to(w_v.weight.dtype)
        found = torch.einsum("bhd,hid->bhi", found, w_v.weight.unflatten(0, (heads, -1))).flatten(-2) + w_v.bias
        last = h[:, -1:] + model.cross_out(found.unsqueeze(1))
        return model.proj_s2(unit_scale(last, model.dep_eps)).float()


@dataclass
class ContextState:
    """What generation remembers between steps: caches of the transformer and of the s2 cross-attention."""

    model: ModelWeights
    layout: Layout
    caches: list[Cache]
    cross: Cache
    mask: Tensor
    last: Tensor  # context of the newest position: [G, 1, d] while the samples share it, then [G, n, d]
    aligned: bool
    filled: int = 0  # own steps

    @classmethod
    def start(cls, model: ModelWeights, x: Tensor, layout: Layout, mask: Tensor, aligned: bool) -> "ContextState":
        h, caches = prefill(model.stack, x, layout)
        h = model.normed(h)
        k, v = model.cross_kv(h).chunk(2, dim=-1)
        if aligned:
            k = turn(k, model.cross_angles[: x.shape[1]])
        cross = layout.cache(x.shape[1], model.cross_heads, h.shape[-1], k)
        cross.fill(slice(None), *(rows.unflatten(-1, (model.cross_heads, -1)) for rows in (k, v)), layout.copies)
        last = h[:, -1:].repeat_interleave(layout.copies, 0)
        return cls(model, layout, caches, cross, mask, last, aligned)

    @property
    def prefix(self) -> int:
        """Bars of context."""
        return self.cross.length

    def append(self, x: Tensor) -> None:
        """Take in the own positions x [G, s, n, d] of s more steps."""
        size, start = self.layout.size, self.filled * self.layout.size
        h = self.model.normed(extend(self.model.stack, self.caches, x.flatten(1, 2), start, self.mask, size))
        k, v = self.model.cross_kv(h).chunk(2, dim=-1)
        if self.aligned:
            k = turn(k, repeated(self.model.cross_angles, self.prefix, start, k.shape[1], size))
        self.cross.store(*(rows.unflatten(-1, (self.model.cross_heads, -1)) for rows in (k, v)), start)
        self.last, self.filled = h[:, -size:], self.filled + x.shape[1]

    def s1_logits(self) -> Tensor:
        """Float32 [G, 1 or n, 2^s1_bits]."""
        return self.model.proj_s1(self.last).float()

    def s2_logits(self, s1: Tensor) -> Tensor:
        """Float32 [G, n, 2^s2_bits] given the s1 [G, n] just drawn."""
        q = F.embedding(s1, self.model.cross_query)
        if self.aligned:
            position = self.prefix + self.filled - 1
            q = turn(q, self.model.cross_angles[position : position + 1])
        end = self.filled * self.layout.size
        q = q.unflatten(-1, (self.model.cross_heads, -1)).to(self.cross.k.dtype)
        attended = self.cross.read(q, end, self.mask[end - self.layout.size : end])
        h = self.last + self.model.cross_out(attended.flatten(-2))
        return self.model.proj_s2(unit_scale(h, self.model.dep_eps)).float()
