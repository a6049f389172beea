"""The figure of a training report: losses over learning rates, use of the codes, reconstruction error."""

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from kronos_qlib.evaluation.palette import INK, QUIET, SERIES
from kronos_qlib.evaluation.style import BEHIND_TEXT, draw_legend, draw_title, new_figure, style_axes

if TYPE_CHECKING:
    from kronos_qlib.evaluation.training_report import TrainingReport

# Stage: title, loss and its unit, legend of the training and of the validation curve.
_STAGES = {
    "tokenizer": ("Stage 1: tokenizer", "loss", "training: MSE and BSQ loss", "validation: MSE alone"),
    "predictor": ("Stage 2: predictor", "cross-entropy, nats", "training", "validation"),
}
_TRAINING, _VALIDATION = SERIES[:2]
_USED, _TRACK = "#9CCBE8", "#EEEEEE"


def draw_training(report: "TrainingReport") -> Figure:
    """Draw the losses of each stage over its learning rate; below, the use of codes and the reconstruction error."""
    inches = [0.9, 4.4, 3.5] if report.histories else [0.9, 3.5]
    figure = new_figure(sum(inches))
    _, *upper, lower = figure.subfigures(len(inches), 1, height_ratios=inches)
    draw_title(figure, "Fine-tuning", f"codes and reconstruction: {report.sample}")
    if upper:
        ratios = {"height_ratios": (4, 1), "hspace": 0.1, "wspace": 0.21, "top": 0.9, "bottom": 0.13}
        axes = upper[0].subplots(
            2, len(report.histories), sharex="col", squeeze=False, gridspec_kw=ratios | {"left": 0.085, "right": 0.98}
        )
        for (losses, rates), (stage, history) in zip(axes.T, report.histories.items()):
            _draw_losses(losses, stage, history)
            _draw_learning_rate(rates, history)
    margins = {"width_ratios": (1, 1.2), "wspace": 0.2, "top": 0.86, "bottom": 0.2, "left": 0.075, "right": 0.905}
    codes, errors = lower.subplots(1, 2, gridspec_kw=margins)
    _draw_codes(codes, report)
    _draw_errors(errors, report.reconstruction)
    return figure


def _draw_losses(axes: Axes, stage: str, history: pd.DataFrame) -> None:
    title, unit, training, validation = _STAGES[stage]
    axes.plot(history["step"], history["train_loss"], color=_TRAINING, linewidth=1.2, label=training)
    validated = history.dropna(subset="val_loss")
    if len(validated):
        best = validated.loc[validated["val_loss"].idxmin()]
        label = f"{validation}, best {best['val_loss']:.4g} after epoch {best['epoch'] + 1:.0f}"
        axes.plot(validated["step"], validated["val_loss"], "o-", color=_VALIDATION, linewidth=1.6, label=label)
        axes.plot(best["step"], best["val_loss"], "o", color=_VALIDATION, markersize=10, clip_on=False)
    style_axes(axes, title, ylabel=unit)
    _scale_losses(axes, history)
    draw_legend(axes, loc="lower left")


