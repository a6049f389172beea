"""From windows to the columns that are kept of a forecast: scores, quantiles of the close, sample paths."""

import logging
import threading
from collections.abc import Callable

import numpy as np
import psutil
import pyarrow as pa
import torch

from kronos_qlib.data.windows import CLOSE, COLUMNS, denormalise
from kronos_qlib.forecast.engine.attention import Layout
from kronos_qlib.forecast.engine.cuda_graph import Recorded
from kronos_qlib.forecast.engine.generate import PART, generate, part_drawn
from kronos_qlib.forecast.engine.weights import Prepared, prepare
from kronos_qlib.forecast.scores import SCORES, scores
from kronos_qlib.forecast.task import DIGEST_BYTES, Task

logger = logging.getLogger("qlib.KronosForecast")
QUANTILES = 5, 10, 25, 50, 75, 90, 95  # per cent, of the close per step over the samples
CPU_SHARE, GPU_SHARE = 0.3, 0.5  # of the memory that windows on their way may take
GPU_PART, OTHER_BYTES = 4096, 4 * 2**30  # windows at a time at most; memory of a device that does not tell


def quantile_columns(horizon: int) -> list[str]:
    """Names of the quantiles' columns, step by step for each quantile: `q05_1` is the 5 % quantile one bar ahead."""
    return [f"q{quantile:02d}_{step + 1}" for quantile in QUANTILES for step in range(horizon)]


def schema(task: Task) -> pa.Schema:
    """The columns of a forecast."""
    fields = [
        ("digest", pa.binary(DIGEST_BYTES)),
        ("datetime", pa.timestamp("ns")),
        ("instrument", pa.string()),
        ("last_close", pa.float64()),
        *((name, pa.float64()) for name in SCORES),
        *((name, pa.float32()) for name in quantile_columns(task.horizon)),
    ]
    if task.paths:
        fields.append(("paths", pa.list_(pa.float32(), task.sampling.sample_count * task.horizon * len(COLUMNS))))
    return pa.schema(fields)


class Scorer:
    """A task with its weights laid out on its device.

    net: the weights, where they are laid out already.
    """

    def __init__(self, task: Task, net: Prepared | None = None) -> None:
        self.task = task
        if net is None:
            networks = task.tokenizer.to(task.device).eval(), task.model.to(task.device).eval()
            net = prepare(*networks, task.max_context, task.dtype, task.windows.lookback)
        self.net = net
        self.part = task.part or part_size(task)
        drawn = part_drawn(self.net, task.sampling)
        self._drawn = Recorded(drawn) if task.device.type == "cuda" else drawn

    def table(self, rows: np.ndarray, done: Callable[[int], None] = lambda windows: None) -> pa.Table:
        """The forecast of the windows at `rows` (int [C]), in their order; `done` is told of windows as they are done.

        Columns: digest of the window, datetime, instrument, last_close (price units), the scores of
        `kronos_qlib.forecast.scores`, quantiles of the close (price units), and where the task keeps them `paths`, the
        S × P × 6 values of each window in price units.

        A GPU without memory enough for a part is given half of it.

        Raises:
            RuntimeError: the memory does not suffice for a single window.
        """
        while True:
            told = 0

            def tell(windows: int) -> None:
                nonlocal told
                told += windows
                done(windows)

            try:
                return self._table(rows, tell)
            except torch.OutOfMemoryError as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
            # Behind the handler, which held on to the tensors of the part that failed.
            done(-told)
            if self.part == 1:
                raise RuntimeError(
                    f"{self.task.device} has not memory enough for one window: give it less sample_count, horizon or "
                    f"lookback ({reason})"
                )
            self.part = -(-self.part // 2)
            logger.warning(f"{self.task.device} is out of memory; going on with {self.part} windows at a time")
            if self.task.device.type == "cuda":
                with torch.cuda.device(self.task.device):
                    torch.cuda.empty_cache()

    def _table(self, rows: np.ndarray, done: Callable[[int], None]) -> pa.Table:
        task, fields, windows = self.task, schema(self.task), self.task.windows.take(rows)
        columns = self._columns(rows, done)
        arrays = {
            "digest": pa.Array.from_buffers(
                fields.field("digest").type, len(rows), [None, pa.py_buffer(task.window_digests(rows).tobytes())]
            ),
            "datetime": pa.array(windows.dates),
            "instrument": pa.array(windows.instruments, pa.string()),
        }
        for name, values in columns.items():
            flat = pa.array(np.ascontiguousarray(values).reshape(-1))
            arrays[name] = flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        return pa.table([arrays[name] for name in fields.names], schema=fields)

    def _columns(self, rows: np.ndarray, done: Callable[[int], None]) -> dict[str, np.ndarray]:
        task, count = self.task, len(rows)
        # The last part is filled up: how a window is rounded may hang on how many there are, and their number in the
        # last part on bars to come.
        rows = rows[np.minimum(np.arange(-(-count // self.part) * self.part), count - 1)]
        batch = task.windows.normalised(rows)
        left, lock = count, threading.Lock()

        def part_done(windows: int) -> None:
            nonlocal left
            with lock:  # parts are done by threads side by side
                real = min(windows, left)
                left -= real
                done(real)

        paths = generate(
            self.net,
            *(torch.from_numpy(array) for array in (batch.x, batch.stamp, task.stamps_after(rows))),
            task.sampling,
            task.windows.take(rows).keys,
            part=self.part,
            part_done=part_done,
            drawn=self._drawn,
        )
        paths = paths[:count].cpu().double().numpy()  # [C, S, P, 6], normalised
        mean, scale, last_close = batch.mean[:count, None], batch.scale[:count, None], batch.last_close[:count]
        close = denormalise(paths[..., CLOSE], mean[..., CLOSE], scale[..., CLOSE])
        quantiles = np.quantile(close, np.array(QUANTILES) / 100, axis=1).astype(np.float32)  # [7, C, P]
        columns = {"last_close": last_close, **scores(close, last_close, scale[:, 0, 0, CLOSE])}
        columns |= dict(zip(quantile_columns(task.horizon), quantiles.transpose(0, 2, 1).reshape(-1, count)))
        if task.paths:
            columns["paths"] = denormalise(paths, mean, scale).astype(np.float32).reshape(count, -1)
        return columns


def part_size(task: Task) -> int:
    """How many windows to take through the networks at a time: a power of two, as the device's memory allows.

    It may decide how a forecast is rounded, so it hangs on how much memory there is, not on how much is free just now.
    On a CPU no more than its caches like, whatever the number of its cores: every thread has such a part in hand.
    """
    config, cpu = task.model.config, task.device.type == "cpu"
    cached = 2 * (config["n_layers"] + 1) * config["d_model"]
    active = 5 * config["d_model"] + 4 * config["ff_dim"]
    layout = Layout.of(1, task.sampling.sample_count, task.horizon)
    rows = layout.copies * (task.windows.lookback + layout.size * task.horizon)
    if cpu:
        room, most = psutil.virtual_memory().total * CPU_SHARE / torch.get_num_threads(), PART
    else:
        total = torch.cuda.get_device_properties(task.device).total_memory if task.device.type == "cuda" else 0
        room, most = total * GPU_SHARE or OTHER_BYTES, GPU_PART
    fits = max(1, int(room / (4 * rows * (cached + active))))
    return min(2 ** (fits.bit_length() - 1), most)
