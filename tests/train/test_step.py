"""A step is torch's AdamW under torch's OneCycle; what a checkpoint keeps of it is all that a resumed one needs."""

import pytest
import torch
from safetensors.torch import load_file
from small import CPU, TRAIN, assert_same_weights, run, specify, tokenizer_stage, weights

from kronos_qlib.train.batches import BatchLoader, BatchSampler
from kronos_qlib.train.checkpoints import Progress, load_checkpoint, save_checkpoint
from kronos_qlib.train.distributed import Compute
from kronos_qlib.train.step import PlainAdamW, TrainingStep


def make_step(**settings):
    stage = tokenizer_stage(**settings)
    sampler = BatchSampler.from_specification(specify(stage))
    return stage, TrainingStep(stage, sampler.steps, 1, Compute(CPU)), BatchLoader(TRAIN, sampler, 8, Compute(CPU))


def test_the_learning_rate_is_a_one_cycle_and_goes_on_where_it_was():
    stage, step, loader = make_step()
    other = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        other, 5e-3, total_steps=loader.sampler.steps, pct_start=0.03, div_factor=10, cycle_momentum=False
    )
    rates = []
    for batch, micro_batches in loader.batches():
        rates.append(step.lr)
        step.take(batch.step, micro_batches)
    expected = []
    for _ in rates:
        expected.append(schedule.get_last_lr()[0])
        other.step()
        schedule.step()
    assert rates == expected
    for done in (0, 1, 4, 20):
        _, resumed, _ = make_step()
        resumed.resume(done)
        assert resumed.lr == rates[done]


def test_the_optimiser_is_torch_s():
    def train(kind):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(7, 5)) for _ in range(2)]
        optimizer = kind([{"params": weights[:1]}, {"params": weights[1:], "lr": 1e-3}], 1e-2, fused=True)
        for step in range(4):
            if step == 2:
                optimizer.load_state_dict(optimizer.state_dict())
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizer.step()
            optimizer.zero_grad()
        state = [value for own in optimizer.state_dict()["state"].values() for value in own.values()]
        return [*weights, *state, torch.tensor([weight.grad is None for weight in weights])]

    ours, theirs = train(PlainAdamW), train(torch.optim.AdamW)
    assert len(ours) == len(theirs) and all(torch.equal(*pair) for pair in zip(ours, theirs))


def test_a_checkpoint_keeps_what_a_resumed_training_needs(tmp_path):
    stage, step, loader = make_step()
    batches = list(loader.batches())
    for batch, micro_batches in batches[:5]:
        step.take(batch.step, micro_batches)
    save_checkpoint(tmp_path, stage.network, step.optimizer, Progress(step=5, micro_batch_size=8))
    names = load_file(tmp_path / "step-00000005" / "optimizer.safetensors").keys()
    assert {"0.step", "0.exp_avg", "0.exp_avg_sq"} <= names  # as in the trainings of earlier versions

    again, resumed, _ = make_step()
    progress = load_checkpoint(tmp_path / "step-00000005", again.network, resumed.optimizer)
    resumed.resume(progress.step)
    for batch, micro_batches in batches[5:9]:
        assert step.take(batch.step, micro_batches) == resumed.take(batch.step, micro_batches)
    assert_same_weights(weights(stage), weights(again))


def test_the_state_of_other_parameters_is_refused(tmp_path):
    run(tokenizer_stage(epochs=1, windows_per_epoch=32), tmp_path)
    _, step, _ = make_step(freeze_blocks=0)
    other = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(next((tmp_path / "checkpoints").glob("step-*")), tokenizer_stage().network, other)
