"""Drawing tokens from logits: temperature, top-k, top-p, inverse transform."""

import torch
import torch.nn.functional as F
from torch import Tensor

FIRST_CANDIDATES = 16  # how many of the largest logits are looked at before more are asked for


def draw(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float, rank: Tensor | None = None
) -> Tensor:
    """Draw one token per uniform number by inverse transform.

    Top-k keeps the k largest logits; top-p then keeps the smallest prefix of the sorted distribution whose mass
    exceeds p, always at least one. The transform goes over the tokens kept in an order of their own, not by their
    probabilities: there two nearly equal ones would change places by a rounding, and with them whole strata of numbers.

    Args:
        logits: float32 [B, R, V]; R is 1 where all S draws of a row share one distribution, else S.
        uniform: float32 [B, S] in [0, 1).
        temperature: > 0, divides the logits.
        top_k: 0 keeps all.
        top_p: in (0, 1]; 1 keeps all.
        rank: int64 [V], the place of each token in the order; by default a token's number.

    Returns:
        Tokens int64 [B, S].
    """
    if top_k == 1:
        return logits.argmax(-1).expand_as(uniform)
    logits, size = logits / temperature, logits.shape[-1]
    rank = torch.arange(size, device=logits.device) if rank is None else rank
    if 0 < top_k < size:
        largest, tokens = logits.topk(top_k)
        probability = largest.softmax(-1)
    elif top_p < 1:
        probability, tokens = _candidates(logits, top_p)
    else:
        tokens = rank.argsort()
        return tokens[_inverse(logits.softmax(-1)[..., tokens], uniform)]
    if top_p < 1:
        probability = probability * (probability.cumsum(-1) - probability <= top_p)
    order = rank[tokens].masked_fill_(probability == 0, size).argsort(dim=-1, stable=True)
    drawn = _inverse(probability.gather(-1, order), uniform)
    return tokens.gather(-1, order).expand(*drawn.shape, -1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1)


def _inverse(probability: Tensor, uniform: Tensor) -> Tensor:
    """The places of numbers [B, S] in rows of probabilities [B, R, K] of any sum, with zeros at the end only."""
    cumulative = probability.cumsum(-1)
    drawn = (cumulative <= uniform.unsqueeze(-1) * cumulative[..., -1:]).sum(-1)
    # A product that rounds up to the whole mass would point past the end.
    return torch.minimum(drawn, (probability > 0).sum(-1) - 1)


def _candidates(logits: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities, in falling order, and tokens of enough candidates to hold the mass top_p in every row.

    How many a row is given hangs on that row alone: among equal logits topk's order hangs on their number.
    """
    log_total = logits.logsumexp(-1, keepdim=True)
    size = logits.shape[-1]
    count = min(FIRST_CANDIDATES, size) if logits.device.type == "cpu" else size  # elsewhere a look would synchronise
    largest, tokens = logits.topk(count)
    probability = (largest - log_total).exp()
    while count < size and bool((short := probability.sum(-1) <= top_p).any()):
        more = min(4 * count, size)
        probability, tokens = (F.pad(table, (0, more - count)) for table in (probability, tokens))
        largest, tokens[short] = logits[short].topk(more)
        probability[short] = (largest - log_total[short]).exp()
        count = more
    return probability, tokens
