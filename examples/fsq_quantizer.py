"""A quantizer of one's own: finite scalar quantization (Mentzer et al. 2023, arXiv 2309.15505) with four levels."""

import torch
from torch import Tensor, nn


class FiniteScalarQuantizer(nn.Module):
    """Bound each coordinate, and round it to one of four levels: two bits of a code. It needs no loss of its own.

    In a workflow, task.model.kwargs, a new tokenizer; s1_bits and s2_bits, which are even, come from there:

        tokenizer:
          d_in: 6
          …
          quantizer: {class: FiniteScalarQuantizer, module_path: examples/fsq_quantizer.py}
    """

    def __init__(self, s1_bits: int, s2_bits: int) -> None:
        super().__init__()
        if s1_bits % 2 or s2_bits % 2:
            raise ValueError(f"four levels take two bits each; s1_bits is {s1_bits} and s2_bits {s2_bits}")
        self.widths = s1_bits // 2, s2_bits // 2

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize a latent [..., W]: values -1, -1/3, 1/3 or 1, with a straight-through gradient; and a loss of 0."""
        bounded = torch.tanh(latent)
        values = self._digits(latent).to(latent.dtype) / 1.5 - 1
        return bounded + (values - bounded).detach(), latent.new_zeros(())

    def codes(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids s1 and s2 [...] of a latent [..., W]: its coordinates are their digits in base four."""
        coarse, fine = self._digits(latent).split(self.widths, dim=-1)
        s1, s2 = ((part * 4 ** torch.arange(part.shape[-1], device=part.device)).sum(-1) for part in (coarse, fine))
        return s1, s2

    def values(self, s1: Tensor, s2: Tensor) -> Tensor:
        """Return the values [..., W] of ids s1 and s2 [...]."""
        parts = [
            (ids.unsqueeze(-1) >> 2 * torch.arange(width, device=ids.device)) & 3
            for ids, width in zip((s1, s2), self.widths)
        ]
        return torch.cat(parts, dim=-1) / 1.5 - 1

    def _digits(self, latent: Tensor) -> Tensor:
        return ((torch.tanh(latent) + 1) * 2).floor().clamp(0, 3).long()
