"""What a step adds up from its micro-batches, how often windows are drawn, and trainings of a part of a network."""

import shutil

import numpy as np
import pytest
import torch
from jobs import job
from small import CPU, TRAIN, assert_same_weights, history, predictor_stage, run, specify, tokenizer_stage, weights

from kronos_qlib.train.adapters import has_lora
from kronos_qlib.train.batches import BatchLoader, BatchSampler, recency_weights, shard
from kronos_qlib.train.distributed import Compute, Group
from kronos_qlib.train.memory_estimate import estimate_micro_batch_size
from kronos_qlib.train.step import TrainingStep

MAKERS = pytest.mark.parametrize("make", [tokenizer_stage, predictor_stage])


def without_dropout(make):
    def stage(**settings):
        made = make(**settings)
        for module in made.network.modules():
            for name in ("p", "ffn_dropout_p", "attn_dropout_p", "resid_dropout_p", "dropout_p"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        return made

    return stage


def first_batch(stage, size):
    sampler = BatchSampler.from_specification(specify(stage))
    return sampler, next(BatchLoader(TRAIN, sampler, size, Compute(CPU)).batches())[1]


def one_step(stage, size):
    """Loss and gradients of the first step in micro-batches of `size` windows."""
    sampler, micro_batches = first_batch(stage, size)
    step = TrainingStep(stage, sampler.steps, 1, Compute(CPU))
    loss, _ = step.take(0, micro_batches)
    return loss, step._gradients.clone()


@MAKERS
@pytest.mark.parametrize("size", [1, 5, 16])
def test_the_sum_over_micro_batches_is_the_gradient_of_the_whole_batch(make, size):
    make = without_dropout(make)
    loss, gradients = one_step(make(clip_norm=1e9), size)
    plain = make(clip_norm=1e9)
    _, [whole] = first_batch(plain, 32)
    plain.network.train()
    expected = plain.loss(whole.examples)
    expected.backward()
    learning = [p for p in plain.network.parameters() if p.requires_grad]
    by_autograd = torch.cat([p.grad.flatten() for p in learning]).double()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert (gradients - by_autograd).norm() < 1e-5 * by_autograd.norm()


@pytest.mark.slow
@MAKERS
def test_one_micro_batch_and_many_train_alike(make, tmp_path):
    stages = {size: without_dropout(make)(epochs=1, windows_per_epoch=150) for size in (32, 3)}
    for size, stage in stages.items():
        run(stage, tmp_path / str(size), micro_batch_size=size)
    for one, many in zip(history(tmp_path / "32"), history(tmp_path / "3"), strict=True):
        assert float(one["train_loss"]) == pytest.approx(float(many["train_loss"]), rel=1e-4)
    for name, tensor in weights(stages[32]).items():
        torch.testing.assert_close(tensor, weights(stages[3])[name], rtol=1e-3, atol=1e-4, msg=name)


def test_processes_share_all_micro_batches_each_once():
    for count in range(7):
        for size in range(1, 6):
            shares = [list(shard(count, rank, size)) for rank in range(size)]
            assert sum(shares, []) == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_recent_windows_are_drawn_more_often_and_none_twice():
    dates = np.datetime64("2020-01-01") + np.arange(1000)
    chances = recency_weights(dates, half_life_days=200)
    assert chances[-1] == 1 and chances[-201] == pytest.approx(0.5) and chances[-401] == pytest.approx(0.25)
    sampler = BatchSampler(1000, windows_per_epoch=50, batch_size=50, epochs=400, seed=3, draw_weights=chances)
    drawn = np.zeros(1000)
    for step in sampler.batches():
        assert len(set(step.rows)) == 50
        drawn[step.rows] += 1
    blocks = drawn.reshape(5, 200).sum(1)  # each a half-life: all windows, 20,000 draws
    expected = 20_000 * chances.reshape(5, 200).sum(1) / chances.sum()
    assert np.all(np.diff(blocks) > 0)
    np.testing.assert_allclose(blocks, expected, rtol=0.15)  # without replacement evens out a little
    again = BatchSampler(1000, windows_per_epoch=50, batch_size=50, epochs=400, seed=3, draw_weights=chances)
    np.testing.assert_array_equal(next(again.batches(7)).rows, list(sampler.batches(7))[0].rows)


def test_the_oldest_windows_are_still_drawn_by_chance():
    dates = np.datetime64("2020-01-01") + np.arange(3000)
    chances = recency_weights(dates, half_life_days=1)  # a half to the power of 2999 is 0 in float64
    assert (chances > 0).all()
    orders = [next(BatchSampler(3000, 2999, 2999, 1, seed, chances).batches()).rows for seed in (1, 2)]
    oldest = [order[-500:] for order in orders]
    assert not np.array_equal(oldest[0], np.sort(oldest[0])) and not np.array_equal(*oldest)


def test_micro_batches_do_not_depend_on_the_number_of_processes():
    sizes = {estimate_micro_batch_size(50, 10**6, Compute(CPU, group=Group(0, count))) for count in (1, 2, 8, 64)}
    assert len(sizes) == 1


@pytest.mark.slow
def test_weights_of_windows_reach_the_training_and_are_part_of_what_it_is(tmp_path):
    short = {"epochs": 1, "windows_per_epoch": 16}
    old = np.where(TRAIN.dates < np.median(TRAIN.dates.astype(np.int64)).astype("M8[ns]"), 1.0, 1e-9)
    job(tmp_path / "old", short, None, draw_weights=old).run()
    job(tmp_path / "all", short, None).run()
    assert history(tmp_path / "old" / "tokenizer") != history(tmp_path / "all" / "tokenizer")
    with pytest.raises(ValueError, match="window weights"):
        job(tmp_path / "old", short, None, draw_weights=old[::-1].copy()).run()


@pytest.mark.slow
def test_patience_ends_a_training_early_and_then_it_is_only_read(tmp_path):
    settings = {"epochs": 9, "windows_per_epoch": 64, "patience": 2, "learning_rate": 0.5}  # too much to get better
    first, second = tokenizer_stage(**settings), tokenizer_stage(**settings)
    run(first, tmp_path)
    judged = [float(row["val_loss"]) for row in history(tmp_path) if row["val_loss"]]
    assert len(judged) < 9
    assert len(judged) - 1 - int(np.argmin(judged)) == 2
    before = (tmp_path / "history.csv").read_bytes()
    run(second, tmp_path, log=lambda metrics, step: pytest.fail("a step was taken"))
    assert (tmp_path / "history.csv").read_bytes() == before
    assert_same_weights(weights(first), weights(second))


@pytest.mark.slow
@MAKERS
def test_frozen_blocks_stay_and_the_network_learns_as_a_whole_afterwards(make, tmp_path):
    stage = make(epochs=1, freeze_blocks=1)
    before, learning = weights(stage), [p.requires_grad for p in stage.network.parameters()]
    run(stage, tmp_path)
    frozen = ("embed.", "encoder.0.") if make is tokenizer_stage else ("embedding.", "time_emb.", "transformer.0.")
    for name, parameter in stage.network.named_parameters():
        assert torch.equal(parameter, before[name]) == (name.startswith(frozen) or not parameter.requires_grad), name
        assert parameter.grad is None
    assert [p.requires_grad for p in stage.network.parameters()] == learning


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.slow
@MAKERS
def test_adapters_train_are_merged_into_best_and_resume_bitwise(make, tmp_path):
    pytest.importorskip("peft")
    settings = {"epochs": 2, "windows_per_epoch": 96, "lora": {"rank": 2, "dropout": 0.1}}
    whole, killed, resumed = (make(**settings) for _ in range(3))
    before, learning = weights(whole), [p.requires_grad for p in whole.network.parameters()]
    run(whole, tmp_path / "whole", checkpoint_every=2)

    def kill(metrics, step):
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        run(killed, tmp_path / "killed", checkpoint_every=2, log=kill)
    assert not has_lora(killed.network)
    run(resumed, tmp_path / "killed", checkpoint_every=2)
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    assert_same_weights(weights(whole), weights(resumed))
    assert not has_lora(whole.network)
    assert [p.requires_grad for p in whole.network.parameters()] == learning
    best = type(whole.network).from_pretrained(tmp_path / "whole" / "best").state_dict()  # strictly
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, best[name])}
    layers = {"q_proj", "k_proj", "v_proj", "out_proj", "w1", "w2", "w3"}
    assert changed and all(name.split(".")[-2] in layers for name in changed)


@pytest.mark.long
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_a_compiled_training_agrees_within_rounding(tmp_path):
    settings = {"epochs": 1, "windows_per_epoch": 96, "s1_query": "teacher_forced", "log_every": 1}
    make = without_dropout(predictor_stage)
    run(make(**settings), tmp_path / "plain", micro_batch_size=32)
    run(make(**settings), tmp_path / "compiled", micro_batch_size=32, compile=True)
    for one, other in zip(history(tmp_path / "plain"), history(tmp_path / "compiled"), strict=True):
        assert float(one["train_loss"]) == pytest.approx(float(other["train_loss"]), rel=1e-3)
