"""How tokens are drawn: the settings, the draw by inverse transform, and the random numbers it takes.

Each random number is a function of (seed, key, sample, step) alone, by a counter-based generator, so a draw depends
neither on the batch nor on the process it is made in.
"""

import math
import numbers
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kronos_qlib.extensions import load_extension, reason
from kronos_qlib.nn.model import S2Rotation

FIRST_CANDIDATES = 16  # of the largest logits are considered, then more where they do not hold the mass
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
SampleKind = Literal["independent", "stratified"]


class TokenFilter(Protocol):
    """A filter of a user's own, the setting `forecast.filter`: which tokens a draw is made from."""

    def __call__(self, probabilities: Tensor) -> Tensor:
        """Weigh tokens.

        Args:
            probabilities: float32 [B, R, V], after the temperature, each row summing to 1; on the network's device.

        Returns:
            Weights [B, R, V], 0 for what is not drawn, at least one above 0 in each row; a row by itself alone. They
            need not sum to 1.
        """


def load_filter(configuration: Mapping[str, Any]) -> TokenFilter:
    """Make a filter of the user's own, and try it on random distributions. Raises ValueError."""
    tokens: TokenFilter = load_extension(configuration)
    name = type(tokens).__name__
    given = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(0)).mul(2).softmax(-1)
    try:
        found, alone = tokens(given.clone()), tokens(given[1:2].clone())
    except Exception as error:
        raise ValueError(f"{name} fails: {reason(error)}") from error
    if not isinstance(found, Tensor) or found.shape != given.shape:
        raise ValueError(f"{name} should return a tensor of the shape {list(given.shape)} that it is given")
    if not (torch.isfinite(found).all() and (found >= 0).all() and (found.sum(-1) > 0).all()):
        raise ValueError(f"{name} should return weights of 0 and more, with one above 0 for each row")
    if not torch.allclose(found[1:2], alone, rtol=1e-5):
        raise ValueError(f"{name} weighs a row by the others of its batch too")
    return tokens


@dataclass(frozen=True)
class Sampling:
    """The settings by which sample paths are drawn; see `draw` for temperature, top_k and top_p.

    anchor: measure paths from the last bar as the tokenizer decodes it, not from the bar itself: the tokenizer's error
    there, which a path goes on with, is taken out of all columns, in normalised units. filter: the configuration of a
    `TokenFilter`, which takes the place of top_k and top_p; None: these.

    Raises:
        ValueError: a setting out of its range; the message names it.
    """

    sample_count: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    s2_rotation: S2Rotation = "reference"
    sampling: SampleKind = "independent"
    anchor: bool = False
    filter: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        checks = {
            "sample_count": (is_whole(self.sample_count) and self.sample_count >= 1, "a whole number, at least 1"),
            "temperature": (
                is_number(self.temperature) and self.temperature > 0,
                "a number above 0 (for the likeliest path use top_k=1)",
            ),
            "top_k": (is_whole(self.top_k) and self.top_k >= 0, "a whole number: 0 (keep all) or more"),
            "top_p": (is_number(self.top_p) and 0 < self.top_p <= 1, "a number in (0, 1]"),
            "seed": (is_whole(self.seed), "a whole number"),
            "sampling": (self.sampling in ("independent", "stratified"), "'independent' or 'stratified'"),
            "s2_rotation": (self.s2_rotation in ("reference", "aligned"), "'reference' or 'aligned'"),
            "anchor": (isinstance(self.anchor, bool), "true or false"),
            "filter": (self.filter is None or self.top_k == 0 and self.top_p == 1, "null, or top_k 0 and top_p 1"),
        }
        for name, (valid, rule) in checks.items():
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {rule}")


