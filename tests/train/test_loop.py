"""Training learns, is judged causally on fixed windows, repeats itself, and goes on where it was cut off."""

import functools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from small import (
    CPU,
    VALID,
    assert_same_weights,
    history,
    predictor_stage,
    run,
    tokenizer_stage,
    weights,
)

from kronos_qlib import KronosTokenizer
from kronos_qlib.train.batches import BatchSampler, load_examples
from kronos_qlib.train.distributed import Compute
from kronos_qlib.train.loop import validate
from kronos_qlib.train.metrics import HISTORY_COLUMNS
from kronos_qlib.train.stages import Stage

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Trained:
    """A stage after a training with its default settings, and what the training returned and logged."""

    stage: Stage
    folder: Path
    best: dict[str, float]
    logged: list[tuple[int, dict[str, float]]]

    @property
    def history(self) -> list[dict[str, str]]:
        return history(self.folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Both stages, each trained once; nobody writes into their folders."""

    @functools.cache
    def train(make):
        stage, folder, logged = make(), tmp_path_factory.mktemp("trained"), []
        best = run(stage, folder, log=lambda metrics, step: logged.append((step, metrics)))
        return Trained(stage, folder, best, logged)

    return train


COMPUTE = Compute(CPU)
MICRO_BATCHES = 4  # of a batch, on a machine with up to four cores
STAGES = pytest.mark.parametrize("make", [tokenizer_stage, predictor_stage])


@STAGES
def test_a_stage_learns_and_ends_with_its_best_weights(make, trained):
    before = validate(make(), VALID, COMPUTE)["val_loss"]
    done = trained(make)
    assert list(done.history[0]) == HISTORY_COLUMNS
    val_losses = [float(row["val_loss"]) for row in done.history if row["val_loss"]]
    assert len(val_losses) == 3
    assert min(val_losses) == pytest.approx(done.best["val_loss"], rel=1e-6)
    assert done.best["val_loss"] < 0.95 * before
    loaded = type(done.stage.network).from_pretrained(done.folder / "best")
    assert_same_weights(weights(done.stage), loaded.state_dict())


@STAGES
def test_the_history_has_a_row_for_every_logging_step_and_epoch(make, trained):
    rows = trained(make).history
    assert [int(row["step"]) for row in rows] == [3, 6, 7, 9, 12, 14, 15, 18, 21]  # 7 steps an epoch
    assert [row["epoch"] for row in rows if row["val_loss"]] == ["0", "1", "2"]
    assert max(float(row["lr"]) for row in rows) <= 5e-3


@STAGES
def test_the_same_seed_gives_bitwise_the_same_training_and_another_seed_another(make, trained, tmp_path):
    first, second, third = trained(make), make(), make()
    torch.manual_seed(99)  # what happens to the global random state does not matter
    run(second, tmp_path / "second")
    run(third, tmp_path / "third", seed=2)
    assert first.history == history(tmp_path / "second")
    assert_same_weights(weights(first.stage), weights(second))
    assert first.history != history(tmp_path / "third")


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@STAGES
@pytest.mark.parametrize("steps", [9, 14])
def test_a_killed_training_resumes_bitwise(make, trained, tmp_path, steps):
    whole = trained(make)
    stage, done = make(), []
    learn = stage.loss

    def loss_until_killed(examples, *halfway):
        done.append(1)
        if len(done) > steps * MICRO_BATCHES:
            raise Killed
        return learn(examples, *halfway)

    stage.loss = loss_until_killed
    with pytest.raises(Killed):
        run(stage, tmp_path)
    resumed = make()
    run(resumed, tmp_path)
    assert history(tmp_path) == whole.history
    assert_same_weights(weights(resumed), weights(whole.stage))


def test_a_finished_training_is_only_read(trained, tmp_path):
    first, second = trained(tokenizer_stage), tokenizer_stage()
    folder = shutil.copytree(first.folder, tmp_path / "copy")
    run(second, folder, log=lambda metrics, step: pytest.fail("a step was taken"))
    assert_same_weights(weights(first.stage), weights(second))


@pytest.mark.parametrize(
    ("settings", "options", "key"),
    [
        ({"learning_rate": 1e-3}, {}, "settings.learning_rate: 0.005 there, 0.001 now"),
        ({}, {"seed": 5}, "seed: 1 there, 5 now"),
    ],
)
def test_a_folder_with_another_training_is_refused(trained, tmp_path, settings, options, key):
    folder = shutil.copytree(trained(tokenizer_stage).folder, tmp_path / "copy")
    with pytest.raises(ValueError, match=key):
        run(tokenizer_stage(**settings), folder, **options)


@pytest.mark.parametrize("settings", [{"log_every": 5}, {"valid_windows": 7}, {"log_every": 2, "valid_windows": 9}])
def test_a_finished_training_is_the_same_with_other_rows_and_another_validation(trained, tmp_path, settings):
    first, second = trained(tokenizer_stage), tokenizer_stage(**settings)
    folder = shutil.copytree(first.folder, tmp_path / "copy")
    best = run(second, folder, checkpoint_every=3, log=lambda metrics, step: pytest.fail("a step was taken"))
    assert_same_weights(weights(first.stage), weights(second))
    assert (best == first.best) == ("valid_windows" not in settings), "the figures are of the windows asked for"


def test_more_epochs_go_on_from_the_last_checkpoint_and_the_schedule_is_said(trained, tmp_path, caplog):
    first, longer, again = trained(tokenizer_stage), tokenizer_stage(epochs=5), tokenizer_stage(epochs=5)
    folder = shutil.copytree(first.folder, tmp_path / "copy")
    steps = []
    with caplog.at_level("INFO"):
        run(longer, folder, log=lambda metrics, step: steps.append(step))
    assert steps[0] > 21 and max(steps) == 35, "no step is taken again"
    assert [row["step"] for row in history(folder)][:9] == [row["step"] for row in first.history]
    rate = next(float(row["lr"]) for row in history(folder) if int(row["step"]) == 24)
    assert "settings.epochs: 3 there, 5 now" in caplog.text and "the schedule of all 35 steps from here" in caplog.text
    assert 0 < rate < 5e-3
    run(again, folder, log=lambda metrics, step: pytest.fail("a step was taken"))
    assert_same_weights(weights(longer), weights(again))
    assert json.loads((folder / "identity.json").read_text())["continued"] == [[3, 21]]
    with pytest.raises(ValueError, match="settings.epochs: 5 there, 4 now"):
        run(tokenizer_stage(epochs=4), folder)


def test_more_epochs_of_the_tokenizer_are_refused_beside_a_training_on_the_former_one(trained, tmp_path):
    shutil.copytree(trained(tokenizer_stage).folder, tmp_path / "tokenizer")
    shutil.copytree(trained(predictor_stage).folder, tmp_path / "predictor")
    with pytest.raises(ValueError, match="epochs 3 → 4 would change the tokenizer, and .*predictor holds a training"):
        run(tokenizer_stage(epochs=4), tmp_path / "tokenizer")
    assert_same_weights(
        weights(trained(tokenizer_stage).stage),
        KronosTokenizer.from_pretrained(tmp_path / "tokenizer" / "best").state_dict(),
    )


def test_only_the_last_two_checkpoints_are_kept(trained):
    folder = trained(tokenizer_stage).folder / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000020", "step-00000021"]


def test_stage_two_leaves_the_tokenizer_alone(trained):
    before = predictor_stage().frozen_tokenizer.state_dict()
    assert_same_weights(before, trained(predictor_stage).stage.frozen_tokenizer.state_dict())


@STAGES
def test_validation_counts_every_window_once(make):
    stage = make()
    stage.network.eval()
    with torch.no_grad():
        one_by_one = [
            stage.validation_metrics(load_examples(VALID, np.array([row])))["val_loss"].item()
            for row in range(len(VALID))
        ]
    assert validate(stage, VALID, COMPUTE)["val_loss"] == pytest.approx(np.mean(one_by_one), rel=1e-5)


def test_validation_of_stage_two_is_causal():
    """Bars after a position do not change its logits: a validation loss that saw them would be too good."""
    stage = predictor_stage()
    batch = VALID.normalised(np.arange(8))
    x, stamp = torch.from_numpy(batch.x), torch.from_numpy(batch.stamp)
    stage.network.eval()
    s1, s2 = stage.frozen_tokenizer.encode(x, half=True)
    seen = stage.network(s1[:, :-1], s2[:, :-1], stamp[:, :-1], use_teacher_forcing=True, s1_targets=s1[:, 1:])
    cut = 10
    targets = s1[:, 1 : cut + 1]
    short = stage.network(s1[:, :cut], s2[:, :cut], stamp[:, :cut], use_teacher_forcing=True, s1_targets=targets)
    for whole, part in zip(seen, short):
        torch.testing.assert_close(whole[:, :cut], part)


def test_sampled_and_teacher_forced_queries_train_differently(trained, tmp_path):
    run(predictor_stage(s1_query="teacher_forced"), tmp_path)
    assert trained(predictor_stage).history != history(tmp_path)


def test_an_epoch_takes_windows_without_replacement_and_every_epoch_others():
    sampler = BatchSampler(n_windows=100, windows_per_epoch=60, batch_size=7, epochs=2, seed=3)
    steps = list(sampler.batches())
    assert [step.step for step in steps] == list(range(sampler.steps)) == list(range(18))
    first, second = (np.concatenate([step.rows for step in steps if step.epoch == number]) for number in (0, 1))
    assert len(first) == len(set(first)) == 60
    assert set(first) != set(second)
    for done in (4, 9, 13):
        rest = list(sampler.batches(done))
        np.testing.assert_array_equal(
            np.concatenate([step.rows for step in rest]), np.concatenate([step.rows for step in steps[done:]])
        )
        assert sampler.windows_drawn(done) == sum(len(step.rows) for step in steps[:done])


def test_a_learning_rate_that_lets_the_training_diverge_stops_it_with_the_last_checkpoint_kept(tmp_path):
    with pytest.raises(FloatingPointError, match=r"tokenizer: the loss or its gradient is not finite at step \d+"):
        run(tokenizer_stage(learning_rate=1e30, log_every=1), tmp_path, checkpoint_every=1)
    kept = sorted((tmp_path / "checkpoints").glob("step-????????"))
    assert kept
    weights = KronosTokenizer.from_pretrained(kept[-1]).state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_a_loss_that_is_not_finite_stops_and_names_step_and_windows(tmp_path):
    stage = tokenizer_stage()
    learn, done = stage.loss, []

    def diverge(examples, *halfway):
        if len(examples.stamp) > 2:  # a step's, not one by which the memory is estimated
            done.append(1)
        return learn(examples, *halfway) * (torch.nan if len(done) == 6 * MICRO_BATCHES else 1)

    stage.loss = diverge
    with pytest.raises(
        FloatingPointError, match=r"tokenizer: the loss or its gradient is not finite at step 6.*[ABCD] 2020-\d\d-\d\d"
    ):
        run(stage, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


def test_metrics_are_logged_as_they_come(trained):
    done = trained(tokenizer_stage)
    assert [step for step, _ in done.logged] == [int(row["step"]) for row in done.history]
    names = ("lr", "train_loss", "val_loss", "val_mse_s1", "windows_per_second", "data_wait")
    assert set(done.logged[-1][1]) == {f"tokenizer.{name}" for name in names}


@STAGES
def test_bfloat16_trains_float32_weights(make, tmp_path):
    stage = make()
    best = run(stage, tmp_path, dtype=torch.bfloat16)
    assert np.isfinite(best["val_loss"])
    assert best["val_loss"] < validate(make(), VALID, COMPUTE)["val_loss"]
    assert {tensor.dtype for tensor in stage.network.parameters()} == {torch.float32}


@STAGES
def test_threads_share_a_batch_without_changing_it(make, tmp_path):
    one, three = make(), make()
    for stage in (one, three):
        for part in stage.network.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.2
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        run(one, tmp_path / "one")
        torch.set_num_threads(3)
        run(three, tmp_path / "three")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert history(tmp_path / "one") == history(tmp_path / "three")
    assert_same_weights(weights(one), weights(three))
