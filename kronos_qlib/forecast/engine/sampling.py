"""Drawing tokens from logits: temperature, top-k, top-p, inverse transform."""

import operator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kronos_qlib.nn.model import S2Rotation

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


_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Philox4x32-10 (Salmon et al. 2011): four words of 32 random bits for each counter.

    Args:
        counter: four arrays of uint32 that broadcast to one shape.
        key: two words of 32 bits.

    Returns:
        Four uint32 arrays of the common shape.
    """
    a, b, c, d = np.broadcast_arrays(*(np.asarray(word, dtype=np.uint32) for word in counter))
    key0, key1 = np.array([key[0]], np.uint32), np.array([key[1]], np.uint32)  # arrays wrap around without a warning
    for _ in range(10):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            _high(second) ^ b ^ key0,
            second.astype(np.uint32),
            _high(first) ^ d ^ key1,
            first.astype(np.uint32),
        )
        key0, key1 = key0 + _WEYL[0], key1 + _WEYL[1]
    return a, b, c, d


def uniforms(seed: int, keys: np.ndarray, sample_count: int, steps: int, stratified: bool = False) -> np.ndarray:
    """Uniform numbers in [0, 1) for the draws of s1 and s2: float32 [steps, 2, B, sample_count].

    Args:
        seed: any integer, taken modulo 2^64.
        keys: one integer per row [B], taken modulo 2^64.
        stratified: at each draw, give each of a row's samples another of `sample_count` equal strata, in an order drawn
            anew (a Latin hypercube, McKay et al. 1979). Each number is still uniform, and independent of those of other
            draws and rows. Otherwise a number does not depend on how many samples there are.
    """
    words = np.asarray(keys, dtype=np.int64).view(np.uint64)[None, :, None]
    sample = np.arange(sample_count, dtype=np.uint32)[None, None, :]
    step = np.arange(steps, dtype=np.uint32)[:, None, None]
    seed = operator.index(seed) % (1 << 64)
    counter = ((words & _LOW).astype(np.uint32), _high(words), sample, step)
    drawn = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    numbers = np.stack([_unit(word) for word in drawn[:2]], axis=1)
    if not stratified:
        return numbers
    strata = np.stack(drawn[2:], axis=1).argsort(axis=-1, kind="stable").argsort(axis=-1)
    return np.minimum((strata + numbers.astype(np.float64)) / sample_count, 1 - 2.0**-24).astype(np.float32)


def _high(word: np.ndarray) -> np.ndarray:
    return (word >> _HALF).astype(np.uint32)


def _unit(word: np.ndarray) -> np.ndarray:
    return (word >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)  # the 24 bits that float32 holds exactly


Spread = Literal["independent", "stratified"]


@dataclass(frozen=True)
class Sampling:
    """How paths are drawn; see `draw` for temperature, top_k and top_p."""

    sample_count: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    s2_rotation: S2Rotation = "reference"
    sampling: Spread = "independent"

    def __post_init__(self) -> None:
        checks = {
            "sample_count": (self.sample_count >= 1, "at least 1"),
            "temperature": (self.temperature > 0, "above 0 (for the likeliest path use top_k=1)"),
            "top_k": (self.top_k >= 0, "0 (keep all) or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "sampling": (self.sampling in ("independent", "stratified"), "'independent' or 'stratified'"),
            "s2_rotation": (self.s2_rotation in ("reference", "aligned"), "'reference' or 'aligned'"),
        }
        for name, (fine, rule) in checks.items():
            if not fine:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {rule}")
