"""Windows of four random walks and networks so small that a training takes a second."""

import csv

import numpy as np
import torch
from networks import make_networks, make_tokenizer
from walks import random_walks

from kronos_qlib.data.windows import Windows
from kronos_qlib.train import PredictorStage, StageSpecification, TokenizerStage, train_stage
from kronos_qlib.train.settings import PredictorSettings, TokenizerSettings

LOOKBACK, FUTURE = 20, 5
CPU = torch.device("cpu")


def make_windows(first, last):
    """Windows of four instruments that walk randomly."""
    bars = random_walks("ABCD", days := 200)
    ends = np.concatenate([np.arange(first, last) + i * days for i in range(4)])
    return Windows(bars, ends, LOOKBACK, FUTURE)


TRAIN, VALID = make_windows(20, 120), make_windows(130, 190)

SETTINGS = {"epochs": 3, "batch_size": 32, "learning_rate": 5e-3, "windows_per_epoch": 200, "log_every": 3}


def tokenizer_stage(**settings):
    return TokenizerStage(make_tokenizer(), TokenizerSettings(**SETTINGS | settings))


def predictor_stage(**settings):
    tokenizer, network = make_networks()
    return PredictorStage(network, tokenizer, PredictorSettings(**SETTINGS | settings))


def specify(stage, **options):
    return StageSpecification(stage, TRAIN, VALID, **({"seed": 1, "device": CPU, "checkpoint_every": 4} | options))


def run(stage, folder, log=lambda metrics, step: None, **options):
    return train_stage(specify(stage, **options), folder, log=log)


def history(folder):
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights(stage):
    return {name: tensor.clone() for name, tensor in stage.network.state_dict().items()}


def assert_same_weights(one, other):
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