def is_whole(value: object) -> bool:
    """Return whether a value is a whole number, of Python or numpy; true and false are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether a value is a finite number, of Python or numpy; true and false are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def draw(
    logits: Tensor,
    uniform: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    rank: Tensor | None = None,
    tokens_filter: TokenFilter | None = None,
) -> Tensor:
    """Draw one token per uniform number by inverse transform.

    Top-k keeps the k largest logits; top-p then keeps the smallest prefix of the sorted distribution whose mass
    exceeds p, always at least one. The transform goes over the tokens kept by their rank, not by their probability: two
    tokens of nearly equal probability would change places by rounding, and uniform numbers between them other tokens.

    Args:
        logits: float32 [B, R, V]; R is 1 where all S draws of a row share one distribution, else S.
        uniform: float32 [B, S] in [0, 1).
        temperature: > 0, divides the logits.
        top_k: 0 keeps all.
        top_p: in (0, 1]; 1 keeps all.
        rank: int64 [V], the place of each token in that order; by default the token itself.
        tokens_filter: weighs the probabilities, where top_k and top_p keep all.

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
        tokens, probability = rank.argsort(), logits.softmax(-1)
        if tokens_filter is not None:
            return tokens[_invert_filtered(tokens_filter(probability)[..., tokens], uniform)]
        return tokens[_invert(probability[..., tokens], uniform)]
    if top_p < 1:
        probability = probability * (probability.cumsum(-1) - probability <= top_p)
    order = rank[tokens].masked_fill_(probability == 0, size).argsort(dim=-1, stable=True)
    drawn = _invert(probability.gather(-1, order), uniform)
    return tokens.gather(-1, order).expand(*drawn.shape, -1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1)


def _invert(probability: Tensor, uniform: Tensor) -> Tensor:
    """Find the places of uniform numbers [B, S] in rows of probabilities [B, R, K], zeros at the end only."""
    cumulative = probability.cumsum(-1)
    drawn = (cumulative <= uniform.unsqueeze(-1) * cumulative[..., -1:]).sum(-1)
    # A product that rounds up to the whole mass would point past the end.
    return torch.minimum(drawn, (probability > 0).sum(-1) - 1)


def _invert_filtered(weights: Tensor, uniform: Tensor) -> Tensor:
    """Find the places of uniform numbers [B, S] in rows of weights [B, R, V], zeros anywhere: those are never drawn."""
    kept = weights > 0
    order = kept.logical_not().to(torch.int8).argsort(dim=-1, stable=True)  # what is kept first, in its order
    drawn = _invert(weights.gather(-1, order), uniform)
    return order.expand(*drawn.shape, -1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1)


def _candidates(logits: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return probabilities, in falling order, and tokens of enough candidates to hold the mass top_p in every row.

    How many candidates a row gets depends on that row alone: topk's order of equal logits depends on their number.
    """
    log_total = logits.logsumexp(-1, keepdim=True)
    size = logits.shape[-1]
    # Elsewhere than on a CPU, looking at values waits for the device.
    count = min(FIRST_CANDIDATES, size) if logits.device.type == "cpu" else size
    largest, tokens = logits.topk(count)
    probability = (largest - log_total).exp()
    while count < size and bool((short := probability.sum(-1) <= top_p).any()):
        more = min(4 * count, size)
        probability, tokens = (F.pad(table, (0, more - count)) for table in (probability, tokens))
        largest, tokens[short] = logits[short].topk(more)
        probability[short] = (largest - log_total[short]).exp()
        count = more
    return probability, tokens


def philox(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Compute four words of 32 random bits for each counter, by Philox4x32-10 (Salmon et al. 2011).

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
    """Draw the uniform numbers in [0, 1) for s1 and s2 of every step: float32 [steps, 2, B, sample_count].

    Args:
        seed: any integer, taken modulo 2^64.
        keys: one integer per row [B], taken modulo 2^64.
        stratified: at each draw, give each of a row's samples a different one of `sample_count` equal strata, in a new
            random order (a Latin hypercube, McKay et al. 1979). Each number is still uniform, and independent of those
            of other draws and rows. Without it a number does not depend on `sample_count`.
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
