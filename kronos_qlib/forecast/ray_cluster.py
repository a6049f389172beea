"""Forecasting on a Ray cluster: every chunk is a task, on whatever machine is free; a lost machine's are done again."""

import logging
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from kronos_qlib.forecast.forecaster import Scorer
from kronos_qlib.forecast.task import Task
from kronos_qlib.hardware.cpu import retain_heap
from kronos_qlib.hardware.device import resolve_device

if TYPE_CHECKING:
    import ray

logger = logging.getLogger("qlib.KronosForecast")
RETRIES = 10  # of a chunk whose machine or process is lost
AHEAD = 2  # chunks in flight for every one that the cluster can work on
LOOK_SECONDS = 60  # without a chunk, after which the cluster is looked at
_SCORERS: dict[str, Scorer] = {}  # of this process, which Ray keeps for the next chunk


def compute_on_cluster(
    task: Task, missing: list[np.ndarray], done: Callable[[int], object]
) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Positions and forecasts of chunks, in the order in which they are finished.

    The cluster is the one that Ray is connected to, else that of RAY_ADDRESS, else one on this machine. A task takes
    one core, or one GPU of it where the task's device is CUDA; machines need this package and none of the files.

    Raises:
        ModuleNotFoundError: the extra `ray` is not installed. ConnectionError: there is no cluster.
        RuntimeError: a chunk was lost again and again, or the cluster has no room for a task.
    """
    ray = require_ray()
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "auto")
        try:
            ray.init(address=address, log_to_driver=False)
        except ConnectionError as error:
            raise ConnectionError(
                f"forecast.engine: ray found no cluster at {address!r}; start one (`ray start --head`), set "
                "RAY_ADDRESS, or use engine: local"
            ) from error
    kind = "GPU" if task.device.type == "cuda" else "CPU"
    if not (slots := _slots(ray, kind)):
        raise RuntimeError(f"forecast.engine: ray: the cluster has no {kind}")
    nodes = sum(node["Alive"] for node in ray.nodes())
    logger.info(f"forecasting {task.told(missing)} on a Ray cluster of {nodes} nodes with {slots} {kind}s")
    remote = ray.remote(_table).options(
        num_cpus=0 if kind == "GPU" else 1, num_gpus=1 if kind == "GPU" else 0, max_retries=RETRIES
    )
    shared, name = ray.put(task), task.digest + os.urandom(4).hex()
    waiting = list(reversed(missing))
    running: dict[ray.ObjectRef, np.ndarray] = {}
    try:
        while waiting or running:
            while waiting and len(running) < AHEAD * max(slots, 1):
                rows = waiting.pop()
                running[remote.remote(name, shared, rows)] = rows
            ready, _ = ray.wait(list(running), num_returns=1, timeout=LOOK_SECONDS)
            slots = _slots(ray, kind)  # machines come and go
            if not ready:
                if not slots:
                    logger.warning(f"forecast.engine: ray: the cluster has lost its last {kind}; waiting for another")
                continue
            rows = running.pop(ready[0])
            try:
                table = ray.get(ready[0])
            except ray.exceptions.RayTaskError as error:
                raise RuntimeError(f"forecast.engine: ray: {error.cause}") from error
            except ray.exceptions.RayError as error:
                raise RuntimeError(f"forecast.engine: ray: a chunk was lost {RETRIES + 1} times ({error})") from error
            done(len(rows))
            yield rows, table
    finally:
        for left in running:
            ray.cancel(left, force=True)


def _slots(ray: ModuleType, kind: str) -> int:
    """How many tasks of a kind the cluster can work on at a time."""
    return int(ray.cluster_resources().get(kind, 0))


def _table(name: str, task: Task, rows: np.ndarray) -> pa.Table:
    """One chunk, in a process of the cluster."""
    if name not in _SCORERS:
        _SCORERS.clear()
        torch.set_num_threads(1)
        _SCORERS[name] = Scorer(task.on(resolve_device(task.device.type)))
    with retain_heap():
        return _SCORERS[name].table(rows)


def require_ray() -> "ray":
    """Ray, or a ModuleNotFoundError that names the extra."""
    try:
        import ray
    except ImportError as error:
        raise ModuleNotFoundError(
            "forecast.engine: ray needs the extra: pip install -c constraints.txt -e '.[ray]'"
        ) from error
    return ray
