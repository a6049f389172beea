"""Windows per second of training, both stages, beside a plain loop over the authors' network, and the share reached of
the machine's limit.

    pip install -c constraints.txt -e '.[bench]'
    python benchmarks/train.py
    python benchmarks/train.py --models nano --stages predictor --threads 1 --rounds 3

The other side is the port of the authors' network in sktime 1.2.0, trained as their scripts do: a dataset that cuts one
window at a time from a DataFrame per instrument, a DataLoader, AdamW, OneCycle, nothing else. Both sides start from the
same random weights, with the same dropout, and see windows of the same random walks, in turns, so that a change of the
machine's pace meets both. Rates are those after the first steps of a turn: neither start nor validation is in them.

Columns: GFLOP/window is counted from shapes, three times the forward pass for what is trained and once for the frozen
encoder of stage 2. share is our rate of that work over the rate of products of two 2048² matrices, measured in every
round. products, attention, rest say where the time of our pass goes, on one thread of a CPU in float32; bound is what
the ratio would be if the rest, which is norms, activations, dropout, quantizer and losses, took no time at all. data
wait is the share of a step's time that passes before its batch is there, ours and theirs. difference is the larger of
loss and gradient norm on one batch without dropout, relative; above 1e-3 the script ends with status 1.
"""

import argparse
import contextlib
import io
import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from machine import MATRIX, cores, describe, matrix_rate
from table import print_row, spread
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset
from work import attention, linears, triangle

from kronos_qlib import Kronos, KronosTokenizer
from kronos_qlib.data.stamps import STAMP_FIELDS, stamps
from kronos_qlib.data.windows import COLUMNS, EPS, Bars, Windows
from kronos_qlib.hardware.cpu import retain_heap
from kronos_qlib.hardware.device import DTYPES, resolve_device, resolve_dtype
from kronos_qlib.nn import zoo
from kronos_qlib.nn.dropout import use_generator
from kronos_qlib.train import PredictorStage, TokenizerStage, train_stage
from kronos_qlib.train.batches import gather
from kronos_qlib.train.settings import PredictorSettings, StageSettings, TokenizerSettings
from kronos_qlib.train.stages import Stage

LOOKBACK, FUTURE, BATCH = 90, 11, 50  # the published recipe: windows of 90 + 10 + 1 bars
INSTRUMENTS, BARS, CLIP = 50, 1000, 5.0
STEPS = {"nano": 30, "mini": 10, "small": 4}  # timed in a turn
WARM_UP = 2  # steps of a turn before the clock runs
WORKERS = (0, 2)  # of the other side's DataLoader: the faster is taken
AGREEMENT = 1e-3
OPERATIONS = {  # by the beginnings of their names in a profile
    "attention": ("aten::_scaled_dot_product", "aten::bmm", "aten::_softmax"),
    "products": ("aten::mm", "aten::addmm"),
}
SETTINGS = {"tokenizer": TokenizerSettings(epochs=1), "predictor": PredictorSettings(epochs=1)}


@dataclass(frozen=True)
class Turn:
    """What one side did: windows per second, and the share of the time in which it waited for data."""

    rate: float
    data_wait: float


def gflop_per_window(model: str, stage: str, length: int = LOOKBACK + FUTURE) -> float:
    """Matrix-product work of one window of training, in 10^9 floating-point operations, counted from shapes.

    Forward and backward are three times the forward products of what is trained. Causal attention counts visible pairs
    only; embeddings are lookups.
    """
    config, tokenizer = zoo.MODELS[model].config, zoo.TOKENIZERS[zoo.MODELS[model].tokenizer].config
    width, d_in, s1_bits = tokenizer["d_model"], tokenizer["d_in"], tokenizer["s1_bits"]
    bits = s1_bits + tokenizer["s2_bits"]

    def blocks(config: dict, count: int, positions: int) -> int:
        return count * (linears(config, positions) + attention(config, triangle(positions)))

    encoder = blocks(tokenizer, tokenizer["n_enc_layers"] - 1, length) + 2 * length * width * (d_in + bits)
    if stage == "tokenizer":
        decoder = blocks(tokenizer, tokenizer["n_dec_layers"] - 1, length) + 2 * length * width * d_in
        return 3 * (encoder + 2 * decoder + 2 * length * width * (s1_bits + bits)) / 1e9
    d, inputs = config["d_model"], length - 1
    logits = 2 * inputs * d * (2 ** config["s1_bits"] + 2 ** config["s2_bits"])
    fusion, cross = 4 * inputs * d * d, 8 * inputs * d * d + attention(config, triangle(inputs))
    return (encoder + 3 * (blocks(config, config["n_layers"], inputs) + fusion + cross + logits)) / 1e9


