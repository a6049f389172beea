"""What each setting of nano's training is worth, changed one at a time, judged on the validation segment alone.

    QLIB_DATA=/path/to/cn_data python benchmarks/recipe.py            fifty minutes on two cores
    QLIB_DATA=/path/to/cn_data python benchmarks/recipe.py --stages predictor --windows 4000

The networks, segments and settings are those of workflows/kronos_csi300_nano.yaml, but one epoch of --windows windows,
so differences are those of a short training. docs/nano.md has the figures. The predictor learns from the codes of the
tokenizer in the package. The row "other seed" shows what chance does. More bars: windows of weekly bars, and of every
fifth day's bar, beside those of days; validated on days alone.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import qlib
import torch
from machine import describe
from qlib.utils import init_instance_by_config

from kronos_qlib import Kronos, KronosTokenizer
from kronos_qlib.data.join_windows import join_windows
from kronos_qlib.data.windows import CLOSE, COLUMNS, Bars, Windows
from kronos_qlib.nn import zoo
from kronos_qlib.train.batches import recency_weights
from kronos_qlib.train.loop import evenly_spaced, train_stage
from kronos_qlib.train.settings import PredictorSettings, TokenizerSettings
from kronos_qlib.train.stages import PredictorStage, StageSpecification, TokenizerStage
from kronos_qlib.workflow.workflow_file import read_workflow

WORKFLOW = Path(__file__).resolve().parents[1] / "workflows" / "kronos_csi300_nano.yaml"
FIVE_DAYS = 5
HALF_LIFE = 500.0  # calendar days
VARIANTS = ("as it is", "other seed", "batch ×1/2", "batch ×2", "rate ×1/2", "rate ×2", "half-life")
VARIANTS += ("weekly", "sampled")  # more bars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", default=["tokenizer", "predictor"], choices=["tokenizer", "predictor"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--windows", type=int, default=16_000, help="of the epoch (default %(default)s)")
    options = parser.parse_args()
    print(describe())
    workflow = read_workflow(WORKFLOW)
    qlib.init(provider_uri=os.environ["QLIB_DATA"], region="cn", logging_level=40)
    dataset = init_instance_by_config(workflow["task"]["dataset"])
    train, valid = dataset.training_windows("train"), dataset.training_windows("valid")
    more = {"weekly": weekly_bars, "sampled": sampled_bars}
    for stage in options.stages:
        published = dict(workflow["task"]["model"]["kwargs"]["finetune"][stage])
        published |= {"epochs": 1, "windows_per_epoch": options.windows, "valid_windows": 2000}
        for name in options.variants:
            joined = add_bars(train, name, more[name]) if name in more else train
            started = time.perf_counter()
            print(f"{stage:<10} {name:<11} {measure(stage, name, published, joined, valid)}", end="  ")
            print(f"{len(joined):,} windows to draw from, {time.perf_counter() - started:.0f} s", flush=True)


def measure(stage: str, name: str, published: dict, train: Windows, valid: Windows) -> str:
    """Train a stage with one setting changed; return its best validation figures."""
    settings = dict(published)
    factor = {"1/2": 0.5, "2": 2.0}.get(name.rpartition("×")[2], 1.0)
    if name.startswith("batch"):
        settings["batch_size"] = round(settings["batch_size"] * factor)
    if name.startswith("rate"):
        settings["learning_rate"] *= factor
    torch.manual_seed(100)  # the new network's weights
    if stage == "tokenizer":
        network = KronosTokenizer.from_config(zoo.TOKENIZERS["nano-new"].config, "nano-new")
        training = TokenizerStage(network, TokenizerSettings(**settings))
    else:
        network = Kronos.from_config(zoo.MODELS["nano-new"].config, "nano-new")
        training = PredictorStage(network, KronosTokenizer.from_pretrained("nano"), PredictorSettings(**settings))
    specification = StageSpecification(
        stage=training,
        train=train,
        valid=replace(valid, bars=train.bars),
        seed=101 if name == "other seed" else 100,
        device=torch.device("cpu"),
        draw_weights=recency_weights(train.dates, HALF_LIFE) if name == "half-life" else None,
    )
    with tempfile.TemporaryDirectory() as folder:
        best = train_stage(specification, folder)
    figures = ", ".join(f"{key} {value:.4f}" for key, value in best.items())
    return f"{figures}, {close_error(network, valid)}" if stage == "tokenizer" else figures


@torch.no_grad()
def close_error(tokenizer: KronosTokenizer, valid: Windows) -> str:
    """Return the RMSE of the reconstructed last close of a lookback as a share of a day's volatility."""
    few = evenly_spaced(valid, 2000)
    x = torch.from_numpy(few.normalised(np.arange(len(few))).x)
    (_, decoded), *_ = tokenizer.eval()(x)
    last = few.lookback - 1
    error = (decoded - x)[:, last, CLOSE].square().mean().sqrt()
    volatility = x[:, : few.lookback, CLOSE].diff(dim=1).var(dim=1).mean().sqrt()
    return f"error of the last close {error / volatility:.3f} of a day's volatility"


def add_bars(train: Windows, name: str, make_bars: Callable[[pd.DataFrame], list[pd.DataFrame]]) -> Windows:
    """Join windows of bars made from each instrument's own to the training windows; none reaches past their dates."""
    bars, last = train.bars, train.dates.max()
    made = []
    for start, end in zip(bars.offsets[:-1], bars.offsets[1:]):
        table = pd.DataFrame(bars.values[start:end], pd.DatetimeIndex(bars.dates[start:end]), COLUMNS)
        table["row"] = np.arange(start, end)
        made += make_bars(table[table.index <= last])
    rows = np.concatenate([each["row"].to_numpy() for each in made])
    offsets = np.cumsum([0, *map(len, made)])
    values = np.concatenate([each[list(COLUMNS)].to_numpy(np.float32) for each in made])
    instruments = tuple(f"{number:05d}" for number in range(len(made)))
    all_bars = Bars(values, bars.stamp[rows], bars.dates[rows], offsets, instruments)
    length = train.lookback + train.future
    starts = [np.arange(a, b - length + 1) for a, b in zip(offsets[:-1], offsets[1:])]
    others = replace(train, bars=all_bars, ends=np.concatenate(starts) + train.lookback - 1)
    return join_windows([("", train), (name, others)])


def weekly_bars(table: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the bars of an instrument's weeks, each at its last day."""
    kinds = {"open": "first", "high": "max", "low": "min", "close": "last", "volume": "sum", "amount": "sum"}
    kinds["row"] = "last"
    return [table.groupby(table.index.to_period("W-FRI")).agg(kinds)]


def sampled_bars(table: pd.DataFrame) -> list[pd.DataFrame]:
    """Return every fifth bar of an instrument, from each of the first five on."""
    return [table.iloc[first::FIVE_DAYS] for first in range(FIVE_DAYS)]


if __name__ == "__main__":
    main()
