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
from dataclasses import replace
from pathlib import Path

import numpy as np
import qlib
import torch
from machine import describe
from scipy.stats import spearmanr
from table import print_row

from kronos_qlib import Kronos, KronosTokenizer
from kronos_qlib.forecast.generate import Sampling
from kronos_qlib.forecast.run import Run, forecast
from kronos_qlib.forecast.task import Task, future_stamps
from kronos_qlib.workflow.finetuning import read_workflow

WORKFLOW = Path(__file__).parents[1] / "workflows" / "kronos_csi300_nano.yaml"
SCORE = "mean_return"


def score(task: Task) -> np.ndarray:
    values, _ = forecast(task, Run(), [SCORE])
    return values[SCORE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/kronos_csi300_nano"), help="(default: %(default)s)")
    parser.add_argument("--days", type=int, default=10, help="score dates (default: %(default)s)")
    parser.add_argument("--per-day", type=int, default=60, help="windows a day for the variance (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--samples", type=int, nargs="+", default=[5, 20], help="(default: %(default)s)")
    options = parser.parse_args()

    from qlib.utils import init_instance_by_config

    print(describe())
    config = read_workflow(WORKFLOW)
    qlib.init(provider_uri=config["qlib_init"]["provider_uri"], region="cn", logging_level=30)
    dataset = init_instance_by_config(config["task"]["dataset"])
    windows = dataset.score_windows("valid")
    dates = np.unique(windows.dates)
    chosen = dates[np.linspace(0, len(dates) - 1, options.days).astype(int)]
    windows = windows.take(np.isin(windows.dates, chosen))
    settings = config["task"]["model"]["kwargs"]["forecast"]
    known = ("temperature", "top_k", "top_p", "s2_rotation")
    sampling = Sampling(**{key: settings[key] for key in known})

    def task_of(windows, samples, seed, spread="independent", dtype=torch.float32):
        return Task(
            tokenizer=KronosTokenizer.from_pretrained(options.run / "tokenizer" / "best"),
            model=Kronos.from_pretrained(options.run / "predictor" / "best"),
            windows=windows,
            future_stamp=future_stamps(windows, dataset.horizon, dataset.calendar.stamps_after),
            sampling=replace(sampling, sample_count=samples, seed=seed, sampling=spread),
            max_context=config["task"]["model"]["kwargs"]["max_context"],
            dtype=dtype,
        )

    rows = [np.flatnonzero(windows.dates == date) for date in chosen]
    few = windows.take(np.sort(np.concatenate([day[:: max(1, len(day) // options.per_day)] for day in rows])))
    print(
        f"windows   {len(few):,} of {options.days} days for the variance over {options.seeds} seeds, {len(windows):,}"
    )
    print("          for the precision\n")
    for number, samples in enumerate(options.samples):
        scores = {
            spread: np.stack([score(task_of(few, samples, seed, spread)) for seed in range(options.seeds)])
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
    exact, rounded = (score(task_of(windows, 5, 100, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    correlations = [spearmanr(exact[day], rounded[day]).statistic for day in rows]
    print(
        f"\nrank correlation of bfloat16 with float32, 5 samples, per day: mean {np.mean(correlations):.4f}, least "
        f"{min(correlations):.4f} of {len(rows)} days"
    )


if __name__ == "__main__":
    main()
