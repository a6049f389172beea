"""The two stages of fine-tuning: what each minimises and how it is judged."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kronos_qlib.nn import Kronos, KronosTokenizer
from kronos_qlib.train.settings import PredictorSettings, TokenizerSettings


class TokenizerStage:
    """Stage 1: reconstruct normalised bars from their codes."""

    name = "tokenizer"

    def __init__(self, tokenizer: KronosTokenizer, settings: TokenizerSettings) -> None:
        self.network, self.settings = tokenizer, settings

    def loss(self, x: Tensor, stamp: Tensor) -> Tensor:
        """Training loss of bars x [B, T, d_in]: (MSE coarse + MSE full + BSQ loss) / 2."""
        (recon_s1, recon), bsq_loss, _, _ = self.network(x)
        return (F.mse_loss(recon_s1.float(), x) + F.mse_loss(recon.float(), x) + bsq_loss) / 2

    def judge(self, x: Tensor, stamp: Tensor) -> dict[str, Tensor]:
        """Validation figures of a batch, the deciding one first: mean squared error from all bits, from coarse bits."""
        (recon_s1, recon), _, _, _ = self.network(x)
        return {"val_loss": F.mse_loss(recon.float(), x), "val_mse_s1": F.mse_loss(recon_s1.float(), x)}


class PredictorStage:
    """Stage 2: predict the codes of the next bar. The tokenizer is frozen."""

    name = "predictor"

    def __init__(self, model: Kronos, tokenizer: KronosTokenizer, settings: PredictorSettings) -> None:
        self.network, self.tokenizer, self.settings = model, tokenizer.eval(), settings

    def loss(self, x: Tensor, stamp: Tensor) -> Tensor:
        """Training loss of bars x [B, T, d_in] with stamps [B, T, 5]: mean cross-entropy of s1 and s2, in nats."""
        return self._losses(x, stamp, self.settings.s1_query == "teacher_forced")[0]

    def judge(self, x: Tensor, stamp: Tensor) -> dict[str, Tensor]:
        """Validation figures of a batch, the deciding one first: cross-entropies in nats, causal, true s1 as query."""
        loss, ce_s1, ce_s2 = self._losses(x, stamp, teacher_forced=True)
        return {"val_loss": loss, "val_ce_s1": ce_s1, "val_ce_s2": ce_s2}

    def _losses(self, x: Tensor, stamp: Tensor, teacher_forced: bool) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            s1, s2 = self.tokenizer.encode(x, half=True)
        logits = self.network(s1[:, :-1], s2[:, :-1], stamp[:, :-1], teacher_forced, s1[:, 1:])
        return self.network.head.compute_loss(*logits, s1[:, 1:], s2[:, 1:])


Stage = TokenizerStage | PredictorStage
