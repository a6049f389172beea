"""Which windows every step learns from, in which parts, and which process takes them."""

import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
import torch

from kronos_qlib.data.windows import Windows
from kronos_qlib.train.code_cache import Codes
from kronos_qlib.train.distributed import Compute
from kronos_qlib.train.settings import StageSettings
from kronos_qlib.train.stages import Examples

LEAST = 1e-100  # of a window's weight


@dataclass(frozen=True)
class Step:
    """What one optimiser step learns from.

    epoch: its epoch, from 0. number: the step, from 0. rows: int `[N]`, the windows of the global batch.
    """

    epoch: int
    number: int
    rows: np.ndarray

    def parts(self, size: int) -> list[slice]:
        """The batch in nearly equal parts of up to `size` windows. Who takes them does not change them."""
        count = math.ceil(len(self.rows) / size)
        edges = [len(self.rows) * part // count for part in range(count + 1)]
        return [slice(*pair) for pair in zip(edges, edges[1:])]


def share_of(parts: int, rank: int, size: int) -> range:
    """The numbers of the parts that one of `size` processes takes; it may be none."""
    return range(parts * rank // size, parts * (rank + 1) // size)


@dataclass(frozen=True)
class Plan:
    """The steps of a stage: each epoch a draw of windows without replacement that only the seed decides.

    weights: float `[size]` or None; windows with larger weights come sooner, so that an epoch that takes only the
        first `per_epoch` of all takes more of them (Efraimidis & Spirakis 2006).
    """

    size: int
    per_epoch: int
    batch_size: int
    epochs: int
    seed: int
    weights: np.ndarray | None = None

    @classmethod
    def of(cls, settings: StageSettings, size: int, seed: int, weights: np.ndarray | None = None) -> "Plan":
        """The plan of a stage's settings for `size` training windows."""
        per_epoch = min(settings.windows_per_epoch or size, size)
        return cls(size, per_epoch, settings.batch_size, settings.epochs, seed, weights)

    @property
    def epoch_steps(self) -> int:
        """Steps in an epoch; its last batch may be smaller."""
        return math.ceil(self.per_epoch / self.batch_size)

    @property
    def steps(self) -> int:
        """Steps in all epochs."""
        return self.epochs * self.epoch_steps

    def windows(self, steps: int) -> int:
        """How many windows the first `steps` steps learn from, counted with repetition."""
        epochs, rest = divmod(steps, self.epoch_steps)
        return epochs * self.per_epoch + min(rest * self.batch_size, self.per_epoch)

    def after(self, done: int) -> Iterator[Step]:
        """Every step after the first `done`."""
        first = done // self.epoch_steps
        for epoch in range(first, self.epochs):
            order = self._order(epoch)
            skip = done % self.epoch_steps if epoch == first else 0
            for part in range(skip, self.epoch_steps):
                rows = order[part * self.batch_size : (part + 1) * self.batch_size]
                yield Step(epoch, epoch * self.epoch_steps + part, rows)

    def _order(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng((self.seed % 2**64, epoch))
        if self.weights is None:
            return random.permutation(self.size)[: self.per_epoch]
        waits = random.standard_exponential(self.size) / self.weights
        return np.argsort(waits, kind="stable")[: self.per_epoch]


def recency(dates: np.ndarray, half_life_days: float) -> np.ndarray:
    """Weights of windows that halve with every half-life before the newest: float `[W]` of dates datetime64 `[W]`.

    None is less than LEAST: what is drawn last of all is still in an order of its own.
    """
    age = (dates.max() - dates) / np.timedelta64(1, "D")
    return np.maximum(0.5 ** (age / half_life_days), LEAST)


@dataclass(frozen=True)
class Part:
    """Some windows of a global batch.

    number: which part of the batch it is. weight: the share of the batch that it is.
    """

    number: int
    weight: float
    examples: Examples


@dataclass
class Feed:
    """The parts that one process takes, step after step, gathered one step ahead by a thread.

    waited: seconds spent so far in waiting for a step that was not ready.
    """

    windows: Windows
    plan: Plan
    part_size: int
    compute: Compute
    codes: Codes | None = None
    waited: float = field(default=0.0, init=False)

    def after(self, done: int) -> Iterator[tuple[Step, list[Part]]]:
        """The steps after the first `done`, each with this process's parts, on the device."""
        with ThreadPoolExecutor(1, thread_name_prefix="feed") as thread:
            ahead: deque[tuple[Step, Future[list[Part]]]] = deque()
            for step in chain(self.plan.after(done), [None]):
                if step is not None:
                    ahead.append((step, thread.submit(self._parts, step)))
                if len(ahead) > 1 or (ahead and step is None):
                    ready, future = ahead.popleft()
                    started = time.perf_counter()
                    parts = future.result()
                    self.waited += time.perf_counter() - started
                    yield ready, [replace(part, examples=part.examples.to(self.compute.device)) for part in parts]

    def _parts(self, step: Step) -> list[Part]:
        slices = step.parts(self.part_size)
        own = share_of(len(slices), self.compute.group.rank, self.compute.group.size)
        if not own:
            return []
        rows = slice(slices[own[0]].start, slices[own[-1]].stop)
        random = np.random.default_rng((self.plan.seed % 2**64, step.number, 1))
        length = self.windows.lookback + self.windows.future
        chance = random.random((len(step.rows), length - 1), dtype=np.float32)  # of the whole batch, whoever takes it
        examples = gather(self.windows, step.rows[rows], self.codes, chance[rows])
        parts = []
        for number in own:
            start, stop = slices[number].start, slices[number].stop
            some = examples.part(slice(start - rows.start, stop - rows.start))
            if self.compute.device.type == "cuda":
                some = some.pinned()
            parts.append(Part(number, (stop - start) / len(step.rows), some))
        return parts


def gather(
    windows: Windows, rows: np.ndarray, codes: Codes | None = None, chance: np.ndarray | None = None
) -> Examples:
    """The windows at `rows` as tensors on the CPU, from the cache of codes if there is one."""
    if codes is None:
        batch = windows.normalised(rows)
        x, ids, stamp = torch.from_numpy(batch.x), None, batch.stamp
    else:
        x, ids, stamp = None, torch.from_numpy(codes.take(rows)), windows.stamps(rows)
    examples = Examples(x, ids, torch.from_numpy(stamp), None if chance is None else torch.from_numpy(chance))
    return examples.part(slice(None))
