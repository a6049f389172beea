"""KronosTokenizer: from a bar to two short bit codes (ids s1 and s2) and back."""

from collections.abc import Sequence
from typing import cast

import torch
from pydantic import FiniteFloat
from torch import Tensor, nn

from kronos_qlib.nn import zoo
from kronos_qlib.nn.checkpoint import Bits, DropoutRate, HubModule, Layers, Width
from kronos_qlib.nn.layers import Block, check_heads, initialise
from kronos_qlib.nn.quantizer import MeanCode, SignQuantizer, ids_to_signs, signs_to_ids


class KronosTokenizer(HubModule):
    """Causal transformer autoencoder around a binary spherical quantizer (Shi et al. 2025, arXiv 2508.02739).

    The first s1_bits of a code are its coarse part (id s1), the rest its fine part (id s2). n_enc_layers and
    n_dec_layers count one more than the blocks that exist, as in the published configurations.
    """

    entries = zoo.TOKENIZERS

    def __init__(
        self,
        d_in: Width,
        d_model: Width,
        n_heads: Width,
        ff_dim: Width,
        n_enc_layers: Layers,
        n_dec_layers: Layers,
        ffn_dropout_p: DropoutRate,
        attn_dropout_p: DropoutRate,
        resid_dropout_p: DropoutRate,
        s1_bits: Bits,
        s2_bits: Bits,
        beta: FiniteFloat,
        gamma0: FiniteFloat,
        gamma: FiniteFloat,
        zeta: FiniteFloat,
        group_size: Width,
    ) -> None:
        super().__init__()
        check_heads("KronosTokenizer", d_model, n_heads)
        self.d_in, self.s1_bits, self.s2_bits = d_in, s1_bits, s2_bits
        self.bits = s1_bits + s2_bits
        dropouts = (ffn_dropout_p, attn_dropout_p, resid_dropout_p)
        self.embed = nn.Linear(d_in, d_model)
        self.head = nn.Linear(d_model, d_in)
        self.encoder = nn.ModuleList(Block(d_model, n_heads, ff_dim, *dropouts) for _ in range(n_enc_layers - 1))
        self.decoder = nn.ModuleList(Block(d_model, n_heads, ff_dim, *dropouts) for _ in range(n_dec_layers - 1))
        self.quant_embed = nn.Linear(d_model, self.bits)
        self.post_quant_embed_pre = nn.Linear(s1_bits, d_model)
        self.post_quant_embed = nn.Linear(self.bits, d_model)
        self.tokenizer = SignQuantizer(self.bits, beta, gamma0, gamma, zeta, group_size)
        initialise(self, d_model)

    def forward(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
        """Reconstruct normalised bars x [B, T, D].

        Returns:
            ((recon_s1, recon), bsq_loss, quantized, ids): reconstructions [B, T, D] from the coarse bits alone and
            from all bits, the BSQ loss (scalar), ±1/sqrt(bits) [B, T, bits], ids over all bits [B, T].
        """
        return self.reconstruct(self.latent(x))

    def latent(self, x: Tensor) -> Tensor:
        """Encode normalised bars x [B, T, D] to what is then quantized: [B, T, bits], not yet of unit length."""
        h = self.embed(x.to(self.embed.weight.dtype))
        for block in self.encoder:
            h = block(h)
        return self.quant_embed(h)

    def reconstruct(
        self, latent: Tensor, mean_code: MeanCode | None = None
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
        """Do the second half of `forward`; `mean_code` gives the batch's mean code if the latent is a micro-batch."""
        quantized, bsq_loss = self.tokenizer(latent, mean_code)
        coarse, full = self.post_quant_embed_pre(quantized[..., : self.s1_bits]), self.post_quant_embed(quantized)
        recon_s1, recon = self._decode(torch.cat([coarse, full])).chunk(2)  # one pass with twice the rows is faster
        return (recon_s1, recon), bsq_loss, quantized, signs_to_ids(quantized)

    def mean_code(self, latent: Tensor) -> Tensor:
        """Return the mean code of a latent [B, T, bits], as the BSQ loss takes it: [bits], float32."""
        return self.tokenizer.mean_code(latent)

    def encode(self, x: Tensor, half: bool = False) -> Tensor | list[Tensor]:
        """Encode normalised bars x [B, T, D] to ids over all bits [B, T], or with half to the list [s1, s2] of them."""
        signs = torch.where(self.latent(x) > 0, 1.0, -1.0)
        if half:
            return [signs_to_ids(signs[..., : self.s1_bits]), signs_to_ids(signs[..., self.s1_bits :])]
        return signs_to_ids(signs)

    def decode(self, ids: Tensor | Sequence[Tensor], half: bool = False) -> Tensor:
        """Decode ids, in either form of `encode`, to normalised bars [B, T, D]; bar i depends on ids up to i only."""
        if half:
            s1, s2 = ids
            signs = torch.cat([ids_to_signs(s1, self.s1_bits), ids_to_signs(s2, self.s2_bits)], dim=-1)
        else:
            signs = ids_to_signs(cast(Tensor, ids), self.bits)
        return self._decode(self.post_quant_embed(signs * self.bits**-0.5))

    def _decode(self, h: Tensor) -> Tensor:
        for block in self.decoder:
            h = block(h)
        return self.head(h)
