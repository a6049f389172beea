"""Proof that nothing leaks: on markets without signal no model finds one, and where something leaks the test says so.

    python benchmarks/leaks.py                       # all three cases, 20 seeds; half an hour on two cores
    python benchmarks/leaks.py --signal 0            # one case alone
    python benchmarks/leaks.py --signal 0.05
    python benchmarks/leaks.py --leak
    python benchmarks/leaks.py --seeds 3

A seed is a demo market of its own (synthetic, `kronos_qlib.data.demo_market`), on which a tiny Kronos is trained, both
stages, and calibrated on its valid segment, a tiny KronosRanker, LightGBM on Alpha158, and LightGBM on Alpha158 with
the factors of a new Kronos. All score the test segment; t is that of the mean daily rank IC (Newey–West, lag the
horizon).

- Without signal (`--signal 0`) the next cross-section is as likely as its mirror image, so no function of past bars has
  an expected rank IC but 0. The proof asks for no |t| above 3.5, and a mean t within 2 standard errors of 0.
- With a signal (`--signal 0.05`: the information coefficient of the planted rule) the mean t of each must be above 2 by
  2 standard errors: a test that finds nothing is worth nothing if nothing could be found. `untrained` are the same
  networks with random weights. They see the planted rule too: they put the next closes somewhere near the mean of the
  lookback, and that is a reversal. What training adds is the difference of the two columns, not Kronos' t alone.
- With a leak (`--leak`: signal 0, every window normalised by its lookback and its horizon, in training and in scoring)
  the same test must fail, for every seed. The leak takes two ways. What is forecast comes back to prices by a mean and
  a scale that hold the horizon: a forecast that stays near zero in normalised units, as new networks' do, then says
  where prices will be. And a window's closes sum to zero over lookback and horizon together, so that a last close above
  the mean foretells a fall: this training can learn. So it takes neither a good model nor a long training to be caught.
  It takes a horizon that weighs something beside the lookback, here 5 of 25 bars.

Ends with status 1 if any of it is not so. Same machine, same settings: the same table.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pandas as pd
import qlib
import torch
from machine import cores, describe
from qlib.contrib.data.handler import Alpha158
from qlib.contrib.eva.alpha import calc_ic
from qlib.data.dataset import DatasetH
from qlib.data.dataset.handler import DataHandlerLP
from table import print_row

from kronos_qlib import Alpha158Kronos, KLineDataset, KLineHandler, KronosModel, KronosRanker
from kronos_qlib.analysis.significance import newey_west_t
from kronos_qlib.data.demo_market import UNIVERSE, write_demo_market
from kronos_qlib.data.windows import Batch, Windows, normalise
from kronos_qlib.nn import zoo

LARGEST_T = 3.5
FOUND_T = 2.0
STANDARD_ERRORS = 2.0
LOOKBACK, HORIZON = 20, 5
SHAPE = {"d_model": 32, "ff_dim": 64, "n_heads": 2, "s1_bits": 6, "s2_bits": 6}
TOKENIZER = zoo.TOKENIZERS["nano"].config | SHAPE | {"n_enc_layers": 2, "n_dec_layers": 2}
MODEL = zoo.MODELS["nano"].config | SHAPE | {"n_layers": 1}
STAGE = {"epochs": 1, "batch_size": 32, "learning_rate": 3e-3, "valid_windows": 200}
RANKER = {"epochs": 1, "days_per_epoch": 250, "batch_size": 4, "learning_rate": 2e-3, "valid_days": 30}
FORECAST = {"sample_count": 2, "temperature": 1.0, "top_p": 1.0, "batch_size": 64}
# As workflows/lightgbm_demo.yaml.
LIGHTGBM = {"objective": "mse", "learning_rate": 0.05, "num_leaves": 31, "max_depth": 6, "colsample_bytree": 0.8879}
LIGHTGBM |= {"lambda_l1": 10, "lambda_l2": 30}
LIGHTGBM |= {"num_threads": 1, "deterministic": True, "force_col_wise": True, "verbosity": -1}


@dataclass(frozen=True)
class Size:
    """How much is simulated and learnt: many days of few instruments, for Alpha158 takes its time per instrument."""

    instruments: int = 30
    days: int = 1500
    tokenizer_windows: int = 1500
    predictor_windows: int = 2500


@dataclass(frozen=True)
class Case:
    """A kind of market and who is asked there."""

    title: str
    signal: float
    models: tuple[str, ...]


@dataclass(frozen=True)
class LeakingWindows(Windows):
    """Windows with the fault to be caught: mean and scale are those of the lookback and of the horizon after it."""

    horizon: int = field(kw_only=True)

    def normalised(self, rows: np.ndarray) -> Batch:
        ends = self.ends[rows]
        last = self.bars.offsets[self.bars.codes[ends] + 1] - 1  # an instrument's horizon may be cut short
        seen = np.minimum(ends[:, None] + np.arange(1 - self.lookback, self.horizon + 1), last[:, None])
        _, mean, scale = normalise(self.bars.values[seen], seen.shape[1])
        x = np.clip((self.values(rows) - mean) / scale, -self.clip, self.clip).astype(np.float32)
        return Batch(x, self.stamps(rows), mean, scale, super().normalised(rows).last_close)


class LeakingDataset(KLineDataset):
    """A KLineDataset whose windows, for training and for scoring, are `LeakingWindows`."""

    def score_windows(self, segment: Any = "test") -> Windows:
        return self._leaking(super().score_windows(segment))

    def training_windows(self, segment: Any) -> Windows:
        return self._leaking(super().training_windows(segment))

    def _leaking(self, windows: Windows) -> LeakingWindows:
        known = windows.bars, windows.ends, windows.lookback, windows.future, windows.clip
        return LeakingWindows(*known, horizon=self.horizon)


def segments(days: int) -> dict[str, list[str]]:
    """Half of the days to train on, a tenth to judge by, the rest for the test, with room for label and horizon."""
    dates = pd.bdate_range("2018-01-02", periods=days).strftime("%Y-%m-%d")
    train, valid, gap = days // 2, days * 6 // 10, HORIZON + 1
    return {
        "train": [dates[0], dates[train - gap]],
        "valid": [dates[train], dates[valid - gap]],
        "test": [dates[valid], dates[-1 - gap]],
    }


def rank_ic_t(dataset: DatasetH, score: pd.Series) -> float:
    """The Newey–West t, lag = horizon, of the mean daily rank IC of a score over the test segment."""
    label = dataset.prepare("test", col_set="label", data_key=DataHandlerLP.DK_R).iloc[:, 0]
    both = pd.DataFrame({"score": score, "label": label}).dropna()
    _, daily = calc_ic(both["score"], both["label"])
    t = newey_west_t(daily, HORIZON)
    if not np.isfinite(t):
        raise ValueError(f"no t: {len(both):,} scores with a label, {both['score'].nunique():,} of them different")
    return float(t)


def lightgbm_t(size: Size, handler: type[Alpha158] = Alpha158, **settings: Any) -> float:
    """Of LightGBM on Alpha158, trained on the market in use, as Qlib's LGBModel does it but without its recorder."""
    parts = segments(size.days)
    fit = {"fit_start_time": parts["train"][0], "fit_end_time": parts["train"][1]}
    dataset = DatasetH(handler(UNIVERSE, **fit, **settings), parts)
    learn = [
        lightgbm.Dataset(rows["feature"], rows["label"].iloc[:, 0])
        for rows in dataset.prepare(["train", "valid"], col_set=["feature", "label"], data_key=DataHandlerLP.DK_L)
    ]
    stop = lightgbm.early_stopping(50, verbose=False)
    model = lightgbm.train(LIGHTGBM, learn[0], 1000, valid_sets=learn[1:], callbacks=[stop])
    features = dataset.prepare("test", col_set="feature", data_key=DataHandlerLP.DK_I)
    return rank_ic_t(dataset, pd.Series(model.predict(features), features.index))


