"""What matplotlib's figures share: frame, titles, axes."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure

from kronos_qlib.evaluation.palette import GRID, INK, LIGHT, QUIET
from kronos_qlib.files import whole_file

DASHED = (0, (4, 2))
BEHIND_TEXT = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}


def new_figure(height: float, width: float = 11) -> Figure:
    """Make a white figure of inches for a file; it needs no display."""
    figure = Figure(figsize=(width, height), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with whole_file(path) as draft:
        figure.savefig(draft, format="png")


def draw_title(figure: Figure, title: str, subtitle: str, note: str = "") -> None:
    """Write the title and the subtitle into the figure's uppermost 0.8 inches, and a note into a box at the right."""
    height = figure.get_figheight()
    figure.text(0.02, 1 - 0.42 / height, title, fontsize=15, fontweight="bold", color=INK)
    figure.text(0.02, 1 - 0.7 / height, subtitle, fontsize=9.5, color=QUIET)
    if note:
        box = {"boxstyle": "round,pad=0.5", "facecolor": LIGHT["warn"], "edgecolor": LIGHT["warn-line"]}
        look = {"fontsize": 9, "fontweight": "bold", "color": LIGHT["warn-ink"], "linespacing": 1.4, "bbox": box}
        figure.text(0.975, 1 - 0.4 / height, note, ha="right", va="center", **look)


def style_axes(axes: Axes, title: str = "", xlabel: str = "", ylabel: str = "") -> None:
    """Name the axes; grid behind the data, no frame, no ticks."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel(xlabel, color=QUIET)
    axes.set_ylabel(ylabel, color=QUIET)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=QUIET)
    axes.margins(x=0.02)


def style_dates(axes: Axes) -> None:
    """Label the x axis with dates, each part of a date once."""
    axes.xaxis.set_major_locator(locator := AutoDateLocator())
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def draw_legend(axes: Axes, **options: Any) -> None:
    """Draw a legend on a white ground, so that a curve behind it leaves it legible."""
    look = {"facecolor": "white", "framealpha": 0.85, "edgecolor": "none", "labelcolor": INK}
    axes.legend(**look | options)


def draw_legend_below(axes: Axes, columns: int) -> None:
    """Draw a legend under the x label, where no curve is."""
    place = {"loc": "upper left", "bbox_to_anchor": (-0.02, -0.17), "ncols": columns}
    draw_legend(axes, fontsize=8, columnspacing=1.2, framealpha=0, **place)
