"""One optimiser step over a global batch, whichever processes and threads share its parts."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kronos_qlib.nn.dropout import use_generator
from kronos_qlib.train.batches import Part
from kronos_qlib.train.distributed import Compute
from kronos_qlib.train.optimizer import AdamW
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
        held: where the loss needs all parts half the way, keep what their first halves leave behind; else it is made
            again, part by part, which takes longer and less memory. The result is the same.
        compiled: let torch.compile build the forward and backward pass.
    """

    def __init__(
        self, stage: Stage, steps: int, seed: int, compute: Compute, *, held: bool = True, compiled: bool = False
    ) -> None:
        self._stage, self._seed, self._compute, self._held = stage, seed, compute, held
        self._loss, self._latent = stage.loss, stage.latent
        if compiled:
            self._loss, self._latent = torch.compile(stage.loss), stage.latent and torch.compile(stage.latent)
        self._parameters = [parameter for parameter in stage.network.parameters() if parameter.requires_grad]
        count = sum(parameter.numel() for parameter in self._parameters)
        device = compute.device
        exact = torch.float64 if device.type == "cpu" else torch.float32
        self._shared = torch.zeros(count + 2, device=device, dtype=exact)
        self._gradients, self._said = self._shared[:-2], self._shared[-2:]
        self._rounded = torch.zeros(count, device=device)
        self.optimizer = AdamW(self._parameters, stage.settings, steps)

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
        self.optimizer.step(number, self._split(self._rounded))
        return loss, asked > 0

    def align(self) -> bool:
        """Give all processes the first one's weights and moments if they differ, as machines of several kinds may make
        them: whether they did."""
        own = [float(parameter.detach().double().sum()) for parameter in self._parameters]
        sums = self._compute.group.gather(own)
        if all(theirs == sums[0] for theirs in sums):
            return False
        for tensor in (*self._parameters, *self.optimizer.moments()):
            self._compute.group.copy(tensor.data)
        return True

    def _passes(self, number: int, parts: list[Part]) -> Iterable[tuple[Tensor, tuple[Tensor, ...]]]:
        """Loss and gradients of every part, weighted by its share of the batch."""
        if self._latent is None:
            return self._compute.each(lambda part: self._pass(number, part), parts)
        # The loss needs the mean code of the whole batch: all parts go half the way, and on when it is known.
        halves = list(self._compute.each(lambda part: self._first_half(number, part), parts))
        mean = torch.zeros(self._stage.code_length, device=self._compute.device, dtype=self._shared.dtype)
        for part, (_, own) in zip(parts, halves):
            mean += part.weight * own
        self._compute.group.sum(mean)
        latents = [latent if self._held else None for latent, _ in halves]
        del halves
        return self._compute.each(lambda pair: self._pass(number, *pair, mean.float()), list(zip(parts, latents)))

    def _first_half(self, number: int, part: Part) -> tuple[Tensor | None, Tensor]:
        with torch.set_grad_enabled(self._held), self._circumstances("first half", number, part):
            latent = self._latent(part.examples)
            return (latent if self._held else None), self._stage.mean_code(latent).detach()

    def _pass(
        self, number: int, part: Part, latent: Tensor | None = None, mean: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        halfway = ()
        if mean is not None:
            if latent is None:
                with self._circumstances("first half", number, part):
                    latent = self._latent(part.examples)
            # Of the whole batch's mean this part's own share has the gradient.
            halfway = latent, lambda own: own + (mean - own.detach())
        with self._circumstances("loss", number, part):
            loss = self._loss(part.examples, *halfway) * part.weight
        return loss.detach(), torch.autograd.grad(loss, self._parameters)

    @contextmanager
    def _circumstances(self, half: str, number: int, part: Part) -> Iterator[None]:
        """Precision, and random numbers that follow from what they are for, in the thread that works on a part."""
        seed = seed_of(self._seed, self._stage.name, half, number, part.number)
        if self._compute.device.type == "cpu":
            chance = torch.Generator().manual_seed(seed)
        else:  # one thread takes the parts one after another, with torch's own
            chance = None
            torch.manual_seed(seed)
        with self._compute.autocast, use_generator(chance):
            yield

    def _split(self, flat: Tensor) -> list[Tensor]:
        """A buffer as one view per parameter."""
        sizes = [parameter.numel() for parameter in self._parameters]
        return [view.view_as(parameter) for view, parameter in zip(flat.split(sizes), self._parameters)]


def seed_of(*parts: int | str) -> int:
    """A seed below 2^56 that follows from all the parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")
