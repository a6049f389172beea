"""The layers that the tokenizer and the model share: RMSNorm, rotary attention, SwiGLU, the pre-norm block."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronos_qlib.nn.dropout import Dropout, current_generator, dropout


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang & Sennrich 2019), computed in float32."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            return _UnitScale.apply(x.float(), self.eps).type_as(x) * self.weight
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x) * self.weight


class _UnitScale(torch.autograd.Function):
    """RMSNorm without its weight, for a CPU, where torch's own makes more passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        factor = torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps)
        y = x * factor
        ctx.save_for_backward(y, factor)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        y, factor = ctx.saved_tensors
        projection = (gradient * y).mean(-1, keepdim=True)
        return torch.addcmul(gradient, y, projection, value=-1) * factor, None


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021), base 10000, half-split convention."""

    inv_freq: Tensor

    def __init__(self, head_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        self.register_buffer("inv_freq", base ** (-torch.arange(0, head_dim, 2).float() / head_dim))

    def table(self, length: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [length, head_dim] of positions 0 … length − 1."""
        positions = torch.arange(length, device=self.inv_freq.device, dtype=torch.float32)
        angles = torch.outer(positions, self.inv_freq.float()).repeat(1, 2)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of x [..., T, head_dim] by the angles of `Rotary.table`."""
    return _Rotation.apply(x, cos.to(x.dtype), sin.to(x.dtype))


class _Rotation(torch.autograd.Function):
    """The rotation in three passes over memory; its gradient is the opposite rotation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate_pairs(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate_pairs(gradient, cos, -sin), None, None


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated, sin = x * cos, sin.chunk(2, dim=-1)[0]
    for half, other, sign in zip(rotated.chunk(2, dim=-1), reversed(x.chunk(2, dim=-1)), (-1, 1), strict=True):
        half.addcmul_(other, sin, value=sign)
    return rotated


class Attention(nn.Module):
    """Multi-head attention with rotary positions on queries and keys, both counted from 0."""

    def __init__(self, d_model: int, n_heads: int, attn_dropout_p: float, resid_dropout_p: float) -> None:
        super().__init__()
        self.n_heads, self.head_dim = n_heads, d_model // n_heads
        self.attn_dropout_p = attn_dropout_p
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        self.rotary = Rotary(self.head_dim)
        self.resid_dropout = Dropout(resid_dropout_p)

    def heads(self, x: Tensor) -> Tensor:
        """Split x [B, T, d] into heads [B, H, T, head_dim]."""
        return x.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2)

    def merge(self, x: Tensor) -> Tensor:
        """Join heads [B, H, T, head_dim] and project them to [B, T, d]."""
        return self.resid_dropout(self.out_proj(x.transpose(1, 2).flatten(-2)))

    def forward(self, query: Tensor, context: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Attend causally from query [B, Q, d], the last Q of T positions, to context [B, T, d] up to each position.

        padding_mask: bool [B, T], true where a position is padding, which no other position attends to.
        """
        q, k, v = self.heads(self.q_proj(query)), self.heads(self.k_proj(context)), self.heads(self.v_proj(context))
        cos, sin = self.rotary.table(context.shape[1])
        q, k = rotate(q, cos[-query.shape[1] :], sin[-query.shape[1] :]), rotate(k, cos, sin)
        return self.merge(_causal_attention(q, k, v, self.attn_dropout_p if self.training else 0.0, padding_mask))

    def last_query(self, query: Tensor, context: Tensor, aligned: bool, padding_mask: Tensor | None = None) -> Tensor:
        """Attend from one query [B, 1, d] to the whole context [B, T, d], but for padding.

        aligned rotates the query by position T − 1, or by that of the last bar that is no padding, and the keys by
        0 … T − 1, as in training; otherwise neither is rotated, as in the published generation (its table has the
        query's length, 1).
        """
        q, k, v = self.heads(self.q_proj(query)), self.heads(self.k_proj(context)), self.heads(self.v_proj(context))
        if aligned:
            cos, sin = self.rotary.table(context.shape[1])
            last = slice(-1, None) if padding_mask is None else _last_unpadded(padding_mask)
            q, k = rotate(q, cos[last], sin[last]), rotate(k, cos, sin)
        seen = None if padding_mask is None else ~padding_mask[:, None, None, :]
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=seen))


def _last_unpadded(padding_mask: Tensor) -> Tensor:
    """Return the last position of each row that is no padding: int64 [B, 1, 1], to index a table of positions with."""
    positions = torch.arange(padding_mask.shape[1], device=padding_mask.device)
    return positions.masked_fill(padding_mask, 0).amax(-1)[:, None, None]


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, padding_mask: Tensor | None = None) -> Tensor:
    """Attend from the last positions, q [B, H, Q, head_dim], to those of k and v [B, H, T, head_dim] up to each.

    Padding is left out.
    """
    queries, length = q.shape[-2], k.shape[-2]
    fused = not dropout_p or current_generator() is None
    if padding_mask is None and fused and queries in (1, length):  # a last position alone attends to all
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=queries == length)
    future = torch.ones(queries, length, dtype=torch.bool, device=q.device).triu(1 + length - queries)
    if padding_mask is not None:  # a position always attends to itself, so that padding has numbers too
        own = torch.eye(length, dtype=torch.bool, device=q.device)[-queries:]
        future = future | (padding_mask[:, None, None, :] & ~own)
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=~future, dropout_p=dropout_p)
    logits = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return dropout(logits.masked_fill(future, float("-inf")).softmax(-1), dropout_p) @ v


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): w2(silu(w1 x) · w3 x)."""

    def __init__(self, d_model: int, ff_dim: int, dropout_p: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(d_model, ff_dim, bias=False)
        self.w3 = nn.Linear(d_model, ff_dim, bias=False)
        self.w2 = nn.Linear(ff_dim, d_model, bias=False)
        self.dropout = Dropout(dropout_p)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """Pre-norm transformer block, causal."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        ff_dim: int,
        ffn_dropout_p: float,
        attn_dropout_p: float,
        resid_dropout_p: float,
    ) -> None:
        super().__init__()
        self.norm1 = RMSNorm(d_model)
        self.self_attn = Attention(d_model, n_heads, attn_dropout_p, resid_dropout_p)
        self.norm2 = RMSNorm(d_model)
        self.ffn = FeedForward(d_model, ff_dim, ffn_dropout_p)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, last: int | None = None) -> Tensor:
        """Map x [B, T, d] to [B, T, d], or to its last positions only, [B, last, d]."""
        context = self.norm1(x)
        query = context
        if last is not None:
            query, x = context[:, -last:], x[:, -last:]
        x = x + self.self_attn(query, context, padding_mask)
        return x + self.ffn(self.norm2(x))


def initialise(module: nn.Module, d_model: int) -> None:
    """Draw the weights of a new network: linear Xavier normal with zero bias, embeddings N(0, 1/d_model), norms 1."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Embedding) and layer.weight.requires_grad:
            nn.init.normal_(layer.weight, std=d_model**-0.5)


def check_heads(owner: str, d_model: int, n_heads: int) -> None:
    """Check that each head has an even number of coordinates, which rotary positions rotate in pairs.

    Raises:
        ValueError: naming `d_model` and `n_heads`.
    """
    if d_model <= 0 or n_heads <= 0 or d_model % (2 * n_heads):
        raise ValueError(f"{owner}: d_model ({d_model}) must be a positive multiple of 2 × n_heads ({n_heads})")
