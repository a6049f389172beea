"""A single sample beyond max_context: the window slides, positions restart, and every step runs all of it again.

Two things need not be run again. The first block's queries, keys and values hang on no position before they are turned,
so they are kept. And the s2 cross-attention looks at the output once, from one position: its query goes through the
keys' weights and what it finds through the values', instead of every position through both.

Shapes: B windows, L context bars, T bars in sight, H heads, D coordinates per head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kronos_qlib.forecast.blocks import prefill
from kronos_qlib.forecast.weights import ModelWeights, turn, unit_scale


class Slide:
    """What generation remembers of windows that slide: input embeddings, and what the first block makes of each."""

    def __init__(self, model: ModelWeights, x: Tensor, horizon: int, limit: int, aligned: bool) -> None:
        """Begin with the context's embeddings x [B, L, d], with room for `horizon` steps; `limit` bars are in sight."""
        batch, self.length, width = x.shape
        self.model, self.limit, self.aligned = model, limit, aligned
        self.filled = 0  # own steps
        self.x = x.new_empty(batch, self.length + horizon, width)
        like = model.stack.blocks[0].qkv.weight
        self.projected = like.new_empty(batch, self.length + horizon, 3 * width)
        self.h = x  # the output [B, T, d], once it has been run
        self._store(0, x)

    def append(self, x: Tensor) -> None:
        """Take in the own positions x [B, s, 1, d] of s more steps."""
        self._store(self.length + self.filled, x.squeeze(2))
        self.filled += x.shape[1]

    def _store(self, start: int, x: Tensor) -> None:
        rows = slice(start, start + x.shape[1])
        self.x[:, rows], self.projected[:, rows] = x, self.model.stack.blocks[0].project(x)

    def s1_logits(self) -> Tensor:
        """Run all that is in sight: float32 [B, 1, 2^s1_bits]."""
        end = self.length + self.filled
        seen = slice(max(0, end - self.limit), end)
        h, _ = prefill(self.model.stack, self.x[:, seen], projected=self.projected[:, seen])
        self.h = self.model.normed(h)
        return self.model.proj_s1(self.h[:, -1:]).float()

    def s2_logits(self, s1: Tensor) -> Tensor:
        """Float32 [B, 1, 2^s2_bits] given the s1 [B, 1] just drawn."""
        model = self.model
        heads, width = model.cross_heads, self.h.shape[-1]
        w_k, w_v = (model.cross_kv.part(slice(start, start + width)) for start in (0, width))
        h, q = self.h.to(w_k.weight.dtype), F.embedding(s1, model.cross_query)
        if self.aligned:
            angles = model.cross_angles[: h.shape[1]]
            q, k = turn(q, angles[-1:]), turn(w_k(h), angles)
            q, k = (rows.to(h.dtype).unflatten(-1, (heads, -1)) for rows in (q, k))
            scores = torch.einsum("bohi,bthi->bht", q, k)
        else:  # the keys' bias adds the same to all scores of a head
            q = q.to(h.dtype).unflatten(-1, (heads, -1))
            scores = torch.einsum("bohi,hid->bhd", q, w_k.weight.unflatten(0, (heads, -1))) @ h.mT
        weights = (scores.float() * (width // heads) ** -0.5).softmax(-1).to(h.dtype)
        found = torch.einsum("bhd,hid->bhi", weights @ h, w_v.weight.unflatten(0, (heads, -1))).flatten(-2) + w_v.bias
        last = self.h[:, -1:] + model.cross_out(found.unsqueeze(1))
        return model.proj_s2(unit_scale(last, model.dep_eps)).float()
