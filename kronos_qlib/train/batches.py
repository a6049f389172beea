"""The batches of a stage: a seed draws their windows, and each process loads its micro-batches of each, one ahead."""

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from typing import ClassVar

import numpy as np
import torch

from kronos_qlib.data.windows import Windows
from kronos_qlib.train.code_cache import CodeCache
from kronos_qlib.train.distributed import Compute
from kronos_qlib.train.settings import RankerSettings
from kronos_qlib.train.stages import Examples, StageSpecification

SMALLEST_DRAW_WEIGHT = 1e-100


@dataclass(frozen=True)
class SampledBatch:
    """The windows of one optimiser step, over all processes.

    epoch, step: from 0, the step counted over all epochs. rows: int `[B]`, their positions among the training windows.
    edges: of D whole days among the rows, int `[D + 1]`; None where days do not matter.
    """

    epoch: int
    step: int
    rows: np.ndarray
    edges: np.ndarray | None = None

    def micro_batches(self, micro_batch_size: int) -> list[slice]:
        """Divide the batch into its days, or into nearly equal slices of up to `micro_batch_size` windows.

        The slices are the same whoever works on them.
        """
        if self.edges is not None:
            return [slice(*pair) for pair in pairwise(self.edges.tolist())]
        count = math.ceil(len(self.rows) / micro_batch_size)
        edges = [len(self.rows) * number // count for number in range(count + 1)]
        return [slice(*pair) for pair in zip(edges, edges[1:])]


@dataclass(frozen=True)
class BatchSampler:
    """Draws the batches of a stage: every epoch takes windows without replacement, by the seed alone.

    n_windows: how many there are to draw from. windows_per_epoch, batch_size, epochs: see `StageSettings`.
    draw_weights: float `[n_windows]` or None. Windows with larger weights come sooner in an epoch's order, so that an
        epoch of fewer than all takes more of them (Efraimidis & Spirakis 2006).
    """

    n_windows: int
    windows_per_epoch: int
    batch_size: int
    epochs: int
    seed: int
    draw_weights: np.ndarray | None = None
    unit: ClassVar[str] = "window"

    @classmethod
    def from_specification(cls, specification: StageSpecification) -> "BatchSampler":
        """Make the sampler of a stage's training windows."""
        if isinstance(specification.stage.settings, RankerSettings):
            return DaySampler.of_days(specification)
        settings, n_windows = specification.stage.settings, len(specification.train)
        windows_per_epoch = min(settings.windows_per_epoch or n_windows, n_windows)
        draw = specification.seed, specification.draw_weights
        return cls(n_windows, windows_per_epoch, settings.batch_size, settings.epochs, *draw)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in an epoch; its last batch may be smaller."""
        return math.ceil(self.windows_per_epoch / self.batch_size)

    @property
    def steps(self) -> int:
        """Steps in all epochs."""
        return self.epochs * self.steps_per_epoch

    def windows_drawn(self, steps: int) -> int:
        """Count the windows of the first `steps` batches, with repetition."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs * self.windows_per_epoch + min(rest * self.batch_size, self.windows_per_epoch)

    def batches(self, first: int = 0) -> Iterator[SampledBatch]:
        """Draw the batches from step `first` to the last."""
        for epoch in range(first // self.steps_per_epoch, self.epochs):
            order, before = self._order(epoch), epoch * self.steps_per_epoch
            for step in range(max(first, before), before + self.steps_per_epoch):
                start = (step - before) * self.batch_size
                yield SampledBatch(epoch, step, order[start : start + self.batch_size])

    def _order(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng((self.seed % 2**64, epoch))
        if self.draw_weights is None:
            return random.permutation(self.n_windows)[: self.windows_per_epoch]
        waits = random.standard_exponential(self.n_windows) / self.draw_weights
        return np.argsort(waits, kind="stable")[: self.windows_per_epoch]


@dataclass(frozen=True)
class DaySampler(BatchSampler):
    """Draws whole days: what `BatchSampler` counts as windows are days here.

    offsets: int `[D + 1]`; the windows of day d are `offsets[d]:offsets[d + 1]`.
    instruments_per_day: so many windows of a day are drawn; None: all.
    """

    offsets: np.ndarray = field(default_factory=lambda: np.zeros(1, int))
    instruments_per_day: int | None = None
    unit: ClassVar[str] = "day"

    @classmethod
    def of_days(cls, specification: StageSpecification) -> "DaySampler":
        """Make the sampler of a ranker's training days."""
        settings, offsets = specification.stage.settings, day_offsets(specification.train.dates)
        days = len(offsets) - 1
        per_epoch = min(settings.days_per_epoch or days, days)
        shape = days, per_epoch, settings.batch_size, settings.epochs
        return cls(*shape, specification.seed, offsets=offsets, instruments_per_day=settings.instruments_per_day)

    def batches(self, first: int = 0) -> Iterator[SampledBatch]:
        """Draw the batches from step `first` to the last, each of whole days."""
        for batch in super().batches(first):
            random = np.random.default_rng((self.seed % 2**64, batch.step, 2))
            days = [self._windows_of(day, random) for day in batch.rows]
            edges = np.cumsum([0, *map(len, days)])
            yield SampledBatch(batch.epoch, batch.step, np.concatenate(days), edges)

    def _windows_of(self, day: int, random: np.random.Generator) -> np.ndarray:
        rows = np.arange(self.offsets[day], self.offsets[day + 1])
        if self.instruments_per_day is None or len(rows) <= self.instruments_per_day:
            return rows
        return np.sort(random.choice(rows, self.instruments_per_day, replace=False))


def day_offsets(dates: np.ndarray) -> np.ndarray:
    """Return where each distinct date of sorted dates [W] begins, and W: int `[D + 1]`."""
    starts = np.flatnonzero(dates[1:] != dates[:-1]) + 1
    return np.concatenate([[0], starts, [len(dates)]]).astype(int)


def recency_weights(dates: np.ndarray, half_life_days: float) -> np.ndarray:
    """Weigh windows by their age, half for every half-life before the newest: float `[W]` of datetime64 `[W]`.

    No weight is below SMALLEST_DRAW_WEIGHT: among zeros the order would not be random.
    """
    age = (dates.max() - dates) / np.timedelta64(1, "D")
    return np.maximum(0.5 ** (age / half_life_days), SMALLEST_DRAW_WEIGHT)


@dataclass(frozen=True)
class MicroBatch:
    """Windows of a batch that go through the network at a time.

    number: which micro-batch of the batch it is. share: its windows over those of the
        batch; of a whole day, 1 over its days.
    """

    number: int
    share: float
    examples: Examples


def shard(count: int, rank: int, size: int) -> range:
    """Return which of `count` micro-batches one of `size` processes works on; it may be none."""
    return range(count * rank // size, count * (rank + 1) // size)


@dataclass
class BatchLoader:
    """Loads the micro-batches of this process, batch after batch; a thread prepares the next one meanwhile.

    seconds_waited: for batches that were not ready.
    """

    windows: Windows
    sampler: BatchSampler
    micro_batch_size: int
    compute: Compute
    code_cache: CodeCache | None = None
    targets: np.ndarray | None = None
    seconds_waited: float = field(default=0.0, init=False)

    def batches(self, first: int = 0) -> Iterator[tuple[SampledBatch, list[MicroBatch]]]:
        """Load the batches from step `first` to the last, each with this process's micro-batches, on its device."""
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as thread:
            ready = None
            for batch in chain(self.sampler.batches(first), [None]):
                following = None if batch is None else (batch, thread.submit(self._load, batch))
                if ready is not None:
                    started = time.perf_counter()
                    micro_batches = ready[1].result()
                    self.seconds_waited += time.perf_counter() - started
                    device = self.compute.device
                    yield ready[0], [replace(some, examples=some.examples.to(device)) for some in micro_batches]
                ready = following

    def _load(self, batch: SampledBatch) -> list[MicroBatch]:
        slices = batch.micro_batches(self.micro_batch_size)
        own = shard(len(slices), self.compute.group.rank, self.compute.group.size)
        if not own:
            return []
        rows = slice(slices[own[0]].start, slices[own[-1]].stop)
        random = np.random.default_rng((self.sampler.seed % 2**64, batch.step, 1))
        length = self.windows.lookback + self.windows.future
        uniforms = random.random((len(batch.rows), length - 1), dtype=np.float32)  # of the whole batch, in any process
        targets = None if self.targets is None else self.targets[batch.rows[rows]]
        examples = load_examples(self.windows, batch.rows[rows], self.code_cache, uniforms[rows], targets)
        micro_batches = []
        for number in own:
            start, stop = slices[number].start, slices[number].stop
            some = examples.copy_rows(slice(start - rows.start, stop - rows.start))
            if self.compute.device.type == "cuda":
                some = some.pin_memory()
            share = (stop - start) / len(batch.rows) if batch.edges is None else 1 / len(slices)
            micro_batches.append(MicroBatch(number, share, some))
        return micro_batches


def load_examples(
    windows: Windows,
    rows: np.ndarray,
    code_cache: CodeCache | None = None,
    uniforms: np.ndarray | None = None,
    targets: np.ndarray | None = None,
) -> Examples:
    """Load the windows at `rows` as tensors on the CPU, as codes if there is a cache of them.

    uniforms, targets: those of these windows.
    """
    if code_cache is None:
        batch = windows.normalised(rows)
        x, ids, stamp = torch.from_numpy(batch.x), None, batch.stamp
    else:
        x, ids, stamp = None, torch.from_numpy(code_cache.take(rows)), windows.stamps(rows)
    given = (None if values is None else torch.from_numpy(values) for values in (uniforms, targets))
    examples = Examples(x, ids, torch.from_numpy(stamp), *given)
    return examples.copy_rows(slice(None))
