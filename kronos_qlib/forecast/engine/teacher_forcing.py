"""One teacher-forced pass over windows: how likely the model finds their last bars, and its hidden states."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kronos_qlib.forecast.engine.attention import prefill
from kronos_qlib.forecast.engine.generate import encode
from kronos_qlib.forecast.engine.weights import NetworkWeights, rotate_neighbours, unit_scale


@torch.inference_mode()
def teacher_forced(weights: NetworkWeights, x: Tensor, stamp: Tensor, bars: int) -> tuple[Tensor, Tensor]:
    """Run normalised windows x [B, L, D], with stamps [B, L, 5], through the networks once, the true codes as input.

    Args:
        bars: k, of how many last bars the cross-entropy is wanted, below L.

    Returns:
        Cross-entropy of the true codes, given the bars before (and of s2 the true s1), as in training: nats, float32
        [B, 2, k], s1 first. Hidden states after the last norm: float32 [B, L, d].
    """
    model = weights.model
    s1, s2 = encode(weights.tokenizer, x)
    h, _ = prefill(model.stack, model.embed(s1, s2, model.embed_time(stamp)))
    h = model.normalise(h)
    before = slice(-1 - bars, -1)  # the positions that the last bars are predicted from
    context, angles = h[:, :-1], model.cross_angles[: h.shape[1] - 1]
    k, v = model.cross_kv(context).chunk(2, dim=-1)
    q = rotate_neighbours(F.embedding(s1[:, -bars:], model.cross_query), angles[-bars:])
    heads = q.to(k.dtype), rotate_neighbours(k, angles), v
    q, k, v = (rows.unflatten(-1, (model.cross_heads, -1)).transpose(1, 2) for rows in heads)
    length = context.shape[1]
    mask = torch.ones(bars, length, dtype=torch.bool, device=h.device).tril(length - bars)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    dependent = unit_scale(h[:, before] + model.cross_out(attended.flatten(-2)), model.dep_eps)
    logits = model.proj_s1(h[:, before]), model.proj_s2(dependent)
    losses = [
        F.cross_entropy(own.float().transpose(1, 2), codes[:, -bars:], reduction="none")
        for own, codes in zip(logits, (s1, s2))
    ]
    return torch.stack(losses, 1), h
