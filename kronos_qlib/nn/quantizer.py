"""Binary spherical quantization (Zhao et al. 2024): a unit vector becomes the signs of its coordinates."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronos_qlib.extensions import load_extension, reason

MeanCode = Callable[[Tensor], Tensor]
"""Gives the mean code [bits] of a whole batch for that of one of its micro-batches."""


class Quantizer(Protocol):
    """A quantizer of a user's own, the argument `quantizer` of a KronosTokenizer as a configuration; a torch module.

    Its codes and values depend on their own position alone, and what it knows it learns by gradients: it keeps no
    running state, which threads and processes would not share.

    It is made with s1_bits and s2_bits beside its own arguments. A latent has W coordinates, the first of which make
    the coarse code, the others the fine one, each by itself.

    widths: how many coordinates make the coarse code, and how many the fine one; W in all.
    """

    widths: tuple[int, int]

    def __call__(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize a latent [..., W].

        Returns:
            Values [..., W], through which a gradient reaches the latent, and a loss, a scalar: a mean over positions.
        """

    def codes(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids s1 below 2^s1_bits and s2 below 2^s2_bits of a latent [..., W]: int64 [...] each."""

    def values(self, s1: Tensor, s2: Tensor) -> Tensor:
        """Return the values [..., W] of ids [...], those that a latent of these codes is quantized to."""


def load_quantizer(configuration: Mapping[str, Any], s1_bits: int, s2_bits: int) -> nn.Module:
    """Make a quantizer of the user's own, and try it on random latents. Raises ValueError."""
    made = load_extension(configuration, s1_bits=s1_bits, s2_bits=s2_bits)
    name = type(made).__name__
    if not isinstance(made, nn.Module) or not isinstance(getattr(made, "widths", None), tuple) or len(made.widths) != 2:
        raise ValueError(f"{name} should be a torch module with widths, a pair of whole numbers")
    random, width = torch.Generator().manual_seed(0), sum(made.widths)
    latent = torch.randn(3, 7, width, generator=random, requires_grad=True)
    try:
        values, loss = made(latent)
        s1, s2 = made.codes(latent)
        back, coarse, fine = made.values(s1, s2), made.values(s1, s2.flip(0)), made.values(s1.flip(0), s2)
        alone = made.codes(latent[:1])
        before = {key: value.clone() for key, value in made.state_dict().items()}
        made.train()(latent)
        kept = all(torch.equal(value, made.state_dict()[key]) for key, value in before.items())
    except Exception as error:
        raise ValueError(f"{name} fails: {reason(error)}") from error
    if values.shape != latent.shape or back.shape != latent.shape or loss.shape != ():
        raise ValueError(f"{name} should return values of the shape {list(latent.shape)} and a scalar loss")
    if not values.requires_grad:
        raise ValueError(f"{name} returns values through which no gradient can reach the latent")
    for ids, bits in ((s1, s1_bits), (s2, s2_bits)):
        if ids.dtype != torch.long or ids.shape != (3, 7) or ids.min() < 0 or ids.max() >= 2**bits:
            raise ValueError(f"{name} should return codes of 0 … {2**bits - 1}, int64 [3, 7]")
    if not torch.allclose(values, back, atol=1e-5):
        raise ValueError(f"{name} quantizes a latent to other values than those of its codes")
    width = made.widths[0]
    if not torch.equal(back[..., :width], coarse[..., :width]) or not torch.equal(back[..., width:], fine[..., width:]):
        raise ValueError(f"{name} makes the values of one code of the other code too")
    if not torch.equal(alone[0], s1[:1]) or not torch.equal(alone[1], s2[:1]):
        raise ValueError(f"{name} quantizes a window by the others of its batch too")
    if not kept:
        raise ValueError(f"{name} changes its own state as it quantizes; processes would not share that")
    return made


class BinarySphericalQuantizer(nn.Module):
    """Quantizes unit vectors to the signs of their coordinates, with a straight-through gradient and the BSQ loss.

    group_size only has to divide the bits: the paper's group codebook does not enter the loss, but its buffer is in
    published checkpoints.
    """

    basis: Tensor
    group_basis: Tensor

    def __init__(self, bits: int, beta: float, gamma0: float, gamma: float, zeta: float, group_size: int) -> None:
        super().__init__()
        if bits % group_size:
            raise ValueError(f"KronosTokenizer: group_size ({group_size}) must divide s1_bits + s2_bits ({bits})")
        self.bits, self.beta, self.gamma0, self.gamma, self.zeta = bits, beta, gamma0, gamma, zeta
        self.register_buffer("basis", 2 ** torch.arange(bits - 1, -1, -1))
        self.register_buffer("group_basis", 2 ** torch.arange(group_size - 1, -1, -1))

    def forward(self, z: Tensor, mean_code: MeanCode | None = None) -> tuple[Tensor, Tensor]:
        """Quantize z [..., bits], already of unit length: ±1/sqrt(bits) [..., bits] and the BSQ loss (scalar).

        The loss is beta · commitment + zeta · (gamma0 · entropy per position − gamma · entropy of the mean code). The
        last term is not a mean over windows, so where z is a micro-batch, `mean_code` gives the mean of its batch.
        """
        signs = torch.where(z > 0, 1.0, -1.0).to(z.dtype)
        quantized = (z + (signs - z).detach()) * self.bits**-0.5  # the gradient passes the scale too
        commitment = (quantized.detach() - z).square().sum(-1).mean()
        p = self.probabilities(z)
        h_sample = _binary_entropy(p).sum(-1).mean()
        mean = p.flatten(0, -2).mean(0)
        h_code = _binary_entropy(mean if mean_code is None else mean_code(mean)).sum()
        loss = self.beta * commitment + self.zeta * (self.gamma0 * h_sample - self.gamma * h_code)
        return quantized, loss

    def probabilities(self, z: Tensor) -> Tensor:
        """Return the probability that each bit of z [..., bits], of unit length, is 0, for the entropies: float32."""
        return torch.sigmoid(-4 * z.float() / self.bits**0.5)


class SignQuantizer(nn.Module):
    """Holds the quantizer under its name in published state dicts, `tokenizer.bsq`."""

    def __init__(self, bits: int, beta: float, gamma0: float, gamma: float, zeta: float, group_size: int) -> None:
        super().__init__()
        self.bsq = BinarySphericalQuantizer(bits, beta, gamma0, gamma, zeta, group_size)

    def forward(self, z: Tensor, mean_code: MeanCode | None = None) -> tuple[Tensor, Tensor]:
        """Normalise z [..., bits] to unit length and quantize it."""
        return self.bsq(F.normalize(z, dim=-1), mean_code)

    def mean_code(self, z: Tensor) -> Tensor:
        """Average the bits' probabilities over all positions of z [..., bits], normalised to unit length: [bits]."""
        return self.bsq.probabilities(F.normalize(z, dim=-1)).flatten(0, -2).mean(0)


def signs_to_ids(signs: Tensor) -> Tensor:
    """Pack signs [..., bits] into ids [...] (int64): bit k, of value 2^k, is 1 where coordinate k is not negative."""
    values = 2 ** torch.arange(signs.shape[-1], device=signs.device)
    return ((signs >= 0).long() * values).sum(-1)


def ids_to_signs(ids: Tensor, bits: int) -> Tensor:
    """Unpack ids [...] into signs ±1.0 [..., bits] (float32), the inverse of `signs_to_ids`."""
    shifts = torch.arange(bits, device=ids.device)
    return ((ids.unsqueeze(-1) >> shifts) & 1).float() * 2 - 1


def _binary_entropy(p: Tensor, eps: float = 1e-8) -> Tensor:
    """Return the entropy of (p, 1 − p) in nats, elementwise."""
    return -(p * torch.log(p + eps) + (1 - p) * torch.log(1 - p + eps))