def make_frames() -> dict[str, pd.DataFrame]:
    """Random walks: per instrument the six columns and the five fields of the stamps, over business days."""
    rng, dates = np.random.default_rng(0), pd.bdate_range("2015-01-01", periods=BARS)
    frames = {}
    for number in range(INSTRUMENTS):
        close = 20 * np.exp(np.cumsum(rng.normal(0, 0.02, BARS)))
        prices = close[:, None] * (1 + rng.normal(0, 0.005, (BARS, 4)))
        volume = 1e6 * np.exp(rng.normal(0, 0.5, BARS))
        values = np.column_stack([prices, volume, volume * prices.mean(axis=1)]).astype(np.float32)
        frame = pd.DataFrame(values, dates, COLUMNS)
        frame[list(STAMP_FIELDS)] = stamps(dates)  # once, as the authors' dataset does, not per window
        frames[f"SH{600000 + number}"] = frame
    return frames


def make_windows(frames: dict[str, pd.DataFrame]) -> Windows:
    """Every window of the frames, for our side."""
    lengths = [len(frame) for frame in frames.values()]
    offsets = np.cumsum([0, *lengths])
    bars = Bars(
        values=np.concatenate([frame[list(COLUMNS)].to_numpy(np.float32) for frame in frames.values()]),
        stamp=np.concatenate([frame[list(STAMP_FIELDS)].to_numpy(np.int8) for frame in frames.values()]),
        dates=np.concatenate([frame.index.to_numpy("datetime64[ns]") for frame in frames.values()]),
        offsets=offsets,
        instruments=tuple(frames),
    )
    ends = [start + np.arange(LOOKBACK - 1, length - FUTURE) for start, length in zip(offsets, lengths)]
    return Windows(bars, np.concatenate(ends), LOOKBACK, FUTURE, CLIP)


class FrameWindows(Dataset):
    """The plain dataset: each sample cuts a random window from a random instrument's DataFrame and normalises it."""

    def __init__(self, frames: dict[str, pd.DataFrame], size: int = 100_000) -> None:
        self.frames, self.size, self.length = frames, size, LOOKBACK + FUTURE
        self.starts = [(name, i) for name, frame in frames.items() for i in range(len(frame) - self.length + 1)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        name, start = random.choice(self.starts)
        window = self.frames[name].iloc[start : start + self.length]
        x = window[list(COLUMNS)].to_numpy(np.float32)
        stamp = window[list(STAMP_FIELDS)].to_numpy(np.float32)
        known = x[:LOOKBACK]
        x = np.clip((x - known.mean(axis=0)) / (known.std(axis=0) + EPS), -CLIP, CLIP)
        return torch.from_numpy(x), torch.from_numpy(stamp)


def our_turn(
    stage: Stage, windows: Windows, device: torch.device, dtype: torch.dtype, steps: int, compiled: bool
) -> Turn:
    """Train by our loop for a turn."""
    size, rows = (WARM_UP + steps) * BATCH, []
    stage.settings = stage.settings.model_copy(update={"windows_per_epoch": size, "valid_windows": 1, "log_every": 1})

    def log(metrics: dict[str, float], step: int) -> None:
        if step > WARM_UP:
            rows.append([metrics[f"{stage.name}.{key}"] for key in ("windows_per_second", "data_wait")])

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        options = {"seed": 0, "device": device, "dtype": dtype, "compiled": compiled, "log": log}
        train_stage(stage, windows, windows.take(slice(1)), folder, **options, checkpoint_every=WARM_UP + steps)
    rates, waits = zip(*rows)
    return Turn(statistics.harmonic_mean(rates), statistics.fmean(waits, [1 / rate for rate in rates]))


def plain_turn(
    network: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    settings: StageSettings,
    dataset: FrameWindows,
    workers: int,
    steps: int,
    device: torch.device,
) -> Turn:
    """Train by a plain loop for a turn."""
    options = {"lr": settings.learning_rate, "betas": tuple(settings.betas), "weight_decay": settings.weight_decay}
    optimizer = torch.optim.AdamW(network.parameters(), **options)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=WARM_UP + steps, pct_start=0.03, div_factor=10
    )

    network.train()
    batches, waited, started = iter(DataLoader(dataset, BATCH, num_workers=workers)), 0.0, 0.0
    for number in range(WARM_UP + steps):
        if number == WARM_UP:
            waited, started = 0.0, time.perf_counter()
        asked = time.perf_counter()
        x, stamp = next(batches)
        waited += time.perf_counter() - asked
        x, stamp = x.to(device), stamp.to(device)
        optimizer.zero_grad()
        loss(x, stamp).backward()
        nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
        optimizer.step()
        schedule.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    return Turn(steps * BATCH / seconds, waited / seconds)


