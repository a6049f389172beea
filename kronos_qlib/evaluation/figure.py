"""The figure of a forecast's evaluation: coverage, CRPS, PIT, where it gains, and what calibrating changes."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from kronos_qlib.evaluation.measures import BANDS, perfect_coverage

# Of Okabe & Ito (2008), told apart with any colour vision.
_KRONOS, _VOLATILITY, _LAST_VALUE = "#0072B2", "#D55E00", "#009E73"
_INK, _QUIET, _GRID = "#222222", "#666666", "#e4e4e4"
_NAMES = {"volatility": "historical volatility", "last_value": "last value"}
_DASHED = (0, (4, 2))


@dataclass(frozen=True)
class Evaluation:
    """The tables of an evaluation, as `kronos_qlib.evaluation.measures` and `.calibration` make them.

    samples: paths a forecast. first, last: score dates. note: shown in the figure. calibration, prob_up: None without.
    """

    overall: pd.DataFrame
    steps: pd.DataFrame
    by_year: pd.DataFrame
    by_volatility: pd.DataFrame
    pit: pd.DataFrame
    samples: int
    first: np.datetime64
    last: np.datetime64
    note: str = ""
    calibration: pd.DataFrame | None = None
    prob_up: pd.DataFrame | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """What is known beside `overall`, by name."""
        figures = {"samples": self.samples} | {
            f"{band}_perfect": value for band, value in perfect_coverage(self.samples).items()
        }
        if self.calibration is not None:
            for row in self.calibration[self.calibration["step"] == "all"].to_dict("records"):
                figures[f"calibrated.{row['measure']}"] = row["after"]
                figures[f"uncalibrated.{row['measure']}"] = row["before"]
        return figures


def evaluation_figure(evaluation: Evaluation) -> Figure:
    """Draw an evaluation, and below it a calibration if there is one."""
    rows = 3 if evaluation.calibration is not None else 2
    height = 1.2 + 3.9 * rows
    figure = Figure(figsize=(11, height), dpi=140, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 2)
    figure.subplots_adjust(top=1 - 1.2 / height, bottom=0.95 / height, left=0.075, right=0.975, hspace=0.5, wspace=0.28)
    _title(figure, evaluation, height)
    _draw_coverage(axes[0, 0], evaluation)
    _draw_crps(axes[0, 1], evaluation.steps)
    _draw_pit(axes[1, 0], evaluation.pit)
    _draw_groups(axes[1, 1], evaluation)
    if evaluation.calibration is not None:
        _draw_calibrated(axes[2, 0], evaluation.calibration)
        _draw_prob_up(axes[2, 1], evaluation)
    return figure


def _title(figure: Figure, evaluation: Evaluation, height: float) -> None:
    first, last = (f"{pd.Timestamp(date):%d %b %Y}" for date in (evaluation.first, evaluation.last))
    said = (
        f"{evaluation.overall['evaluated_windows'].iloc[0]:,.0f} forecasts from {evaluation.samples} samples each, "
        f"{first} to {last} · ratios to the last close · bars and shades: 95 %, overlapping horizons allowed for"
    )
    figure.text(0.02, 1 - 0.42 / height, "Forecasts and what came", fontsize=15, fontweight="bold", color=_INK)
    figure.text(0.02, 1 - 0.68 / height, said, fontsize=9, color=_QUIET)
    if evaluation.note:
        box = {"boxstyle": "round,pad=0.4", "facecolor": "#fff1d6", "edgecolor": "#E69F00"}
        at = {"ha": "right", "fontsize": 9, "fontweight": "bold", "color": "#7a4a00", "bbox": box}
        figure.text(0.975, 1 - 0.4 / height, evaluation.note, **at)


def _draw_coverage(axes: Axes, evaluation: Evaluation) -> None:
    steps, perfect = evaluation.steps, perfect_coverage(evaluation.samples)
    for band in BANDS:
        first = band == "coverage_90"
        axes.axhline(int(band[-2:]) / 100, color=_INK, linewidth=1, label="nominal" if first else None)
        label = f"{evaluation.samples} samples of the right distribution" if first else None
        axes.axhline(perfect[band], color=_QUIET, linewidth=1, linestyle=(0, (1, 2)), label=label)
        axes.fill_between(steps.index, steps[f"{band}_low"], steps[f"{band}_high"], color=_KRONOS, alpha=0.15, lw=0)
        axes.plot(steps.index, steps[band], "o-", color=_KRONOS, markersize=4, label="Kronos" if first else None)
        label = "historical volatility" if first else None
        axes.plot(steps.index, steps[f"{band}_volatility"], color=_VOLATILITY, linestyle=_DASHED, label=label)
    _style(axes, "Coverage of the 50 % and 90 % bands", "bars ahead")
    _coverage_scale(axes)
    _legend(axes, 2)


def _draw_crps(axes: Axes, steps: pd.DataFrame) -> None:
    axes.plot(steps.index, steps["crps_last_value"], color=_LAST_VALUE, linestyle=_DASHED, label="last value")
    axes.plot(
        steps.index, steps["crps_volatility"], color=_VOLATILITY, linestyle=_DASHED, label="historical volatility"
    )
    axes.plot(steps.index, steps["crps"], "o-", color=_KRONOS, markersize=4, label="Kronos")
    _style(axes, "CRPS in % of the last close (less is better)", "bars ahead")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    _legend(axes, 3)


def _draw_pit(axes: Axes, pit: pd.DataFrame) -> None:
    pit = pit[pit["step"] == "all"]
    edges = [*pit["low"], pit["high"].iloc[-1]]
    axes.stairs(pit["density"], edges, fill=True, color=_KRONOS, alpha=0.55, label="Kronos")
    axes.stairs(pit["density_volatility"], edges, color=_VOLATILITY, linewidth=1.4, label="historical volatility")
    axes.axhline(1, color=_INK, linewidth=1, label="calibrated")
    _style(axes, "PIT, all steps", "probability forecast of a close below the one that came")
    axes.set_ylabel("density", color=_QUIET)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    _legend(axes, 3)


def _draw_groups(axes: Axes, evaluation: Evaluation) -> None:
    tables = (evaluation.by_volatility.rename(index="{} volatility".format), evaluation.by_year)
    groups = pd.concat([evaluation.overall.rename(index={0: "all"}), *tables])
    rows = np.arange(len(groups))
    for offset, name, colour in ((-0.13, "volatility", _VOLATILITY), (0.13, "last_value", _LAST_VALUE)):
        difference, low, high = (groups[f"crps_less_{name}{end}"] for end in ("", "_low", "_high"))
        axes.hlines(rows + offset, low, high, color=colour, linewidth=1.6)
        axes.plot(difference, rows + offset, "o", color=colour, label=f"Kronos less {_NAMES[name]}")
    axes.axvline(0, color=_INK, linewidth=1)
    _style(axes, "CRPS of Kronos less a simple forecast's", "← Kronos better      Kronos worse →")
    axes.set(yticks=rows, yticklabels=groups.index, ylim=(len(groups) - 0.4, -0.6))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=2))
    _legend(axes, 2)


def _draw_calibrated(axes: Axes, calibration: pd.DataFrame) -> None:
    steps = calibration[calibration["step"] != "all"]
    for band in BANDS:
        first, table = band == "coverage_90", steps[steps["measure"] == band]
        at = table["step"].astype(int)
        axes.axhline(int(band[-2:]) / 100, color=_INK, linewidth=1, label="nominal" if first else None)
        axes.plot(at, table["before"], color=_QUIET, linestyle=_DASHED, label="before" if first else None)
        axes.plot(at, table["after"], "o-", color=_KRONOS, markersize=4, label="after" if first else None)
    _style(axes, "Coverage before and after calibration", "bars ahead")
    _coverage_scale(axes)
    _legend(axes, 3)


def _draw_prob_up(axes: Axes, evaluation: Evaluation) -> None:
    brier = evaluation.calibration.set_index("measure").loc["brier"]
    axes.plot([0, 1], [0, 1], color=_INK, linewidth=1, label=f"calibrated (a constant: Brier {brier['constant']:.3f})")
    for when, colour, line in (("before", _QUIET, _DASHED), ("after", _KRONOS, "-")):
        table = evaluation.prob_up[evaluation.prob_up["when"] == when]
        sizes = 12 + 150 * table["windows"] / table["windows"].sum()
        axes.plot(table["forecast"], table["share"], color=colour, linestyle=line, linewidth=1)
        axes.scatter(table["forecast"], table["share"], s=sizes, color=colour, label=f"{when}: Brier {brier[when]:.3f}")
    _style(axes, "prob_up and the share that rose (area: forecasts)", "probability forecast")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    _legend(axes, 2)


def _legend(axes: Axes, columns: int) -> None:
    """Below the axes, where no curve is."""
    place = {"loc": "upper left", "bbox_to_anchor": (-0.02, -0.17), "ncols": columns}
    axes.legend(frameon=False, labelcolor=_INK, fontsize=8, columnspacing=1.2, **place)


def _coverage_scale(axes: Axes) -> None:
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    for band in BANDS:
        at = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8, "color": _INK}
        axes.annotate(f"{band[-2:]} %", (1, int(band[-2:]) / 100), xycoords=axes.get_yaxis_transform(), **at)


def _style(axes: Axes, heading: str, below: str) -> None:
    axes.set_title(heading, loc="left", fontsize=11, fontweight="bold", color=_INK)
    axes.set_xlabel(below, color=_QUIET)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=_QUIET)
    axes.margins(x=0.03)
    axes.xaxis.set_major_locator(MaxNLocator(integer=below == "bars ahead"))
