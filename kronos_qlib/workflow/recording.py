"""Record what a run is: settings, data range, versions, and whether its test period was seen before."""

import json
import platform
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from qlib.config import C
from qlib.log import get_module_logger
from qlib.workflow import R
from qlib.workflow.recorder import Recorder

from kronos_qlib.data.dataset import KLineDataset
from kronos_qlib.data.demo_market import is_synthetic
from kronos_qlib.data.windows import Windows
from kronos_qlib.extensions import describe_extension
from kronos_qlib.forecast.calibration import Calibration
from kronos_qlib.nn import zoo
from kronos_qlib.nn.checkpoint import HubModule
from kronos_qlib.settings import Settings
from kronos_qlib.versions import package_versions
from kronos_qlib.workflow.findings import Finding, record_findings

RECORD, FACTORS_RECORD = "kronos_run.json", "kronos_factors.json"
ROLLING_RECORD = "kronos_rolling.json"
logger = get_module_logger("KronosModel")
_recorded: dict[tuple[str, str], str] = {}  # by recorder id and file name, what was saved; of this process


def task_findings() -> list[Finding]:
    """Return what is wrong with the records of the task that Qlib's trainer has left in the active recorder."""
    if not _recording():
        return []
    try:
        task = R.get_recorder().load_object("task")
    except Exception:  # not started by Qlib's trainer, which is no fault; what is raised depends on MLflow's store
        return []
    return [finding for finding in record_findings(task) if finding.level != "ok"]


def _extensions(**settings: Any) -> dict[str, Any]:
    """Describe the user's own classes among settings, by their keys joined by dots; nothing where there are none."""
    own: dict[str, Any] = {}

    def search(key: str, value: Any) -> None:
        if isinstance(value, Settings):
            value = vars(value)
        if isinstance(value, Mapping) and "class" in value:
            own[key] = describe_extension(value)
        elif isinstance(value, Mapping):
            for name, each in value.items():
                search(f"{key}.{name}" if key else str(name), each)

    search("", settings)
    return {"extensions": own} if own else {}


def record_run(settings: Settings, dataset: KLineDataset, calibration: Calibration | None = None) -> None:
    """Save settings, data range, package versions and machine as kronos_run.json in the active recorder, if any.

    With a calibration also what it was fitted on and does; all of it is in calibration.json.

    A recorder that holds the very same already is left as it is: training, scoring and evaluating are one run.
    """
    if not _recording():
        return
    handler = dataset.handler
    run: dict[str, Any] = {
        "model": settings.model_dump(),
        "data": {
            "provider_uri": str(C.dpm.get_data_uri(handler.freq)),
            "synthetic": is_synthetic(C.dpm.get_data_uri(handler.freq)),
            "universe": handler.instruments,
            "freq": handler.freq,
            "first": handler.dates[0],
            "last": handler.dates[-1],
            "amount": handler.amount_rule,
            **({"columns": dict(own)} if (own := handler.data_loader.columns) else {}),
            "lookback": dataset.lookback,
            "horizon": dataset.horizon,
            "segments": dataset.segments,
        },
        **_extensions(**vars(settings), columns=handler.data_loader.columns, normalisation=dataset.normalisation),
        "packages": package_versions(),
        "machine": {
            "python": platform.python_version(),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }
    if calibration is not None:
        run["calibration"] = calibration.model_dump(exclude={"identity", "conformity"})
    record_json(RECORD, run)


def record_factors(provenance: dict[str, Any]) -> None:
    """Save what factors are made of as kronos_factors.json in the active recorder, if any."""
    if _recording():
        record_json(FACTORS_RECORD, provenance)


def record_json(name: str, values: dict[str, Any]) -> None:
    """Save values as a file of the active recorder, unless that holds the very same already."""
    recorder, content = R.get_recorder(), json.dumps(values, indent=2, default=str) + "\n"
    if _recorded.get((recorder.id, name)) == content:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_text(content)
        recorder.save_objects(local_path=str(path))
    _recorded[recorder.id, name] = content


def record_metrics(metrics: dict[str, float], step: int | None) -> None:
    """Log metrics to the active recorder, if any."""
    if _recording():
        R.log_metrics(step=step, **metrics)


def record_files(paths: Iterable[Path]) -> None:
    """Save files as artifacts of the active recorder, if any."""
    if _recording():
        for path in paths:
            R.get_recorder().save_objects(local_path=str(path))


def active_recorder() -> dict[str, str] | None:
    """Return the MLflow store and run of the active recorder, for other processes to log to; None without one."""
    return {"uri": R.get_uri(), "run_id": R.get_recorder().id} if _recording() else None


def end_as_failed() -> None:
    """End the active recorder as failed, so that a run that was stopped does not pass for a finished one."""
    if _recording():
        R.end_exp(recorder_status=Recorder.STATUS_FA)


def record_tags(tags: dict[str, str]) -> None:
    """Set tags of the active recorder, if any."""
    if _recording():
        R.set_tags(**tags)


def warn_of_pretraining_overlap(tokenizer: HubModule, model: HubModule, windows: Windows) -> None:
    """Warn, and tag the recorder, if scores of these windows fall into the pre-training data of a checkpoint."""
    overlap = pretraining_overlap(tokenizer, model, windows.dates.min())
    if overlap:
        logger.warning(f"KronosModel: {overlap}")
        record_tags({"pretraining_overlap": overlap})


def pretraining_overlap(tokenizer: HubModule, model: HubModule, first: np.datetime64) -> str | None:
    """Return a warning if scores from `first` on fall into the pre-training data of a checkpoint, else None."""
    for known, until in pretraining(tokenizer, model):
        if first <= np.datetime64(until):
            return (
                f"the scores start on {pd.Timestamp(first).date()}, but {known} trained on data up to "
                f"{until}: up to then they are not out of sample"
            )
    return None


def pretraining(tokenizer: HubModule, model: HubModule) -> Iterator[tuple[str, str]]:
    """Yield what is known of the pre-training data of each network: whose they were ("nano was"), and their last date.

    A loaded network of a published shape counts as that checkpoint or a descendant of it.
    """
    for network in (model, tokenizer):
        if network.source is None:
            continue
        own = network.entries.get(network.source) or zoo.published(network.source)
        alike = {name: e for name, e in network.entries.items() if _shape(e.config) == _shape(network.config)}
        entry = own or next((e for e in alike.values() if e.trained_until), None)
        if entry and entry.trained_until:
            name = entry.hub_id or next(name for name, e in alike.items() if e is entry)
            known = f"{network.source} was" if own else f"{network.source} may descend from {name}, which was"
            yield known, entry.trained_until


def _shape(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.endswith("dropout_p")}


def _recording() -> bool:
    """Say whether a Qlib recorder is active, without asking Qlib for one, which would start it."""
    if not C.registered:
        return False
    experiment = R.exp_manager.active_experiment
    return experiment is not None and experiment.active_recorder is not None
