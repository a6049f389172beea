"""Both networks' weights, prepared for generation: fused products, embeddings as lookups, the compute dtype."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from kronos_qlib.data.windows import CLOSE
from kronos_qlib.forecast.engine.sampling import is_whole
from kronos_qlib.hardware.device import check_memory
from kronos_qlib.nn import Kronos, KronosTokenizer, zoo
from kronos_qlib.nn.layers import Attention, Block, RMSNorm
from kronos_qlib.nn.tokenizer import embed_columns, project_columns

_Rows = tuple[Tensor, Tensor | None]  # weight and bias of a layer


@dataclass(frozen=True)
class Linear:
    """A matrix product in the compute dtype: the input is cast to it, the output stays in it."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)

    def rows(self, rows: slice) -> "Linear":
        """Return the product of some rows of the weight: these outputs only."""
        return Linear(self.weight[rows], None if self.bias is None else self.bias[rows])


@dataclass(frozen=True)
class BlockWeights:
    """A block with q, k, v as one product and w1, w3 as one; the norms' weights are multiplied into those products.

    Coordinates of queries and keys are ordered so that those rotated together are neighbours.
    """

    eps1: float
    qkv: Linear
    out: Linear
    eps2: float
    w13: Linear
    w2: Linear
    n_heads: int

    def project(self, x: Tensor) -> Tensor:
        """Compute queries, keys and values of x [..., T, d], not rotated yet: [..., T, 3 · d]."""
        return self.qkv(unit_scale(x, self.eps1))

    def split_heads(self, projection: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys, rotated by their positions' angles, and values: each [..., T, H, C]."""
        width = projection.shape[-1] // 3
        qk = rotate_neighbours(projection[..., : 2 * width], angles).unflatten(-1, (2, self.n_heads, -1))
        return qk[..., 0, :, :], qk[..., 1, :, :], projection[..., 2 * width :].unflatten(-1, (self.n_heads, -1))

    def keys_and_values(self, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        """Compute rotated keys and values alone: each [..., T, H, C]."""
        width = x.shape[-1]
        k = self.qkv.rows(slice(width, 2 * width))(unit_scale(x, self.eps1))
        return rotate_neighbours(k, angles[:, width // 2 :]).unflatten(-1, (self.n_heads, -1)), self.values(x)

    def values(self, x: Tensor) -> Tensor:
        """Compute values alone: [..., T, H, C]."""
        width = x.shape[-1]
        v = self.qkv.rows(slice(2 * width, 3 * width))(unit_scale(x, self.eps1))
        return v.unflatten(-1, (self.n_heads, -1))

    def output(self, x: Tensor, attended: Tensor) -> Tensor:
        """Compute the block's output for input x [..., T, d] and the attention's output [..., T, H, C]."""
        x = self.out(attended.flatten(-2)).float().add_(x)
        gate, value = self.w13(unit_scale(x, self.eps2)).float().chunk(2, dim=-1)
        return self.w2(F.silu(gate).mul_(value)).float().add_(x)


@dataclass(frozen=True)
class Stack:
    """Blocks that share one table of rotary angles: complex64 [positions, d_model], queries' and keys', all heads."""

    blocks: list[BlockWeights]
    angles: Tensor


def unit_scale(x: Tensor, eps: float) -> Tensor:
    """Apply RMSNorm without its weight, to float32."""
    if x.device.type != "cpu":
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    # On a CPU torch makes more passes over x than these two.
    return x * torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def rotate_neighbours(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate pairs of neighbours of x [..., T, 2·n] by angles (complex64 [T, n]), in float32, to x's dtype."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * angles).flatten(-2).to(x.dtype)


@dataclass(frozen=True)
class TokenizerWeights:
    """The tokenizer: the codes' embedding is a lookup, coarse[s1] + fine[s2]."""

    embed: Linear  # of bars, by `embed_columns`
    encoder: Stack
    quant_embed: Linear
    coarse: Tensor
    fine: Tensor
    decoder: Stack
    head: Linear  # to bars, by `project_columns`
    codes: Callable[[Tensor], tuple[Tensor, Tensor]]

    def embed_bars(self, x: Tensor) -> Tensor:
        """Embed normalised bars [..., D]: [..., d]."""
        return embed_columns(x.to(self.embed.weight.dtype), self.embed.weight, self.embed.bias)

    def project_bars(self, h: Tensor) -> Tensor:
        """Decode hidden states [..., d] to normalised bars [..., D]."""
        return project_columns(h.to(self.head.weight.dtype), self.head.weight, self.head.bias)


@dataclass(frozen=True)
class ModelWeights:
    """The model: fusion projection and cross-attention queries depend on a token alone, so they are lookups."""

    s1: Tensor
    s2: Tensor
    time: list[Tensor]
    stack: Stack
    norm: Tensor
    eps: float
    proj_s1: Linear
    cross_query: Tensor  # [2^s1_bits, d_model], not rotated
    cross_kv: Linear
    cross_out: Linear
    cross_heads: int
    cross_angles: Tensor  # complex64 [positions, d_model / 2]
    dep_eps: float
    proj_s2: Linear

    def embed(self, s1: Tensor, s2: Tensor, time: Tensor) -> Tensor:
        """Compute input embeddings, float32 [..., d], of tokens [...] and time embeddings that broadcast to them."""
        return F.embedding(s1, self.s1) + F.embedding(s2, self.s2) + time

    def normalise(self, x: Tensor) -> Tensor:
        """Apply the norm after the last block."""
        return unit_scale(x, self.eps) * self.norm

    def embed_time(self, stamp: Tensor) -> Tensor:
        """Look up time embeddings, float32 [..., d], of stamps [..., 5]."""
        fields = stamp.long().unbind(-1)
        return sum(F.embedding(index, table) for index, table in zip(fields, self.time, strict=True))


@dataclass(frozen=True)
class NetworkWeights:
    """Both networks, ready to generate."""

    tokenizer: TokenizerWeights
    model: ModelWeights
    max_context: int
    tokenizer_network: KronosTokenizer

    @property
    def device(self) -> torch.device:
        """The device of both networks."""
        return self.model.s1.device

    @cached_property
    def ranks(self) -> tuple[Tensor, Tensor]:
        """The rank of each s1, and of each s2, by the close of a single bar of it: int64 [2^s1_bits], [2^s2_bits].

        The other token of that bar is the mean of its values. Draws go over the tokens in this order (see `draw`):
        where rounding moves a uniform number across an edge, the bar drawn is much like the one on the other side.
        """
        return _close_ranks(self.tokenizer_network)


@torch.inference_mode()
def prepare_weights(
    tokenizer: KronosTokenizer, model: Kronos, max_context: int, dtype: torch.dtype, length: int
) -> NetworkWeights:
    """Prepare the weights of both networks for generation, once per run.

    Args:
        max_context: bars that the model sees at most.
        dtype: of the matrix products, but for those of the tokenizer's encoder and of the two heads: bfloat16 there
            changes tokens, and scores agree less with those of float32 (benchmarks/draws.py measures how well they
            do). Everything else is float32, but for keys and values.
        length: the longest sequence that will be encoded, in bars.

    Raises:
        ValueError: the networks do not belong together, or max_context is below 2 or needs more memory than there is.
    """
    check_pair(tokenizer, model)
    check_max_context(max_context, model)
    return NetworkWeights(
        _tokenizer_weights(tokenizer, dtype, max(length, max_context)),
        _model_weights(model, dtype, max_context),
        max_context,
        tokenizer,
    )


def beyond_training(model: Kronos, bars: int) -> str | None:
    """Say that windows of so many bars are longer than those that a network of the zoo was trained on; None if not."""
    entry = model.entries.get(model.source or "") or zoo.published(model.source or "")
    if entry is None or entry.max_context is None or bars <= entry.max_context:
        return None
    return (
        f"windows of {bars} bars, lookback and horizon together, are longer than the {entry.max_context} that "
        f"{model.source} was trained on: its forecasts are far worse then; give it fewer bars, or fine-tune it on these"
    )


def check_max_context(max_context: int, model: Kronos) -> None:
    """Refuse a max_context that is no whole number of at least 2, or whose rotary angles would not fit into memory.

    Raises:
        ValueError: one line that names it.
    """
    if not is_whole(max_context) or max_context < 2:
        raise ValueError(f"max_context is {max_context!r}; it must be a whole number, at least 2")
    angles = 12 * model.d_model  # bytes a position, of the layers and of the cross-attention
    check_memory(f"max_context {max_context}", max_context * angles, torch.device("cpu"))


def check_pair(tokenizer: KronosTokenizer, model: Kronos) -> None:
    """Refuse what is no tokenizer and model, or has different codes.

    Raises:
        ValueError: one of them is something else, they are in each other's place, or their s1_bits or s2_bits differ.
    """
    if isinstance(tokenizer, Kronos) and isinstance(model, KronosTokenizer):
        raise ValueError("tokenizer and model are in each other's place: the tokenizer is a Kronos")
    for name, network, kind in (("tokenizer", tokenizer, KronosTokenizer), ("model", model, Kronos)):
        if not isinstance(network, kind):
            raise ValueError(f"{name} should be a {kind.__name__}, not {network!r:.80}")
    theirs, ours = (tokenizer.s1_bits, tokenizer.s2_bits), (model.s1_bits, model.s2_bits)
    if theirs != ours:
        raise ValueError(f"tokenizer and model do not belong together: (s1_bits, s2_bits) are {theirs} and {ours}")


def _tokenizer_weights(tokenizer: KronosTokenizer, dtype: torch.dtype, length: int) -> TokenizerWeights:
    post, (coarse, fine) = tokenizer.post_quant_embed, _code_values(tokenizer)
    width = coarse.shape[1]
    return TokenizerWeights(
        # Float32: the signs of the encoder's output are the tokens, and all later draws depend on them.
        embed=_fuse(torch.float32, tokenizer.embed),
        encoder=_stack(tokenizer.encoder, torch.float32, length),
        quant_embed=_fuse(torch.float32, tokenizer.quant_embed),
        coarse=coarse @ post.weight[:, :width].T + post.bias,
        fine=fine @ post.weight[:, width:].T,
        decoder=_stack(tokenizer.decoder, dtype, length),
        head=_fuse(torch.float32, tokenizer.head),
        codes=tokenizer.codes,
    )


def _code_values(tokenizer: KronosTokenizer) -> tuple[Tensor, Tensor]:
    """Return the quantized values of each s1, and of each s2: [2^s1_bits, …] and [2^s2_bits, …], which make W."""
    s1, s2 = (
        torch.arange(2**bits, device=tokenizer.embed.weight.device) for bits in (tokenizer.s1_bits, tokenizer.s2_bits)
    )
    width = tokenizer.post_quant_embed_pre.in_features
    coarse = tokenizer.values(s1, torch.zeros_like(s1))[:, :width].contiguous()
    return coarse, tokenizer.values(torch.zeros_like(s2), s2)[:, width:].contiguous()


@torch.inference_mode()
def _close_ranks(tokenizer: KronosTokenizer) -> tuple[Tensor, Tensor]:
    """See `NetworkWeights.ranks`; in float32 for every dtype of the run, so that the order of the tokens is one."""
    weights, values = tokenizer.post_quant_embed.weight, _code_values(tokenizer)
    width = values[0].shape[1]
    ranks = []
    for half, own in zip((weights[:, :width], weights[:, width:]), values):
        x = own @ half.T + tokenizer.post_quant_embed.bias
        for block in tokenizer.decoder:
            weights_of_block = _block(block, torch.float32)
            x = weights_of_block.output(x, weights_of_block.values(x))  # a single position attends to itself
        bars = project_columns(x, tokenizer.head.weight, tokenizer.head.bias)
        ranks.append(bars[:, CLOSE].argsort(stable=True).argsort())
    return ranks[0], ranks[1]


def _model_weights(model: Kronos, dtype: torch.dtype, length: int) -> ModelWeights:
    codes, cross = model.embedding, model.dep_layer.cross_attn
    first, second = codes.fusion_proj.weight.chunk(2, dim=1)
    heads = cross.n_heads
    return ModelWeights(
        s1=codes.emb_s1.weight * codes.scale @ first.T + codes.fusion_proj.bias,
        s2=codes.emb_s2.weight * codes.scale @ second.T,
        time=[table.float() for table in model.time_emb.tables()],
        stack=_stack(model.transformer, dtype, length),
        norm=model.norm.weight.detach().float(),
        eps=model.norm.eps,
        proj_s1=_fuse(torch.float32, model.head.proj_s1),
        cross_query=_pairs(cross.q_proj(codes.emb_s1.weight).T, heads).T.contiguous(),
        cross_kv=_concatenate(dtype, (_rotary_rows(cross.k_proj, heads), _rows(cross.v_proj))),
        cross_out=_fuse(dtype, cross.out_proj),
        cross_heads=heads,
        cross_angles=_angles(cross, length),
        dep_eps=model.dep_layer.norm.eps,
        proj_s2=_fuse(torch.float32, model.head.proj_s2, norm=model.dep_layer.norm),
    )


def _stack(blocks: torch.nn.ModuleList, dtype: torch.dtype, length: int) -> Stack:
    if not blocks:
        return Stack([], torch.empty(0))
    return Stack([_block(block, dtype) for block in blocks], _angles(blocks[0].self_attn, length).repeat(1, 2))


def _block(block: Block, dtype: torch.dtype) -> BlockWeights:
    attention, heads = block.self_attn, block.self_attn.n_heads
    queries, keys = _rotary_rows(attention.q_proj, heads), _rotary_rows(attention.k_proj, heads)
    return BlockWeights(
        eps1=block.norm1.eps,
        qkv=_concatenate(dtype, (queries, keys, _rows(attention.v_proj)), block.norm1),
        out=_fuse(dtype, attention.out_proj),
        eps2=block.norm2.eps,
        w13=_fuse(dtype, block.ffn.w1, block.ffn.w3, norm=block.norm2),
        w2=_fuse(dtype, block.ffn.w2),
        n_heads=heads,
    )


def _angles(attention: Attention, length: int) -> Tensor:
    """Return the rotary angles of all heads' pairs at positions 0 … length − 1: complex64 [length, d / 2]."""
    cos, sin = (table[:, : table.shape[1] // 2] for table in attention.rotary.table(length))
    return torch.complex(cos, sin).repeat(1, attention.n_heads)


def _pairs(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows [heads · head_dim, ...] so that coordinates i and i + head_dim / 2 are neighbours."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _rotary_rows(layer: torch.nn.Linear, heads: int) -> _Rows:
    return _pairs(layer.weight, heads), None if layer.bias is None else _pairs(layer.bias, heads)


def _rows(layer: torch.nn.Linear) -> _Rows:
    return layer.weight, layer.bias


def _fuse(dtype: torch.dtype, *layers: torch.nn.Linear, norm: RMSNorm | None = None) -> Linear:
    """Fuse layers on one input into one product, and multiply the weight of the norm before them into it."""
    return _concatenate(dtype, [_rows(layer) for layer in layers], norm)


def _concatenate(dtype: torch.dtype, layers: Sequence[_Rows], norm: RMSNorm | None = None) -> Linear:
    weight = torch.cat([weight for weight, _ in layers])
    if norm is not None:
        weight = weight * norm.weight
    bias = None if layers[0][1] is None else torch.cat([bias for _, bias in layers]).to(dtype)
    return Linear(weight.to(dtype), bias)
