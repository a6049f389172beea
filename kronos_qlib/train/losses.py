"""Losses of a user's own: which bars of a window count how much in a stage's training."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from kronos_qlib.extensions import load_extension, reason


class StageLoss(Protocol):
    """A loss of a user's own, the setting `loss` of a stage as a configuration."""

    def __call__(self, errors: Tensor, x: Tensor, stamp: Tensor) -> Tensor:
        """Return the loss of each window, of which the training takes the mean.

        Args:
            errors: of the predictor, the mean cross-entropy of the next bar's codes, in nats, float32 [B, T - 1]; of
                the tokenizer, half the squared errors of both reconstructions, mean over the columns [B, T].
            x: the windows' normalised bars, float32 [B, T, D]. stamp: their stamps, int64 [B, T, 5].

        Returns:
            [B], a window by itself alone, through which a gradient reaches the errors.
        """


def load_loss(configuration: Mapping[str, Any]) -> StageLoss:
    """Make a loss of the user's own, and try it on random errors. Raises ValueError."""
    loss: StageLoss = load_extension(configuration)
    name, random = type(loss).__name__, torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, 6, generator=random)
    for count in (7, 8):  # of a predictor's errors, of a tokenizer's
        errors = torch.rand(3, count, generator=random, requires_grad=True)
        stamp = torch.zeros(3, 8, 5, dtype=torch.long)
        try:
            found, alone = loss(errors, x, stamp), loss(errors[:1], x[:1], stamp[:1])
        except Exception as error:
            raise ValueError(f"{name} fails: {reason(error)}") from error
        if not isinstance(found, Tensor) or found.shape != (3,) or not torch.isfinite(found).all():
            raise ValueError(f"{name} should return a finite loss for each window, a tensor of the shape [3]")
        if not found.requires_grad:
            raise ValueError(f"{name} returns what no gradient can reach the errors through")
        if not torch.allclose(found[:1], alone, rtol=1e-5):
            raise ValueError(f"{name} judges a window by the others of its batch too")
    return loss
