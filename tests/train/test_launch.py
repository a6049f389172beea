"""Any number of processes trains bitwise alike, and what stops one of them is told where the training was started."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from jobs import assert_same_results, checkpoints, job
from safetensors.torch import load_file
from small import TRAIN, VALID

from kronos_qlib.nn import KronosTokenizer
from kronos_qlib.train import Job
from kronos_qlib.train.batches import BatchSampler
from kronos_qlib.train.launch import launch

pytestmark = pytest.mark.slow

# Batches of 2 micro-batches in stage 1 and of 4 in stage 2, whose last batch has 2 windows, so 1 micro-batch; 38
# windows to validate on are 2 batches of 16 and one of 6. Three processes are more than there is work for.
UNEVEN = {
    "micro_batch_size": 3,
    "tokenizer": {"epochs": 2, "batch_size": 6, "windows_per_epoch": 58, "valid_windows": 38, "log_every": 3},
    "predictor": {"epochs": 2, "batch_size": 10, "windows_per_epoch": 72, "valid_windows": 38, "log_every": 3},
}


RECORDER = {"uri": "sqlite:///nowhere.db", "run_id": "1"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    trained = job(folder, **UNEVEN)
    trained.run()
    return trained


def test_more_processes_than_there_is_work_for_train_bitwise_as_one(alone, tmp_path):
    trained = job(tmp_path, **UNEVEN)
    launch(trained, 3)  # tests/train/test_restarts.py has two
    assert_same_results(tmp_path, alone.folder)
    assert trained.results() == alone.results()
    for one, other in ((trained.tokenizer, alone.tokenizer), (trained.model, alone.model)):
        for name, tensor in one.state_dict().items():
            np.testing.assert_array_equal(tensor, other.state_dict()[name], name)
    assert not (tmp_path / "job").exists()


def test_the_steps_that_are_compared_have_learned_something(alone):
    for stage, start in (("tokenizer", job(alone.folder).tokenizer), ("predictor", job(alone.folder).model)):
        best = load_file(alone.folder / stage / "best" / "model.safetensors")
        assert all(
            not np.array_equal(tensor, best[name]) for name, tensor in start.named_parameters() if tensor.requires_grad
        )
        with (alone.folder / stage / "history.csv").open(newline="") as file:
            judged = [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]]
        assert judged[1] < judged[0]


def test_a_job_comes_back_from_disk_as_it_was(tmp_path):
    lora = {"lora": {"rank": 2, "targets": ["q_proj"]}, "windows_per_epoch": 10}
    saved = job(
        tmp_path / "out",
        predictor=lora,
        draw_weights=np.linspace(0.1, 1, len(TRAIN)),
        half_life_days=9.0,
        recorder=RECORDER,
    )
    saved.save(tmp_path / "job")
    loaded = Job.load(tmp_path / "job")
    for name in ("settings", "folder", "seed", "device", "dtype", "recorder"):
        assert getattr(loaded, name) == getattr(saved, name), name
    np.testing.assert_array_equal(loaded.draw_weights, saved.draw_weights)
    for ours, theirs in ((saved.train, loaded.train), (saved.valid, loaded.valid)):
        np.testing.assert_array_equal(ours.keys, theirs.keys)
        np.testing.assert_array_equal(ours.bars.values, theirs.bars.values)
    with pytest.raises(FileNotFoundError, match="file system that all machines"):
        Job.load(tmp_path / "elsewhere")


def test_bars_that_are_not_finite_end_the_training_and_are_named(tmp_path):
    bars = TRAIN.bars
    values = bars.values.copy()
    values[bars.offsets[2] + 4, 3] = np.inf  # a close of C that few windows have
    bars = replace(bars, values=values)
    windows = replace(TRAIN, bars=bars), replace(VALID, bars=bars)
    broken = job(tmp_path, {"epochs": 1}, None, windows, checkpoint_every=1)
    hit = lambda rows: any(0 <= bars.offsets[2] + 4 - (windows[0].ends[row] - 19) < 25 for row in rows)  # noqa: E731
    specification = next(broken.specifications())
    batch = next(b for b in BatchSampler.from_specification(specification).batches() if hit(b.rows))
    assert batch.step > 0
    with pytest.raises(
        FloatingPointError, match=f"tokenizer: the loss .* at step {batch.step + 1}; its batch has 8 win"
    ):
        broken.run()  # how an error of several processes is raised: tests/train/test_restarts.py, a full disk
    with (tmp_path / "tokenizer" / "diverged.csv").open(newline="") as file:
        named = [(row["instrument"], np.datetime64(row["datetime"])) for row in csv.DictReader(file)]
    assert named == list(zip(TRAIN.instruments[batch.rows], TRAIN.dates[batch.rows]))
    assert checkpoints(tmp_path, "tokenizer")[-1] == batch.step
    KronosTokenizer.from_pretrained(tmp_path / "tokenizer" / "checkpoints" / f"step-{batch.step:08d}")  # refuses NaN
