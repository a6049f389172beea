"""A task of a walk-forward: one training and the days that it scores, in a recorder of its own."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Run
from qlib.config import C
from qlib.contrib.eva.alpha import calc_ic
from qlib.data import D
from qlib.data.dataset import Dataset
from qlib.data.dataset.weight import Reweighter
from qlib.model.trainer import _exe_task, _log_task_info
from qlib.utils import get_callable_kwargs, init_instance_by_config
from qlib.workflow import R
from sqlalchemy.engine import make_url

from kronos_qlib.data.folds import Segments
from kronos_qlib.train.step import derive_seed
from kronos_qlib.workflow.task_config import seed_generators

TASK_TAG, SECONDS_TAG = "kronos_qlib.task", "kronos_qlib.seconds"
_handlers: dict[str, Any] = {}  # of this process: the handler of the task before, by its configuration


@dataclass(frozen=True)
class RollingTask:
    """One training of a walk-forward and the days that it scores.

    number: from 1. config: as Qlib's trainer takes it. digest: of all that decides the scores, the bars too.
    """

    number: int
    segments: Segments
    config: dict[str, Any]
    digest: str


@dataclass(frozen=True)
class TaskRun:
    """A task that has ended: its recorder, how long it took, and whether that was before."""

    task: RollingTask
    recorder_id: str
    seconds: float
    reused: bool


def train_task(task: RollingTask, experiment: str) -> TaskRun:
    """Train a task and record its predictions, as Qlib's `task_train`, but for the handler, which tasks share."""
    started = time.monotonic()
    seed_generators(derive_seed(int(task.digest, 16), "task", task.number))
    config = task.config | {"dataset": task_dataset(task)}
    if config.get("reweighter"):
        config["reweighter"] = init_instance_by_config(config["reweighter"], accept_types=Reweighter)
    with R.start(experiment_name=experiment, recorder_name=f"task {task.number}"):
        recorder = R.get_recorder()
        _log_task_info(task.config)
        _exe_task(config)
        seconds = round(time.monotonic() - started, 1)
        R.set_tags(**{TASK_TAG: task.digest, SECONDS_TAG: str(seconds)})
    return TaskRun(task, recorder.id, seconds, reused=False)


def rank_ic(run: TaskRun, experiment: str) -> float:
    """Compute the mean daily rank IC of a task's scores, on the days that have labels."""
    recorder = R.get_recorder(recorder_id=run.recorder_id, experiment_name=experiment)
    scores, labels = (recorder.load_object(name).iloc[:, 0] for name in ("pred.pkl", "label.pkl"))
    both = pd.DataFrame({"score": scores, "label": labels}).dropna()
    return float(calc_ic(both["score"], both["label"])[1].mean()) if len(both) else float("nan")


def task_dataset(task: RollingTask) -> Dataset:
    """Make a task's dataset; a handler of the same configuration is not loaded again."""
    dataset = task.config["dataset"]
    handler = dataset["kwargs"]["handler"]
    key = json.dumps([str(C.dpm.get_data_uri("day")), handler], sort_keys=True, default=str)
    if key not in _handlers:
        _handlers.clear()
        _handlers[key] = init_instance_by_config(handler)
    return init_instance_by_config(dataset | {"kwargs": dataset["kwargs"] | {"handler": _handlers[key]}})


_FIELDS = ("$open", "$high", "$low", "$close", "$volume", "$amount", "$vwap", "$factor", "$change")


class BarDigests:
    """Digests of a universe's bars up to a day, so that tasks on other bars are other tasks."""

    def __init__(self, handler: Mapping[str, Any], reach: int) -> None:
        kind, kwargs = get_callable_kwargs(handler)
        default = signature(kind).parameters.get("instruments")
        universe = kwargs.get("instruments", None if default is None else default.default)
        self._reach, self._sessions = reach, pd.DatetimeIndex(D.calendar())
        if not isinstance(universe, (str, list, tuple, Mapping)):
            self._rows = pd.Series(dtype=np.uint64, index=pd.DatetimeIndex([]))
            return
        instruments = D.instruments(universe) if isinstance(universe, str) else universe
        bars = D.features(instruments, list(_FIELDS), kwargs.get("start_time"), kwargs.get("end_time"))
        rows = pd.util.hash_pandas_object(bars)
        self._rows = pd.Series(rows.to_numpy(), bars.index.get_level_values("datetime")).sort_index(kind="stable")

    def until(self, date: pd.Timestamp) -> str:
        """Return the digest of the bars up to those that the labels of a date are made of."""
        last = min(int(self._sessions.searchsorted(date)) + self._reach, len(self._sessions) - 1)
        rows = self._rows.loc[: self._sessions[last]]
        return blake2b(rows.to_numpy().tobytes(), digest_size=8).hexdigest()


def finished_runs(experiment: str, tag: str | None) -> dict[str, Run]:
    """Find the finished runs of an experiment, the newest of each value of a tag, the newest first.

    An SQLite store that is not there yet is not made.
    """
    uri = R.get_uri()
    if uri.startswith("sqlite:///") and not Path(make_url(uri).database or "").exists():
        return {}
    client = MlflowClient(uri)
    known = client.get_experiment_by_name(experiment)
    if known is None:
        return {}
    runs = client.search_runs(
        [known.experiment_id], "attributes.status = 'FINISHED'", 1, 50_000, ["attributes.start_time DESC"]
    )
    found: dict[str, Run] = {}
    for run in runs:
        if tag is None or tag in run.data.tags:
            found.setdefault(run.data.tags[tag] if tag else run.info.run_id, run)
    return found
