"""Windows → tensors: what a process learns from in every step, made ready while the step before it runs."""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
import torch

from kronos_qlib.data.windows import Windows
from kronos_qlib.train.codes import Codes
from kronos_qlib.train.compute import Compute
from kronos_qlib.train.plan import Plan, Step, share_of
from kronos_qlib.train.stages import Examples


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
        batch = windows.gather(rows)
        x, ids, stamp = torch.from_numpy(batch.x), None, batch.stamp
    else:
        x, ids, stamp = None, torch.from_numpy(codes.take(rows)), windows.stamps(rows)
    examples = Examples(x, ids, torch.from_numpy(stamp), None if chance is None else torch.from_numpy(chance))
    return examples.part(slice(None))
