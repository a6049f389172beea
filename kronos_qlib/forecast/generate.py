"""Sampled generation: every window's context is computed once and shared by its samples.

The two halves: `_prefill` runs a window's context through the blocks and keeps keys and values per layer; `_extend`
runs the samples' own positions against that shared prefix and their own cache. Attention joins the two parts in one
softmax; the samples are folded into the query axis, so the prefix is neither copied nor read again per sample.

Shapes: B windows, S samples, L context bars, P forecast bars, H heads, D coordinates per head.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import trange

from kronos_qlib.forecast.randomness import uniforms
from kronos_qlib.forecast.sampling import draw
from kronos_qlib.forecast.weights import ModelWeights, Prepared, Stack, TokenizerWeights, prepare
from kronos_qlib.nn import Kronos, KronosTokenizer
from kronos_qlib.nn.device import resolve_dtype
from kronos_qlib.nn.layers import rotate
from kronos_qlib.nn.model import TIME_TABLES, S2Rotation
from kronos_qlib.nn.quantizer import signs_to_ids


@dataclass(frozen=True)
class Sampling:
    """How paths are drawn; see `draw` for temperature, top_k and top_p."""

    sample_count: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    s2_rotation: S2Rotation = "reference"

    def __post_init__(self) -> None:
        checks = {
            "sample_count": (self.sample_count >= 1, "at least 1"),
            "temperature": (self.temperature > 0, "above 0 (for the likeliest path use top_k=1)"),
            "top_k": (self.top_k >= 0, "0 (keep all) or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "s2_rotation": (self.s2_rotation in ("reference", "aligned"), "'reference' or 'aligned'"),
        }
        for name, (fine, rule) in checks.items():
            if not fine:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {rule}")


def sample_paths(
    tokenizer: KronosTokenizer,
    model: Kronos,
    x: Tensor,
    x_stamp: Tensor,
    y_stamp: Tensor,
    *,
    sample_count: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    max_context: int = 512,
    seed: int = 0,
    keys: Sequence[int] | np.ndarray | Tensor | None = None,
    dtype: torch.dtype | str | None = None,
    s2_rotation: S2Rotation = "reference",
) -> Tensor:
    """Draw future paths of normalised windows.

    Args:
        x: normalised bars [B, L, d_in], oldest first.
        x_stamp: their stamps [B, L, 5]: minute, hour, weekday (Monday 0), day, month.
        y_stamp: stamps of the bars to forecast [B, P, 5].
        keys: one integer per row; a row's random numbers depend on (seed, key, sample, step) only. Default: 0 … B−1.
        max_context: bars the model sees at most; the window slides beyond it, and caches cannot be used there.
        dtype: of the matrix products: float32 (None), bfloat16 or "auto".
        s2_rotation: "reference" as published, "aligned" as trained.

    Returns:
        float32 [B, sample_count, P, d_in], normalised units, on x's device.

    Raises:
        ValueError: shapes that do not fit together, NaN in x, an option out of range, networks of different bits.
    """
    sampling = Sampling(sample_count, temperature, top_k, top_p, seed, s2_rotation)
    x, x_stamp, y_stamp = (torch.as_tensor(values) for values in (x, x_stamp, y_stamp))
    device = next(model.parameters()).device
    net = prepare(tokenizer, model, max_context, resolve_dtype(dtype, device), x.shape[1])
    paths = generate(net, x, x_stamp, y_stamp, sampling, keys)
    return paths.to(x.device).clone()  # an ordinary tensor: one made in inference mode cannot be worked on


@torch.inference_mode()
def generate(
    net: Prepared,
    x: Tensor,
    x_stamp: Tensor,
    y_stamp: Tensor,
    sampling: Sampling,
    keys: Sequence[int] | np.ndarray | Tensor | None = None,
    progress: bool = False,
) -> Tensor:
    """`sample_paths` with weights that are prepared already; progress shows a bar over the P steps."""
    _check_shapes(net, x, x_stamp, y_stamp)
    batch, length, _ = x.shape
    horizon, samples, limit = y_stamp.shape[1], sampling.sample_count, net.max_context
    x, x_stamp, y_stamp = x.to(net.device, torch.float32), x_stamp.to(net.device), y_stamp.to(net.device)
    keys = np.arange(batch) if keys is None else _as_integers(keys, batch)
    uniform = torch.from_numpy(uniforms(sampling.seed, keys, samples, horizon)).to(net.device)

    s1, s2 = _encode(net.tokenizer, x)
    time, own_time = net.model.embed_time(x_stamp[:, -limit:]), net.model.embed_time(y_stamp)
    own_s1 = torch.empty(batch, samples, horizon, dtype=torch.long, device=net.device)
    own_s2 = torch.empty_like(own_s1)
    state: _ContextState | None = None
    for step in trange(horizon, desc="forecast", unit="bar", disable=not progress):
        prefix = min(length, limit - step)  # context bars still in sight
        if state is None or state.prefix != prefix:  # the first step, or the window slid and positions restart
            inputs = net.model.embed(s1[:, -prefix:], s2[:, -prefix:], time[:, -prefix:])
            state = _ContextState.start(net.model, inputs, samples, horizon, sampling.s2_rotation == "aligned")
        if state.filled < step:
            new = slice(state.filled, step)
            state.append(net.model.embed(own_s1[:, :, new], own_s2[:, :, new], own_time[:, None, new]))
        own_s1[:, :, step] = draw(state.s1_logits(), uniform[step, 0], *_filters(sampling))
        own_s2[:, :, step] = draw(state.s2_logits(own_s1[:, :, step]), uniform[step, 1], *_filters(sampling))
    kept = min(length, limit - horizon)
    return _decode(net.tokenizer, s1[:, length - kept :], s2[:, length - kept :], own_s1, own_s2)


def _filters(sampling: Sampling) -> tuple[float, int, float]:
    return sampling.temperature, sampling.top_k, sampling.top_p


def _check_shapes(net: Prepared, x: Tensor, x_stamp: Tensor, y_stamp: Tensor) -> None:
    if x.ndim != 3 or x.shape[-1] != net.tokenizer.embed.weight.shape[1] or x.shape[1] == 0:
        raise ValueError(f"x has shape {list(x.shape)}; expected [B, L, {net.tokenizer.embed.weight.shape[1]}]")
    if x_stamp.shape != (*x.shape[:2], 5):
        raise ValueError(f"x_stamp has shape {list(x_stamp.shape)}; x needs {[*x.shape[:2], 5]}")
    if y_stamp.ndim != 3 or y_stamp.shape[0] != x.shape[0] or y_stamp.shape[2] != 5 or y_stamp.shape[1] == 0:
        raise ValueError(f"y_stamp has shape {list(y_stamp.shape)}; expected [{x.shape[0]}, P, 5]")
    if y_stamp.shape[1] >= net.max_context:
        raise ValueError(f"pred_len ({y_stamp.shape[1]}) must be below max_context ({net.max_context})")
    if not torch.isfinite(x).all():
        raise ValueError("x holds NaN or infinite values")
    for name, stamp in (("x_stamp", x_stamp), ("y_stamp", y_stamp)):
        for field, (table, column) in zip(TIME_TABLES, zip(net.model.time, stamp.unbind(-1))):
            if not ((column >= 0) & (column < len(table))).all():
                raise ValueError(f"{name} has a {field} outside 0 … {len(table) - 1}")


def _as_integers(keys: Sequence[int] | np.ndarray | Tensor, count: int) -> np.ndarray:
    """The keys modulo 2^64 as int64."""
    values = keys.tolist() if isinstance(keys, (np.ndarray, Tensor)) else keys
    try:
        integers = [operator.index(value) % 2**64 for value in values]
    except TypeError:
        integers = []
    if len(integers) != count:
        raise ValueError(f"keys must hold one integer for each of the {count} rows, not {keys!r}")
    return np.array(integers, np.uint64).view(np.int64)


@dataclass
class _Cache:
    """Keys and values of one attention: the shared prefix [B, H, L, D] and the samples' own [B, H, S, P, D]."""

    k: Tensor
    v: Tensor
    own_k: Tensor
    own_v: Tensor

    @classmethod
    def of_prefix(cls, k: Tensor, v: Tensor, samples: int, capacity: int) -> "_Cache":
        batch, heads, _, dim = k.shape
        own = k.new_empty(2, batch, heads, samples, capacity, dim)
        return cls(k, v, own[0], own[1])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, filled: int) -> Tensor:
        """Store k, v [B, H, S, n, D] behind the `filled` own positions and attend from q, causally: [B, H, S, n, D]."""
        end = filled + k.shape[3]
        self.own_k[:, :, :, filled:end], self.own_v[:, :, :, filled:end] = k, v
        return self.read(q, end)

    def read(self, q: Tensor, end: int) -> Tensor:
        """Attend from q [B, H, S, n, D] to the prefix and own positions before `end`, the last n of them causally."""
        batch, heads, samples, n, dim = q.shape
        length = self.k.shape[2]
        q = q * dim**-0.5
        scores = q.new_empty(batch, heads, samples, n, length + end)
        scores[..., :length] = (q.flatten(2, 3) @ self.k.mT).unflatten(2, (samples, n))
        scores[..., length:] = q @ self.own_k[:, :, :, :end].mT
        if n > 1:
            ahead = torch.ones(n, end, dtype=torch.bool, device=q.device).triu(end - n + 1)
            scores[..., length:].masked_fill_(ahead, -torch.inf)
        weights = scores.float().softmax(-1).to(q.dtype)
        shared = (weights[..., :length].flatten(2, 3) @ self.v).unflatten(2, (samples, n))
        return shared + weights[..., length:] @ self.own_v[:, :, :, :end]


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` in float32, whatever the compute dtype."""
    return rotate(x.float(), cos, sin).to(x.dtype)


def _prefill(
    stack: Stack, x: Tensor, samples: int, capacity: int, keys_only_last: bool = False
) -> tuple[Tensor, list[_Cache]]:
    """Run context x [B, L, d] through the blocks: the output [B, L, d] and each layer's cache.

    With keys_only_last the last block stops at its keys and values, and the output is of no use.
    """
    caches = []
    cos, sin = stack.cos[: x.shape[1]], stack.sin[: x.shape[1]]
    for block in stack.blocks:
        q, k, v = block.qkv(block.norm1(x)).unflatten(-1, (3, block.n_heads, -1)).permute(2, 0, 3, 1, 4)
        k = _turn(k, cos, sin)
        caches.append(_Cache.of_prefix(k, v.contiguous(), samples, capacity))
        if keys_only_last and block is stack.blocks[-1]:
            break
        attended = F.scaled_dot_product_attention(_turn(q, cos, sin), k, v, is_causal=True)
        x = x + block.out(attended.transpose(1, 2).flatten(-2))
        x = x + block.feed_forward(x)
    return x, caches


def _extend(stack: Stack, caches: list[_Cache], x: Tensor, filled: int) -> Tensor:
    """Run own positions x [B, S, n, d], which follow `filled` others, through the blocks: [B, S, n, d]."""
    for block, cache in zip(stack.blocks, caches, strict=True):
        start = cache.k.shape[2] + filled
        cos, sin = stack.cos[start : start + x.shape[2]], stack.sin[start : start + x.shape[2]]
        q, k, v = block.qkv(block.norm1(x)).unflatten(-1, (3, block.n_heads, -1)).permute(3, 0, 4, 1, 2, 5)
        attended = cache.attend(_turn(q, cos, sin), _turn(k, cos, sin), v, filled)
        x = x + block.out(attended.permute(0, 2, 3, 1, 4).flatten(-2))
        x = x + block.feed_forward(x)
    return x


@dataclass
class _ContextState:
    """What generation remembers between steps: caches of the transformer and of the s2 cross-attention."""

    model: ModelWeights
    caches: list[_Cache]
    cross: _Cache
    last: Tensor  # context of the newest position: [B, 1, d] while the samples share it, then [B, S, d]
    prefix: int
    filled: int
    aligned: bool

    @classmethod
    def start(cls, model: ModelWeights, x: Tensor, samples: int, capacity: int, aligned: bool) -> "_ContextState":
        h, caches = _prefill(model.stack, x, samples, capacity)
        h = model.norm(h)
        k, v = model.cross_kv(h).unflatten(-1, (2, model.cross_heads, -1)).permute(2, 0, 3, 1, 4)
        if aligned:
            k = _turn(k, model.cross_cos[: x.shape[1]], model.cross_sin[: x.shape[1]])
        cross = _Cache.of_prefix(k.contiguous(), v.contiguous(), samples, capacity)
        return cls(model, caches, cross, h[:, -1:], prefix=x.shape[1], filled=0, aligned=aligned)

    def append(self, x: Tensor) -> None:
        """Take in own positions x [B, S, n, d]."""
        h = self.model.norm(_extend(self.model.stack, self.caches, x, self.filled))
        k, v = self.model.cross_kv(h).unflatten(-1, (2, self.model.cross_heads, -1)).permute(3, 0, 4, 1, 2, 5)
        end = self.filled + x.shape[2]
        if self.aligned:
            positions = slice(self.prefix + self.filled, self.prefix + end)
            k = _turn(k, self.model.cross_cos[positions], self.model.cross_sin[positions])
        self.cross.own_k[:, :, :, self.filled : end], self.cross.own_v[:, :, :, self.filled : end] = k, v
        self.last, self.filled = h[:, :, -1], end

    def s1_logits(self) -> Tensor:
        """Float32 [B, 1 or S, 2^s1_bits]."""
        return self.model.proj_s1(self.last).float()

    def s2_logits(self, s1: Tensor) -> Tensor:
        """Float32 [B, S, 2^s2_bits] given the s1 [B, S] just drawn."""
        q = F.embedding(s1, self.model.cross_query).unflatten(-1, (self.model.cross_heads, -1))
        if self.aligned:
            position = self.prefix + self.filled - 1
            q = rotate(q, self.model.cross_cos[position], self.model.cross_sin[position])
        q = q.transpose(1, 2).unsqueeze(3).to(self.cross.k.dtype)  # [B, H, S, 1, D]
        attended = self.cross.read(q, self.filled).squeeze(3).transpose(1, 2).flatten(-2)
        h = self.model.dep_norm(self.last + self.model.cross_out(attended))
        return self.model.proj_s2(h).float()


def _encode(tokenizer: TokenizerWeights, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes s1 and s2 [B, L] of normalised bars [B, L, d_in]."""
    h, _ = _prefill(tokenizer.encoder, tokenizer.embed(x).float(), samples=0, capacity=0)
    signs = torch.where(tokenizer.quant_embed(h) > 0, 1.0, -1.0)
    return signs_to_ids(signs[..., : tokenizer.s1_bits]), signs_to_ids(signs[..., tokenizer.s1_bits :])


def _decode(tokenizer: TokenizerWeights, s1: Tensor, s2: Tensor, own_s1: Tensor, own_s2: Tensor) -> Tensor:
    """Normalised bars [B, S, P, d_in] of own codes [B, S, P] that follow the shared codes [B, L]."""
    samples, horizon = own_s1.shape[1:]
    shared = F.embedding(s1, tokenizer.coarse) + F.embedding(s2, tokenizer.fine)
    own = F.embedding(own_s1, tokenizer.coarse) + F.embedding(own_s2, tokenizer.fine)
    _, caches = _prefill(tokenizer.decoder, shared, samples, horizon, keys_only_last=True)
    return tokenizer.head(_extend(tokenizer.decoder, caches, own, filled=0))
