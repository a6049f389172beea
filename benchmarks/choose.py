"""What score, horizon and sampling do best on the valid segment: what may be chosen without a look at the test.

    QLIB_DATA=/path/to/cn_data qrun workflows/kronos_csi300_nano.yaml          # trains the networks
    QLIB_DATA=/path/to/cn_data python benchmarks/choose.py                     # forecasts valid some times over

Every third score date of the workflow's valid segment is forecast with each of some samplings, and of each the ten
scores are made over 1, 3, 5 and all 10 steps, as they are and with volatility and size taken out. Rank IC is against
the workflow's label, which for no date kept reaches into the test segment. The best of so many is best by chance for
a good part: the last line says how many there were.

Writes choose.csv, one row per combination, beside the networks. Forecasts are kept there too; run it again and only
what is missing is computed.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from machine import describe
from table import print_row
from tqdm import tqdm
from trained import RUN, Trained

from kronos_qlib.analysis.signals import daily_rank_ic, wide
from kronos_qlib.analysis.significance import newey_west_t
from kronos_qlib.data.windows import CLOSE, COLUMNS, Windows
from kronos_qlib.forecast.run import Execution, forecast
from kronos_qlib.forecast.scores import scores
from kronos_qlib.workflow.neutralise import factor_ranks, neutralised

SAMPLINGS = {
    "as in the workflow": {},
    "temperature 0.8": {"temperature": 0.8},
    "temperature 1, top_p 0.9": {"temperature": 1.0},
    "temperature 1, all tokens": {"temperature": 1.0, "top_p": 1.0},
    "20 stratified samples": {"sample_count": 20, "sampling": "stratified"},
}
HORIZONS = 1, 3, 5, 10
NEUTRAL = {"": [], "volatility, size": ["volatility", "size"]}
LABEL_BARS = 2  # the label looks two bars ahead


def kept_windows(trained: Trained, every: int) -> tuple[Windows, pd.Series]:
    """Windows of every n-th score date of valid and their labels, all of which lie within valid."""
    windows = trained.dataset.score_windows("valid")
    dates = np.unique(windows.dates)[:-LABEL_BARS]
    windows = windows.take(np.isin(windows.dates, dates[::every]))
    labels = trained.dataset.prepare("valid", col_set="label", data_key="raw").iloc[:, 0]
    index = pd.MultiIndex.from_arrays([windows.dates, windows.instruments], names=["datetime", "instrument"])
    return windows, labels.reindex(index)


def all_scores(trained: Trained, windows: Windows, sampling: dict, run: Path) -> Iterator[tuple[int, str, np.ndarray]]:
    """Horizon, name and values [W] of every score."""
    task = trained.task(windows, keep_paths=True, **sampling)
    columns, _ = forecast(task, Execution(run / "choose"), ["paths", "last_close"])
    steps = trained.dataset.horizon
    close = columns["paths"].reshape(len(windows), -1, steps, len(COLUMNS))[..., CLOSE].astype(np.float64)
    blocks = [rows for rows in np.array_split(np.arange(len(windows)), 64) if len(rows)]
    scale = np.concatenate([windows.normalised(rows).scale[:, 0, CLOSE] for rows in blocks])
    for horizon in HORIZONS:
        for name, values in scores(close[..., :horizon], columns["last_close"], scale).items():
            yield horizon, name, values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=RUN, help="(default: %(default)s)")
    parser.add_argument("--every", type=int, default=3, help="every n-th score date (default: %(default)s)")
    parser.add_argument("--best", type=int, default=12, help="rows to print (default: %(default)s)")
    options = parser.parse_args()

    print(describe())
    trained = Trained.load(options.run)
    windows, labels = kept_windows(trained, options.every)
    returns, lag = wide(labels), -(-trained.dataset.horizon // options.every)
    ranks = {said: factor_ranks(trained.dataset, windows, names) for said, names in NEUTRAL.items() if names}
    rows = []
    for said, sampling in SAMPLINGS.items():
        scored = all_scores(trained, windows, sampling, options.run)
        for horizon, name, values in tqdm(scored, desc=said, total=len(HORIZONS) * 10, unit="score"):
            plain = pd.Series(values, labels.index)
            for neutral in NEUTRAL:
                score = neutralised(plain, ranks[neutral]) if neutral else plain
                daily = daily_rank_ic(wide(score), returns)
                row = {"sampling": said, "horizon": horizon, "score": name, "without": neutral}
                row |= {"rank_ic": daily.mean(), "icir": daily.mean() / daily.std(), "t": newey_west_t(daily, lag)}
                rows.append(row)
    table = pd.DataFrame(rows)
    table.to_csv(options.run / "choose.csv", index=False)
    print(f"\n{len(windows):,} windows, {returns.shape[0]} days; t: Newey–West, lag {lag}\n")
    usual = (table["sampling"] == "as in the workflow") & (table["horizon"] == trained.dataset.horizon)
    usual &= (table["score"] == trained.settings["score"]) & (table["without"] == "")
    best = pd.concat([table[usual], table.sort_values("t", ascending=False).head(options.best)])
    for number, row in enumerate(best.to_dict("records")):
        figures = {"rank_ic": f"{row['rank_ic']:+.4f}", "icir": f"{row['icir']:+.3f}", "t": f"{row['t']:+.2f}"}
        print_row(row | figures, with_heading=number == 0)
    print(f"\nThe first row is the workflow, the others the best by t of {len(table):,} combinations.")


if __name__ == "__main__":
    main()