def save_networks(name: str, folder: Path, **changes: float) -> tuple[Path, Path]:
    """Write new networks of the zoo's shapes, but for `changes` of both: the folders of tokenizer and model."""
    torch.manual_seed(0)
    entry = zoo.MODELS[name]
    KronosTokenizer(**zoo.TOKENIZERS[entry.tokenizer].config | changes).save_pretrained(folder / "tokenizer")
    Kronos(**entry.config | changes).save_pretrained(folder / "model")
    return folder / "tokenizer", folder / "model"


def our_stage(name: str, paths: tuple[Path, Path], settings: StageSettings) -> Stage:
    """A stage of ours."""
    tokenizer = KronosTokenizer.from_pretrained(paths[0])
    if name == "tokenizer":
        return TokenizerStage(tokenizer, settings)
    return PredictorStage(Kronos.from_pretrained(paths[1]), tokenizer, settings)


def plain_stage(
    name: str, paths: tuple[Path, Path], device: torch.device | str = "cpu", draw_s1: bool = True
) -> tuple[nn.Module, Callable[..., Tensor]]:
    """The other side's network to train, and its loss of x [B, T, 6] and stamps [B, T, 5]."""
    from sktime.libs.kronos import kronos as reference

    with contextlib.redirect_stdout(io.StringIO()):  # the hub's mixin says that it loads a local folder
        tokenizer = reference.KronosTokenizer.from_pretrained(str(paths[0])).to(device)
        model = reference.Kronos.from_pretrained(str(paths[1])).to(device) if name == "predictor" else None

    def reconstruction(x: Tensor, stamp: Tensor) -> Tensor:
        (coarse, full), bsq_loss, _, _ = tokenizer(x)
        return (F.mse_loss(coarse, x) + F.mse_loss(full, x) + bsq_loss) / 2

    def prediction(x: Tensor, stamp: Tensor) -> Tensor:
        with torch.no_grad():
            s1, s2 = tokenizer.encode(x, half=True)
        query = {} if draw_s1 else {"use_teacher_forcing": True, "s1_targets": s1[:, 1:]}
        logits = model(s1[:, :-1], s2[:, :-1], stamp[:, :-1].long(), **query)
        return model.head.compute_loss(*logits, s1[:, 1:], s2[:, 1:])[0]

    if name == "tokenizer":
        return tokenizer, reconstruction
    tokenizer.eval()
    return model, prediction


def difference(model: str, name: str, windows: Windows, folder: Path) -> float:
    """The larger relative difference of loss and gradient norm, in float32, without dropout and draws."""
    dropouts = ("ffn_dropout_p", "attn_dropout_p", "resid_dropout_p")
    paths = save_networks(model, folder, **dict.fromkeys(dropouts, 0.0))
    settings = SETTINGS[name]
    if name == "predictor":
        settings = settings.model_copy(update={"s1_query": "teacher_forced"})
    stage = our_stage(name, paths, settings)
    network, plain_loss = plain_stage(name, paths, draw_s1=False)
    examples = gather(windows, np.linspace(0, len(windows) - 1, BATCH).astype(int))
    figures = []
    for trained, loss_of, batch in (
        (stage.network, stage.loss, [examples]),
        (network, plain_loss, [examples.x, examples.stamp]),
    ):
        trained.train()
        for part in trained.modules():  # the model's token dropout is no constructor argument of the tokenizer
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        loss = loss_of(*batch)
        loss.backward()
        figures.append((loss.item(), nn.utils.get_total_norm(p.grad for p in trained.parameters()).item()))
    return max(abs(ours - theirs) / abs(theirs) for ours, theirs in zip(*figures, strict=True))


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without what C++ code says on standard error: torch's profiler tells of its beginning and end."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def where_time_goes(stage: Stage, windows: Windows, part: int, repeats: int = 3) -> dict[str, float]:
    """Shares of products, attention and the rest in the time of a pass, forward and backward, of one thread."""
    chance = np.random.default_rng(0).random((part, LOOKBACK + FUTURE - 1), np.float32)
    examples = gather(windows, np.linspace(0, len(windows) - 1, part).astype(int), chance=chance)
    parameters = [parameter for parameter in stage.network.parameters() if parameter.requires_grad]
    stage.network.train()

    def one_pass() -> None:
        with use_generator(torch.Generator().manual_seed(0)):
            torch.autograd.grad(stage.loss(examples), parameters)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with retain_heap():
        one_pass()
        with silent(), profile(activities=[ProfilerActivity.CPU]) as profiled:
            for _ in range(repeats):
                one_pass()
    torch.set_num_threads(threads)
    seconds = dict.fromkeys(("products", "attention", "rest"), 0.0)
    for operation in profiled.key_averages():
        kind = next((kind for kind, names in OPERATIONS.items() if operation.key.startswith(names)), "rest")
        seconds[kind] += operation.self_cpu_time_total
    return {kind: part / sum(seconds.values()) for kind, part in seconds.items()}


