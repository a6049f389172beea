"""Figures of runs side by side, as PNG."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from kronos_qlib.analysis.charts import ROLLING_DAYS
from kronos_qlib.analysis.comparison import Comparison
from kronos_qlib.analysis.notes import synthetic_note
from kronos_qlib.analysis.results import RunResult
from kronos_qlib.files import whole_file

# Okabe & Ito (2008), told apart with any colour vision; their yellow is left out, too pale for a line on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_INK, _QUIET, _GRID = "#222222", "#666666", "#e4e4e4"


def plot_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Write excess_return.png, rolling_ic.png and deciles.png to `folder`, and return their paths."""
    paths = [folder / f"{name}.png" for name in ("excess_return", "rolling_ic", "deciles")]
    plot_excess_return(comparison.runs, paths[0])
    plot_rolling_ic(comparison, paths[1])
    plot_deciles(comparison, paths[2])
    return paths


def plot_excess_return(runs: Sequence[RunResult], path: Path) -> None:
    """Write the cumulative excess return of every run, after costs (solid) and before (dashed), its drawdown below.

    Returns are summed, not compounded, as in Qlib's risk analysis, so the deepest point below is Qlib's max_drawdown.
    """
    figure = Figure(figsize=(10, 6.6), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(
        2,
        sharex=True,
        gridspec_kw={
            "height_ratios": (3, 1),
            "hspace": 0.08,
            "top": 0.845,
            "left": 0.075,
            "right": 0.975,
            "bottom": 0.07,
        },
    )
    for number, run in enumerate(runs):
        _draw_run(upper, lower, run, _COLOURS[number % len(_COLOURS)])
    _style(upper, "excess return")
    _style(lower, "drawdown")
    lower.yaxis.set_major_locator(MaxNLocator(3))
    lower.xaxis.set_major_locator(locator := AutoDateLocator())
    lower.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    _legend(upper)
    first = min(run.report.index[0] for run in runs)
    last = max(run.report.index[-1] for run in runs)
    said = f"daily returns less the benchmark's, summed · {first:%d %b %Y} to {last:%d %b %Y}"
    _title(figure, runs, "Cumulative excess return over the benchmark", said)
    _save(figure, path)


def plot_rolling_ic(comparison: Comparison, path: Path) -> None:
    """Write the mean daily rank IC of the last `ROLLING_DAYS` days of every run.

    With fewer days in common the picture is of axes that say so.
    """
    figure, axes = _one_axes()
    for number, (name, daily) in enumerate(comparison.rank_ic.items()):
        mean = daily.rolling(ROLLING_DAYS).mean()
        axes.plot(mean.index, mean, color=_COLOURS[number % len(_COLOURS)], linewidth=1.8, label=name)
    _style(axes, "rank IC", percent=False)
    axes.xaxis.set_major_locator(locator := AutoDateLocator())
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    if len(comparison.rank_ic) < ROLLING_DAYS:
        said = f"the runs have {len(comparison.rank_ic)} days in common"
        axes.text(0.5, 0.5, said, transform=axes.transAxes, ha="center", color=_QUIET)
    axes.legend(facecolor="white", framealpha=0.85, edgecolor="none", labelcolor=_INK)
    first, last = comparison.rank_ic.index[[0, -1]]
    said = f"daily rank IC, mean of {ROLLING_DAYS} days · scores of {first:%d %b %Y} to {last:%d %b %Y}"
    _title(figure, comparison.runs, "Rolling rank IC", said)
    _save(figure, path)


def plot_deciles(comparison: Comparison, path: Path) -> None:
    """Write the mean label of the tenths of the instruments by score, of every run."""
    figure, axes = _one_axes()
    for number, (name, means) in enumerate(comparison.deciles.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        axes.plot(means.index, means, "o-", color=colour, linewidth=1.6, markersize=5, label=name)
    _style(axes, "mean label")
    axes.set_xticks(comparison.deciles.index)
    axes.set_xlabel("decile of the score, 10 the highest", color=_QUIET)
    axes.legend(facecolor="white", framealpha=0.85, edgecolor="none", labelcolor=_INK)
    _title(figure, comparison.runs, "Deciles", "mean label a day of the tenths of the instruments by score")
    _save(figure, path)


def _one_axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(10, 5.4), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(gridspec_kw={"top": 0.82, "left": 0.085, "right": 0.975, "bottom": 0.11})


def _save(figure: Figure, path: Path) -> None:
    with whole_file(path) as draft:
        figure.savefig(draft, format="png")


def _draw_run(upper: Axes, lower: Axes, run: RunResult, colour: str) -> None:
    before_cost = run.report["return"] - run.report["bench"]
    after_cost = before_cost - run.report["cost"]
    total = after_cost.cumsum()
    drawdown = total - total.cummax()
    upper.plot(before_cost.cumsum(), color=colour, linewidth=1.1, linestyle=(0, (4, 2)), alpha=0.75)
    upper.plot(total, color=colour, linewidth=2, label=f"{run.name}  {100 * total.iloc[-1]:+.1f} %")
    lower.plot(drawdown, color=colour, linewidth=1.1)
    lower.fill_between(pd.DatetimeIndex(drawdown.index), drawdown, 0, color=colour, alpha=0.12, linewidth=0)


def _style(axes: Axes, label: str, percent: bool = True) -> None:
    axes.set_ylabel(label, color=_QUIET)
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{round(100 * ratio, 6):g} %"))
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.axhline(0, color=_QUIET, linewidth=0.9, zorder=1)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=_QUIET)
    axes.margins(x=0.01)


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    handles += [
        Line2D([], [], color=_QUIET, linewidth=2),
        Line2D([], [], color=_QUIET, linewidth=1.1, linestyle=(0, (4, 2))),
    ]
    axes.legend(
        handles,
        [*labels, "after costs", "before costs"],
        frameon=True,
        facecolor="white",
        framealpha=0.85,
        edgecolor="none",
        labelcolor=_INK,
        loc="best",
    )


def _title(figure: Figure, runs: Sequence[RunResult], heading: str, said: str) -> None:
    figure.text(0.02, 0.945, heading, fontsize=15, fontweight="bold", color=_INK)
    figure.text(0.02, 0.895, said, fontsize=10, color=_QUIET)
    note = synthetic_note(runs)
    if note:
        figure.text(
            0.975,
            0.945,
            f"{note}\nsimulated bars, not a real result",
            fontsize=10,
            fontweight="bold",
            color="#7a4a00",
            ha="right",
            va="center",
            linespacing=1.4,
            bbox={"boxstyle": "round,pad=0.5", "facecolor": "#fff1d6", "edgecolor": "#E69F00"},
        )
