"""The processes of one training, and how they speak: sums, shared values, work that only the first does."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kronos_qlib.hardware.cpu import MapFunction, core_pool, cores

Value = TypeVar("Value")
PATIENCE = timedelta(minutes=30)  # a first process may read data or write a large checkpoint while the others wait


@dataclass(frozen=True)
class Group:
    """One process among `size`; a group of one needs no backend."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files, logs and shows progress."""
        return self.rank == 0

    def sum(self, values: Tensor) -> None:
        """Replace a tensor by its sum over the processes."""
        if self.size > 1:
            dist.all_reduce(values)

    def copy(self, tensor: Tensor) -> None:
        """Replace a tensor by the first process's."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, in the order of ranks, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def once(self, work: Callable[[], Value]) -> Value:
        """Let the first process do some work; its value, or its error, reaches them all."""
        if self.size == 1:
            return work()
        told: list[Any] = [None, None]
        if self.first:
            try:
                told[0] = work()
            except Exception as error:  # raised again below, in every process
                told[1] = error
        dist.broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise told[1]
        return told[0]


ALONE = Group()


def launched() -> bool:
    """Whether a launcher (torchrun or our own) started this process as one of a group."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


@contextmanager
def joined() -> Iterator[Group]:
    """Join the group that the launcher's environment names: NCCL between GPUs, gloo between CPUs."""
    store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # The launcher keeps one store for all its restarts: the dead must not be found there under the old addresses.
        store = dist.PrefixStore(f"life {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield Group(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """This process's own device of a kind; the cores of a machine are divided among its processes.

    Raises:
        ValueError: more processes on this machine than GPUs.
    """
    local, beside = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type != "cuda":
        torch.set_num_threads(max(1, cores() // beside))
        return device
    if beside > torch.cuda.device_count():
        raise ValueError(f"{beside} processes on this machine, but torch sees {torch.cuda.device_count()} GPU(s)")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@dataclass(frozen=True)
class Compute:
    """The device of this process, the precision of its matrix products, and the processes that it works with.

    each: a `map` for pieces of work: on a CPU as many at a time as there are cores, each by one thread.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    group: Group = ALONE
    each: MapFunction = map

    @property
    def autocast(self) -> torch.autocast:
        """The context of a forward pass in this precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16)

    @property
    def precision(self) -> str:
        """The name of the precision."""
        return str(self.dtype).removeprefix("torch.")

    @classmethod
    @contextmanager
    def on(cls, device: torch.device, dtype: torch.dtype, group: Group = ALONE) -> Iterator["Compute"]:
        """For the length of a block. In it torch itself uses one thread of a CPU, `each` as many as torch did."""
        if device.type == "cpu":
            with core_pool() as each:
                yield cls(device, dtype, group, each)
        else:
            yield cls(device, dtype, group)
