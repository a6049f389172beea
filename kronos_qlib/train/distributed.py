"""The processes of one training: their group and its collectives, the device of each, and its cores."""

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
TIMEOUT = timedelta(minutes=30)  # the first process may read data or write a large checkpoint while the others wait


@dataclass(frozen=True)
class Group:
    """One process among `size`, and torch.distributed's collectives; a group of one needs no backend."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files, logs and shows progress."""
        return self.rank == 0

    def all_reduce(self, values: Tensor) -> None:
        """Replace a tensor by its sum over the processes."""
        if self.size > 1:
            dist.all_reduce(values)

    def broadcast(self, tensor: Tensor) -> None:
        """Replace a tensor by that of the first process."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)

    def all_gather(self, value: Value) -> list[Value]:
        """Return every process's value, in the order of ranks, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def run_on_first(self, work: Callable[[], Value]) -> Value:
        """Call a function in the first process alone, and return its value, or raise its error, in every process."""
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]  # value, error
        if self.is_first:
            try:
                outcome[0] = work()
            except Exception as error:  # raised again below, in every process
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


SINGLE_PROCESS = Group()


def is_launched() -> bool:
    """Return whether a launcher (torchrun or our own) started this process as one of a group."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


@contextmanager
def process_group() -> Iterator[Group]:
    """Join the group that the launcher's environment names, for a block: NCCL between GPUs, gloo between CPUs."""
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # The launcher keeps one store for all its restarts: dead processes must not be found under old addresses.
        store = dist.PrefixStore(f"life {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield Group(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """Choose this process's own device of a kind, and divide the cores of a machine among its processes.

    Raises:
        ValueError: more processes on this machine than GPUs.
    """
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type != "cuda":
        torch.set_num_threads(max(1, cores() // local_size))
        return device
    if local_size > torch.cuda.device_count():
        raise ValueError(f"{local_size} processes on this machine, but torch sees {torch.cuda.device_count()} GPU(s)")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


@dataclass(frozen=True)
class Compute:
    """The device of this process, the precision of its matrix products, and its group.

    map_on_cores: a `map` for pieces of work: on a CPU as many at a time as there are cores, each by one thread.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    group: Group = SINGLE_PROCESS
    map_on_cores: MapFunction = map

    @property
    def autocast(self) -> torch.autocast:
        """The context of a forward pass in this precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16)

    @property
    def precision(self) -> str:
        """The name of the precision."""
        return str(self.dtype).removeprefix("torch.")


@contextmanager
def open_compute(device: torch.device, dtype: torch.dtype, group: Group = SINGLE_PROCESS) -> Iterator[Compute]:
    """Make a `Compute` for a block. In it torch itself uses one thread of a CPU, `map_on_cores` as many as torch did.

    torch would divide every operation among its threads, and their number would decide how some sums round. Whole
    pieces of work side by side, each on one thread, give the same result on any number of cores.
    """
    if device.type == "cpu":
        with core_pool() as map_on_cores:
            yield Compute(device, dtype, group, map_on_cores)
    else:
        yield Compute(device, dtype, group)
