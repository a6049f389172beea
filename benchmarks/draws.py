"""What sampling and precision do to scores: variance over seeds, and agreement of bfloat16 with float32.

    QLIB_DATA=/path/to/cn_data qrun workflows/kronos_csi300_nano.yaml        # trains the networks that are asked
    QLIB_DATA=/path/to/cn_data python benchmarks/draws.py

Windows are those of the workflow's valid segment on some days, evenly spaced.

- Variance: of `mean_return` over seeds, per window, averaged over windows; independent samples beside stratified ones.
  The ratio says how many times as many independent samples would give the same precision.
- Precision: Spearman's correlation over the instruments of a day of `mean_return` in bfloat16 with that in float32, at
  the same random numbers. (On a processor without bfloat16 products this is slow.) Beside it the same for an engine
  that cannot be built: products in float32 of weights and inputs that are rounded to bfloat16, nothing else rounded.
  Hardware that multiplies bfloat16 rounds that much at least.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from machine import describe
from scipy.stats import spearmanr
from table import print_row
from torch import Tensor
from tqdm.auto import tqdm
from trained import RUN, Trained

from kronos_qlib.forecast.chunk_store import divide
from kronos_qlib.forecast.engine.weights import Linear, NetworkWeights, Stack, prepare_weights
from kronos_qlib.forecast.forecaster import Forecaster
from kronos_qlib.forecast.run import CHUNK_WINDOWS, Execution, forecast
from kronos_qlib.forecast.task import Task

SCORE = "mean_return"


@dataclass(frozen=True)
class Rounded(Linear):
    """A product in float32 of weights and inputs that are rounded to bfloat16."""

    @classmethod
    def of(cls, layer: Linear) -> "Rounded":
        return cls(layer.weight.bfloat16().float(), layer.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x.bfloat16().float())

    def rows(self, rows: slice) -> "Rounded":
        return Rounded(**vars(super().rows(rows)))


def rounded(net: NetworkWeights) -> NetworkWeights:
    """Float32 networks with such products where `prepare` has bfloat16 ones."""

    def stack(blocks: Stack) -> Stack:
        layers = ("qkv", "out", "w13", "w2")
        changed = [
            replace(block, **{name: Rounded.of(getattr(block, name)) for name in layers}) for block in blocks.blocks
        ]
        return replace(blocks, blocks=changed)

    model = replace(
        net.model,
        stack=stack(net.model.stack),
        cross_kv=Rounded.of(net.model.cross_kv),
        cross_out=Rounded.of(net.model.cross_out),
    )
    return replace(net, tokenizer=replace(net.tokenizer, decoder=stack(net.tokenizer.decoder)), model=model)


def score(task: Task) -> np.ndarray:
    values, _ = forecast(task, Execution(), [SCORE])
    return values[SCORE]


def score_rounded(task: Task) -> np.ndarray:
    networks = task.tokenizer.eval(), task.model.eval()
    weights = prepare_weights(*networks, task.max_context, torch.float32, task.windows.lookback)
    forecaster = Forecaster(task, rounded(weights))
    chunks = divide(np.ones(len(task), bool), CHUNK_WINDOWS)
    tables = [forecaster.table(rows) for rows in tqdm(chunks, desc="rounded", unit="chunk")]
    return np.concatenate([table.column(SCORE).to_numpy() for table in tables])


def spread_over(dates: np.ndarray, count: int) -> np.ndarray:
    """So many of the dates, evenly spaced."""
    return dates[np.linspace(0, len(dates) - 1, count).astype(int)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=RUN, help="(default: %(default)s)")
    parser.add_argument("--days", type=int, default=10, help="score dates for the variance (default: %(default)s)")
    parser.add_argument(
        "--precision-days", type=int, default=30, help="score dates for the precision (default: %(default)s)"
    )
    parser.add_argument("--per-day", type=int, default=60, help="windows a day for the variance (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--samples", type=int, nargs="+", default=[5, 20], help="(default: %(default)s)")
    options = parser.parse_args()

    print(describe())
    trained = Trained.load(options.run)
    windows = trained.dataset.score_windows("valid")
    dates = np.unique(windows.dates)
    days = [np.flatnonzero(windows.dates == date) for date in spread_over(dates, options.days)]
    few = windows.take(np.sort(np.concatenate([day[:: max(1, len(day) // options.per_day)] for day in days])))
    print(f"windows   {len(few):,} of {options.days} days for the variance over {options.seeds} seeds\n")
    for number, samples in enumerate(options.samples):
        scores = {
            spread: np.stack(
                [
                    score(trained.task(few, sample_count=samples, seed=seed, sampling=spread))
                    for seed in range(options.seeds)
                ]
            )
            for spread in ("independent", "stratified")
        }
        variance = {name: values.var(0, ddof=1).mean() for name, values in scores.items()}
        bias = scores["stratified"].mean() - scores["independent"].mean()
        error = np.sqrt(sum(values.mean(1).var(ddof=1) / options.seeds for values in scores.values()))
        row = {
            "samples": samples,
            "independent, variance of mean_return": f"{variance['independent']:.3e}",
            "stratified": f"{variance['stratified']:.3e}",
            "ratio": f"{variance['independent'] / variance['stratified']:.2f}×",
            "difference of means ± standard error": f"{bias:+.1e} ± {error:.1e}",
        }
        print_row(row, with_heading=number == 0)

    many = windows.take(np.isin(windows.dates, spread_over(dates, options.precision_days)))
    days = [np.flatnonzero(many.dates == date) for date in np.unique(many.dates)]
    exact = score(trained.task(many))
    print(f"\nrank correlation with float32 per day, {len(many):,} windows of {len(days)} days, 5 samples")
    engines = {
        "bfloat16": lambda: score(trained.task(many, torch.bfloat16)),
        "weights and inputs rounded": lambda: score_rounded(trained.task(many)),
    }
    for number, (name, engine) in enumerate(engines.items()):
        values = engine()
        correlations = np.array([spearmanr(exact[day], values[day]).statistic for day in days])
        row = {
            "engine": name,
            "mean": f"{correlations.mean():.4f}",
            "least": f"{correlations.min():.4f}",
            "days below 0.99": f"{(correlations < 0.99).sum()}",
        }
        print_row(row, with_heading=number == 0)


if __name__ == "__main__":
    main()
