"""The report of a fine-tuning: its histories, the use of the tokenizer's codes, the error of its reconstruction."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from kronos_qlib.data.windows import Batch, Windows, denormalise
from kronos_qlib.files import whole_file
from kronos_qlib.nn import KronosTokenizer
from kronos_qlib.train.job import STAGES


@dataclass(frozen=True)
class TrainingReport:
    """The figures of a report.

    histories: stage → its history.csv, of the stages that were trained. codebook: see `codebook_use`. reconstruction:
    see `reconstruction_error`. codes: number of codes of s1 and s2, 2^bits. sample: a description of the windows
    that the tokenizer was measured on.
    """

    histories: dict[str, pd.DataFrame]
    codebook: dict[str, float]
    reconstruction: pd.DataFrame
    codes: dict[str, int]
    sample: str

    @property
    def metrics(self) -> dict[str, float]:
        """List all figures by name, for a recorder: `codebook.perplexity_s1`, `reconstruction.close.mae`."""
        errors = self.reconstruction.to_dict("index")
        return {f"codebook.{name}": value for name, value in self.codebook.items()} | {
            f"reconstruction.{column}.{name}": value for column, row in errors.items() for name, value in row.items()
        }


def write_training_report(
    folder: str | os.PathLike[str], tokenizer: KronosTokenizer, windows: Windows, device: torch.device
) -> tuple[list[Path], dict[str, float]]:
    """Write training.png, reconstruction.csv and codebook.json to the output folder of a fine-tuning.

    Args:
        folder: holds tokenizer/history.csv and predictor/history.csv; a stage without one is left out.
        tokenizer: of the best weights; it is moved to `device` and left in eval mode.
        windows: to measure the tokenizer on; some thousand of the validation segment are enough.

    Returns:
        The paths of the three files, and the figures of `TrainingReport.metrics`.

    Raises:
        ValueError: there are no windows, or a history is damaged. Nothing is written then.
    """
    # Drawing alone needs matplotlib: a process that only trains does not load it.
    from kronos_qlib.evaluation.style import save_figure
    from kronos_qlib.evaluation.training_figure import draw_training

    folder = Path(folder)
    report = TrainingReport(
        histories=_histories(folder),
        codebook=codebook_use(tokenizer, windows, device),
        reconstruction=reconstruction_error(tokenizer, windows, device),
        codes={"s1": 2**tokenizer.s1_bits, "s2": 2**tokenizer.s2_bits},
        sample=_describe(windows),
    )
    figure = draw_training(report)
    paths = [folder / name for name in ("training.png", "reconstruction.csv", "codebook.json")]
    save_figure(figure, paths[0])
    with whole_file(paths[1]) as draft:
        report.reconstruction.to_csv(draft)
    with whole_file(paths[2]) as draft:
        draft.write_text(json.dumps(report.codebook, indent=2) + "\n")
    return paths, report.metrics


def codebook_use(
    tokenizer: KronosTokenizer, windows: Windows, device: torch.device, batch_size: int = 256
) -> dict[str, float]:
    """Measure how evenly the codes of all bars of all windows, future bars included, spread over the codebook.

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
    return {f"perplexity_{name}": _perplexity(count) for name, count in counts.items()} | {
        f"used_{name}": float((count > 0).mean()) for name, count in counts.items()
    }


def reconstruction_error(
    tokenizer: KronosTokenizer, windows: Windows, device: torch.device, batch_size: int = 256
) -> pd.DataFrame:
    """Measure the error of decoded bars, over all bars of all windows, future bars included.

    Decoded bars are compared in price units with the bars of the data, which are not clipped as the tokenizer's input
    is: what clipping loses counts as an error.

    Returns:
        A row per column of a bar. mae, rmse: mean absolute and root mean squared error, in the
        column's unit. mae_share: mae over the mean absolute value of the column (0.01 is 1 %), NaN if that is zero.
        mae_s1, mae_s1_share: the same from the coarse bits alone.

    Raises:
        ValueError: there are no windows.
    """
    sums = pd.DataFrame(0.0, pd.Index(windows.bars.columns, name="column"), ["error", "square", "error_s1", "value"])
    with torch.no_grad():
        for rows, batch, x in _batches(tokenizer, windows, device, batch_size):
            (recon_s1, recon), *_ = tokenizer(x)
            actual = _actual_bars(windows, rows)
            error, error_s1 = (_in_price_units(decoded, batch) - actual for decoded in (recon, recon_s1))
            terms = {"error": abs(error), "square": error**2, "error_s1": abs(error_s1), "value": abs(actual)}
            for name, term in terms.items():
                sums[name] += term.sum(axis=(0, 1))
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
    """Yield the rows of a batch, the batch, and its bars x [B, T, D] on the device, to which the tokenizer is moved."""
    if not len(windows):
        raise ValueError("There are no windows to measure the tokenizer on; pass some of the validation segment")
    tokenizer.to(device).eval()
    for start in range(0, len(windows), batch_size):
        rows = np.arange(start, min(start + batch_size, len(windows)))
        batch = windows.normalised(rows)
        yield rows, batch, torch.from_numpy(batch.x).to(device)


def _actual_bars(windows: Windows, rows: np.ndarray) -> np.ndarray:
    """Look up the bars of the windows at `rows` in the data: float64 [B, T, D], in price units."""
    offsets = np.arange(1 - windows.lookback, windows.future + 1)
    return windows.bars.values[windows.ends[rows, None] + offsets].astype(np.float64)


def _in_price_units(x: Tensor, batch: Batch) -> np.ndarray:
    return denormalise(x.float().cpu().numpy(), batch.mean, batch.scale)


def _perplexity(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def _histories(folder: Path) -> dict[str, pd.DataFrame]:
    """Read the histories in a folder. Only numbers pass: a damaged one is noticed before anything is written."""
    paths = {stage: folder / stage / "history.csv" for stage in STAGES}
    histories = {}
    for stage, path in paths.items():
        if path.exists():
            try:
                histories[stage] = pd.read_csv(path, dtype=float)
            except ValueError as error:
                raise ValueError(f"{path} is damaged ({error}); mend or remove it to get a report") from error
    return {stage: history for stage, history in histories.items() if len(history)}


def _describe(windows: Windows) -> str:
    first, last = (f"{pd.Timestamp(date):%d %b %Y}" for date in (windows.dates.min(), windows.dates.max()))
    return f"{len(windows):,} windows of {windows.lookback} + {windows.future} bars, {first} to {last}"
