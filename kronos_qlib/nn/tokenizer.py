"""KronosTokenizer: from a bar to two short bit codes (ids s1 and s2) and back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from pydantic import FiniteFloat
from torch import Tensor, nn
from typing_extensions import Self

from kronos_qlib.extensions import identify, identity_of
from kronos_qlib.nn import zoo
from kronos_qlib.nn.checkpoint import Bits, DropoutRate, HubModule, Layers, Width
from kronos_qlib.nn.layers import Block, check_heads, initialise
from kronos_qlib.nn.quantizer import MeanCode, SignQuantizer, ids_to_signs, load_quantizer, signs_to_ids
from kronos_qlib.settings import check_configuration

KNOWN_COLUMNS = 6  # of a bar that every tokenizer has; further ones are products of their own


class KronosTokenizer(HubModule):
    """Causal transformer autoencoder around a binary spherical quantizer (Shi et al. 2025, arXiv 2508.02739).

    The first s1_bits of a code are its coarse part (id s1), the rest its fine part (id s2). n_enc_layers and
    n_dec_layers count one more than the blocks that exist, as in the published configurations. quantizer is the
    configuration of a `Quantizer` of the user's own; None: the binary spherical one, of beta … group_size. columns are
    the names of those beyond six that it was trained on; None: none, or not trained.
    """

    code_arguments = ("quantizer",)

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
        quantizer: Any = None,
        columns: Any = None,
    ) -> None:
        super().__init__()
        check_heads("KronosTokenizer", d_model, n_heads)
        if columns is not None and (not isinstance(columns, list) or len(columns) != d_in - KNOWN_COLUMNS):
            raise ValueError(
                f"KronosTokenizer: columns should name the {d_in - KNOWN_COLUMNS} beyond six, not {columns!r}"
            )
        self.own_quantizer = None if quantizer is None else identify(_configured(quantizer))
        if self.own_quantizer is not None:
            self.config["quantizer"] = identity_of(self.own_quantizer)  # without a path: see `from_pretrained`
        self.d_in, self.s1_bits, self.s2_bits = d_in, s1_bits, s2_bits
        self.bits = s1_bits + s2_bits
        dropouts = (ffn_dropout_p, attn_dropout_p, resid_dropout_p)
        self.embed = nn.Linear(d_in, d_model)
        self.head = nn.Linear(d_model, d_in)
        self.encoder = nn.ModuleList(Block(d_model, n_heads, ff_dim, *dropouts) for _ in range(n_enc_layers - 1))
        self.decoder = nn.ModuleList(Block(d_model, n_heads, ff_dim, *dropouts) for _ in range(n_dec_layers - 1))
        self.tokenizer: nn.Module = (
            SignQuantizer(self.bits, beta, gamma0, gamma, zeta, group_size)
            if self.own_quantizer is None
            else load_quantizer(self.own_quantizer, s1_bits, s2_bits)
        )
        coarse, fine = (s1_bits, s2_bits) if self.own_quantizer is None else self.tokenizer.widths
        self.quant_embed = nn.Linear(d_model, coarse + fine)
        self.post_quant_embed_pre = nn.Linear(coarse, d_model)
        self.post_quant_embed = nn.Linear(coarse + fine, d_model)
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
        h = embed_columns(x.to(self.embed.weight.dtype), self.embed.weight, self.embed.bias)
        for block in self.encoder:
            h = block(h)
        return self.quant_embed(h)

    def reconstruct(
        self, latent: Tensor, mean_code: MeanCode | None = None
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
        """Do the second half of `forward`; `mean_code` gives the batch's mean code if the latent is a micro-batch."""
        own = self.own_quantizer is not None
        quantized, bsq_loss = self.tokenizer(latent) if own else self.tokenizer(latent, mean_code)
        coarse_width = self.post_quant_embed_pre.in_features
        coarse, full = self.post_quant_embed_pre(quantized[..., :coarse_width]), self.post_quant_embed(quantized)
        recon_s1, recon = self._decode(torch.cat([coarse, full])).chunk(2)  # one pass with twice the rows is faster
        ids = self._joined(*self.codes(latent)) if own else signs_to_ids(quantized)
        return (recon_s1, recon), bsq_loss, quantized, ids

    def mean_code(self, latent: Tensor) -> Tensor:
        """Return the mean code of a latent [B, T, bits], as the BSQ loss takes it: [bits], float32."""
        return self.tokenizer.mean_code(latent)

    def encode(self, x: Tensor, half: bool = False) -> Tensor | list[Tensor]:
        """Encode normalised bars x [B, T, D] to ids over all bits [B, T], or with half to the list [s1, s2] of them."""
        s1, s2 = self.codes(self.latent(x))
        return [s1, s2] if half else self._joined(s1, s2)

    def decode(self, ids: Tensor | Sequence[Tensor], half: bool = False) -> Tensor:
        """Decode ids, in either form of `encode`, to normalised bars [B, T, D]; bar i depends on ids up to i only."""
        if half:
            s1, s2 = ids
        else:
            joined = cast(Tensor, ids)
            s1, s2 = joined & (2**self.s1_bits - 1), joined >> self.s1_bits
        return self._decode(self.post_quant_embed(self.values(s1, s2)))

    def codes(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids s1 and s2 [B, T] of a latent [B, T, W]."""
        if self.own_quantizer is not None:
            return self.tokenizer.codes(latent)
        signs = torch.where(latent > 0, 1.0, -1.0)
        return signs_to_ids(signs[..., : self.s1_bits]), signs_to_ids(signs[..., self.s1_bits :])

    def values(self, s1: Tensor, s2: Tensor) -> Tensor:
        """Return the quantized values [..., W] of ids s1 and s2 [...]."""
        if self.own_quantizer is not None:
            return self.tokenizer.values(s1, s2)
        signs = torch.cat([ids_to_signs(s1, self.s1_bits), ids_to_signs(s2, self.s2_bits)], dim=-1)
        return signs * self.bits**-0.5

    def _joined(self, s1: Tensor, s2: Tensor) -> Tensor:
        """Return the ids over all bits of ids s1 and s2."""
        return s1 + (s2 << self.s1_bits)

    @classmethod
    def _check_sizes(cls, config: dict[str, Any], config_path: Path, weights_path: Path) -> None:
        own = config.get("quantizer") is not None  # whose bits are no sizes of tensors
        checked = {key: value for key, value in config.items() if not (own and key.endswith("_bits"))}
        super()._check_sizes(checked, config_path, weights_path)

    def __getstate__(self) -> dict[str, Any]:
        """Leave a quantizer of the user's own out of a pickle: its class has no name in another process."""
        state = self.__dict__.copy()
        if self.own_quantizer is not None:
            state["_modules"] = {name: each for name, each in self._modules.items() if name != "tokenizer"}
            state["_own_state"] = self.tokenizer.state_dict()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the quantizer of the user's own anew, by its configuration."""
        own = state.pop("_own_state", None)
        state.setdefault("own_quantizer", None)  # of networks pickled before there was a choice
        super().__setstate__(state)
        if own is not None and self.own_quantizer is not None:
            self.tokenizer = load_quantizer(self.own_quantizer, self.s1_bits, self.s2_bits)
            self.tokenizer.load_state_dict(own)

    def _decode(self, h: Tensor) -> Tensor:
        for block in self.decoder:
            h = block(h)
        return project_columns(h, self.head.weight, self.head.bias)

    def widened(self, d_in: int) -> Self:
        """Return a copy that takes and returns bars of `d_in` columns, of which this one has the first.

        The weights of the new columns are zero: until it is trained they change no code, and are decoded to their mean.

        Raises:
            ValueError: it would have fewer columns.
        """
        if d_in < self.d_in:
            raise ValueError(f"d_in ({d_in}) is below the {self.d_in} columns that the weights are of")
        tensors, more = self.state_dict(), d_in - self.d_in
        tensors["embed.weight"] = F.pad(tensors["embed.weight"], (0, more))
        tensors["head.weight"] = F.pad(tensors["head.weight"], (0, 0, 0, more))
        tensors["head.bias"] = F.pad(tensors["head.bias"], (0, more))
        own = {"d_in": d_in, "quantizer": self.own_quantizer, "columns": None if more else self.config.get("columns")}
        wide = type(self)(**self.config | own)
        wide.load_state_dict(tensors)
        wide.source = self.source
        return wide.train(self.training)


def _configured(quantizer: Any) -> Mapping[str, Any]:
    """Check that a quantizer is given as a configuration. Raises ValueError."""
    if not isinstance(quantizer, Mapping):
        raise ValueError("KronosTokenizer: quantizer should be a configuration with the keys class and module_path")
    return cast(Mapping[str, Any], check_configuration(quantizer))


def embed_columns(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply bars x [..., D] by a weight [d, D]: [..., d].

    The columns beyond the six are a product of their own, so that where their weights are zero the rest is the same bit
    by bit.
    """
    if weight.shape[1] <= KNOWN_COLUMNS:
        return F.linear(x, weight, bias)
    (known, more), (first, rest) = (
        (each[..., :KNOWN_COLUMNS].contiguous(), each[..., KNOWN_COLUMNS:].contiguous()) for each in (x, weight)
    )
    return F.linear(known, first, bias) + F.linear(more, rest)


def project_columns(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply hidden states h [..., d] by a weight [D, d]: bars [..., D]; see `embed_columns`."""
    if len(weight) <= KNOWN_COLUMNS:
        return F.linear(h, weight, bias)
    parts = slice(KNOWN_COLUMNS), slice(KNOWN_COLUMNS, None)
    products = [F.linear(h, weight[rows], None if bias is None else bias[rows]) for rows in parts]
    return torch.cat(products, dim=-1)
