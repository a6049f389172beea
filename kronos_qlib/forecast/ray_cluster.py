"""Forecast on a Ray cluster: each chunk is a Ray task on any free machine; a lost machine's chunks are done again."""

import logging
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from kronos_qlib.forecast.forecaster import Forecaster
from kronos_qlib.forecast.task import Task
from kronos_qlib.hardware.cpu import retain_heap
from kronos_qlib.hardware.device import resolve_device

logger = logging.getLogger("qlib.KronosForecast")
RETRIES = 10  # of a chunk whose machine or process is lost
CHUNKS_PER_SLOT = 2  # submitted to Ray for each task that the cluster can execute at a time
LOOK_SECONDS = 60  # without a finished chunk, after which the size of the cluster is read again
_FORECASTERS: dict[str, Forecaster] = {}  # of this process, which Ray keeps for the next chunk


def compute_on_cluster(
    task: Task, chunks: list[np.ndarray], report: Callable[[int], object]
) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Compute chunks (positions of windows), in the order in which they are finished: positions and forecasts.

    The cluster is the one that Ray is connected to, else that of RAY_ADDRESS, else one on this machine. A chunk takes
    one core, or one GPU where the task's device is CUDA; machines need this package and, of the user's files,
    those of a quantizer, filter or normalisation of one's own, at the same place.

    Raises:
        ModuleNotFoundError: the extra `ray` is not installed. ConnectionError: there is no cluster.
        RuntimeError: a chunk was lost too often, or the cluster has no core or GPU.
    """
    ray = connect_to_cluster()
    kind = "GPU" if task.device.type == "cuda" else "CPU"
    if not (slots := _slots(ray, kind)):
        raise RuntimeError(f"forecast.engine: ray: the cluster has no {kind}")
    nodes = sum(node["Alive"] for node in ray.nodes())
    logger.info(f"forecasting {task.describe(chunks)} on a Ray cluster of {nodes} nodes with {slots} {kind}s")
    remote = ray.remote(_table).options(
        num_cpus=0 if kind == "GPU" else 1, num_gpus=1 if kind == "GPU" else 0, max_retries=RETRIES
    )
    shared, name = ray.put(task), task.digest + os.urandom(4).hex()
    waiting = list(reversed(chunks))
    running: dict[Any, np.ndarray] = {}  # by Ray's reference
    try:
        while waiting or running:
            while waiting and len(running) < CHUNKS_PER_SLOT * max(slots, 1):
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
            report(len(rows))
            yield rows, table
    finally:
        for left in running:
            ray.cancel(left, force=True)


def _slots(ray: ModuleType, kind: str) -> int:
    """Return how many chunks the cluster can compute at a time."""
    return int(ray.cluster_resources().get(kind, 0))


def _table(name: str, task: Task, rows: np.ndarray) -> pa.Table:
    """Compute one chunk, in a process of the cluster."""
    if name not in _FORECASTERS:
        _FORECASTERS.clear()
        torch.set_num_threads(1)
        _FORECASTERS[name] = Forecaster(task.to(resolve_device(task.device.type)))
    with retain_heap():
        return _FORECASTERS[name].table(rows)


def connect_to_cluster(key: str = "forecast.engine") -> ModuleType:
    """Connect Ray to the cluster of RAY_ADDRESS, or one on this machine, unless it is connected, and return it.

    Args:
        key: of the setting or option that asks for it, for errors.

    Raises:
        ModuleNotFoundError: the extra `ray` is not installed. ConnectionError: there is no cluster.
    """
    ray = require_ray(key)
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "auto")
        try:
            ray.init(address=address, log_to_driver=False)
        except ConnectionError as error:
            raise ConnectionError(
                f"{key}: ray found no cluster at {address!r}; start one (`ray start --head`), set RAY_ADDRESS, or use "
                "the engine local"
            ) from error
    return ray


def require_ray(key: str = "forecast.engine") -> ModuleType:
    """Import Ray.

    Raises:
        ModuleNotFoundError: it is not installed; the message names the extra.
    """
    try:
        import ray
    except ImportError as error:
        raise ModuleNotFoundError(f"{key}: ray needs the extra: pip install -c constraints.txt -e '.[ray]'") from error
    return ray
