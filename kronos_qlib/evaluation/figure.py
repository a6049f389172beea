"""The figure of a forecast's evaluation: coverage, CRPS, PIT, where it gains, and what calibrating changes."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from kronos_qlib.evaluation.measures import BANDS, perfect_coverage
from kronos_qlib.evaluation.palette import INK, KRONOS, LAST_VALUE, QUIET, VOLATILITY
from kronos_qlib.evaluation.style import DASHED, draw_legend_below, draw_title, new_figure, style_axes

_COMPARED = "crps", "interval_50", "interval_90", "coverage_50", "coverage_90", "qlike", "energy", "dm_p"
_COMPARED += "crps_difference", "crps_difference_low", "crps_difference_high"
_NAMES = {"volatility": "historical volatility", "last_value": "last value"}


@dataclass(frozen=True)
class Evaluation:
    """The tables of an evaluation, of `kronos_qlib.evaluation.measures` and `.calibration`.

    samples: paths a forecast. first, last: score dates. note: shown in the figure. calibration, prob_up: None without a
    calibration; baselines: of `compare_baselines`, None without any; risk: of `backtest_risk`, None without paths.
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
    baselines: pd.DataFrame | None = None
    risk: pd.DataFrame | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """The figures that are not in `overall`, by name."""
        figures = {"samples": self.samples} | {
            f"{band}_perfect": value for band, value in perfect_coverage(self.samples).items()
        }
        if self.calibration is not None:
            for row in self.calibration[self.calibration["step"] == "all"].to_dict("records"):
                figures[f"calibrated.{row['measure']}"] = row["after"]
                figures[f"uncalibrated.{row['measure']}"] = row["before"]
        if self.baselines is not None:
            for row in self.baselines[self.baselines["step"] == "all"].to_dict("records"):
                prefix = "" if row["forecast"] == "kronos" else f"{row['forecast']}."
                figures |= {f"{prefix}{name}": row[name] for name in _COMPARED}
        return figures


def draw_evaluation(evaluation: Evaluation) -> Figure:
    """Draw an evaluation, and below it the calibration if there is one."""
    rows = 3 if evaluation.calibration is not None else 2
    height = 1.2 + 3.9 * rows
    figure = new_figure(height)
    axes = figure.subplots(rows, 2)
    figure.subplots_adjust(top=1 - 1.2 / height, bottom=0.95 / height, left=0.075, right=0.975, hspace=0.5, wspace=0.28)
    draw_title(figure, "Forecasts and actual closes", _subtitle(evaluation), evaluation.note)
    _draw_coverage(axes[0, 0], evaluation)
    _draw_crps(axes[0, 1], evaluation.steps)
    _draw_pit(axes[1, 0], evaluation.pit)
    _draw_groups(axes[1, 1], evaluation)
    if evaluation.calibration is not None:
        _draw_calibrated(axes[2, 0], evaluation.calibration)
        _draw_prob_up(axes[2, 1], evaluation)
    return figure


def _subtitle(evaluation: Evaluation) -> str:
    first, last = (f"{pd.Timestamp(date):%d %b %Y}" for date in (evaluation.first, evaluation.last))
    return (
        f"{evaluation.overall['evaluated_windows'].iloc[0]:,.0f} forecasts from {evaluation.samples} samples each, "
        f"{first} to {last} · ratios to the last close · bars and shades: 95 %, overlapping horizons allowed for"
    )


def _draw_coverage(axes: Axes, evaluation: Evaluation) -> None:
    steps, perfect = evaluation.steps, perfect_coverage(evaluation.samples)
    for band in BANDS:
        first = band == "coverage_90"
        axes.axhline(int(band[-2:]) / 100, color=INK, linewidth=1, label="nominal" if first else None)
        label = f"{evaluation.samples} samples of the right distribution" if first else None
        axes.axhline(perfect[band], color=QUIET, linewidth=1, linestyle=(0, (1, 2)), label=label)
        axes.fill_between(steps.index, steps[f"{band}_low"], steps[f"{band}_high"], color=KRONOS, alpha=0.15, lw=0)
        axes.plot(steps.index, steps[band], "o-", color=KRONOS, markersize=4, label="Kronos" if first else None)
        label = "historical volatility" if first else None
        axes.plot(steps.index, steps[f"{band}_volatility"], color=VOLATILITY, linestyle=DASHED, label=label)
    _style_steps(axes, "Coverage of the 50 % and 90 % bands")
    _coverage_scale(axes)
    draw_legend_below(axes, 2)


