"""Which windows every step learns from, in which parts, and which process takes them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kronos_qlib.train.settings import StageSettings

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
