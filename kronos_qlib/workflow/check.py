"""Finds what is wrong with a workflow before it runs: what `kronos-qlib check` prints, and what `fit` warns of."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import qlib
from qlib.config import C
from qlib.data.dataset.handler import DataHandler
from qlib.data.dataset.weight import Reweighter
from qlib.utils import init_instance_by_config
from sqlalchemy import create_engine
from sqlalchemy import text as sql
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from kronos_qlib.data.dataset import KLineDataset
from kronos_qlib.files import whole_file
from kronos_qlib.nn import zoo
from kronos_qlib.workflow.calibration_job import calibration_windows, check_calibration
from kronos_qlib.workflow.factor_table import factor_findings
from kronos_qlib.workflow.findings import Finding, one_line, record_findings, segment_overlap
from kronos_qlib.workflow.kronos_factors import factor_loaders, without_data
from kronos_qlib.workflow.model import IDLE, KronosModel
from kronos_qlib.workflow.ranker import KronosRanker
from kronos_qlib.workflow.records import FEW_SAMPLES
from kronos_qlib.workflow.settings import CalibrationSettings
from kronos_qlib.workflow.workflow_file import read_workflow

_OURS = (
    "KronosModel",
    "KronosRanker",
    "KLineDataset",
    "KLineHandler",
    "KronosFactors",
    "Alpha158Kronos",
)  # whose messages say what they are about


class WorkflowCheck:
    """The check of a workflow file; nothing is trained, forecast or written.

    model, dataset, reweighter: what was made of the workflow's configurations while it was checked, or None.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = {}
        self.model: Any = None
        self.dataset: Any = None
        self.reweighter: Any = None

    def findings(self) -> Iterator[Finding]:
        """Yield the findings as they are found. What needs something that could not be made is left out."""
        try:
            self.config = read_workflow(self.path)
        except (ValueError, OSError) as error:
            yield Finding("error", "file", str(error))
            return
        yield Finding("ok", "file", str(self.path))
        yield from recorder_findings(self.config["qlib_init"])
        try:
            qlib.init(**self.config["qlib_init"])
        except Exception as error:  # Qlib's init may raise anything
            yield Finding("error", "qlib_init", f"{self.path}: qlib_init: {one_line(error)}")
            return
        absent = [folder for folder in C.dpm.provider_uri.values() if not Path(folder).is_dir()]
        if absent:
            yield Finding(
                "error", "qlib_init", f"{self.path}: qlib_init.provider_uri: there is no Qlib store at {absent[0]}"
            )
            return
        yield Finding("ok", "qlib_init", f"{C['provider_uri']}, region {C['region']}")
        task = self.config["task"]
        self.model = yield from _made("task.model", task["model"])
        self.dataset = yield from _made("task.dataset", without_data(task["dataset"]))
        if task.get("reweighter"):
            self.reweighter = yield from _made("task.reweighter", task["reweighter"])
            if self.reweighter is not None and not isinstance(self.reweighter, Reweighter):
                yield Finding(
                    "error", "task.reweighter", f"is a {type(self.reweighter).__name__}, not a Reweighter of Qlib"
                )
        if isinstance(self.dataset, KLineDataset):
            yield from dataset_findings(self.dataset)
        if isinstance(self.model, KronosModel):
            yield from model_findings(self.model, self.dataset)
        if isinstance(self.model, KronosRanker):
            yield from ranker_findings(self.model, self.dataset)
        if isinstance(getattr(self.dataset, "handler", None), DataHandler):
            handler = self.dataset.handler
            for loader in factor_loaders(handler.data_loader):
                load = handler.instruments, handler.start_time, handler.end_time
                yield from factor_findings(loader, *load, self.dataset.segments)
                if loader.cache_dir is not None:
                    yield _folder_finding("factors, cache_dir", loader.cache_dir)
        yield from record_findings(task)


def _made(subject: str, configuration: Mapping[str, Any]) -> Any:
    """Make an object of a configuration, as Qlib does; yield what comes of it and return it, or None."""
    try:
        made = init_instance_by_config(configuration)
    except Exception as error:  # of any class
        message = one_line(error)
        yield Finding("error", subject, message if message.startswith(_OURS) else f"{subject}: {message}")
        return None
    yield Finding("ok", subject, type(made).__name__)
    return made


def dataset_findings(dataset: KLineDataset) -> Iterator[Finding]:
    """Count the windows of each segment, and find segments that overlap or are empty."""
    handler = dataset.handler
    days = handler.dates
    yield Finding(
        "ok", "data", f"{days[0].date()} … {days[-1].date()}, universe {handler.instruments}, freq {handler.freq}"
    )
    for name in dataset.segments:
        try:
            select = dataset.score_windows if name == "test" else dataset.training_windows
            windows = select(name)
        except ValueError as error:
            yield Finding("error", name, one_line(error))
            continue
        left = f"; {len(windows.left_out)} instruments have too little history" if windows.left_out else ""
        count = f"{len(windows):,} windows of {dataset.lookback} bars, of {len(set(windows.instruments))} instruments"
        yield Finding("warning" if left else "ok", name, count + left)
    for earlier, later in (("train", "valid"), ("train", "test"), ("valid", "test")):
        overlap = segment_overlap(dataset, earlier, later)
        if overlap:
            yield Finding("error" if later == "valid" else "warning", earlier, overlap)


