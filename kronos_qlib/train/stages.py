"""The two stages of fine-tuning: what each minimises and how it is judged."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kronos_qlib.nn import Kronos, KronosTokenizer
from kronos_qlib.nn.checkpoint import HubModule
from kronos_qlib.nn.quantizer import MeanCode
from kronos_qlib.train.settings import PredictorSettings, StageSettings, TokenizerSettings


@dataclass(frozen=True)
class Examples:
    """What a stage learns from, T bars of each of B windows.

    x: normalised bars float32 `[B, T, d_in]`, or codes: ids s1 and s2, `[B, T, 2]`; one of them is None.
    stamp: `[B, T, 5]`. chance: uniform numbers float32 `[B, T - 1]` for what is drawn at random, None in validation.
    """

    x: Tensor | None
    codes: Tensor | None
    stamp: Tensor
    chance: Tensor | None

    def to(self, device: torch.device) -> "Examples":
        """The same on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Examples":
        """The same in memory that a GPU can fetch while it computes."""
        return self._each(Tensor.pin_memory)

    def part(self, rows: slice) -> "Examples":
        """Some of the windows, in memory of their own: where rows begin in memory decides how products are rounded."""
        return self._each(lambda tensor: tensor[rows].clone())

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Examples":
        return Examples(*(None if tensor is None else change(tensor) for tensor in vars(self).values()))


class Stage(Protocol):
    """What the loop needs to know of a stage.

    A loss that is no mean over windows is reached in two halves: `latent` of each part of a batch, `mean_code` of the
    latent (of `code_length` numbers), from which that of the batch follows, and `loss` with both. For other losses
    `latent` is None and the rest is not there.
    """

    name: str
    network: HubModule
    settings: StageSettings
    latent: Callable[[Examples], Tensor] | None

    def loss(self, examples: Examples) -> Tensor: ...

    def judge(self, examples: Examples) -> dict[str, Tensor]: ...


class TokenizerStage:
    """Stage 1: reconstruct normalised bars from their codes."""

    name = "tokenizer"

    def __init__(self, tokenizer: KronosTokenizer, settings: TokenizerSettings) -> None:
        self.network, self.settings, self.code_length = tokenizer, settings, tokenizer.bits

    def latent(self, examples: Examples) -> Tensor:
        """The first half of the loss: [B, T, bits]."""
        return self.network.latent(examples.x)

    def mean_code(self, latent: Tensor) -> Tensor:
        """What the loss of a batch needs to know of all its parts: [bits]."""
        return self.network.mean_code(latent)

    def loss(self, examples: Examples, latent: Tensor | None = None, mean_code: MeanCode | None = None) -> Tensor:
        """Training loss: (MSE coarse + MSE full + BSQ loss) / 2."""
        latent = self.latent(examples) if latent is None else latent
        (recon_s1, recon), bsq_loss, _, _ = self.network.reconstruct(latent, mean_code)
        return (F.mse_loss(recon_s1.float(), examples.x) + F.mse_loss(recon.float(), examples.x) + bsq_loss) / 2

    def judge(self, examples: Examples) -> dict[str, Tensor]:
        """Validation figures of a batch, the deciding one first: mean squared error from all bits, from coarse bits."""
        x, ((recon_s1, recon), _, _, _) = examples.x, self.network(examples.x)
        return {"val_loss": F.mse_loss(recon.float(), x), "val_mse_s1": F.mse_loss(recon_s1.float(), x)}


class PredictorStage:
    """Stage 2: predict the codes of the next bar. The tokenizer is frozen."""

    name = "predictor"
    latent = None  # its loss is a mean over windows

    def __init__(self, model: Kronos, tokenizer: KronosTokenizer, settings: PredictorSettings) -> None:
        self.network, self.tokenizer, self.settings = model, tokenizer.eval(), settings

    def loss(self, examples: Examples) -> Tensor:
        """Training loss: mean cross-entropy of s1 and s2, in nats."""
        return self._losses(examples, self.settings.s1_query == "teacher_forced")[0]

    def judge(self, examples: Examples) -> dict[str, Tensor]:
        """Validation figures of a batch, the deciding one first: cross-entropies in nats, causal, true s1 as query."""
        loss, ce_s1, ce_s2 = self._losses(examples, teacher_forced=True)
        return {"val_loss": loss, "val_ce_s1": ce_s1, "val_ce_s2": ce_s2}

    def _losses(self, examples: Examples, teacher_forced: bool) -> tuple[Tensor, Tensor, Tensor]:
        s1, s2 = self._codes(examples)
        s1_logits, context = self.network.decode_s1(s1[:, :-1], s2[:, :-1], examples.stamp[:, :-1])
        query = s1[:, 1:] if teacher_forced else draw(s1_logits.detach(), examples.chance)
        s2_logits = self.network.decode_s2(context, query)
        return self.network.head.compute_loss(s1_logits, s2_logits, s1[:, 1:], s2[:, 1:])

    @torch.no_grad()
    def _codes(self, examples: Examples) -> tuple[Tensor, Tensor]:
        if examples.codes is not None:
            return examples.codes[..., 0].long(), examples.codes[..., 1].long()
        s1, s2 = self.tokenizer.encode(examples.x, half=True)
        return s1, s2


def draw(logits: Tensor, chance: Tensor) -> Tensor:
    """One code per position from its distribution: ids [B, T] from logits [B, T, V] and uniform numbers [B, T].

    The numbers come from outside, so that a draw depends neither on the other windows nor on the process.
    """
    mass = logits.float().softmax(-1).cumsum(-1)
    target = chance.unsqueeze(-1) * mass[..., -1:]
    return torch.searchsorted(mass, target, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
