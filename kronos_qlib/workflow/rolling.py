"""Walk-forward: a workflow's model trained anew every so many sessions, its predictions joined as one run.

What `kronos-qlib roll` runs. The tasks are those of Qlib's `RollingGen`, purged; Qlib trains each of them into a
recorder of its own, and its `RollingEnsemble` joins the predictions.
"""

import copy
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import pandas as pd
import qlib
import torch
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky.process_executor import TerminatedWorkerError
from mlflow import MlflowClient
from mlflow.entities import Run
from qlib.cli.run import sys_config
from qlib.config import C
from qlib.data import D
from qlib.model.ens.ensemble import RollingEnsemble
from qlib.utils import get_callable_kwargs, init_instance_by_config
from qlib.workflow import R
from qlib.workflow.record_temp import SignalRecord
from qlib.workflow.recorder import Recorder
from qlib.workflow.task.gen import RollingGen

from kronos_qlib.data.dataset import KLineDataset
from kronos_qlib.data.expressions import sessions_ahead
from kronos_qlib.data.folds import Segments
from kronos_qlib.forecast.ray_cluster import RETRIES, connect_to_cluster, require_ray
from kronos_qlib.hardware.device import resolve_device
from kronos_qlib.versions import package_versions
from kronos_qlib.workflow.check import recorder_findings
from kronos_qlib.workflow.recording import RECORD, ROLLING_RECORD, record_json
from kronos_qlib.workflow.rolling_task import (
    SECONDS_TAG,
    TASK_TAG,
    BarDigests,
    RollingTask,
    TaskRun,
    finished_runs,
    task_dataset,
    train_task,
)
from kronos_qlib.workflow.task_config import (
    bar_freq,
    horizon_of,
    label_expressions,
    output_dirs,
    replaced,
)
from kronos_qlib.workflow.training_folder import fixed_part
from kronos_qlib.workflow.workflow_file import read_workflow

Window: TypeAlias = Literal["expanding", "sliding"]
Start: TypeAlias = Literal["scratch", "previous"]
Engine: TypeAlias = Literal["local", "ray"]
ROLLING_TAG = "kronos_qlib.rolling"
_SEGMENTS = "task.dataset.kwargs.segments"
_RECORDS = "qlib.workflow.record_temp"


@dataclass(frozen=True)
class _Place:
    """Where another process, or another machine that sees the same folder, trains a task."""

    config: dict[str, Any]
    workflow: str
    experiment: str
    folder: str
    threads: int


