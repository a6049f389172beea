"""Forecast windows: sample paths, and the columns that are kept of them (scores, quantiles of the close, paths)."""

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch

from kronos_qlib.data.windows import CLOSE, COLUMNS, denormalise
from kronos_qlib.forecast.engine.attention import CacheLayout
from kronos_qlib.forecast.engine.cuda_graph import GraphedFunction
from kronos_qlib.forecast.engine.generate import CPU_BATCH, DrawPaths, generate, path_drawer
from kronos_qlib.forecast.engine.weights import NetworkWeights, prepare_weights
from kronos_qlib.forecast.scores import SCORES, SUMMARIES, scores, summaries
from kronos_qlib.forecast.task import DIGEST_BYTES, Task

logger = logging.getLogger("qlib.KronosForecast")
QUANTILES = 5, 10, 25, 50, 75, 90, 95  # per cent, of the close per step over the samples
CPU_SHARE, GPU_SHARE = 0.3, 0.5  # of the memory, for the window batches that are being forecast
GPU_BATCH = 4096  # windows in a window batch at most
OTHER_BYTES = 4 * 2**30  # assumed memory of a device that does not report it


def quantile_columns(horizon: int) -> list[str]:
    """Name the quantiles' columns, step by step for each quantile: `q05_1` is the 5 % quantile one bar ahead."""
    return [f"q{quantile:02d}_{step + 1}" for quantile in QUANTILES for step in range(horizon)]


def schema(task: Task) -> pa.Schema:
    """Return the columns of a forecast."""
    fields = [
        ("digest", pa.binary(DIGEST_BYTES)),
        ("datetime", pa.timestamp("ns")),
        ("instrument", pa.string()),
        ("last_close", pa.float64()),
        *((name, pa.float64()) for name in SCORES),
        *((name, pa.float32()) for name in quantile_columns(task.horizon)),
    ]
    if task.summaries:
        fields += [(name, pa.float64()) for name in SUMMARIES]
    if task.keep_paths:
        values = task.sampling.sample_count * task.horizon * len(task.windows.bars.columns)
        fields.append(("paths", pa.list_(pa.float32(), values)))
    return pa.schema(fields)


