"""The optimiser is torch's AdamW under torch's OneCycle, bit for bit."""

import pytest
import torch

from kronos_qlib.train.optimizer import AdamW, one_cycle
from kronos_qlib.train.settings import PredictorSettings

SETTINGS = PredictorSettings(epochs=1, learning_rate=1e-2, betas=[0.8, 0.97], weight_decay=0.1)


def parameters() -> list[torch.nn.Parameter]:
    chance = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=chance)) for shape in ((3, 5), (7,), (2, 2, 2))]


def gradients(steps: int) -> list[list[torch.Tensor]]:
    chance = torch.Generator().manual_seed(1)
    return [[torch.randn(p.shape, generator=chance) for p in parameters()] for _ in range(steps)]


def torch_s(steps: int) -> tuple[list[torch.nn.Parameter], list[float]]:
    """Parameters after some steps by torch's classes, and the rates they took."""
    own, rates = parameters(), []
    optimizer = torch.optim.AdamW(own, lr=1e-2, betas=(0.8, 0.97), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-2, total_steps=steps, pct_start=0.03, div_factor=10, cycle_momentum=False
    )
    for given in gradients(steps):
        for parameter, gradient in zip(own, given):
            parameter.grad = gradient
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return own, rates


@pytest.mark.parametrize("steps", [1, 2, 20, 34, 100, 101])
def test_steps_are_those_of_torch_to_the_bit(steps):
    own, (theirs, rates) = parameters(), torch_s(steps)
    optimizer = AdamW(own, SETTINGS, steps)
    for number, given in enumerate(gradients(steps)):
        assert optimizer.rate(number) == one_cycle(number, steps, 1e-2) == rates[number]
        optimizer.step(number, given)
    for one, other in zip(own, theirs, strict=True):
        assert torch.equal(one, other)


def test_what_it_remembers_goes_on_in_another():
    whole, first, second = (parameters() for _ in range(3))
    given = gradients(10)
    optimizers = [AdamW(of, SETTINGS, 10) for of in (whole, first, second)]
    for number in range(10):
        optimizers[0].step(number, given[number])
    for number in range(5):
        optimizers[1].step(number, given[number])
    for one, other in zip(first, second):
        other.data.copy_(one.data)
    optimizers[2].load({name: tensor.clone() for name, tensor in optimizers[1].tensors().items()})
    for number in range(5, 10):
        optimizers[2].step(number, given[number])
    for one, other in zip(whole, second, strict=True):
        assert torch.equal(one, other)


def test_the_state_of_other_parameters_is_refused():
    optimizer = AdamW(parameters(), SETTINGS, 10)
    with pytest.raises(ValueError, match="that of other parameters"):
        optimizer.load(AdamW(parameters()[:2], SETTINGS, 10).tensors())
