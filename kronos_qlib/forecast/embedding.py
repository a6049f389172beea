"""Read windows in one pass instead of forecasting them: surprise of their last bars, and a pooled hidden state."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch

from kronos_qlib.data.windows import Windows
from kronos_qlib.forecast.engine.generate import CPU_BATCH
from kronos_qlib.forecast.engine.teacher_forcing import teacher_forced
from kronos_qlib.forecast.engine.weights import prepare_weights
from kronos_qlib.forecast.forecaster import to_arrow
from kronos_qlib.forecast.task import DIGEST_BYTES, digest_of_identity, digest_windows
from kronos_qlib.hardware.cpu import core_pool
from kronos_qlib.nn import Kronos, KronosTokenizer
from kronos_qlib.nn.checkpoint import digest_of_weights

GENERATION = 1  # raised when the same task would give other numbers
SURPRISES = ("surprise_s1", "surprise_s2", "surprise_s1_last", "surprise_s2_last")
HIDDEN = "hidden"
GPU_BATCH = 1024


@dataclass(frozen=True)
class EmbeddingTask:
    """Networks, windows and settings of a pass.

    surprise_bars: last bars whose surprise is averaged. pooled_bars: last bars whose hidden states are averaged.
    """

    tokenizer: KronosTokenizer
    model: Kronos
    windows: Windows
    surprise_bars: int
    pooled_bars: int
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.windows)

    @cached_property
    def identity(self) -> dict[str, object]:
        """What decides the numbers, beside the windows' bars: settings and weights."""
        windows = self.windows
        return {
            "embedding": GENERATION,
            "tokenizer": digest_of_weights(self.tokenizer),
            "tokenizer_config": self.tokenizer.config,
            "model": digest_of_weights(self.model),
            "model_config": self.model.config,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "lookback": windows.lookback,
            "clip": windows.clip,
            "normalisation": windows.normalisation_identity,
            "surprise_bars": self.surprise_bars,
            "pooled_bars": self.pooled_bars,
        }

    @cached_property
    def digest(self) -> str:
        """A digest of `identity`; it names the folder in a cache."""
        return digest_of_identity(self.identity)

    def window_digests(self, rows: np.ndarray) -> np.ndarray:
        """Compute the digest of each window at `rows`: void [B] of DIGEST_BYTES bytes."""
        return digest_windows(self.windows.take(rows))

    @property
    def schema(self) -> pa.Schema:
        """The columns: surprises in nats a bar (mean of the last bars, and of the last), hidden state [d]."""
        return pa.schema(
            [
                ("digest", pa.binary(DIGEST_BYTES)),
                ("datetime", pa.timestamp("ns")),
                ("instrument", pa.string()),
                *((name, pa.float32()) for name in SURPRISES),
                (HIDDEN, pa.list_(pa.float32(), self.model.d_model)),
            ]
        )


class Embedder:
    """Reads windows of a task, with the weights prepared on its device."""

    def __init__(self, task: EmbeddingTask) -> None:
        networks = task.tokenizer.to(task.device).eval(), task.model.to(task.device).eval()
        lookback = task.windows.lookback
        self.task, self.weights = task, prepare_weights(*networks, lookback, task.dtype, lookback)
        # As many windows as this go through the networks together, always: how they are rounded may depend on it.
        self.batch_size = CPU_BATCH if task.device.type == "cpu" else GPU_BATCH

    def table(self, rows: np.ndarray, report: Callable[[int], object] = lambda windows: None) -> pa.Table:
        """Read the windows at `rows` (int [B]), in their order; `report` is called with the number of each batch."""
        task, fields, windows = self.task, self.task.schema, self.task.windows.take(rows)
        parts, starts = [], range(0, len(rows), self.batch_size)
        with core_pool() if task.device.type == "cpu" else nullcontext(map) as map_batches:
            for start, part in zip(starts, map_batches(lambda start: self._read(rows, start), starts)):
                parts.append(part)
                report(min(self.batch_size, len(rows) - start))
        values = np.concatenate(parts)[: len(rows)]
        surprise, hidden = values[:, : len(SURPRISES)], values[:, len(SURPRISES) :]
        columns = {
            "digest": task.window_digests(rows),
            "datetime": windows.dates,
            "instrument": windows.instruments,
            **dict(zip(SURPRISES, surprise.T)),
            HIDDEN: hidden,
        }
        return pa.table([to_arrow(columns[field.name], field.type) for field in fields], schema=fields)

    def _read(self, rows: np.ndarray, start: int) -> np.ndarray:
        """Read a batch, filled up with its last window: float32 [batch_size, 4 + d]."""
        task = self.task
        batch = task.windows.normalised(rows[np.minimum(np.arange(start, start + self.batch_size), len(rows) - 1)])
        # Copies of torch's own: where rows begin in memory decides how products round.
        x, stamp = (torch.from_numpy(values).clone().to(task.device) for values in (batch.x, batch.stamp))
        losses, hidden = teacher_forced(self.weights, x, stamp, task.surprise_bars)
        surprise = torch.cat([losses.mean(-1), losses[..., -1]], dim=-1)
        return torch.cat([surprise, hidden[:, -task.pooled_bars :].mean(1)], dim=-1).cpu().numpy()
