"""The task of a forecast: all that decides the scores of some windows, and its form on disk for other processes."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from kronos_qlib.data.windows import Windows
from kronos_qlib.data.windows_on_disk import map_windows, save_windows
from kronos_qlib.extensions import identity_of
from kronos_qlib.files import save_array, whole_file
from kronos_qlib.forecast.engine.generate import Sampling
from kronos_qlib.hardware.device import DTYPES
from kronos_qlib.nn import Kronos, KronosTokenizer
from kronos_qlib.nn.checkpoint import digest_of_weights

GENERATION = 3  # raised when the same task would give other scores: chunks cached before are then not read any more
TASK_FILE, STAMPS, DIGEST_BYTES = "task.json", "future_stamp.npy", 16


@dataclass(frozen=True)
class Task:
    """Networks, windows and settings of a forecast.

    future_stamp: int8 [N, P, 5], stamps of the P bars after each of the N distinct score dates, in their order.
    batch_size: windows that go through the networks together (on a CPU, in each thread).
    keep_paths: keep the sample paths themselves. summaries: keep what `scores.SUMMARIES` says of them.
    """

    tokenizer: KronosTokenizer
    model: Kronos
    windows: Windows
    future_stamp: np.ndarray
    sampling: Sampling
    max_context: int
    batch_size: int
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    keep_paths: bool = False
    summaries: bool = False

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def horizon(self) -> int:
        """Bars to forecast."""
        return self.future_stamp.shape[1]

    @cached_property
    def score_dates(self) -> np.ndarray:
        """The distinct score dates: datetime64[ns] [N]."""
        return np.unique(self.windows.dates)

    def horizon_stamps(self, rows: np.ndarray) -> np.ndarray:
        """Return the stamps of the bars to forecast, of the windows at `rows` (int [B]): int64 [B, P, 5 + C]."""
        days = self.score_dates.searchsorted(self.windows.bars.dates[self.windows.ends[rows]])
        stamps, conditions = self.future_stamp[days].astype(np.int64), self.windows.conditions(rows)
        return np.concatenate([stamps, np.repeat(conditions[:, None], self.horizon, axis=1)], axis=2)

    @cached_property
    def identity(self) -> dict[str, object]:
        """What decides the scores, beside the windows' bars: settings and weights."""
        windows = self.windows
        sampling = asdict(self.sampling) | {"filter": identity_of(self.sampling.filter)}
        return {
            "generation": GENERATION,
            "tokenizer": digest_of_weights(self.tokenizer),
            "tokenizer_config": self.tokenizer.config,
            "model": digest_of_weights(self.model),
            "model_config": self.model.config,
            "sampling": {key: value for key, value in sampling.items() if value or key not in ("anchor", "filter")},
            "max_context": self.max_context,
            "dtype": self.precision,
            "device": self.device.type,  # another kind of device rounds differently
            "lookback": windows.lookback,
            "clip": windows.clip,
            "normalisation": windows.normalisation_identity,
            "horizon": self.horizon,
        }

    @cached_property
    def digest(self) -> str:
        """A digest of `identity`; it names the folder of these forecasts in `cache_dir`."""
        return digest_of_identity(self.identity)

    def window_digests(self, rows: np.ndarray) -> np.ndarray:
        """Compute the digest of each window at `rows`: of its bars, its stamps and the horizon's, instrument and date.

        Returns:
            void [B] of DIGEST_BYTES bytes.
        """
        return digest_windows(self.windows.take(rows), self.horizon_stamps(rows))

    def save(self, folder: Path) -> None:
        """Write what another process needs to forecast this task: networks, windows (to be mapped) and settings."""
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.model.save_pretrained(folder / "model")
        save_windows(folder / "windows", {"score": self.windows})
        save_array(folder / STAMPS, self.future_stamp)
        manifest = {
            "sampling": asdict(self.sampling),
            "max_context": self.max_context,
            "dtype": self.precision,
            "device": str(self.device),
            "batch_size": self.batch_size,
            "keep_paths": self.keep_paths,
            "summaries": self.summaries,
            "quantizer": self.tokenizer.own_quantizer,
        }
        with whole_file(folder / TASK_FILE) as draft:
            draft.write_text(json.dumps(manifest, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Task":
        """Load the task that `save` wrote, its windows mapped from the files."""
        manifest = json.loads((folder / TASK_FILE).read_text())
        own_code = {"quantizer": manifest["quantizer"]}
        return cls(
            tokenizer=KronosTokenizer.from_pretrained(folder / "tokenizer", trusted=own_code).eval(),
            model=Kronos.from_pretrained(folder / "model").eval(),
            windows=map_windows(folder / "windows")["score"],
            future_stamp=np.load(folder / STAMPS, mmap_mode="r"),
            sampling=Sampling(**manifest["sampling"]),
            max_context=manifest["max_context"],
            batch_size=manifest["batch_size"],
            dtype=DTYPES[manifest["dtype"]],
            device=torch.device(manifest["device"]),
            keep_paths=manifest["keep_paths"],
            summaries=manifest["summaries"],
        )

    @property
    def precision(self) -> str:
        """The name of the precision of the matrix products."""
        return str(self.dtype).removeprefix("torch.")

    def describe(self, chunks: Sequence[np.ndarray]) -> str:
        """Say how many windows, samples and bars some chunks have."""
        return f"{sum(map(len, chunks)):,} windows × {self.sampling.sample_count} samples × {self.horizon} bars"

    def to(self, device: torch.device) -> "Task":
        """Return the same task on another device."""
        return replace(self, device=device)


def digest_of_identity(identity: dict[str, object]) -> str:
    """Return the digest of what decides the results of a task beside its windows; it names their folder."""
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()


def digest_windows(windows: Windows, *others: np.ndarray) -> np.ndarray:
    """Compute the digest of each window: of its bars, its stamps, its rows of `others`, instrument and date.

    Returns:
        void [W] of DIGEST_BYTES bytes.
    """
    every = np.arange(len(windows))
    fields = windows.values(every), windows.stamps(every), *others, windows.keys
    digests = (
        hashlib.blake2b(b"".join(field.tobytes() for field in window), digest_size=DIGEST_BYTES).digest()
        for window in zip(*fields)
    )
    return np.frombuffer(b"".join(digests), np.dtype((np.void, DIGEST_BYTES)))


def future_stamps(windows: Windows, horizon: int, stamps_after: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
    """Return a task's `future_stamp`, from a calendar's `stamps_after(dates, horizon)`."""
    return stamps_after(np.unique(windows.dates), horizon).astype(np.int8)
