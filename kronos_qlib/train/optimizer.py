"""AdamW under a OneCycle schedule, as torch.optim computes them.

torch's classes for them are left out: at their first use they load torch's compiler, 70 MiB and two seconds of every
process of a training. Its function does the work of the one, the other is a formula.
"""

import math

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from kronos_qlib.train.settings import StageSettings

WARM_UP = 0.03  # of all steps
FIRST, LAST = 10, 1e4  # the peak is so many times the first rate, and the first so many times the last
EPS = 1e-8
FUSED = ("cpu", "cuda", "mps")


def one_cycle(step: int, steps: int, peak: float) -> float:
    """The learning rate of a step, the first being 0: up to the peak and down again, both along half a cosine.

    As torch.optim.lr_scheduler.OneCycleLR (Smith & Topin 2018) with cosine annealing and two phases.
    """
    first = peak / FIRST
    top = WARM_UP * steps - 1
    if step <= top:
        return _cosine(first, peak, step / top)
    return _cosine(peak, first / LAST, (step - top) / (steps - 1 - top))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (math.cos(math.pi * share) + 1)


class AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused where torch has it so; the rate follows `one_cycle`.

    Args:
        parameters: what learns; never empty.
        steps: of the whole training.
    """

    def __init__(self, parameters: list[Tensor], settings: StageSettings, steps: int) -> None:
        self._parameters, self._settings, self._steps = parameters, settings, steps
        self._counts = [torch.zeros((), device=parameter.device) for parameter in parameters]
        self._means, self._squares = ([torch.zeros_like(p) for p in parameters] for _ in range(2))

    def rate(self, step: int) -> float:
        """The learning rate of a step, the first being 0."""
        return one_cycle(step, self._steps, self._settings.learning_rate)

    @torch.no_grad()
    def step(self, number: int, gradients: list[Tensor]) -> None:
        """Change the parameters by their gradients, as step `number` of the schedule."""
        beta1, beta2 = self._settings.betas
        adamw(
            self._parameters,
            gradients,
            self._means,
            self._squares,
            [],
            self._counts,
            fused=self._parameters[0].device.type in FUSED or None,
            amsgrad=False,
            maximize=False,
            lr=self.rate(number),
            beta1=beta1,
            beta2=beta2,
            weight_decay=self._settings.weight_decay,
            eps=EPS,
        )

    def moments(self) -> list[Tensor]:
        """The running means of gradients and of their squares."""
        return [*self._means, *self._squares]

    def tensors(self) -> dict[str, Tensor]:
        """All that it remembers: `INDEX.step`, `INDEX.exp_avg` and `INDEX.exp_avg_sq` of each parameter."""
        names = ("step", "exp_avg", "exp_avg_sq")
        every = zip(self._counts, self._means, self._squares, strict=True)
        return {f"{index}.{name}": tensor for index, one in enumerate(every) for name, tensor in zip(names, one)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Remember what `tensors` gave.

        Raises:
            ValueError: they are of other parameters.
        """
        own = self.tensors()
        if {name: tensor.shape for name, tensor in own.items()} != {name: t.shape for name, t in tensors.items()}:
            raise ValueError("the optimiser's state is that of other parameters")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
