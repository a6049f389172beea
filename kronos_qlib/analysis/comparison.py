"""The table of runs side by side: as a DataFrame, in the terminal and as comparison.csv."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kronos_qlib.analysis.results import RunResult
from kronos_qlib.files import whole_file

# Column of the table: heading and format in the terminal.
_HEADINGS = {
    "ic": ("IC", "{:+.4f}"),
    "icir": ("ICIR", "{:+.3f}"),
    "rank_ic": ("Rank IC", "{:+.4f}"),
    "rank_icir": ("Rank ICIR", "{:+.3f}"),
    "excess_return_with_cost": ("Excess/year", "{:+.1%}"),
    "information_ratio": ("Inf. ratio", "{:+.2f}"),
    "max_drawdown": ("Drawdown", "{:.1%}"),
}
COLUMNS = list(_HEADINGS)
SYNTHETIC = "SYNTHETIC demo market"


def comparison(runs: Sequence[RunResult]) -> pd.DataFrame:
    """One row per run, index `run`, columns `COLUMNS`.

    ic, rank_ic: mean of the daily (rank) information coefficient; icir, rank_icir: that mean over its standard
    deviation, daily. excess_return_with_cost: over the benchmark, a year, as a ratio (0.05 is 5 %);
    information_ratio: of the same, annualised; max_drawdown: of the summed excess return, a ratio below 0. All as
    Qlib's SigAnaRecord and PortAnaRecord stored them.
    """
    index = pd.Index([run.name for run in runs], name="run")
    return pd.DataFrame([run.metrics for run in runs], index=index, columns=COLUMNS)


def terminal_text(runs: Sequence[RunResult]) -> str:
    """The comparison as aligned plain text, with the notes a reader needs to judge it."""
    headings = ["run", *(heading for heading, _ in _HEADINGS.values())]
    rows = [
        [name, *(_cell(layout, row[column]) for column, (_, layout) in _HEADINGS.items())]
        for name, row in comparison(runs).iterrows()
    ]
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    ruler = "─" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [
        "  ".join(
            [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        )
        for cells in [headings, *rows]
    ]
    return "\n".join([lines[0], ruler, *lines[1:], ruler, *_notes(runs)])


def _cell(layout: str, value: float) -> str:
    return layout.format(value) if np.isfinite(value) else "n/a"


def _notes(runs: Sequence[RunResult]) -> list[str]:
    periods = {run.name: backtest_period(run) for run in runs}
    notes = ["Excess/year, Inf. ratio and Drawdown: over the benchmark, after costs."]
    if len(set(periods.values())) == 1:
        notes.append(f"Backtest {next(iter(periods.values()))}.")
    else:
        notes.append("CAUTION: the backtests cover different dates, so these rows do not compare:")
        notes += [f"  {name}: {period}" for name, period in periods.items()]
    if any(run.synthetic for run in runs):
        notes.append(f"{synthetic_note(runs)}: simulated bars, no evidence about real markets.")
    return notes


def backtest_period(run: RunResult) -> str:
    """First and last day and number of days of the backtest, in words."""
    first, last = run.report.index[0], run.report.index[-1]
    return f"{first:%Y-%m-%d} … {last:%Y-%m-%d}, {len(run.report)} days"


def synthetic_note(runs: Sequence[RunResult]) -> str:
    """Who ran on a demo market, in words; empty if nobody did."""
    names = [run.name for run in runs if run.synthetic]
    return SYNTHETIC + (f" ({', '.join(names)})" if len(names) < len(runs) else "") if names else ""


def write_csv(runs: Sequence[RunResult], path: Path) -> None:
    """Write `comparison(runs)` with full precision, and the column `synthetic` (True for a demo market) at its end."""
    table = comparison(runs).assign(synthetic=[run.synthetic for run in runs])
    with whole_file(path) as draft:
        table.to_csv(draft)