def factors_t(size: Size, seed: int) -> float:
    """Of LightGBM on Alpha158 and all factors of a Kronos with random weights."""
    networks = {"tokenizer": TOKENIZER, "model": MODEL, "device": "cpu", "dtype": "float32", "seed": seed}
    windows = {"lookback": LOOKBACK, "horizon": HORIZON, "forecast": FORECAST}
    pca = {"components": 8, "fit": segments(size.days)["train"]}
    return lightgbm_t(size, Alpha158Kronos, kronos={**networks, **windows, "pca": pca})


def kronos_t(
    size: Size,
    seed: int,
    folder: Path,
    dataset: type[KLineDataset] = KLineDataset,
    calibration: dict[str, Any] | None = None,
) -> float:
    """Of a tiny Kronos, both stages trained on the market in use, or read where they were trained before.

    With `LeakingDataset`, on windows that leak; with a calibration, its forecasts are calibrated on the valid segment.
    """
    finetune = {
        "output_dir": str(folder),
        "processes": 1,
        "micro_batch_size": STAGE["batch_size"],
        "tokenizer": STAGE | {"windows_per_epoch": size.tokenizer_windows},
        "predictor": STAGE | {"windows_per_epoch": size.predictor_windows, "s1_query": "teacher_forced"},
    }
    return _fitted_t(dataset, size, seed, finetune, calibration)


