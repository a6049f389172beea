"""What fine-tuning came to: its curves, how the tokenizer uses its codes, and how well it gives the bars back."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from kronos_qlib.data.windows import COLUMNS, Batch, Windows, denormalise
from kronos_qlib.files import whole_file
from kronos_qlib.nn import KronosTokenizer

if TYPE_CHECKING:  # drawing alone needs matplotlib; whoever only trains does not load it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stage: heading, loss and its unit, legend of the training and of the validation curve.
_STAGES = {
    "tokenizer": ("Stage 1: tokenizer", "loss", "training: MSE and BSQ loss", "validation: MSE alone"),
    "predictor": ("Stage 2: predictor", "cross-entropy, nats", "training", "validation"),
}
_TRAINING, _VALIDATION, _USED, _TRACK = "#0072B2", "#D55E00", "#9CCBE8", "#eeeeee"
_INK, _QUIET, _GRID = "#222222", "#666666", "#e4e4e4"
_BEHIND_TEXT = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}


@dataclass(frozen=True)
class TrainingReport:
    """The figures of a report.

    histories: stage → its history.csv, of the stages that were trained. codebook: as `codebook_use` gives it.
    reconstruction: as `reconstruction_error` gives it. codes: how many codes s1 and s2 have, 2^bits.
    sample: the judged windows, in words.
    """

    histories: dict[str, pd.DataFrame]
    codebook: dict[str, float]
    reconstruction: pd.DataFrame
    codes: dict[str, int]
    sample: str

    @property
    def metrics(self) -> dict[str, float]:
        """All figures by name, for a recorder: `codebook.perplexity_s1`, `reconstruction.close.mae`."""
        errors = self.reconstruction.to_dict("index")
        return {f"codebook.{name}": value for name, value in self.codebook.items()} | {
            f"reconstruction.{column}.{name}": value for column, row in errors.items() for name, value in row.items()
        }


def write_report(
    folder: str | os.PathLike[str], tokenizer: KronosTokenizer, windows: Windows, device: torch.device
) -> tuple[list[Path], dict[str, float]]:
    """Write training.png, reconstruction.csv and codebook.json to the output folder of a fine-tuning.

    Args:
        folder: holds tokenizer/history.csv and predictor/history.csv; a stage without one is left out.
        tokenizer: of the best weights; it is moved to `device` and left in eval mode.
        windows: to judge the tokenizer on, all of them; some thousand of the validation segment will do.

    Returns:
        The paths of the three files, and their figures by name as `TrainingReport.metrics` gives them.

    Raises:
        ValueError: there are no windows, or a history is damaged. Nothing is written then.
    """
    folder = Path(folder)
    report = TrainingReport(
        histories=_histories(folder),
        codebook=codebook_use(tokenizer, windows, device),
        reconstruction=reconstruction_error(tokenizer, windows, device),
        codes={"s1": 2**tokenizer.s1_bits, "s2": 2**tokenizer.s2_bits},
        sample=_in_words(windows),
    )
    figure = report_figure(report)
    paths = [folder / name for name in ("training.png", "reconstruction.csv", "codebook.json")]
    with whole_file(paths[0]) as draft:
        figure.savefig(draft, format="png")
    with whole_file(paths[1]) as draft:
        report.reconstruction.to_csv(draft)
    with whole_file(paths[2]) as draft:
        draft.write_text(json.dumps(report.codebook, indent=2) + "\n")
    return paths, report.metrics


def codebook_use(
    tokenizer: KronosTokenizer, windows: Windows, device: torch.device, batch_size: int = 256
) -> dict[str, float]:
    """How evenly the codes of all bars of all windows, future bars included, spread over the codebook.

    Returns:
        perplexity_s1, perplexity_s2: exp(entropy) of the marginal distribution of the ids, from 1 (one code for
        everything) to 2^bits (all alike). used_s1, used_s2: the share of the 2^bits codes that occur at all.

    Raises:
        ValueError: there are no windows.
    """
    counts = {"s1": np.zeros(2**tokenizer.s1_bits, np.int64), "s2": np.zeros(2**tokenizer.s2_bits, np.int64)}
    with torch.no_grad():
        for _, _, x in _batches(tokenizer, windows, device, batch_size):
            for count, ids in zip(counts.values(), tokenizer.encode(x, half=True)):
                count += np.bincount(ids.cpu().numpy().ravel(), minlength=len(count))
    return {f"perplexity_{part}": _perplexity(count) for part, count in counts.items()} | {
        f"used_{part}": float((count > 0).mean()) for part, count in counts.items()
    }


def reconstruction_error(
    tokenizer: KronosTokenizer, windows: Windows, device: torch.device, batch_size: int = 256
) -> pd.DataFrame:
    """How far decoded bars are from the actual ones, over all bars of all windows, future bars included.

    What is decoded is brought back to price units and compared with the bars as they are in the data, which are not
    clipped as the input of the tokenizer is: what clipping loses counts as an error.

    Returns:
        A row per column of a bar, open … amount. mae, rmse: mean absolute and root mean squared error, in the
        column's unit. mae_share: mae over the mean absolute value of the column (0.01 is 1 %), NaN if that is zero.
        mae_s1, mae_s1_share: the same from the coarse bits alone.

    Raises:
        ValueError: there are no windows.
    """
    sums = pd.DataFrame(0.0, pd.Index(COLUMNS, name="column"), ["error", "square", "error_s1", "value"])
    with torch.no_grad():
        for rows, batch, x in _batches(tokenizer, windows, device, batch_size):
            (recon_s1, recon), *_ = tokenizer(x)
            actual = _actual_bars(windows, rows)
            error, error_s1 = (_in_price_units(part, batch) - actual for part in (recon, recon_s1))
            parts = {"error": abs(error), "square": error**2, "error_s1": abs(error_s1), "value": abs(actual)}
            for name, part in parts.items():
                sums[name] += part.sum(axis=(0, 1))
    bars = len(windows) * (windows.lookback + windows.future)
    means = sums / bars
    value = means["value"].where(means["value"] > 0)
    return pd.DataFrame(
        {
            "mae": means["error"],
            "rmse": np.sqrt(means["square"]),
            "mae_share": means["error"] / value,
            "mae_s1": means["error_s1"],
            "mae_s1_share": means["error_s1"] / value,
        }
    )


def _batches(
    tokenizer: KronosTokenizer, windows: Windows, device: torch.device, batch_size: int
) -> Iterator[tuple[np.ndarray, Batch, Tensor]]:
    """Rows of `windows`, the batch of them, and its bars x [B, T, 6] on the device, where the tokenizer is too."""
    if not len(windows):
        raise ValueError("There are no windows to judge the tokenizer on; give some of the validation segment")
    tokenizer.to(device).eval()
    for start in range(0, len(windows), batch_size):
        rows = np.arange(start, min(start + batch_size, len(windows)))
        batch = windows.normalised(rows)
        yield rows, batch, torch.from_numpy(batch.x).to(device)


def _actual_bars(windows: Windows, rows: np.ndarray) -> np.ndarray:
    """The bars of the windows at `rows` as the data has them: float64 [B, T, 6], in price units."""
    offsets = np.arange(1 - windows.lookback, windows.future + 1)
    return windows.bars.values[windows.ends[rows, None] + offsets].astype(np.float64)


def _in_price_units(x: Tensor, batch: Batch) -> np.ndarray:
    return denormalise(x.float().cpu().numpy(), batch.mean, batch.scale)


def _perplexity(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def _histories(folder: Path) -> dict[str, pd.DataFrame]:
    """The histories there are. Numbers only, so that a damaged one is noticed before anything is written."""
    paths = {stage: folder / stage / "history.csv" for stage in _STAGES}
    histories = {}
    for stage, path in paths.items():
        if path.exists():
            try:
                histories[stage] = pd.read_csv(path, dtype=float)
            except ValueError as error:
                raise ValueError(f"{path} is damaged ({error}); mend or remove it to get a report") from error
    return {stage: history for stage, history in histories.items() if len(history)}


def _in_words(windows: Windows) -> str:
    first, last = (f"{pd.Timestamp(date):%d %b %Y}" for date in (windows.dates.min(), windows.dates.max()))
    return f"{len(windows):,} windows of {windows.lookback} + {windows.future} bars, {first} to {last}"


def report_figure(report: TrainingReport) -> "Figure":
    """Draw the curves of each stage over its learning rate, and below them the use of codes and the reconstruction."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    inches = [0.9, 4.4, 3.5] if report.histories else [0.9, 3.5]
    figure = Figure(figsize=(11, sum(inches)), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    title, *upper, lower = figure.subfigures(len(inches), 1, height_ratios=inches)
    title.text(0.02, 0.5, "Fine-tuning", fontsize=15, fontweight="bold", color=_INK)
    title.text(0.02, 0.16, f"codes and reconstruction: {report.sample}", fontsize=10, color=_QUIET)
    if upper:
        ratios = {"height_ratios": (4, 1), "hspace": 0.1, "wspace": 0.19, "top": 0.9, "bottom": 0.13}
        axes = upper[0].subplots(
            2, len(report.histories), sharex="col", squeeze=False, gridspec_kw=ratios | {"left": 0.075, "right": 0.98}
        )
        for (losses, rates), (stage, history) in zip(axes.T, report.histories.items()):
            _draw_losses(losses, stage, history)
            _draw_learning_rate(rates, history)
    margins = {"width_ratios": (1, 1.2), "wspace": 0.2, "top": 0.86, "bottom": 0.2, "left": 0.075, "right": 0.905}
    codes, errors = lower.subplots(1, 2, gridspec_kw=margins)
    _draw_codes(codes, report)
    _draw_errors(errors, report.reconstruction)
    return figure


def _draw_losses(axes: "Axes", stage: str, history: pd.DataFrame) -> None:
    heading, unit, training, validation = _STAGES[stage]
    axes.plot(history["step"], history["train_loss"], color=_TRAINING, linewidth=1.2, label=training)
    judged = history.dropna(subset="val_loss")
    if len(judged):
        best = judged.loc[judged["val_loss"].idxmin()]
        label = f"{validation}, best {best['val_loss']:.4g} after epoch {best['epoch'] + 1:.0f}"
        axes.plot(judged["step"], judged["val_loss"], "o-", color=_VALIDATION, linewidth=1.6, label=label)
        axes.plot(best["step"], best["val_loss"], "o", color=_VALIDATION, markersize=10, clip_on=False)
    _style(axes, heading)
    axes.set_ylabel(unit, color=_QUIET)
    _leave_out_the_start(axes, history)
    _legend(axes, "lower left")


def _leave_out_the_start(axes: "Axes", history: pd.DataFrame) -> None:
    """Scale to the last nine tenths of a training: its first steps would press all others flat."""
    losses = pd.concat([history["train_loss"][len(history) // 10 :], history["val_loss"]])
    low, high = losses.min(), losses.max()
    margin = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
    # The legend lies below: a curve that only falls would run through it.
    axes.set_ylim(low - 3 * margin, high + margin)
    start = history["train_loss"].iloc[0]
    if start > high + margin:
        entry = history["step"][history["train_loss"] < high + margin].iloc[0]
        at = {"xytext": (14, -4), "textcoords": "offset points", "va": "top", "bbox": _BEHIND_TEXT}
        axes.annotate(f"from {start:.3g}", (entry, high + margin), color=_TRAINING, **at)


def _draw_learning_rate(axes: "Axes", history: pd.DataFrame) -> None:
    peak = history["lr"].max()
    axes.fill_between(history["step"], history["lr"], color=_QUIET, alpha=0.18, linewidth=0)
    axes.plot(history["step"], history["lr"], color=_QUIET, linewidth=1)
    _style(axes)
    axes.set(ylim=(0, 1.15 * peak), yticks=[0, peak], yticklabels=["0", f"{peak:.2g}"])
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.set_ylabel("learning\nrate", color=_QUIET, fontsize=8)
    axes.set_xlabel("optimiser steps", color=_QUIET)


def _draw_codes(axes: "Axes", report: TrainingReport) -> None:
    """A bar per part of a code: the whole codebook, in it the codes that occur, in them the perplexity."""
    parts = {"s1": "s1, coarse", "s2": "s2, fine"}
    sizes = np.array([report.codes[part] for part in parts])
    perplexity, used = (
        np.array([report.codebook[f"{name}_{part}"] for part in parts]) for name in ("perplexity", "used")
    )
    bars = {
        "all 2^bits": (sizes / sizes, _TRACK),
        "that occur": (used, _USED),
        "perplexity": (perplexity / sizes, _TRAINING),
    }
    for label, (share, colour) in bars.items():
        axes.barh([0, 1], share, color=colour, height=0.34, label=label)
    for row, name in enumerate(parts.values()):
        axes.text(0, row - 0.27, name, color=_INK, fontweight="bold")
        note = f"perplexity {perplexity[row]:.3g} of {sizes[row]:,}, {100 * used[row]:.0f} % occur"
        axes.text(1, row - 0.27, note, color=_INK, ha="right")
    _style(axes, "Use of the codes")
    axes.grid(False)
    axes.set(xlim=(0, 1), ylim=(1.3, -0.6), yticks=[])
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    _legend(axes, "upper left", reverse=True, ncols=3, bbox_to_anchor=(-0.02, -0.09))


def _draw_errors(axes: "Axes", errors: pd.DataFrame) -> None:
    """A line per column of a bar, from the error with the coarse bits alone to that with all bits."""
    rows = np.arange(len(errors))
    shares = 100 * errors[["mae_share", "mae_s1_share"]]
    shares = shares.where(shares > 0)
    axes.hlines(rows, *shares.to_numpy().T, color=_USED, linewidth=2)
    axes.plot(shares["mae_s1_share"], rows, "o", markerfacecolor="white", color=_TRAINING, label="coarse bits alone")
    axes.plot(shares["mae_share"], rows, "o", color=_TRAINING, label="all bits")
    beside = axes.get_yaxis_transform()
    for row, (share, error) in enumerate(zip(shares["mae_share"], errors["mae"])):
        if math.isfinite(share):
            at = {"textcoords": "offset points", "ha": "right", "va": "center", "bbox": _BEHIND_TEXT}
            axes.annotate(f"{share:.{2 if share < 1 else 1}f} %", (share, row), (-8, 0), color=_INK, **at)
        axes.text(1.13, row, _short(error), transform=beside, ha="right", va="center", color=_INK)
    axes.text(1.13, -0.7, "MAE in units", transform=beside, ha="right", va="bottom", color=_QUIET)
    _style(axes, "Reconstruction error")
    axes.set(yticks=rows, yticklabels=errors.index, ylim=(len(errors) - 0.4, -0.6))
    _scale_to(axes, shares.to_numpy())
    axes.set_xlabel("mean absolute error (MAE) in % of the column's mean", color=_QUIET)
    _legend(axes, "best")


def _scale_to(axes: "Axes", shares: np.ndarray) -> None:
    """A logarithmic scale in per cent, with room for the labels on the left."""
    from matplotlib.ticker import LogLocator, NullLocator

    if not np.isfinite(shares).any():
        return
    low, high = np.nanmin(shares), np.nanmax(shares)
    span = max(high / low, 4.0)
    axes.set_xscale("log")
    axes.set_xlim(low / span**0.25, high * span**0.08)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:g} %")


def _legend(axes: "Axes", place: str, **options: Any) -> None:
    look = {"frameon": True, "facecolor": "white", "framealpha": 0.85, "edgecolor": "none", "labelcolor": _INK}
    axes.legend(loc=place, **look, **options)


def _short(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def _style(axes: "Axes", heading: str = "") -> None:
    axes.set_title(heading, loc="left", fontsize=11, fontweight="bold", color=_INK)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=_QUIET)
    axes.margins(x=0.01)
