"""One optimiser step over a global batch, whichever processes and threads share its parts."""

import math
from collections.abc import Iterable
from contextlib import ExitStack

import torch
from torch import Tensor

from kronos_qlib.nn.dropout import drawn_from
from kronos_qlib.train.compute import Compute
from kronos_qlib.train.feed import Part
from kronos_qlib.train.seeds import seed_of
from kronos_qlib.train.stages import Stage


class Diverged(ArithmeticError):
    """The loss or its gradient is not finite; the weights are as they were before the step."""


class Learner:
    """Forward and backward by parts, one sum over parts and processes, clipping, AdamW under OneCycle.

    What a part adds follows from its windows, the weights and its own random numbers, not from who works on it. On a
    CPU the sum is in float64, where the order of so few float32 terms is lost in the rounding to float32: any number of
    processes and threads takes bitwise the same step. The loss and whether to stop share the gradients' buffer, so
    that a step has one sum over the processes (and one more, small, for a loss that is no mean over windows).

    Args:
        steps: of the whole training, for the schedule.
        compiled: let torch.compile build the forward and backward pass.
    """

    def __init__(self, stage: Stage, steps: int, seed: int, compute: Compute, compiled: bool = False) -> None:
        self._stage, self._seed, self._compute = stage, seed, compute
        self._loss = torch.compile(stage.loss) if compiled else stage.loss
        self._parameters = [parameter for parameter in stage.network.parameters() if parameter.requires_grad]
        count = sum(parameter.numel() for parameter in self._parameters)
        device = compute.device
        exact = torch.float64 if device.type == "cpu" else torch.float32
        self._shared = torch.zeros(count + 2, device=device, dtype=exact)
        self._gradients, self._said = self._shared[:-2], self._shared[-2:]
        self._rounded = torch.zeros(count, device=device)
        for parameter, gradient in zip(self._parameters, self._split(self._rounded)):
            parameter.grad = gradient
        self.optimizer, self.schedule = _optimizer(self._parameters, stage, steps, device)

    def step(self, number: int, parts: list[Part], stop: bool = False) -> tuple[float, bool]:
        """Learn from a global batch of which `parts` are this process's: the batch's loss, and if any wants to stop.

        Raises:
            Diverged: in all processes at once.
        """
        self._stage.network.train()
        self._shared.zero_()
        self._said[1] = float(stop)
        for loss, gradients in self._passes(number, parts):
            self._said[0] += loss
            for total, gradient in zip(self._split(self._gradients), gradients):
                total += gradient
        self._compute.group.sum(self._shared)
        norm = torch.linalg.vector_norm(self._gradients)
        loss, asked, norm = torch.cat([self._said, norm[None]]).tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged
        limit = self._stage.settings.clip_norm
        if norm > limit:
            self._gradients.mul_(limit / norm)
        self._rounded.copy_(self._gradients)
        self.optimizer.step()
        self.schedule.step()
        return loss, asked > 0

    def _passes(self, number: int, parts: list[Part]) -> Iterable[tuple[Tensor, tuple[Tensor, ...]]]:
        """Loss and gradients of every part, weighted by its share of the batch."""
        chances = [self._chance(number, part) for part in parts]
        if self._stage.latent is None:
            return self._compute.each(lambda pair: self._pass(*pair), list(zip(parts, chances)))
        # The loss needs the mean code of the whole batch: all parts go half the way, and on when it is known.
        latents = list(self._compute.each(lambda pair: self._latent(*pair), list(zip(parts, chances))))
        mean = torch.zeros(self._stage.code_length, device=self._compute.device, dtype=self._shared.dtype)
        for part, (_, own) in zip(parts, latents):
            mean += part.weight * own
        self._compute.group.sum(mean)
        known = [(part, chance, latent, mean.float()) for part, chance, (latent, _) in zip(parts, chances, latents)]
        return self._compute.each(lambda all_of_it: self._pass(*all_of_it), known)

    def _latent(self, part: Part, chance: torch.Generator | None) -> tuple[Tensor, Tensor]:
        with self._circumstances(chance):
            latent = self._stage.latent(part.examples)
            return latent, self._stage.mean_code(latent).detach()

    def _pass(
        self, part: Part, chance: torch.Generator | None, latent: Tensor | None = None, mean: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        with self._circumstances(chance):
            # Of the whole batch's mean this part's own share has the gradient.
            halfway = () if latent is None else (latent, lambda own: own + (mean - own.detach()))
            loss = self._loss(part.examples, *halfway) * part.weight
        return loss.detach(), torch.autograd.grad(loss, self._parameters)

    def _chance(self, number: int, part: Part) -> torch.Generator | None:
        """A part's random numbers. On a GPU they are torch's own, for it takes the parts one after another."""
        seed = seed_of(self._seed, self._stage.name, number, part.number)
        if self._compute.device.type == "cpu":
            return torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        return None

    def _circumstances(self, chance: torch.Generator | None) -> ExitStack:
        """Precision and random numbers of a thread's pass."""
        stack = ExitStack()
        stack.enter_context(self._compute.autocast)
        stack.enter_context(drawn_from(chance))
        return stack

    def _split(self, flat: Tensor) -> list[Tensor]:
        """A buffer as one view per parameter."""
        sizes = [parameter.numel() for parameter in self._parameters]
        return [view.view_as(parameter) for view, parameter in zip(flat.split(sizes), self._parameters)]


def _optimizer(
    parameters: list[torch.nn.Parameter], stage: Stage, steps: int, device: torch.device
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.OneCycleLR]:
    """AdamW under a OneCycle schedule with 3 % warm-up from a tenth of the peak; the betas stay as they are set."""
    settings = stage.settings
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=tuple(settings.betas),
        weight_decay=settings.weight_decay,
        fused=device.type in ("cpu", "cuda", "mps") or None,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=steps, pct_start=0.03, div_factor=10, cycle_momentum=False
    )
    return optimizer, schedule
