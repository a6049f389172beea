"""One optimiser step on a batch: forward and backward by micro-batch, one sum over the processes, clipping, AdamW."""

import hashlib
import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from kronos_qlib.nn.dropout import use_generator
from kronos_qlib.train.adapters import learning_rates
from kronos_qlib.train.batches import MicroBatch
from kronos_qlib.train.distributed import Compute
from kronos_qlib.train.stages import Stage


class PlainAdamW(torch.optim.AdamW):
    """torch's AdamW without the decorators that keep torch's compiler out of it: to import that takes seconds."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)


class Diverged(ArithmeticError):
    """The loss or its gradient is not finite; the weights are as they were before the step."""


class TrainingStep:
    """Accumulates the gradients of a batch and takes a step of AdamW under OneCycleLR.

    What a micro-batch adds depends on its windows, the weights and its own random numbers, not on the thread or process
    that works on it. On a CPU the sum is in float64, where the order of so few float32 terms is lost when it is rounded
    to float32: any number of processes and threads takes bitwise the same step. Loss and stop request share the buffer
    of the gradients, so that a step has one all-reduce (and a small one more for a loss that is no mean over windows).

    Args:
        steps: of the whole training, for the schedule.
        keep_latents: for a loss in two halves (see `Stage`), keep what the first half of every micro-batch leaves for
            the backward pass; else it is computed again, which takes longer and less memory. The result is the same.
        compile: let torch.compile build the forward and backward pass.
    """

    def __init__(
        self,
        stage: Stage,
        steps: int,
        seed: int,
        compute: Compute,
        *,
        keep_latents: bool = True,
        compile: bool = False,
    ) -> None:
        self._stage, self._seed, self._compute, self._keep_latents = stage, seed, compute, keep_latents
        self._loss, self._latent = stage.loss, stage.latent
        if compile:
            self._loss, self._latent = torch.compile(stage.loss), stage.latent and torch.compile(stage.latent)

        settings = stage.settings
        rates = learning_rates(stage.network, settings.learning_rate, getattr(settings, "layer_decay", 1.0))
        groups = [(rate, [p for _, p in some]) for rate, some in groupby(rates, key=itemgetter(0))]
        self._parameters = [parameter for _, some in groups for parameter in some]
        count, device = sum(parameter.numel() for parameter in self._parameters), compute.device
        exact = torch.float64 if device.type == "cpu" else torch.float32
        self._reduced = torch.zeros(count + 2, device=device, dtype=exact)
        self._gradients, self._loss_and_stop = self._reduced[:-2], self._reduced[-2:]
        self._rounded = torch.zeros(count, device=device)

        self.optimizer = PlainAdamW(
            [{"params": some} for _, some in groups],
            settings.learning_rate,
            betas=tuple(settings.betas),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            [rate for rate, _ in groups],
            total_steps=steps,
            pct_start=0.03,
            div_factor=10,
            final_div_factor=1e4,
            cycle_momentum=False,
        )

    @property
    def lr(self) -> float:
        """The learning rate of the step to come, the highest of all layers'."""
        return max(self._schedule.get_last_lr())

    def resume(self, steps: int) -> None:
        """Go on after the first `steps` steps, whose weights and moments have been loaded."""
        if steps:
            self._schedule.load_state_dict({"last_epoch": steps - 1, "_step_count": steps + 1})
            self._schedule.step()

    def take(self, step: int, micro_batches: list[MicroBatch], stop: bool = False) -> tuple[float, bool]:
        """Take step `step` on a batch, of which `micro_batches` are this process's.

        Returns:
            The batch's loss, and whether any process wants to stop.

        Raises:
            Diverged: in all processes at once.
        """
        self._stage.network.train()
        self._reduced.zero_()
        self._loss_and_stop[1] = float(stop)
        for loss, gradients in self._losses_and_gradients(step, micro_batches):
            self._loss_and_stop[0] += loss
            for total, gradient in zip(self._by_parameter(self._gradients), gradients):
                total += gradient
        self._compute.group.all_reduce(self._reduced)

        norm = torch.linalg.vector_norm(self._gradients)
        loss, stops, norm = torch.cat([self._loss_and_stop, norm[None]]).tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged
        clip_norm = self._stage.settings.clip_norm
        if norm > clip_norm:
            self._gradients.mul_(clip_norm / norm)

        self._rounded.copy_(self._gradients)
        for parameter, gradient in zip(self._parameters, self._by_parameter(self._rounded)):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._schedule.step()
        return loss, stops > 0

    def synchronise(self) -> bool:
        """Give all processes the first one's weights and moments if they differ, and return whether they did.

        Machines of several kinds may round differently.
        """
        own = [float(parameter.detach().double().sum()) for parameter in self._parameters]
        sums = self._compute.group.all_gather(own)
        if all(theirs == sums[0] for theirs in sums):
            return False
        moments = [self.optimizer.state[p][name] for name in ("exp_avg", "exp_avg_sq") for p in self._parameters]
        for tensor in (*self._parameters, *moments):
            self._compute.group.broadcast(tensor.data)
        return True

    def _losses_and_gradients(
        self, step: int, micro_batches: list[MicroBatch]
    ) -> Iterable[tuple[Tensor, tuple[Tensor, ...]]]:
        """Run forward and backward for every micro-batch, weighted by its share of the batch."""
        if self._latent is None:
            return self._compute.map_on_cores(lambda some: self._forward_backward(step, some), micro_batches)
        # The loss depends on the mean code of the whole batch: all first halves come before any second half.
        halves = list(self._compute.map_on_cores(lambda some: self._first_half(step, some), micro_batches))
        mean = torch.zeros(self._stage.code_length, device=self._compute.device, dtype=self._reduced.dtype)
        for some, (_, own) in zip(micro_batches, halves):
            mean += some.share * own
        self._compute.group.all_reduce(mean)
        pairs = [(some, latent) for some, (latent, _) in zip(micro_batches, halves)]
        del halves
        return self._compute.map_on_cores(lambda pair: self._forward_backward(step, *pair, mean.float()), pairs)

    def _first_half(self, step: int, some: MicroBatch) -> tuple[Tensor | None, Tensor]:
        with torch.set_grad_enabled(self._keep_latents), self._forward_context("first half", step, some):
            latent = self._latent(some.examples)
            return (latent if self._keep_latents else None), self._stage.mean_code(latent).detach()

    def _forward_backward(
        self, step: int, some: MicroBatch, latent: Tensor | None = None, mean: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        latent_and_mean_code = ()
        if mean is not None:
            if latent is None:
                with self._forward_context("first half", step, some):
                    latent = self._latent(some.examples)
            # The value is the whole batch's mean code; the gradient is that of this micro-batch's share in it.
            latent_and_mean_code = latent, lambda own: own + (mean - own.detach())
        with self._forward_context("loss", step, some):
            loss = self._loss(some.examples, *latent_and_mean_code) * some.share
        return loss.detach(), torch.autograd.grad(loss, self._parameters)

    @contextmanager
    def _forward_context(self, half: str, step: int, some: MicroBatch) -> Iterator[None]:
        """Set the precision and the random numbers of one half of one micro-batch, in the thread that works on it."""
        seed = derive_seed(self._seed, self._stage.name, half, step, some.number)
        if self._compute.device.type == "cpu":
            generator = torch.Generator().manual_seed(seed)
        else:  # one thread takes the micro-batches one after another, with torch's own generator
            generator = None
            torch.manual_seed(seed)
        with self._compute.autocast, use_generator(generator):
            yield

    def _by_parameter(self, flat: Tensor) -> list[Tensor]:
        """View a buffer as one tensor per parameter."""
        sizes = [parameter.numel() for parameter in self._parameters]
        return [view.view_as(parameter) for view, parameter in zip(flat.split(sizes), self._parameters)]


def derive_seed(*key: int | str) -> int:
    """Derive a seed below 2^56 from all of a key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "little")
