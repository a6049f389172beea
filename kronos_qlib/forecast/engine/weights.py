"""A network's weights laid out for generation: fused products, looked-up embeddings, the compute dtype."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from kronos_qlib.data.windows import CLOSE
from kronos_qlib.nn import Kronos, KronosTokenizer
from kronos_qlib.nn.layers import Attention, Block, RMSNorm
from kronos_qlib.nn.quantizer import ids_to_signs

_Rows = tuple[Tensor, Tensor | None]  # weight and bias of a layer


@dataclass(frozen=True)
class Linear:
    """A matrix product in the compute dtype; the input is cast to it, the output stays in it."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)

    def part(self, rows: slice) -> "Linear":
        """The product that gives these outputs only."""
        return Linear(self.weight[rows], None if self.bias is None else self.bias[rows])


@dataclass(frozen=True)
class BlockWeights:
    """A block with q, k, v as one product and w1, w3 as one; what the norms multiply by is in those products' weights.

    Coordinates of queries and keys are in such an order that those turned together lie side by side.
    """

    eps1: float
    qkv: Linear
    out: Linear
    eps2: float
    w13: Linear
    w2: Linear
    n_heads: int

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values of x [..., T, d], not turned yet: [..., T, 3 · d]."""
        return self.qkv(unit_scale(x, self.eps1))

    def heads(self, projected: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, turned by their positions' angles, and values: each [..., T, H, D]."""
        width = projected.shape[-1] // 3
        turned = turn(projected[..., : 2 * width], angles).unflatten(-1, (2, self.n_heads, -1))
        return turned[..., 0, :, :], turned[..., 1, :, :], projected[..., 2 * width :].unflatten(-1, (self.n_heads, -1))

    def keys(self, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values alone."""
        width = x.shape[-1]
        k = self.qkv.part(slice(width, 2 * width))(unit_scale(x, self.eps1))
        return turn(k, angles[:, width // 2 :]).unflatten(-1, (self.n_heads, -1)), self.values(x)

    def values(self, x: Tensor) -> Tensor:
        """Values alone."""
        width = x.shape[-1]
        v = self.qkv.part(slice(2 * width, 3 * width))(unit_scale(x, self.eps1))
        return v.unflatten(-1, (self.n_heads, -1))

    def rest(self, x: Tensor, attended: Tensor) -> Tensor:
        """The block's output for input x [..., T, d] and what the heads attended to, [..., T, H, D]."""
        x = self.out(attended.flatten(-2)).float().add_(x)
        gate, value = self.w13(unit_scale(x, self.eps2)).float().chunk(2, dim=-1)
        return self.w2(F.silu(gate).mul_(value)).float().add_(x)


@dataclass(frozen=True)
class Stack:
    """Blocks that share one table of rotary angles: complex64 [positions, d_model], queries' and keys', all heads."""

    blocks: list[BlockWeights]
    angles: Tensor


def unit_scale(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without its weight, of float32."""
    if x.device.type != "cpu":
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    # On a CPU torch composes it of more passes over x than these two.
    return x * torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Turn pairs of neighbours of x [..., T, 2·n] by angles (complex64 [T, n]), in float32, to x's dtype."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * angles).flatten(-2).to(x.dtype)


@dataclass(frozen=True)
class TokenizerWeights:
    """The tokenizer: the codes' embedding is a lookup, coarse[s1] + fine[s2]."""

    embed: Linear
    encoder: Stack
    quant_embed: Linear
    coarse: Tensor
    fine: Tensor
    decoder: Stack
    head: Linear
    s1_bits: int


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
    cross_query: Tensor  # [2^s1_bits, d_model], not turned
    cross_kv: Linear
    cross_out: Linear
    cross_heads: int
    cross_angles: Tensor  # complex64 [positions, d_model / 2]
    dep_eps: float
    proj_s2: Linear

    def embed(self, s1: Tensor, s2: Tensor, time: Tensor) -> Tensor:
        """Input embeddings, float32 [..., d_model], of tokens [...] and time embeddings that broadcast to them."""
        return F.embedding(s1, self.s1) + F.embedding(s2, self.s2) + time

    def normed(self, x: Tensor) -> Tensor:
        """The norm after the last block."""
        return unit_scale(x, self.eps) * self.norm

    def embed_time(self, stamp: Tensor) -> Tensor:
        """Time embeddings, float32 [..., d_model], of stamps [..., 5]."""
        fields = stamp.long().unbind(-1)
        return sum(F.embedding(index, table) for index, table in zip(fields, self.time, strict=True))


@dataclass(frozen=True)
class Prepared:
    """Both networks, ready to generate."""

    tokenizer: TokenizerWeights
    model: ModelWeights
    max_context: int
    network: KronosTokenizer

    @property
    def device(self) -> torch.device:
        return self.model.s1.device

    @cached_property
    def ranks(self) -> tuple[Tensor, Tensor]:
        """The place of each s1, and of each s2, by the close of a single bar of it: int64 [2^s1_bits], [2^s2_bits].

        The other code is in the middle between its values. Draws go over the tokens in this order (see `draw`), so a
        number that falls on the other side of an edge, for a rounding, gives a bar that is much alike.
        """
        return _close_ranks(self.network)


@torch.inference_mode()
def prepare(tokenizer: KronosTokenizer, model: Kronos, max_context: int, dtype: torch.dtype, length: int) -> Prepared:
    """Lay out the weights of both networks, once per run.

    Args:
        max_context: bars that the model sees at most.
        dtype: of the matrix products, but for those of the tokenizer's encoder and of the two heads: in bfloat16 they
            would turn codes, and scores would agree less with those of float32 (how well they do is measured by
            benchmarks/draws.py). Everything else is float32, but for what attention reads.
        length: the longest sequence that will be encoded, in bars.
    """
    check_pair(tokenizer, model)
    return Prepared(
        _tokenizer_weights(tokenizer, dtype, max(length, max_context)),
        _model_weights(model, dtype, max_context),
        max_context,
        tokenizer,
    )


def check_pair(tokenizer: KronosTokenizer, model: Kronos) -> None:
    """Refuse a tokenizer and a model with different codes.

    Raises:
        ValueError: their s1_bits or s2_bits differ.
    """
    theirs, ours = (tokenizer.s1_bits, tokenizer.s2_bits), (model.s1_bits, model.s2_bits)
    if theirs != ours:
        raise ValueError(f"tokenizer and model do not belong together: (s1_bits, s2_bits) are {theirs} and {ours}")


def _tokenizer_weights(tokenizer: KronosTokenizer, dtype: torch.dtype, length: int) -> TokenizerWeights:
    scale, s1_bits = tokenizer.bits**-0.5, tokenizer.s1_bits
    device = tokenizer.embed.weight.device
    codes = [ids_to_signs(torch.arange(2**bits, device=device), bits) for bits in (s1_bits, tokenizer.s2_bits)]
    post = tokenizer.post_quant_embed
    return TokenizerWeights(
        # Signs of the encoder's output are the codes. A code that turns changes what all draws after it see.
        embed=_linear(torch.float32, tokenizer.embed),
        encoder=_stack(tokenizer.encoder, torch.float32, length),
        quant_embed=_linear(torch.float32, tokenizer.quant_embed),
        coarse=codes[0] * scale @ post.weight[:, :s1_bits].T + post.bias,
        fine=codes[1] * scale @ post.weight[:, s1_bits:].T,
        decoder=_stack(tokenizer.decoder, dtype, length),
        head=_linear(torch.float32, tokenizer.head),
        s1_bits=s1_bits,
    )


@torch.inference_mode()
def _close_ranks(tokenizer: KronosTokenizer) -> tuple[Tensor, Tensor]:
    """See `Prepared.ranks`; in float32 whatever the precision of the run, so that all go over the tokens alike."""
    weights, (s1_bits, s2_bits) = tokenizer.post_quant_embed.weight, (tokenizer.s1_bits, tokenizer.s2_bits)
    halves = weights[:, :s1_bits], weights[:, s1_bits:]
    ranks = []
    for half, bits in zip(halves, (s1_bits, s2_bits)):
        signs = ids_to_signs(torch.arange(2**bits, device=weights.device), bits)
        x = signs * tokenizer.bits**-0.5 @ half.T + tokenizer.post_quant_embed.bias
        for block in tokenizer.decoder:
            laid_out = _block(block, torch.float32)
            x = laid_out.rest(x, laid_out.values(x))  # the one position there is attends to itself
        ranks.append(tokenizer.head(x)[:, CLOSE].argsort(stable=True).argsort())
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
        proj_s1=_linear(torch.float32, model.head.proj_s1),
        cross_query=_pairs(cross.q_proj(codes.emb_s1.weight).T, heads).T.contiguous(),
        cross_kv=_joined(dtype, (_turned(cross.k_proj, heads), _plain(cross.v_proj))),
        cross_out=_linear(dtype, cross.out_proj),
        cross_heads=heads,
        cross_angles=_angles(cross, length),
        dep_eps=model.dep_layer.norm.eps,
        proj_s2=_linear(torch.float32, model.head.proj_s2, norm=model.dep_layer.norm),
    )


def _stack(blocks: torch.nn.ModuleList, dtype: torch.dtype, length: int) -> Stack:
    laid_out = [_block(block, dtype) for block in blocks]
    if not laid_out:
        return Stack([], torch.empty(0))
    return Stack(laid_out, _angles(blocks[0].self_attn, length).repeat(1, 2))


def _block(block: Block, dtype: torch.dtype) -> BlockWeights:
    attention, heads = block.self_attn, block.self_attn.n_heads
    queries, keys = _turned(attention.q_proj, heads), _turned(attention.k_proj, heads)
    return BlockWeights(
        eps1=block.norm1.eps,
        qkv=_joined(dtype, (queries, keys, _plain(attention.v_proj)), block.norm1),
        out=_linear(dtype, attention.out_proj),
        eps2=block.norm2.eps,
        w13=_linear(dtype, block.ffn.w1, block.ffn.w3, norm=block.norm2),
        w2=_linear(dtype, block.ffn.w2),
        n_heads=heads,
    )


def _angles(attention: Attention, length: int) -> Tensor:
    """The turns of all heads' pairs at positions 0 … length − 1: complex64 [length, d_model / 2]."""
    cos, sin = (table[:, : table.shape[1] // 2] for table in attention.rotary.table(length))
    return torch.complex(cos, sin).repeat(1, attention.n_heads)


def _pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads · head_dim, ...] in the order in which coordinates i and i + head_dim / 2 are neighbours."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _turned(layer: torch.nn.Linear, heads: int) -> _Rows:
    return _pairs(layer.weight, heads), None if layer.bias is None else _pairs(layer.bias, heads)


def _plain(layer: torch.nn.Linear) -> _Rows:
    return layer.weight, layer.bias


def _linear(dtype: torch.dtype, *layers: torch.nn.Linear, norm: RMSNorm | None = None) -> Linear:
    """Several layers on one input as one product, after a norm that only brings to unit scale."""
    return _joined(dtype, [_plain(layer) for layer in layers], norm)


def _joined(dtype: torch.dtype, layers: Sequence[_Rows], norm: RMSNorm | None = None) -> Linear:
    weight = torch.cat([weight for weight, _ in layers])
    if norm is not None:
        weight = weight * norm.weight
    bias = None if layers[0][1] is None else torch.cat([bias for _, bias in layers]).to(dtype)
    return Linear(weight.to(dtype), bias)
