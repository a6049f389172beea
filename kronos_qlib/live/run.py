"""A finished run of any Qlib model, found in Qlib's recorder and ready to score another date."""

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import qlib
from qlib.data import D
from qlib.data.dataset import DatasetH
from qlib.utils import get_callable_kwargs
from qlib.workflow import R
from qlib.workflow.record_temp import PortAnaRecord
from qlib.workflow.recorder import Recorder

from kronos_qlib.analysis import DEFAULT_URI
from kronos_qlib.analysis.results import FoundRun, ResultsError, find_run
from kronos_qlib.versions import package_versions
from kronos_qlib.workflow.recording import ROLLING_RECORD
from kronos_qlib.workflow.task_config import bar_freq
from kronos_qlib.workflow.workflow_file import read_workflow

logger = logging.getLogger("qlib.signals")
WORKFLOWS = (".yaml", ".yml")


@dataclass(frozen=True)
class LiveRun:
    """A finished run, with Qlib initialised on its store.

    found: the run. trained: the run that has the model: another one if this joins those of `kronos-qlib roll`.
    recorder: Qlib's, of the model. task: model, dataset and records as the workflow had them, plain data.
    store: the folder of the bars. freq: of them. versions: of the packages that it was run with; empty if not recorded.
    """

    found: FoundRun
    trained: FoundRun
    recorder: Recorder
    task: dict[str, Any]
    store: Path
    freq: str
    versions: dict[str, str | None]

    @property
    def portfolio(self) -> dict[str, Any] | None:
        """Return the configuration of the run's PortAnaRecord; None of a run without a backtest."""
        records = self.task.get("record") or []
        for record in records if isinstance(records, list) else [records]:
            try:
                kind, kwargs = get_callable_kwargs(record, "qlib.workflow.record_temp")
            except (ImportError, AttributeError, TypeError, KeyError):
                continue  # it could not run either
            if isinstance(kind, type) and issubclass(kind, PortAnaRecord):
                complete = PortAnaRecord(None, config=kwargs.get("config"))  # with Qlib's defaults
                parts = ("strategy", "executor", "backtest")
                return {name: getattr(complete, f"{name}_config") for name in parts}
        return None

    def load_model(self) -> Any:
        """Load the fitted model, a pickle of Qlib's. Raises ResultsError, one line, with the versions that differ."""
        return self._load("params.pkl")

    def load_dataset(self) -> DatasetH:
        """Load the dataset without its data, a pickle of Qlib's. Raises ResultsError, one line."""
        dataset = self._load("dataset")
        if not isinstance(dataset, DatasetH):
            raise ResultsError(f"{self.found.experiment}: its dataset is a {type(dataset).__name__}, not a DatasetH")
        return dataset

    def _load(self, artifact: str) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of libraries about pickles of other versions, said below
                return self.recorder.load_object(artifact)
        except Exception as error:  # a pickle of another version may raise anything
            others = [f"{name} {then}, here {now}" for name, then, now in self.changed_versions()]
            raise ResultsError(
                f"{artifact} of recorder {self.trained.run_id} cannot be loaded ({type(error).__name__}: {error}); "
                f"the run had {', '.join(others) or 'the same versions of its packages'}"
            ) from error

    def changed_versions(self) -> list[tuple[str, str, str]]:
        """List the packages that the run had in another version: name, then, now."""
        here = package_versions()
        return [
            (name, then, here.get(name) or "not installed")
            for name, then in self.versions.items()
            if then is not None and here.get(name) != then
        ]


def open_run(source: str, uri: str | None = None, store: Path | None = None, date: str | None = None) -> LiveRun:
    """Find the newest finished run of a workflow file or an experiment, or a recorder, and initialise Qlib for it.

    Of a run that joins those of `kronos-qlib roll`, the model is the last task's, or the one's that scored the date.

    Args:
        source: a workflow's file, an experiment's name, or a recorder id.
        uri: the MLflow store; by default the workflow's, or mlflow.db in the working directory.
        store: the Qlib store; by default the run's.
        date: of the scores that are wanted; None or no date: later than all tasks.

    Raises:
        ResultsError: no such run, or its store of bars is not found. FileNotFoundError, ValueError: the workflow's.
    """
    settings: dict[str, Any] = {}
    name = source
    if Path(source).suffix in WORKFLOWS:
        workflow = read_workflow(Path(source))
        name, settings = workflow.get("experiment_name", "workflow"), workflow["qlib_init"]
        uri = uri or settings["exp_manager"].get("kwargs", {}).get("uri")
    found = find_run(name, uri or DEFAULT_URI)
    config = found.read("config") or {}
    task = found.read("task") or config.get("task")
    if not task:
        raise ResultsError(f"{name}: recorder {found.run_id} has no task: it is not a run of Qlib's task_train or qrun")
    recorded = found.read("kronos_run.json") or {}
    settings = config.get("qlib_init", {}) | settings
    handler = (task["dataset"].get("kwargs") or {}).get("handler")
    freq = recorded.get("data", {}).get("freq") or (bar_freq(handler) if isinstance(handler, dict) else "day")
    named = settings.get("provider_uri") or recorded.get("data", {}).get("provider_uri")
    places = found.stores(str(store.absolute()) if store else named, freq) if store or named else []
    if not places:
        where = store or named or "not recorded"
        raise ResultsError(f"{name}: its Qlib store ({where}) has no bars of {freq} here; name it by --store")
    manager = {
        "class": "MLflowExpManager",
        "module_path": "qlib.workflow.expm",
        "kwargs": {"uri": uri or DEFAULT_URI, "default_exp_name": name},
    }
    options = {"region": settings.get("region", "cn"), "exp_manager": manager, "logging_level": logging.WARNING}
    qlib.init(provider_uri=str(places[0].resolve()), **options)
    rolled = found.read(ROLLING_RECORD)
    trained = found if rolled is None else find_run(_task_of(rolled["tasks"], date), uri or DEFAULT_URI)
    recorder = R.get_recorder(recorder_id=trained.run_id, experiment_name=trained.experiment)
    versions = (rolled or recorded).get("packages") or {}
    return LiveRun(found, trained, recorder, task, places[0].resolve(), freq, versions)


def _task_of(tasks: list[dict[str, Any]], date: str | None) -> str:
    """Return the recorder of the task that scored a date, or of the last one."""
    try:
        wanted = pd.Timestamp(date).tz_localize(None).normalize()
    except (ValueError, TypeError):
        wanted = pd.NaT
    for task in tasks:
        start, end = map(pd.Timestamp, task["segments"]["test"])
        if start <= wanted <= end:
            return str(task["recorder"])
    return str(tasks[-1]["recorder"])


def label_expression(dataset: DatasetH) -> str | None:
    """Return the Qlib expression of a dataset's first label; None where its loader does not tell."""
    loader = getattr(dataset.handler, "data_loader", None)
    labels = getattr(loader, "label", None)
    if labels is None:
        fields = getattr(loader, "fields", {})
        labels = fields["label"][0] if isinstance(fields, dict) and "label" in fields else None
    return str(labels[0]) if labels else None


def instruments_of(dataset: DatasetH, date: pd.Timestamp, freq: str) -> list[str] | None:
    """List the members of a dataset's universe on a date, sorted; None where its handler names none."""
    universe = getattr(dataset.handler, "instruments", None)
    if universe is None:
        return None
    if isinstance(universe, str):
        universe = D.instruments(universe)
    day = date.normalize()  # as spans name days
    return sorted(D.list_instruments(universe, start_time=day, end_time=date, freq=freq, as_list=True))
