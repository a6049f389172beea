"""Drawing tokens from logits: temperature, top-k, top-p, inverse transform."""

import torch
import torch.nn.functional as F
from torch import Tensor

FIRST_CANDIDATES = 16  # how many of the largest logits are looked at before more are asked for


def draw(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float, values: Tensor | None = None
) -> Tensor:
    """Draw one token per uniform number by inverse transform, over the tokens from the likeliest down.

    Top-k keeps the k largest logits; top-p then keeps the smallest prefix of the sorted distribution whose mass
    exceeds p, always at least one.

    Args:
        logits: float32 [B, R, V]; R is 1 where all S draws of a row share one distribution, else S.
        uniform: float32 [B, S] in [0, 1).
        temperature: > 0, divides the logits.
        top_k: 0 keeps all.
        top_p: in (0, 1]; 1 keeps all.
        values: float32 [V]; given, the transform goes over the tokens in the order of these instead.

    Returns:
        Tokens int64 [B, S].
    """
    if top_k == 1:
        return logits.argmax(-1).expand_as(uniform)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        largest, tokens = logits.topk(top_k)
        probability = largest.softmax(-1)
    elif top_p < 1:
        probability, tokens = _candidates(logits, top_p)
    else:
        probability, tokens = logits.softmax(-1), None
    kept = torch.full_like(probability[..., 0], probability.shape[-1], dtype=torch.long)
    if top_p < 1:
        keep = probability.cumsum(-1) - probability <= top_p
        probability, kept = probability * keep, keep.sum(-1)
    if values is not None:
        probability, tokens = _in_order(probability, tokens, kept, values)
    cumulative = probability.cumsum(-1)
    target = uniform.unsqueeze(-1) * cumulative[..., -1:]
    rank = (cumulative <= target).sum(-1)
    rank = torch.minimum(rank, kept - 1)  # a product that rounds up to the whole mass would point past the end
    return rank if tokens is None else tokens.expand(*rank.shape, -1).gather(-1, rank.unsqueeze(-1)).squeeze(-1)


def _in_order(probability: Tensor, tokens: Tensor | None, kept: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates by rising value, the `kept` first of each row before the others."""
    if tokens is None:
        tokens = torch.arange(len(values), device=values.device).expand_as(probability)
    out = torch.arange(probability.shape[-1], device=values.device) >= kept.unsqueeze(-1)
    order = values[tokens].masked_fill(out, torch.inf).argsort(dim=-1, stable=True)
    return probability.gather(-1, order), tokens.gather(-1, order)


def _candidates(logits: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities, in falling order, and tokens of enough candidates to hold the mass top_p in every row.

    How many a row is given hangs on that row alone: among equal logits topk's order hangs on their number.
    """
    log_total = logits.logsumexp(-1, keepdim=True)
    size = logits.shape[-1]
    count = min(FIRST_CANDIDATES, size) if logits.device.type == "cpu" else size  # elsewhere a look would synchronise
    values, tokens = logits.topk(count)
    probability = (values - log_total).exp()
    while count < size and bool((short := probability.sum(-1) <= top_p).any()):
        more = min(4 * count, size)
        probability, tokens = (F.pad(table, (0, more - count)) for table in (probability, tokens))
        values, tokens[short] = logits[short].topk(more)
        probability[short] = (values - log_total[short]).exp()
        count = more
    return probability, tokens