def ranker_t(size: Size, seed: int, folder: Path) -> float:
    """Of a tiny KronosRanker, trained from scratch on the bars of the market in use."""
    windows = KLineDataset(KLineHandler(UNIVERSE), segments(size.days), LOOKBACK, HORIZON)
    settings = {"output_dir": str(folder), "processes": 1, "inputs": "bars", **RANKER}
    model = KronosRanker(TOKENIZER, MODEL, ranker=settings, device="cpu", dtype="float32", seed=seed)
    model.fit(windows)
    return rank_ic_t(windows, model.predict(windows))


def untrained_t(size: Size, seed: int) -> float:
    """Of the networks that `kronos_t` starts from: random weights."""
    return _fitted_t(KLineDataset, size, seed, None)


def _fitted_t(
    dataset: type[KLineDataset],
    size: Size,
    seed: int,
    finetune: dict[str, Any] | None,
    calibration: dict[str, Any] | None = None,
) -> float:
    windows = dataset(KLineHandler(UNIVERSE), segments(size.days), LOOKBACK, HORIZON)
    settings = {"finetune": finetune, "forecast": FORECAST, "calibration": calibration}
    model = KronosModel(TOKENIZER, MODEL, **settings, device="cpu", dtype="float32", seed=seed)
    model.fit(windows)
    return rank_ic_t(windows, model.predict(windows))


def t_values(seed: int, signal: float, models: Sequence[str], size: Size, folder: Path) -> dict[str, float]:
    """The t of each model, as named below, on its own market, which Qlib then uses."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        market = write_demo_market(
            place / "market", instruments=size.instruments, days=size.days, signal=signal, seed=seed
        )
        qlib.init(provider_uri=str(market), region="cn", kernels=1, logging_level=40, clear_mem_cache=True)
        ask = {
            "kronos": lambda: kronos_t(size, seed, place / "kronos"),
            "calibrated": lambda: kronos_t(size, seed, place / "kronos", calibration={"days": 40}),
            "ranker": lambda: ranker_t(size, seed, place / "ranker"),
            "lightgbm": lambda: lightgbm_t(size),
            "factors": lambda: factors_t(size, seed),
            "untrained": lambda: untrained_t(size, seed),
            "leaking": lambda: kronos_t(size, seed, place / "leaking", LeakingDataset),
        }
        return {model: ask[model]() for model in models}


def signal_faults(t: Sequence[float], standard_errors: float = STANDARD_ERRORS) -> list[str]:
    """What speaks against "there is nothing to be found here" in the t of some seeds: one line each."""
    t, faults = np.asarray(t), []
    beyond = np.abs(t) > LARGEST_T
    if beyond.any():
        faults.append(f"|t| is above {LARGEST_T} for {beyond.sum()} of {len(t)} seeds")
    if abs(t.mean()) > standard_errors * standard_error(t):
        faults.append(f"the mean t is {abs(t.mean()) / standard_error(t):.1f} standard errors away from 0")
    return faults


def blindness_faults(t: Sequence[float]) -> list[str]:
    """What speaks against "this finds the signal" in the t of some seeds."""
    least = np.mean(t) - STANDARD_ERRORS * standard_error(t)
    return [] if least > FOUND_T else [f"the mean t less {STANDARD_ERRORS:g} standard errors is only {least:.1f}"]


def standard_error(t: Sequence[float]) -> float:
    """Of the mean of independent t: each has standard deviation 1, and the spread found is not to excuse a mean."""
    return 1 / np.sqrt(len(t))


def judged(model: str, t: pd.Series, signal: float) -> tuple[str, bool]:
    """What is to be said of a model's t, and whether it is as it should be."""
    if model == "untrained":
        return "for comparison", True
    if model == "leaking":
        caught = int((t.abs() > LARGEST_T).sum())
        return f"the leak is caught in {caught} of {len(t)} seeds", caught == len(t)
    faults = blindness_faults(t) if signal else signal_faults(t)
    fine = "finds the signal" if signal else "finds nothing, as it should be"
    return "; ".join(faults) or fine, not faults


