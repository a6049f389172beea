"""Binary spherical quantization (Zhao et al. 2024): a unit vector becomes the signs of its coordinates."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MeanCode = Callable[[Tensor], Tensor]
"""Gives the mean code [bits] of a whole batch for that of one of its micro-batches."""


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