def measure(model: str, name: str, options: argparse.Namespace, windows: Windows, dataset: FrameWindows) -> dict:
    """One row of the table: both sides in turns, `rounds` times, after a comparison of what they compute."""
    settings, dtype, steps = SETTINGS[name], DTYPES[options.dtype], options.steps or STEPS[model]
    device = resolve_device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        apart = difference(model, name, windows, Path(folder) / "without dropout")
        paths = save_networks(model, Path(folder))
        stage, (network, loss) = our_stage(name, paths, settings), plain_stage(name, paths, device)

    def our(steps: int) -> Turn:
        return our_turn(stage, windows, device, dtype, steps, options.compile)

    def plain(workers: int, steps: int) -> Turn:
        return plain_turn(network, loss, settings, dataset, workers, steps, device)

    workers = max(WORKERS, key=lambda workers: plain(workers, min(steps, 5)).rate)
    our(steps=1)
    ours, theirs, products = [], [], []
    for _ in range(options.rounds):
        ours.append(our(steps))
        theirs.append(plain(workers, steps))
        products.append(matrix_rate(dtype, device=device))
    rate, work = statistics.median(turn.rate for turn in ours), gflop_per_window(model, name)
    ratios = [one.rate / other.rate for one, other in zip(ours, theirs, strict=True)]
    where = bound = "–"
    if device.type == "cpu" and dtype is torch.float32 and not options.compile:  # a profile is of that alone
        shares = where_time_goes(stage, windows, part=-(-BATCH // 4))
        where = " / ".join(f"{share:.0%}" for share in shares.values())
        bound = f"{statistics.median(ratios) / (1 - shares['rest']):.2f}×"
    waits = (statistics.median(turn.data_wait for turn in turns) for turns in (ours, theirs))
    return {
        "model": model,
        "stage": name,
        "GFLOP/window": f"{work:.2f}",
        "plain windows/s": f"{statistics.median(turn.rate for turn in theirs):.1f} ({workers} workers)",
        "our windows/s": f"{rate:.1f}",
        "ratio (min … max)": spread(ratios, 2),
        "GFLOP/s": f"{rate * work:.0f}",
        f"{MATRIX}² GFLOP/s": f"{statistics.median(products):.0f}",
        "share": f"{rate * work / statistics.median(products):.0%}",
        "products / attention / rest": where,
        "bound": bound,
        "data wait": " / ".join(f"{wait:.1%}" for wait in waits),
        "difference": f"{apart:.0e}" if apart <= AGREEMENT else f"{apart:.0e} DIFFERS",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ", ".join(f"{name} {steps}" for name, steps in STEPS.items())
    parser.add_argument("--models", nargs="+", choices=STEPS, default=list(STEPS), help="(default: all of them)")
    parser.add_argument("--stages", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="(default: both)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: %(default)s)")
    parser.add_argument("--steps", type=int, help=f"steps of {BATCH} windows timed in a turn (default: {default})")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of our products (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for both sides (default: %(default)s)")
    parser.add_argument(
        "--compile", action="store_true", help="let torch.compile build our step (needs a C++ compiler)"
    )
    options = parser.parse_args()
    try:
        import sktime.libs.kronos  # noqa: F401
    except ImportError:
        parser.error("the extra `bench` is not installed: pip install -c constraints.txt -e '.[bench]'")
    torch.set_num_threads(options.threads)

    print(describe("sktime"))
    if options.threads > cores():
        print(f"caution   {options.threads} threads on {cores()} cores: the figures will be poor")
    dtype, device = DTYPES[options.dtype], resolve_device(options.device)
    if dtype is torch.bfloat16 and resolve_dtype("auto", device) is not dtype:
        print("caution   this device does not multiply bfloat16 in hardware: it will be far slower than float32")
    print(
        f"settings  {options.device}, {options.threads} threads, {options.dtype}{', compiled' * options.compile}, "
        f"batches of {BATCH} windows of {LOOKBACK + FUTURE} bars, median of {options.rounds} rounds\n"
    )
    frames = make_frames()
    windows, dataset = make_windows(frames), FrameWindows(frames)
    agreed = True
    for number, (model, stage) in enumerate(itertools.product(options.models, options.stages)):
        row = measure(model, stage, options, windows, dataset)
        print_row(row, with_heading=number == 0)
        agreed &= "DIFFERS" not in row["difference"]
    if not agreed:
        print(f"\nThe two sides' losses differ by more than {AGREEMENT:g}: the comparison is worth nothing.")
    return 0 if agreed else 1


if __name__ == "__main__":
    raise SystemExit(main())
