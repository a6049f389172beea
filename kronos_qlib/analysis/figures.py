"""Figures of runs side by side, as PNG."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from kronos_qlib.analysis.charts import ROLLING_DAYS
from kronos_qlib.analysis.comparison import Comparison
from kronos_qlib.analysis.notes import synthetic_note
from kronos_qlib.analysis.results import RunResult
from kronos_qlib.evaluation.palette import QUIET, SERIES
from kronos_qlib.evaluation.style import (
    DASHED,
    draw_legend,
    draw_title,
    new_figure,
    save_figure,
    style_axes,
    style_dates,
)


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
    figure = new_figure(6.6, width=10)
    margins = {"top": 0.845, "left": 0.075, "right": 0.975, "bottom": 0.07}
    upper, lower = figure.subplots(2, sharex=True, gridspec_kw={"height_ratios": (3, 1), "hspace": 0.08} | margins)
    for number, run in enumerate(runs):
        if len(run.report):
            _draw_run(upper, lower, run, SERIES[number % len(SERIES)])
    _style(upper, "excess return")
    _style(lower, "drawdown")
    lower.yaxis.set_major_locator(MaxNLocator(3))
    style_dates(lower)
    _draw_cost_legend(upper)
    days = [day for run in runs if len(run.report) for day in run.report.index[[0, -1]]]
    span = f"{min(days):%d %b %Y} to {max(days):%d %b %Y}" if days else "no run has a backtest"
    subtitle = f"returns less the benchmark's, summed · {span}"
    _draw_title(figure, runs, "Cumulative excess return over the benchmark", subtitle)
    save_figure(figure, path)


def plot_rolling_ic(comparison: Comparison, path: Path) -> None:
    """Write the mean daily rank IC of the last `ROLLING_DAYS` days of every run.

    With fewer days in common a sentence stands in the axes.
    """
    figure, axes = _one_axes()
    for number, (name, daily) in enumerate(comparison.rank_ic.items()):
        mean = daily.rolling(ROLLING_DAYS).mean()
        axes.plot(mean.index, mean, color=SERIES[number % len(SERIES)], linewidth=1.8, label=name)
    _style(axes, "rank IC", percent=False)
    style_dates(axes)
    if len(comparison.rank_ic) < ROLLING_DAYS:
        message = f"the runs have {len(comparison.rank_ic)} {comparison.step}s in common"
        axes.text(0.5, 0.5, message, transform=axes.transAxes, ha="center", color=QUIET)
    draw_legend(axes)
    first, last = comparison.rank_ic.index[[0, -1]]
    subtitle = f"rank IC, mean of {ROLLING_DAYS} {comparison.step}s · scores of {first:%d %b %Y} to {last:%d %b %Y}"
    _draw_title(figure, comparison.runs, "Rolling rank IC", subtitle)
    save_figure(figure, path)


def plot_deciles(comparison: Comparison, path: Path) -> None:
    """Write the mean label of the tenths of the instruments by score, of every run."""
    figure, axes = _one_axes()
    for number, (name, means) in enumerate(comparison.deciles.items()):
        colour = SERIES[number % len(SERIES)]
        axes.plot(means.index, means, "o-", color=colour, linewidth=1.6, markersize=5, label=name)
    _style(axes, "mean label", xlabel="decile of the score, 10 the highest")
    axes.set_xticks(comparison.deciles.index)
    draw_legend(axes)
    _draw_title(
        figure, comparison.runs, "Deciles", f"mean label a {comparison.step} of the tenths of the instruments by score"
    )
    save_figure(figure, path)


def _one_axes() -> tuple[Figure, Axes]:
    figure = new_figure(5.4, width=10)
    return figure, figure.subplots(gridspec_kw={"top": 0.82, "left": 0.085, "right": 0.975, "bottom": 0.11})


def _draw_run(upper: Axes, lower: Axes, run: RunResult, colour: str) -> None:
    before_cost = run.report["return"] - run.report["bench"]
    after_cost = before_cost - run.report["cost"]
    total = after_cost.cumsum()
    drawdown = total - total.cummax()
    upper.plot(before_cost.cumsum(), color=colour, linewidth=1.1, linestyle=DASHED, alpha=0.75)
    upper.plot(total, color=colour, linewidth=2, label=f"{run.name}  {100 * total.iloc[-1]:+.1f} %")
    lower.plot(drawdown, color=colour, linewidth=1.1)
    lower.fill_between(pd.DatetimeIndex(drawdown.index), drawdown, 0, color=colour, alpha=0.12, linewidth=0)


def _style(axes: Axes, ylabel: str, percent: bool = True, xlabel: str = "") -> None:
    style_axes(axes, xlabel=xlabel, ylabel=ylabel)
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{round(100 * ratio, 6):g} %"))
    axes.axhline(0, color=QUIET, linewidth=0.9, zorder=1)


def _draw_cost_legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    lines = {"after costs": {"linewidth": 2}, "before costs": {"linewidth": 1.1, "linestyle": DASHED}}
    handles += [Line2D([], [], color=QUIET, **look) for look in lines.values()]
    draw_legend(axes, handles=handles, labels=[*labels, *lines], loc="best")


def _draw_title(figure: Figure, runs: Sequence[RunResult], title: str, subtitle: str) -> None:
    note = synthetic_note(runs)
    draw_title(figure, title, subtitle, f"{note}\nsimulated bars, not a real result" if note else "")
