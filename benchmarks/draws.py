"""What sampling and precision do to scores: variance over seeds, and agreement of bfloat16 with float32.

    QLIB_DATA=/path/to/cn_data qrun workflows/kronos_csi300_nano.yaml        # trains the networks that are asked
    QLIB_DATA=/path/to/cn_data python benchmarks/draws.py

Windows are those of the workflow's valid segment on some days, evenly spaced.

- Variance: of `mean_return` over seeds, per window, averaged over windows; independent samples beside stratified ones.
  The ratio says how many times as many independent samples would give the same precision.
- Precision: Spearman's correlation over the instruments of a day of `mean_return` in bfloat16 with that in float32, at
  the same random numbers. (On a processor without bfloat16 products this is slow.)
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from machine import describe
from scipy.stats import spearmanr
from table import print_row
from trained import RUN, Trained

from kronos_qlib.forecast.run import Run, forecast
from kronos_qlib.forecast.task import Task

SCORE = "mean_return"


def score(task: Task) -> np.ndarray:
    values, _ = forecast(task, Run(), [SCORE])
    return values[SCORE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=RUN, help="(default: %(default)s)")
    parser.add_argument("--days", type=int, default=10, help="score dates (default: %(default)s)")
    parser.add_argument("--per-day", type=int, default=60, help="windows a day for the variance (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--samples", type=int, nargs="+", default=[5, 20], help="(default: %(default)s)")
    options = parser.parse_args()

    print(describe())
    trained = Trained.load(options.run)
    windows = trained.dataset.score_windows("valid")
    dates = np.unique(windows.dates)
    chosen = dates[np.linspace(0, len(dates) - 1, options.days).astype(int)]
    windows = windows.take(np.isin(windows.dates, chosen))
    rows = [np.flatnonzero(windows.dates == date) for date in chosen]
    few = windows.take(np.sort(np.concatenate([day[:: max(1, len(day) // options.per_day)] for day in rows])))
    print(
        f"windows   {len(few):,} of {options.days} days for the variance over {options.seeds} seeds, {len(windows):,}"
    )
    print("          for the precision\n")
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
    exact, rounded = (score(trained.task(windows, dtype)) for dtype in (torch.float32, torch.bfloat16))
    correlations = [spearmanr(exact[day], rounded[day]).statistic for day in rows]
    print(
        f"\nrank correlation of bfloat16 with float32, 5 samples, per day: mean {np.mean(correlations):.4f}, least "
        f"{min(correlations):.4f} of {len(rows)} days"
    )


if __name__ == "__main__":
    main()
