"""Windows of four random walks and networks so small that a training takes a second."""

import csv

import numpy as np
import pandas as pd
import torch

from kronos_qlib import Kronos, KronosTokenizer
from kronos_qlib.data.stamps import stamps
from kronos_qlib.data.windows import Bars, Windows
from kronos_qlib.nn import zoo
from kronos_qlib.train import PredictorStage, StageSpecification, TokenizerStage, train_stage
from kronos_qlib.train.settings import PredictorSettings, TokenizerSettings

LOOKBACK, FUTURE = 20, 5
SMALL_TOKENIZER = {
    "d_model": 16,
    "ff_dim": 32,
    "n_heads": 2,
    "n_enc_layers": 2,
    "n_dec_layers": 2,
    "s1_bits": 4,
    "s2_bits": 4,
}
SMALL_MODEL = {
    "d_model": 16,
    "ff_dim": 32,
    "n_heads": 2,
    "n_layers": 1,
    "s1_bits": 4,
    "s2_bits": 4,
    "ffn_dropout_p": 0.1,
}
CPU = torch.device("cpu")


def make_windows(first, last):
    """Windows of four instruments that walk randomly."""
    rng = np.random.default_rng(0)
    length, names = 200, ("A", "B", "C", "D")
    close = 20 * np.exp(np.cumsum(rng.normal(0, 0.02, (4, length)), 1))
    spread = np.abs(rng.normal(0, 0.01, (4, length)))
    volume = np.exp(rng.normal(10, 0.5, (4, length)))
    columns = [close * (1 - spread / 2), close * (1 + spread), close * (1 - spread), close, volume, volume * close]
    dates = pd.bdate_range("2020-01-01", periods=length)
    bars = Bars(
        values=np.stack(columns, -1).reshape(-1, 6).astype(np.float32),
        stamp=np.tile(stamps(dates), (4, 1)).astype(np.int8),
        dates=np.tile(dates.to_numpy("datetime64[ns]"), 4),
        offsets=np.arange(5) * length,
        instruments=names,
    )
    ends = np.concatenate([np.arange(first, last) + i * length for i in range(4)])
    return Windows(bars, ends, LOOKBACK, FUTURE)


TRAIN, VALID = make_windows(20, 120), make_windows(130, 190)

SETTINGS = {"epochs": 3, "batch_size": 32, "learning_rate": 5e-3, "windows_per_epoch": 200, "log_every": 3}


def tokenizer_stage(**settings):
    torch.manual_seed(0)
    network = KronosTokenizer(**(zoo.TOKENIZERS["nano"].config | SMALL_TOKENIZER))
    return TokenizerStage(network, TokenizerSettings(**SETTINGS | settings))


def predictor_stage(**settings):
    torch.manual_seed(0)
    tokenizer = KronosTokenizer(**(zoo.TOKENIZERS["nano"].config | SMALL_TOKENIZER))
    network = Kronos(**(zoo.MODELS["nano"].config | SMALL_MODEL))
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
