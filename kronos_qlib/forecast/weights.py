"""A network's weights laid out for generation: fused products, looked-up embeddings, the compute dtype."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kronos_qlib.nn import Kronos, KronosTokenizer
from kronos_qlib.nn.layers import Attention, Block, RMSNorm
from kronos_qlib.nn.quantizer import ids_to_signs


@dataclass(frozen=True)
class Linear:
    """A matrix product in the compute dtype; the input is cast to it, the output stays in it."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


@dataclass(frozen=True)
class Norm:
    """RMSNorm in float32."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


@dataclass(frozen=True)
class BlockWeights:
    """A block with q, k, v as one product and w1, w3 as one."""

    norm1: Norm
    qkv: Linear
    out: Linear
    norm2: Norm
    w13: Linear
    w2: Linear
    n_heads: int

    def feed_forward(self, x: Tensor) -> Tensor:
        """SwiGLU of norm2(x), the gate in float32."""
        gate, value = self.w13(self.norm2(x)).float().chunk(2, dim=-1)
        return self.w2(F.silu(gate) * value)


@dataclass(frozen=True)
class Stack:
    """Blocks that share one table of rotary angles (cos and sin, [positions, head_dim], float32)."""

    blocks: list[BlockWeights]
    cos: Tensor
    sin: Tensor


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
    norm: Norm
    proj_s1: Linear
    cross_query: Tensor  # [2^s1_bits, d_model], unrotated
    cross_kv: Linear
    cross_out: Linear
    cross_heads: int
    cross_cos: Tensor
    cross_sin: Tensor
    dep_norm: Norm
    proj_s2: Linear

    def embed(self, s1: Tensor, s2: Tensor, time: Tensor) -> Tensor:
        """Input embeddings, float32 [..., d_model], of tokens [...] and time embeddings that broadcast to them."""
        return F.embedding(s1, self.s1) + F.embedding(s2, self.s2) + time

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

    @property
    def device(self) -> torch.device:
        return self.model.s1.device


@torch.inference_mode()
def prepare(tokenizer: KronosTokenizer, model: Kronos, max_context: int, dtype: torch.dtype, length: int) -> Prepared:
    """Lay out the weights of both networks, once per run.

    Args:
        max_context: bars that the model sees at most.
        dtype: of the matrix products; everything else is float32.
        length: the longest sequence that will be encoded, in bars.
    """
    check_pair(tokenizer, model)
    return Prepared(
        _tokenizer_weights(tokenizer, dtype, max(length, max_context)),
        _model_weights(model, dtype, max_context),
        max_context,
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
        embed=_linear(dtype, tokenizer.embed),
        encoder=_stack(tokenizer.encoder, dtype, length),
        quant_embed=_linear(torch.float32, tokenizer.quant_embed),  # its signs are the codes: no rounding there
        coarse=codes[0] * scale @ post.weight[:, :s1_bits].T + post.bias,
        fine=codes[1] * scale @ post.weight[:, s1_bits:].T,
        decoder=_stack(tokenizer.decoder, dtype, length),
        head=_linear(torch.float32, tokenizer.head),
        s1_bits=s1_bits,
    )


def _model_weights(model: Kronos, dtype: torch.dtype, length: int) -> ModelWeights:
    codes, cross = model.embedding, model.dep_layer.cross_attn
    first, second = codes.fusion_proj.weight.chunk(2, dim=1)
    cos, sin = cross.rotary.table(length)
    return ModelWeights(
        s1=codes.emb_s1.weight * codes.scale @ first.T + codes.fusion_proj.bias,
        s2=codes.emb_s2.weight * codes.scale @ second.T,
        time=[table.float() for table in model.time_emb.tables()],
        stack=_stack(model.transformer, dtype, length),
        norm=_norm(model.norm),
        proj_s1=_linear(dtype, model.head.proj_s1),
        cross_query=cross.q_proj(codes.emb_s1.weight),
        cross_kv=_linear(dtype, cross.k_proj, cross.v_proj),
        cross_out=_linear(dtype, cross.out_proj),
        cross_heads=cross.n_heads,
        cross_cos=cos,
        cross_sin=sin,
        dep_norm=_norm(model.dep_layer.norm),
        proj_s2=_linear(dtype, model.head.proj_s2),
    )


def _stack(blocks: torch.nn.ModuleList, dtype: torch.dtype, length: int) -> Stack:
    laid_out = [_block(block, dtype) for block in blocks]
    if not laid_out:
        return Stack([], torch.empty(0), torch.empty(0))
    return Stack(laid_out, *blocks[0].self_attn.rotary.table(length))


def _block(block: Block, dtype: torch.dtype) -> BlockWeights:
    attention: Attention = block.self_attn
    return BlockWeights(
        norm1=_norm(block.norm1),
        qkv=_linear(dtype, attention.q_proj, attention.k_proj, attention.v_proj),
        out=_linear(dtype, attention.out_proj),
        norm2=_norm(block.norm2),
        w13=_linear(dtype, block.ffn.w1, block.ffn.w3),
        w2=_linear(dtype, block.ffn.w2),
        n_heads=attention.n_heads,
    )


def _norm(norm: RMSNorm) -> Norm:
    return Norm(norm.weight.detach().float(), norm.eps)


def _linear(dtype: torch.dtype, *layers: torch.nn.Linear) -> Linear:
    """Several layers on one input as one product."""
    weight = torch.cat([layer.weight for layer in layers]).to(dtype)
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers]).to(dtype)
    return Linear(weight, bias)
