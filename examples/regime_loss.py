"""A loss of one's own: windows of wild markets count more, where errors cost more."""

from torch import Tensor


class RegimeWeighted:
    """Weigh each window by its regime: how much its closes move from bar to bar, in units of the window's deviation.

    In a workflow, task.model.kwargs.finetune:

        predictor: {loss: {class: RegimeWeighted, module_path: examples/regime_loss.py, kwargs: {weight: 2.0}}, …}
    """

    def __init__(self, weight: float = 1.0) -> None:
        if weight < 0:
            raise ValueError(f"weight should be 0 or more; it is {weight}")
        self.weight = weight

    def __call__(self, errors: Tensor, x: Tensor, stamp: Tensor) -> Tensor:
        """Return the loss of each window [B]: errors [B, T - 1] or [B, T]; x [B, T, D], close in column 3."""
        moves = x[:, 1:, 3] - x[:, :-1, 3]
        return errors.mean(1) * (1 + self.weight * moves.square().mean(1).sqrt())