class WalkForward:
    """The tasks of a workflow that is trained anew every `step` sessions, and the run that joins their predictions.

    The tasks' test segments divide the workflow's own. Train, valid and test move on together; between train and valid,
    and between valid and test, lies an embargo of as many sessions as a label looks ahead or a window has a horizon,
    whichever is more. Qlib is initialised.

    Args:
        workflow: a file for qrun, of any Qlib model. step: sessions that a task scores.
        window: expanding trains on all sessions from the start, sliding on as many as the first task.
        start: previous lets each training begin with the weights of the task before (KronosModel, KronosRanker).
        next_epochs: epochs of such a training; None: what the workflow says.
        processes: tasks at a time on this machine. engine: ray trains the tasks on a Ray cluster.
        experiment: of the joined run; the tasks are in NAME_tasks. By default the workflow's name and _rolling.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: one line, for what cannot be done.
    """

    def __init__(
        self,
        workflow: Path,
        step: int,
        window: Window = "expanding",
        start: Start = "scratch",
        next_epochs: int | None = None,
        processes: int = 1,
        engine: Engine = "local",
        experiment: str | None = None,
    ) -> None:
        if step < 1 or processes < 1 or (next_epochs or 1) < 1:
            raise ValueError("step, processes and next epochs should be 1 or more")
        for name, value, known in (("window", window, Window), ("from", start, Start), ("engine", engine, Engine)):
            if value not in get_args(known):
                raise ValueError(f"{name} should be {' or '.join(get_args(known))}, not {value!r}")
        if start == "previous" and (processes > 1 or engine == "ray"):
            raise ValueError("from previous is a chain of tasks: it takes neither processes nor the engine ray")
        if engine == "ray" and processes > 1:
            raise ValueError("processes are of this machine; leave them out with the engine ray")
        if next_epochs is not None and start != "previous":
            raise ValueError("next epochs are of trainings from previous weights: say from previous too")
        if engine == "ray":
            require_ray("engine")
        self.workflow, self.step, self.processes, self.engine = workflow, step, processes, engine
        self.window, self.start, self.next_epochs = window, start, next_epochs
        self.config = read_workflow(workflow)
        self.name = self.config.get("experiment_name", "workflow")
        self.experiment = experiment or f"{self.name}_rolling"
        for finding in recorder_findings(self.config["qlib_init"]):
            if finding.level == "error":
                raise ValueError(f"{workflow}: {finding.text}")
        qlib.init(**copy.deepcopy(self.config["qlib_init"]))
        absent = [folder for folder in C.dpm.provider_uri.values() if not Path(folder).is_dir()]
        if absent:
            raise ValueError(f"{workflow}: qlib_init.provider_uri: there is no Qlib store at {absent[0]}")
        task = self.config["task"]
        handler = (task["dataset"].get("kwargs") or {}).get("handler")
        if not isinstance(handler, Mapping):
            raise ValueError(f"{workflow}: task.dataset.kwargs.handler should be a configuration")
        if bar_freq(handler) != "day":
            raise ValueError(f"{workflow}: freq {bar_freq(handler)}: Qlib's RollingGen counts sessions of days")
        labels = label_expressions(handler)
        if not labels:
            raise ValueError(f"{workflow}: the handler should name its label, whose reach is the embargo")
        self._folders = output_dirs(task["model"], "task.model")
        if start == "previous" and not self._folders:
            raise ValueError(f"{workflow}: from previous needs a model whose training has an output_dir")
        self.reach = max(sessions_ahead(label) for label in labels)
        self.embargo = max(self.reach, horizon_of(task["dataset"]))
        self.tasks = self._tasks(handler)

    @property
    def task_experiment(self) -> str:
        """The experiment of the tasks' recorders."""
        return f"{self.experiment}_tasks"

    def preview(self) -> str:
        """Describe the tasks, their windows and a rough time; nothing is trained and nothing is written."""
        lines = [f"{self.name}: dry run, nothing is trained and nothing is written", ""]
        ended = self._ended()
        for task in self.tasks:
            spans = [f"{name} {start.date()} … {end.date()}" for name, (start, end) in task.segments.items()]
            done = "   finished before" if task.digest in ended else ""
            lines.append(f"task {task.number}/{len(self.tasks)}   {'; '.join(spans)}{_windows(task)}{done}")
        lines.append(f"embargo    {self.embargo} sessions between train and valid, valid and test; {self.window} train")
        lines.append(f"runs       {self.experiment}, of the tasks {self.task_experiment}")
        lines.append(f"time       {self._rough_time(len(self.tasks) - len(ended))}")
        return "\n".join(lines)

    def run(self) -> Iterator[TaskRun]:
        """Yield every task as it ends, those that ended before first; in their order unless several run at a time.

        Raises:
            RuntimeError: a process, or a machine of the cluster, was lost. And what a model raises.
        """
        ended = self._ended()
        for task in self.tasks:
            if task.digest in ended:
                run = ended[task.digest]
                yield TaskRun(task, run.info.run_id, float(run.data.tags.get(SECONDS_TAG, 0)), reused=True)
        waiting = [task for task in self.tasks if task.digest not in ended]
        R.get_exp(experiment_name=self.task_experiment)  # made once, not by each process
        if self.engine == "ray":
            yield from self._run_on_ray(waiting)
        elif self.processes > 1:
            yield from self._run_in_processes(waiting)
        else:
            for task in waiting:
                yield train_task(task, self.task_experiment)

    def join(self, runs: list[TaskRun]) -> Recorder:
        """Record the joined predictions and the workflow's records of them as one run; one that is there is kept."""
        runs = sorted(runs, key=lambda run: run.task.number)
        digest = _digest([run.task.digest for run in runs], self.config["task"].get("record"))
        known = finished_runs(self.experiment, ROLLING_TAG).get(digest)
        if known is not None:
            return R.get_recorder(recorder_id=known.info.run_id, experiment_name=self.experiment)
        recorders = [R.get_recorder(recorder_id=run.recorder_id, experiment_name=self.task_experiment) for run in runs]
        joined = {
            name: RollingEnsemble()({recorder.id: recorder.load_object(name) for recorder in recorders})
            for name in ("pred.pkl", "label.pkl")
        }
        provenance, kronos_run = self._provenance(runs), self._kronos_run(recorders[-1])
        with R.start(experiment_name=self.experiment):
            recorder = R.get_recorder()
            R.set_tags(**{ROLLING_TAG: digest}, **_overlaps(recorders))
            R.log_params(step=self.step, window=self.window, start=self.start, tasks=len(runs))
            R.save_objects(config=self._joined_config(), **joined)
            record_json(ROLLING_RECORD, provenance)
            if kronos_run:
                record_json(RECORD, kronos_run | {"rolling": provenance})
            for record in _list(self.config["task"].get("record")):
                if not issubclass(get_callable_kwargs(record, _RECORDS)[0], SignalRecord):
                    init_instance_by_config(record, recorder=recorder, default_module=_RECORDS).generate()
        return recorder

    def _tasks(self, handler: Mapping[str, Any]) -> list[RollingTask]:
        template, bars, tasks = self.config["task"], BarDigests(handler, self.reach), []
        base, before = fixed_part(self._folders[0][1]) if self._folders else None, None
        for number, segments in enumerate(self._segments(), 1):
            config = copy.deepcopy({key: value for key, value in template.items() if key != "record"})
            dates = {"fit_start_time": segments["train"][0], "fit_end_time": segments["train"][1]}
            config["dataset"] = replaced(config["dataset"], dates)
            config["dataset"]["kwargs"]["segments"] = segments
            if base is not None and self.start == "previous":
                config["model"] = _with_start(config["model"], before, self.next_epochs)
            decisive = replaced(config, {"output_dir": None, "end_time": None})  # later bars decide no score
            digest = _digest(decisive, bars.until(segments["test"][1]))
            if base is not None:
                folder = f"{base}_rolling/{segments['test'][0].date()}_{digest}"
                config["model"] = replaced(config["model"], {"output_dir": folder})
                before = folder
            config["record"] = [{"class": "SignalRecord", "module_path": "qlib.workflow.record_temp"}]
            tasks.append(RollingTask(number, segments, config, digest))
        return tasks

    def _segments(self) -> list[Segments]:
        """Return the tasks' segments: Qlib's, with an embargo between train and valid too, within the workflow's."""
        owner, sessions = f"{self.workflow}: {_SEGMENTS}", pd.DatetimeIndex(D.calendar())
        given = self.config["task"]["dataset"]["kwargs"].get("segments") or {}
        known: Segments = {}
        for name in ("train", "valid", "test"):
            pair = given.get(name)
            if not isinstance(pair, (list, tuple)) or len(pair) != 2 or pair[0 if name == "test" else 1] is None:
                raise ValueError(f"{owner}.{name} should be two dates")
            first, last = pair[0] or sessions[0], pair[1] or sessions[-1]
            known[name] = pd.Timestamp(first), pd.Timestamp(last)
        dates = [date for pair in known.values() for date in pair]
        inside = [int(((sessions >= start) & (sessions <= end)).sum()) for start, end in known.values()]
        if any(later < earlier for earlier, later in zip(dates, dates[1:])) or not all(inside):
            raise ValueError(f"{owner}: train, valid and test should follow each other, with sessions in each")
        first = int(sessions.searchsorted(known["test"][0]))
        if (
            int(sessions.searchsorted(known["valid"][0])) - int(sessions.searchsorted(known["train"][0]))
            <= self.embargo
        ):
            raise ValueError(f"{owner}: the embargo of {self.embargo} sessions leaves nothing to train on")
        if first - self.embargo <= int(sessions.searchsorted(known["valid"][0])):
            raise ValueError(f"{owner}: the embargo of {self.embargo} sessions leaves nothing to validate")
        generator = RollingGen(self.step, rtype=self.window, ds_extra_mod_func=None)
        template = {"dataset": {"kwargs": {"segments": known}}}
        rolled = [task["dataset"]["kwargs"]["segments"] for task in generator.generate(template)]
        return [self._purged(segments, known["test"][1], sessions) for segments in rolled]

    def _purged(self, segments: Segments, last: pd.Timestamp, sessions: pd.DatetimeIndex) -> Segments:
        """Shorten train and valid by the embargo before what follows them, and test to the workflow's.

        Not by RollingGen's trunc_days, which leaves train as it is and fails where that starts with the calendar.
        """

        def before(name: str) -> pd.Timestamp:
            return sessions[int(sessions.searchsorted(segments[name][0])) - self.embargo - 1]

        (start, end), ends = segments["test"], sessions[sessions <= last][-1]
        return {
            "train": (segments["train"][0], min(segments["train"][1], before("valid"))),
            "valid": (segments["valid"][0], min(segments["valid"][1], before("test"))),
            "test": (start, ends if end is None else min(end, ends)),
        }

    def _run_in_processes(self, tasks: list[RollingTask]) -> Iterator[TaskRun]:
        """As many threads in each process as here: where a batch is cut by them, the scores must not differ."""
        threads = torch.get_num_threads()
        try:
            with parallel_config("loky", n_jobs=self.processes, inner_max_num_threads=threads):
                yield from Parallel(return_as="generator_unordered")(
                    delayed(_train_elsewhere)(self._place(), task) for task in tasks
                )
        except TerminatedWorkerError as error:
            raise RuntimeError(f"a process was lost ({error}); run the same again, finished tasks are kept") from None

    def _run_on_ray(self, tasks: list[RollingTask]) -> Iterator[TaskRun]:
        ray = connect_to_cluster("engine")
        device = (self.config["task"]["model"].get("kwargs") or {}).get("device")
        on_gpu = device is not None and resolve_device(device).type == "cuda"
        cores = min(torch.get_num_threads(), max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes()))
        options = {"num_cpus": max(cores, 1), "num_gpus": int(on_gpu), "max_retries": RETRIES}
        remote = ray.remote(_train_elsewhere).options(**options)
        running = [remote.remote(self._place(), task) for task in tasks]
        try:
            while running:
                (ended,), running = ray.wait(running, num_returns=1)
                try:
                    yield ray.get(ended)
                except ray.exceptions.RayTaskError as error:
                    raise RuntimeError(f"engine: ray: {error.cause}") from error
                except ray.exceptions.RayError as error:
                    raise RuntimeError(f"engine: ray: a task was lost {RETRIES + 1} times ({error})") from error
        finally:
            for left in running:
                ray.cancel(left, force=True)

    def _place(self) -> "_Place":
        return _Place(self.config, str(self.workflow), self.task_experiment, os.getcwd(), torch.get_num_threads())

    def _ended(self) -> dict[str, Run]:
        """Find the finished runs of the tasks, by digest."""
        known = finished_runs(self.task_experiment, TASK_TAG)
        return {task.digest: known[task.digest] for task in self.tasks if task.digest in known}

    def _rough_time(self, left: int) -> str:
        """Say how long the tasks that are left may take, by those before or by the workflow's own newest run."""
        of_tasks = [
            float(run.data.tags.get(SECONDS_TAG, 0)) for run in finished_runs(self.task_experiment, TASK_TAG).values()
        ]
        if not left:
            return "nothing is left to train"
        if of_tasks:
            each, source = float(np.mean(of_tasks)), f"the {len(of_tasks)} tasks of before"
        else:
            whole = next(iter(finished_runs(self.name, None).values()), None)
            if whole is None:
                return "not known before a task, or the workflow itself, has been run"
            each, source = (whole.info.end_time - whole.info.start_time) / 1000, f"the newest run of {self.name}"
        total = each * -(-left // self.processes)
        return f"about {total / 60:,.1f} minutes: {left} tasks of {each:,.0f} s, by {source}"

    def _joined_config(self) -> dict[str, Any]:
        """Return the workflow's configuration with what makes the joined run another one."""
        config = copy.deepcopy(self.config) | {"experiment_name": self.experiment}
        config["task"]["rolling"] = {"step": self.step, "window": self.window, "start": self.start}
        config["task"]["rolling"] |= {
            "next_epochs": self.next_epochs,
            "embargo": self.embargo,
            "tasks": len(self.tasks),
        }
        config["task"]["dataset"]["kwargs"]["segments"] = self._whole_segments()
        return config

    def _whole_segments(self) -> dict[str, list[str]]:
        """Return the first task's train and valid, and all that is scored."""
        segments = self.tasks[0].segments | {
            "test": (self.tasks[0].segments["test"][0], self.tasks[-1].segments["test"][1])
        }
        return {name: [str(date.date()) for date in dates] for name, dates in segments.items()}

    def _provenance(self, runs: list[TaskRun]) -> dict[str, Any]:
        tasks = [
            {
                "number": run.task.number,
                "recorder": run.recorder_id,
                "digest": run.task.digest,
                "seconds": run.seconds,
                "segments": {name: [str(date.date()) for date in dates] for name, dates in run.task.segments.items()},
            }
            for run in runs
        ]
        return {
            "workflow": str(self.workflow),
            **self._joined_config()["task"]["rolling"],
            "experiment": self.task_experiment,
            "tasks": tasks,
            "provider_uri": str(C.dpm.get_data_uri("day")),
            "packages": package_versions(),
        }

    def _kronos_run(self, recorder: Recorder) -> dict[str, Any]:
        """Return the last task's kronos_run.json, of the whole; nothing for other models."""
        client = MlflowClient(R.get_uri())
        if RECORD not in [file.path for file in client.list_artifacts(recorder.id)]:
            return {}
        values = json.loads(Path(client.download_artifacts(recorder.id, RECORD)).read_text())
        values["data"]["segments"] = self._whole_segments()
        return values


def _train_elsewhere(place: _Place, task: RollingTask) -> TaskRun:
    os.chdir(place.folder)
    torch.set_num_threads(place.threads)
    if not C.registered:
        sys_config(place.config, place.workflow)
        qlib.init(**copy.deepcopy(place.config["qlib_init"]))
    return train_task(task, place.experiment)


def _windows(task: RollingTask) -> str:
    """Count a task's windows; nothing for a dataset that has none."""
    if not issubclass(get_callable_kwargs(task.config["dataset"])[0], KLineDataset):
        return ""
    dataset = task_dataset(task)
    train, valid = (len(dataset.training_windows(name)) for name in ("train", "valid"))
    return f"   windows {train:,} + {valid:,}, scored {len(dataset.score_windows('test')):,}"


def _with_start(model: Any, before: str | None, next_epochs: int | None) -> Any:
    """Copy a model's configuration with the former training wherever it names an output_dir, and its own epochs."""
    if not isinstance(model, Mapping):
        return model
    changed = {key: _with_start(value, before, next_epochs) for key, value in model.items()}
    if isinstance(model.get("output_dir"), str):
        changed["start_from"] = before
        stages = (
            [changed]
            if "tokenizer" not in model and "predictor" not in model
            else [changed[name] for name in ("tokenizer", "predictor") if changed.get(name)]
        )
        for stage in stages if next_epochs is not None else ():
            stage["next_epochs"] = next_epochs
    return changed


def _overlaps(recorders: Any) -> dict[str, str]:
    """Return the tag that says that scores fall into a checkpoint's pre-training data, if a task has it."""
    found = (recorder.list_tags().get("pretraining_overlap") for recorder in recorders)
    overlap = next((text for text in found if text), None)
    return {"pretraining_overlap": overlap} if overlap else {}


def _digest(*what: Any) -> str:
    return blake2b(json.dumps(what, sort_keys=True, default=str).encode(), digest_size=5).hexdigest()


def _list(records: Any) -> list[Any]:
    return records if isinstance(records, list) else [records] if records else []