def model_findings(model: KronosModel, dataset: Any) -> Iterator[Finding]:
    """Say which networks run where, and find what a training or a forecast would meet."""
    settings = model.settings
    for name in ("tokenizer", "model"):
        network = getattr(model, name)
        source = network.source or "a new network, random weights"
        untrained = network.source is None and settings.finetune is None
        note = f"; {zoo.SHIPPED_NOTE}" if name == "model" and network.source == "nano" else ""
        yield Finding("warning" if untrained else "ok", name, f"{network.n_parameters:,} parameters, {source}{note}")
    if isinstance(dataset, KLineDataset):
        try:
            model.check_bars(dataset)
        except ValueError as error:
            yield Finding("error", "model", one_line(error))
        if model.idle_columns:
            yield Finding("warning", "tokenizer", IDLE.format(model.idle_columns))
    yield Finding("ok", "device", f"{settings.device}, dtype {settings.dtype}")
    for key, folder in _folders(model).items():
        yield _folder_finding(key, Path(folder))
    if settings.finetune is not None and isinstance(dataset, KLineDataset):
        for segment in ("train", "valid"):
            if segment not in dataset.segments:
                yield Finding("error", "finetune", f"the dataset has no segment {segment!r}, which finetune needs")
    if settings.calibration is not None and isinstance(dataset, KLineDataset):
        yield from calibration_findings(model, dataset, settings.calibration)
    if isinstance(dataset, KLineDataset) and "test" in dataset.segments:
        size = f"{settings.forecast.sample_count} samples × {dataset.horizon} bars"
        yield Finding("ok", "forecast", f"{len(dataset.score_windows('test')):,} windows × {size}")


def calibration_findings(model: KronosModel, dataset: KLineDataset, settings: CalibrationSettings) -> Iterator[Finding]:
    """Say what a calibration is fitted on, and what stands against it."""
    try:
        check_calibration(dataset, settings)
    except ValueError as error:
        yield Finding("error", "calibration", one_line(error))
        return
    windows, samples = calibration_windows(dataset, settings), model.settings.forecast.sample_count
    text = (
        f"{len(windows):,} windows of {len(set(windows.dates))} days of {settings.segment} × {samples} samples, "
        f"{settings.bands} bands"
    )
    few = f"; bands of 90 % need {FEW_SAMPLES} samples or more" if samples < FEW_SAMPLES else ""
    yield Finding("warning" if few else "ok", "calibration", text + few)


def ranker_findings(model: KronosRanker, dataset: Any) -> Iterator[Finding]:
    """Say which networks learn where, and find what a training would meet."""
    network, settings = model.rankers[0], model.settings
    start = f"begins with the weights of {model.model.source}" if model.model.source else "new, random weights"
    count = f"{settings.ranker.ensemble} × {network.n_parameters:,}"
    yield Finding("ok", "rankers", f"{count} parameters, {start}; inputs: {network.inputs}")
    yield Finding("ok", "device", f"{settings.device}, dtype {settings.dtype}")
    yield _folder_finding("ranker.output_dir", Path(settings.ranker.output_dir))
    if isinstance(dataset, KLineDataset):
        try:
            job = model.job(dataset)
        except ValueError as error:
            yield Finding("error", "ranker", one_line(error))
            return
        for name, windows in (("train", job.train), ("valid", job.valid)):
            days = len(set(windows.dates))
            yield Finding("ok", f"ranker {name}", f"{len(windows):,} labelled windows of {days:,} days")


def _folders(model: KronosModel) -> dict[str, str]:
    settings = model.settings
    folders = {"forecast.cache_dir": settings.forecast.cache_dir}
    if settings.finetune is not None:
        folders["finetune.output_dir"] = settings.finetune.output_dir
    return {key: folder for key, folder in folders.items() if folder is not None}


def _folder_finding(key: str, folder: Path) -> Finding:
    """Try to write into the nearest folder that is there already."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        with whole_file(there / ".kronos-qlib-check"):
            pass
        (there / ".kronos-qlib-check").unlink()
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Finding("error", key, f"{folder} cannot be written to: {error}")
    return Finding("ok", key, f"{folder}, {free / 2**30:,.1f} GiB free")


def recorder_findings(qlib_init: Mapping[str, Any]) -> Iterator[Finding]:
    """Find out whether the experiment store can be written."""
    manager = qlib_init.get("exp_manager")
    uri = manager.get("kwargs", {}).get("uri") if isinstance(manager, Mapping) else None
    if not isinstance(uri, str) or not uri:
        yield Finding("error", "recorder", "qlib_init.exp_manager.kwargs.uri should be the address of an MLflow store")
        return
    if uri.startswith("sqlite:///"):
        try:
            database = Path(make_url(uri).database or "")
            if database.exists():
                with create_engine(uri).connect() as connection:
                    connection.execute(sql("PRAGMA user_version"))
            found = _folder_finding("recorder", database.absolute().parent)
        except (SQLAlchemyError, OSError, ValueError) as error:
            found = Finding("error", "recorder", f"{uri} cannot be opened: {one_line(error)}")
        yield found if found.level == "error" else Finding("ok", "recorder", uri)
    else:
        yield Finding("ok", "recorder", uri)