def to_arrow(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Return values, which have the width of `kind`, as a column: `pa.array` would import pandas into every worker."""
    if pa.types.is_string(kind):
        texts = [text.encode() for text in values]
        offsets = np.cumsum([0, *map(len, texts)], dtype=np.int32)
        return pa.StringArray.from_buffers(len(texts), pa.py_buffer(offsets), pa.py_buffer(b"".join(texts)))
    if pa.types.is_fixed_size_list(kind):
        flat = to_arrow(values.reshape(-1), kind.value_type)
        return pa.Array.from_buffers(kind, len(values), [None], children=[flat])
    words = np.ascontiguousarray(values).view(np.uint8)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(words)])


class Forecaster:
    """Forecasts windows of a task, with the weights prepared on its device.

    Args:
        weights: the prepared weights, where they are at hand.
    """

    def __init__(self, task: Task, weights: NetworkWeights | None = None) -> None:
        self.task, self.batch_size = task, task.batch_size
        if weights is None:
            networks = task.tokenizer.to(task.device).eval(), task.model.to(task.device).eval()
            weights = prepare_weights(*networks, task.max_context, task.dtype, task.windows.lookback)
        self.weights = weights
        draw_paths = path_drawer(weights, task.sampling)
        self._draw_paths: DrawPaths = GraphedFunction(draw_paths) if task.device.type == "cuda" else draw_paths

    def table(self, rows: np.ndarray, report: Callable[[int], object] = lambda windows: None) -> pa.Table:
        """Forecast the windows at `rows` (int [B]), in their order.

        A GPU that runs out of memory is given half as many windows at a time.

        Args:
            report: called with the number of windows of each window batch when it is forecast.

        Returns:
            digest of the window, datetime, instrument, last_close (price units), the scores of
            `kronos_qlib.forecast.scores`, quantiles of the close (price units), and where the task keeps them
            `SUMMARIES`, and `paths`: the S × P × D values of each window in price units.

        Raises:
            RuntimeError: the memory does not suffice for a single window.
        """
        while True:
            reported = 0

            def report_batch(windows: int) -> None:
                nonlocal reported
                reported += windows
                report(windows)

            try:
                return self._table(rows, report_batch)
            except torch.OutOfMemoryError as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
            # Outside the handler, whose traceback keeps the tensors of the window batch that failed.
            report(-reported)
            if self.batch_size == 1:
                raise RuntimeError(
                    f"{self.task.device} has not enough memory for one window: set a smaller sample_count, horizon or "
                    f"lookback ({reason})"
                )
            self.batch_size = -(-self.batch_size // 2)
            logger.warning(f"{self.task.device} is out of memory; going on with {self.batch_size} windows at a time")
            if self.task.device.type == "cuda":
                with torch.cuda.device(self.task.device):
                    torch.cuda.empty_cache()

    def _table(self, rows: np.ndarray, report: Callable[[int], object]) -> pa.Table:
        task, fields, windows = self.task, schema(self.task), self.task.windows.take(rows)
        columns = {
            "digest": task.window_digests(rows),
            "datetime": windows.dates,
            "instrument": windows.instruments,
            **self._columns(rows, report),
        }
        return pa.table([to_arrow(columns[field.name], field.type) for field in fields], schema=fields)

    def _columns(self, rows: np.ndarray, report: Callable[[int], object]) -> dict[str, np.ndarray]:
        task, count = self.task, len(rows)
        # The last window batch is filled up with copies of its last window: how a window is rounded may depend on the
        # size of its batch, and without filling that size would depend on how many later dates there are. Where there
        # are fewer windows than in a batch, it is only filled up to the next step of CPU_BATCH.
        size = min(self.batch_size, -(-count // CPU_BATCH) * CPU_BATCH)
        rows = rows[np.minimum(np.arange(-(-count // size) * size), count - 1)]
        batch = task.windows.normalised(rows)
        unreported, lock = count, threading.Lock()

        def report_batch(windows: int) -> None:
            nonlocal unreported
            with lock:  # threads forecast window batches side by side
                own = min(windows, unreported)  # without the copies
                unreported -= own
                report(own)

        drawn = generate(
            self.weights,
            torch.from_numpy(batch.x),
            torch.from_numpy(batch.stamp),
            torch.from_numpy(task.horizon_stamps(rows)),
            task.sampling,
            task.windows.take(rows).keys,
            batch_size=size,
            report=report_batch,
            draw_paths=self._draw_paths,
        )
        paths = drawn[:count].cpu().double().numpy()  # [B, S, P, D], normalised
        mean, scale, last_close = batch.mean[:count, None], batch.scale[:count, None], batch.last_close[:count]
        close = denormalise(paths[..., CLOSE], mean[..., CLOSE], scale[..., CLOSE])
        quantiles = np.quantile(close, np.array(QUANTILES) / 100, axis=1).astype(np.float32)  # [7, B, P]
        columns = {"last_close": last_close, **scores(close, last_close, scale[:, 0, 0, CLOSE])}
        columns |= dict(zip(quantile_columns(task.horizon), quantiles.transpose(0, 2, 1).reshape(-1, count)))
        if task.keep_paths or task.summaries:
            paths = denormalise(paths, mean, scale)
        if task.summaries:
            columns |= summaries(paths, last_close, mean[:, 0, 0, COLUMNS.index("volume")])
        if task.keep_paths:
            columns["paths"] = paths.astype(np.float32).reshape(count, -1)
        return columns


def choose_batch_size(
    config: Mapping[str, Any], lookback: int, horizon: int, sample_count: int, device: torch.device
) -> int:
    """Choose `batch_size: auto`: a power of two of windows, as the device's memory allows.

    It may decide how a forecast is rounded, so it depends on how much memory there is, not on how much is free now. On
    a CPU a window batch is no larger than its caches like, however many cores there are: every thread has one.

    Args:
        config: the model's constructor arguments.
    """
    cached = 2 * (config["n_layers"] + 1) * config["d_model"]
    active = 5 * config["d_model"] + 4 * config["ff_dim"]
    layout = CacheLayout.divide(1, sample_count, horizon)
    rows = layout.groups_per_window * (lookback + layout.group_size * horizon)
    if device.type == "cpu":
        room, most = psutil.virtual_memory().total * CPU_SHARE / torch.get_num_threads(), CPU_BATCH
    else:
        total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
        room, most = total * GPU_SHARE or OTHER_BYTES, GPU_BATCH
    windows = max(1, int(room / (4 * rows * (cached + active))))
    return min(2 ** (windows.bit_length() - 1), most)
