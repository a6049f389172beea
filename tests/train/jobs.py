"""Jobs so small that they train in a second or two, the processes that do so, and what they leave on disk."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from networks import make_networks
from small import CPU, TRAIN, VALID

from kronos_qlib.nn.ranker import KronosRankNetwork
from kronos_qlib.train import FinetuneSettings, Job
from kronos_qlib.train.job import RankerJob
from kronos_qlib.train.settings import RankerSettings

WINDOWS = TRAIN, replace(VALID, bars=TRAIN.bars)  # of one market, as processes share them
STAGES = ("tokenizer", "predictor")
STAGE = {"epochs": 2, "windows_per_epoch": 160, "batch_size": 8, "learning_rate": 5e-3, "valid_windows": 40}
DROPOUT = {"ffn_dropout_p": 0.1, "attn_dropout_p": 0.1, "resid_dropout_p": 0.1}
STEPS = 40  # of a stage with these settings: 20 an epoch


def job(
    folder, tokenizer=STAGE, predictor=STAGE, windows=WINDOWS, draw_weights=None, seed=1, recorder=None, **settings
):
    """New networks with dropout, and what to do with them; a stage's mapping is laid over STAGE, None skips it."""
    settings = {
        "output_dir": str(folder),
        "checkpoint_every": 5,
        "micro_batch_size": 4,
        "tokenizer": tokenizer and STAGE | tokenizer,
        "predictor": predictor and STAGE | predictor,
    } | settings
    tokenizer, model = make_networks(DROPOUT, DROPOUT)
    return Job(
        tokenizer=tokenizer,
        model=model,
        train=windows[0],
        valid=windows[1],
        settings=FinetuneSettings(**settings),
        folder=Path(folder),
        seed=seed,
        device=CPU,
        dtype=torch.float32,
        draw_weights=draw_weights,
        recorder=recorder,
    )


def ranker_job(folder, **settings):
    """A ranker of two blocks that learns random labels of the same windows, in whole days."""
    torch.manual_seed(0)
    tokenizer, model = make_networks(DROPOUT, DROPOUT | {"n_layers": 2})
    rng = np.random.default_rng(0)
    days = [windows.take(np.argsort(windows.dates, kind="stable")) for windows in WINDOWS]
    labels = [rng.normal(size=len(windows)).astype(np.float32) for windows in days]
    sizes = {"epochs": 2, "days_per_epoch": 50, "batch_size": 4, "valid_days": 20}
    settings = {"output_dir": str(folder), "learning_rate": 5e-3} | sizes | settings
    return RankerJob(
        tokenizer=tokenizer,
        model=model,
        train=days[0],
        valid=days[1],
        settings=RankerSettings(**settings),
        folder=Path(folder),
        seed=1,
        device=CPU,
        dtype=torch.float32,
        rankers=(KronosRankNetwork.on(model, "tokens", True, 1),),
        train_targets=labels[0],
        valid_targets=labels[1],
    )


def results(folder):
    """Every byte of what a training is for: history, best weights and their figures, of all stages."""
    files = ("history.csv", "best/model.safetensors", "best/config.json", "result.json")
    paths = [Path(folder) / stage / name for stage in (*STAGES, "ranker") for name in files]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.exists()}


def assert_same_results(folder, other):
    one, two = results(folder), results(other)
    assert one and one.keys() == two.keys()
    for name in one:
        assert one[name] == two[name], name


def checkpoints(folder, stage):
    """The steps of a stage's checkpoints, oldest first."""
    return sorted(
        int(path.name.removeprefix("step-")) for path in (Path(folder) / stage / "checkpoints").glob("step-????????")
    )


def steps_done(folder):
    """How many steps of both stages together are in a checkpoint."""
    return sum(max(checkpoints(folder, stage), default=0) for stage in STAGES)


def children(pid):
    """The processes that one has started and that live, by their ids."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(path.parent.name))
    return found


def workers(launcher=None):
    """The training processes of a launcher, by default of this process."""
    return [pid for pid in children(launcher or os.getpid()) if "kronos_qlib.train.worker" in command(pid)]


def command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