def verdict(case: Case, t: pd.DataFrame) -> tuple[list[str], bool]:
    """Lines that say what came of a case, and whether all of it is as it should be."""
    lines, all_good = [], True
    for model in case.models:
        said, good = judged(model, t[model], case.signal)
        spread = f" (standard deviation {t[model].std():.2f})" if len(t) > 1 else ""
        mean = f"mean t {t[model].mean():+.2f} ± {standard_error(t[model]):.2f}{spread}"
        lines.append(f"{model:<10} {mean}, largest |t| {t[model].abs().max():.2f}: {said}")
        all_good &= good
    return [*lines, "as it should be" if all_good else "NOT AS IT SHOULD BE"], all_good


def measured(case: Case, seeds: int, size: Size, pool: ProcessPoolExecutor, folder: Path) -> Iterator[dict[str, Any]]:
    """A row of t per seed, as soon as it and those before it are there."""
    ask = partial(t_values, signal=case.signal, models=case.models, size=size, folder=folder)
    for seed, t in enumerate(pool.map(ask, range(seeds))):
        yield {"seed": seed} | t


def prove(case: Case, seeds: int, size: Size, pool: ProcessPoolExecutor, folder: Path) -> bool:
    """Measure and print a case; whether it is as it should be."""
    print(f"\n## {case.title}\n", flush=True)
    started, rows = time.perf_counter(), []
    for row in measured(case, seeds, size, pool, folder):
        rows.append(row)
        print_row({key: value if key == "seed" else f"{value:+.2f}" for key, value in row.items()}, len(rows) == 1)
    lines, good = verdict(case, pd.DataFrame(rows))
    print("\n" + "\n".join(lines) + f"\n({time.perf_counter() - started:.0f} s)", flush=True)
    return good


def cases(signal: float | None, leak: bool) -> list[Case]:
    """What the options ask for; without options all three."""
    none = Case("signal 0: there is nothing to find", 0.0, ("kronos", "calibrated", "ranker", "lightgbm", "factors"))
    caught = Case("signal 0, normalised over the horizon too: a leak", 0.0, ("leaking",))
    if signal is None and not leak:
        return [none, _with_signal(0.05), caught]
    asked = [] if signal is None else [_with_signal(signal) if signal else none]
    return asked + [caught] * leak


def _with_signal(signal: float) -> Case:
    return Case(
        f"signal {signal:g}: there is something to find",
        signal,
        ("kronos", "calibrated", "ranker", "lightgbm", "factors", "untrained"),
    )


def quiet() -> None:
    """One thread, and nothing said by Qlib, LightGBM and progress bars, in a process of the pool."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.dup2(nowhere, sys.stderr.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="markets 0, 1, … of each case (default: %(default)s)")
    parser.add_argument("--signal", type=float, help="this case alone; 0 plants nothing (default: 0 and then 0.05)")
    parser.add_argument("--leak", action="store_true", help="the leak alone, or after the case of --signal")
    parser.add_argument("--processes", type=int, default=cores(), help="seeds at a time (default: %(default)s)")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds should be 1 or more; it is {options.seeds}")
    if options.signal is not None and not 0 <= options.signal <= 0.5:
        parser.error(f"--signal should be from 0 to 0.5; it is {options.signal:g}")
    size = Size()
    print(describe("statsmodels", "lightgbm"))
    print(f"{size}, {LOOKBACK} + {HORIZON} bars, synthetic")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn"), quiet) as pool,
    ):
        done = [prove(case, options.seeds, size, pool, Path(folder)) for case in cases(options.signal, options.leak)]
    sys.exit(0 if all(done) else 1)


if __name__ == "__main__":
    main()