def _scale_losses(axes: Axes, history: pd.DataFrame) -> None:
    """Scale the y axis to the last nine tenths of a training: the first steps would press all others flat."""
    losses = pd.concat([history["train_loss"][len(history) // 10 :], history["val_loss"]])
    low, high = losses.min(), losses.max()
    margin = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
    # The legend lies below: a curve that only falls would run through it.
    axes.set_ylim(low - 3 * margin, high + margin)
    start = history["train_loss"].iloc[0]
    if start > high + margin:
        entry = history["step"][history["train_loss"] < high + margin].iloc[0]
        at = {"xytext": (14, -4), "textcoords": "offset points", "va": "top", "bbox": BEHIND_TEXT}
        axes.annotate(f"from {start:.3g}", (entry, high + margin), color=_TRAINING, **at)


def _draw_learning_rate(axes: Axes, history: pd.DataFrame) -> None:
    peak = history["lr"].max()
    axes.fill_between(history["step"], history["lr"], color=QUIET, alpha=0.18, linewidth=0)
    axes.plot(history["step"], history["lr"], color=QUIET, linewidth=1)
    style_axes(axes, xlabel="optimiser steps")
    axes.set(ylim=(0, 1.15 * peak), yticks=[0, peak], yticklabels=["0", f"{peak:.2g}"])
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.set_ylabel("learning\nrate", color=QUIET, fontsize=8)


def _draw_codes(axes: Axes, report: "TrainingReport") -> None:
    """Draw a bar for s1 and for s2: the whole codebook, in it the codes that occur, in them the perplexity."""
    codes = {"s1": "s1, coarse", "s2": "s2, fine"}
    sizes = np.array([report.codes[code] for code in codes])
    perplexity, used = (
        np.array([report.codebook[f"{name}_{code}"] for code in codes]) for name in ("perplexity", "used")
    )
    bars = {
        "all 2^bits": (sizes / sizes, _TRACK),
        "that occur": (used, _USED),
        "perplexity": (perplexity / sizes, _TRAINING),
    }
    for label, (share, colour) in bars.items():
        axes.barh([0, 1], share, color=colour, height=0.34, label=label)
    for row, name in enumerate(codes.values()):
        axes.text(0, row - 0.27, name, color=INK, fontweight="bold")
        note = f"perplexity {perplexity[row]:.3g} of {sizes[row]:,}, {100 * used[row]:.0f} % occur"
        axes.text(1, row - 0.27, note, color=INK, ha="right")
    style_axes(axes, "Use of the codes")
    axes.grid(False)
    axes.set(xlim=(0, 1), ylim=(1.3, -0.6), yticks=[])
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    draw_legend(axes, loc="upper left", reverse=True, ncols=3, bbox_to_anchor=(-0.02, -0.09))


def _draw_errors(axes: Axes, errors: pd.DataFrame) -> None:
    """Draw a line for each column of a bar, from the error with the coarse bits alone to the error with all bits."""
    rows = np.arange(len(errors))
    shares = 100 * errors[["mae_share", "mae_s1_share"]]
    shares = shares.where(shares > 0)
    axes.hlines(rows, *shares.to_numpy().T, color=_USED, linewidth=2)
    axes.plot(shares["mae_s1_share"], rows, "o", markerfacecolor="white", color=_TRAINING, label="coarse bits alone")
    axes.plot(shares["mae_share"], rows, "o", color=_TRAINING, label="all bits")
    beside = axes.get_yaxis_transform()
    for row, (share, error) in enumerate(zip(shares["mae_share"], errors["mae"])):
        if math.isfinite(share):
            at = {"textcoords": "offset points", "ha": "right", "va": "center", "bbox": BEHIND_TEXT}
            axes.annotate(f"{share:.{2 if share < 1 else 1}f} %", (share, row), (-8, 0), color=INK, **at)
        axes.text(1.13, row, _short(error), transform=beside, ha="right", va="center", color=INK)
    axes.text(1.13, -0.7, "MAE in units", transform=beside, ha="right", va="bottom", color=QUIET)
    style_axes(axes, "Reconstruction error", xlabel="mean absolute error (MAE) in % of the column's mean")
    axes.set(yticks=rows, yticklabels=errors.index, ylim=(len(errors) - 0.4, -0.6))
    _scale_errors(axes, shares.to_numpy())
    draw_legend(axes, loc="best")


def _scale_errors(axes: Axes, shares: np.ndarray) -> None:
    """Make the x axis logarithmic in per cent, with room for the labels on the left."""
    if not np.isfinite(shares).any():
        return
    low, high = np.nanmin(shares), np.nanmax(shares)
    span = max(high / low, 4.0)
    axes.set_xscale("log")
    axes.set_xlim(low / span**0.25, high * span**0.08)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:g} %")


def _short(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"