def _draw_crps(axes: Axes, steps: pd.DataFrame) -> None:
    axes.plot(steps.index, steps["crps_last_value"], color=LAST_VALUE, linestyle=DASHED, label="last value")
    axes.plot(steps.index, steps["crps_volatility"], color=VOLATILITY, linestyle=DASHED, label="historical volatility")
    axes.plot(steps.index, steps["crps"], "o-", color=KRONOS, markersize=4, label="Kronos")
    _style_steps(axes, "CRPS in % of the last close (less is better)")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    draw_legend_below(axes, 3)


def _draw_pit(axes: Axes, pit: pd.DataFrame) -> None:
    pit = pit[pit["step"] == "all"]
    edges = [*pit["low"], pit["high"].iloc[-1]]
    axes.stairs(pit["density"], edges, fill=True, color=KRONOS, alpha=0.55, label="Kronos")
    axes.stairs(pit["density_volatility"], edges, color=VOLATILITY, linewidth=1.4, label="historical volatility")
    axes.axhline(1, color=INK, linewidth=1, label="calibrated")
    style_axes(axes, "PIT, all steps", "probability forecast of a close below the actual one", "density")
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    draw_legend_below(axes, 3)


def _draw_groups(axes: Axes, evaluation: Evaluation) -> None:
    tables = (evaluation.by_volatility.rename(index="{} volatility".format), evaluation.by_year)
    groups = pd.concat([evaluation.overall.rename(index={0: "all"}), *tables])
    rows = np.arange(len(groups))
    for offset, name, colour in ((-0.13, "volatility", VOLATILITY), (0.13, "last_value", LAST_VALUE)):
        difference, low, high = (groups[f"crps_less_{name}{end}"] for end in ("", "_low", "_high"))
        axes.hlines(rows + offset, low, high, color=colour, linewidth=1.6)
        axes.plot(difference, rows + offset, "o", color=colour, label=f"Kronos less {_NAMES[name]}")
    axes.axvline(0, color=INK, linewidth=1)
    style_axes(axes, "CRPS of Kronos less a simple forecast's", "← Kronos better      Kronos worse →")
    axes.set(yticks=rows, yticklabels=groups.index, ylim=(len(groups) - 0.4, -0.6))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=2))
    draw_legend_below(axes, 2)


def _draw_calibrated(axes: Axes, calibration: pd.DataFrame) -> None:
    steps = calibration[calibration["step"] != "all"]
    for band in BANDS:
        first, table = band == "coverage_90", steps[steps["measure"] == band]
        at = table["step"].astype(int)
        axes.axhline(int(band[-2:]) / 100, color=INK, linewidth=1, label="nominal" if first else None)
        axes.plot(at, table["before"], color=QUIET, linestyle=DASHED, label="before" if first else None)
        axes.plot(at, table["after"], "o-", color=KRONOS, markersize=4, label="after" if first else None)
    _style_steps(axes, "Coverage before and after calibration")
    _coverage_scale(axes)
    draw_legend_below(axes, 3)


def _draw_prob_up(axes: Axes, evaluation: Evaluation) -> None:
    brier = evaluation.calibration.set_index("measure").loc["brier"]
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, label=f"calibrated (a constant: Brier {brier['constant']:.3f})")
    for when, colour, line in (("before", QUIET, DASHED), ("after", KRONOS, "-")):
        table = evaluation.prob_up[evaluation.prob_up["when"] == when]
        sizes = 12 + 150 * table["windows"] / table["windows"].sum()
        axes.plot(table["forecast"], table["share"], color=colour, linestyle=line, linewidth=1)
        axes.scatter(table["forecast"], table["share"], s=sizes, color=colour, label=f"{when}: Brier {brier[when]:.3f}")
    style_axes(axes, "prob_up and the share that rose (area: forecasts)", "probability forecast")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    draw_legend_below(axes, 2)


def _coverage_scale(axes: Axes) -> None:
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    for band in BANDS:
        at = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8, "color": INK}
        axes.annotate(f"{band[-2:]} %", (1, int(band[-2:]) / 100), xycoords=axes.get_yaxis_transform(), **at)


def _style_steps(axes: Axes, title: str) -> None:
    style_axes(axes, title, "bars ahead")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
