"""What Qlib's recorders hold of a finished run: metrics, the backtest's daily report, whether the data were real."""

import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from kronos_qlib.data.demo import BENCHMARK, is_synthetic

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # read by mlflow; files here are small and local

from mlflow.entities import Experiment
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

DEFAULT_URI = "sqlite:///mlflow.db"
_REPORT = "portfolio_analysis/report_normal_1day.pkl"
_METRICS = {
    "ic": "IC",
    "icir": "ICIR",
    "rank_ic": "Rank IC",
    "rank_icir": "Rank ICIR",
    "excess_return_with_cost": "1day.excess_return_with_cost.annualized_return",
    "information_ratio": "1day.excess_return_with_cost.information_ratio",
    "max_drawdown": "1day.excess_return_with_cost.max_drawdown",
}


class ResultsError(Exception):
    """A run that was asked for cannot be shown; the message says why and what there is instead."""


@dataclass(frozen=True)
class RunResult:
    """One finished run.

    name: the experiment's name, with the recorder id after it where a recorder was asked for.
    metrics: by this package's names (`comparison.COLUMNS`); IC as such, returns as ratios a year.
    report: Qlib's `report_normal_1day.pkl`, one row per backtest day with return, bench, cost, turnover as ratios.
    provider_uri: the Qlib store as the workflow named it; None if the recorder does not say.
    synthetic: the store is a demo market.
    """

    name: str
    run_id: str
    metrics: dict[str, float]
    report: pd.DataFrame
    provider_uri: str | dict[str, str] | None
    synthetic: bool


def load_runs(names: Sequence[str], uri: str = DEFAULT_URI) -> list[RunResult]:
    """The newest finished run of each experiment in `names`, or the run itself where a name is a recorder id.

    Raises ResultsError if `uri` cannot be read, a name is unknown, has no finished run, or a run lacks its signal
    analysis or backtest. Artifacts are pickles: read only stores whose runs you trust.
    """
    database = _database(uri)
    try:
        client = MlflowClient(tracking_uri=uri)
        experiments = client.search_experiments()
    except (MlflowException, SQLAlchemyError) as error:
        raise ResultsError(f"the MLflow store {uri} cannot be read: {str(error).splitlines()[0]}") from error
    folder = database.parent if database else Path.cwd()
    found = [_find_run(client, experiments, name, uri) for name in dict.fromkeys(names)]
    return [_load_run(client, name, run, folder) for name, run in found]


def _database(uri: str) -> Path | None:
    """The file of an SQLite uri, which must exist: MLflow would make an empty one, and 'no experiments' misleads."""
    if not uri.startswith("sqlite:///"):
        return None
    database = Path(uri.removeprefix("sqlite:///")).resolve()
    if not database.is_file():
        raise ResultsError(
            f"there is no MLflow database {database}; run a workflow with qrun first, or name another by --uri"
        )
    return database


def _find_run(client: MlflowClient, experiments: list[Experiment], name: str, uri: str) -> tuple[str, MlflowRun]:
    experiment = next((known for known in experiments if known.name == name), None)
    if experiment is not None:
        runs = client.search_runs(
            [experiment.experiment_id],
            "attributes.status = 'FINISHED'",
            order_by=["attributes.start_time DESC"],
            max_results=1,
        )
        if not runs:
            raise ResultsError(f"experiment {name!r} in {uri} has no finished run; {_known(client, experiments)}")
        return name, runs[0]
    try:
        run = client.get_run(name)
    except MlflowException as error:
        raise ResultsError(f"no experiment or recorder {name!r} in {uri}; {_known(client, experiments)}") from error
    if run.info.status != "FINISHED":
        raise ResultsError(
            f"recorder {name!r} in {uri} is not finished but {run.info.status}; {_known(client, experiments)}"
        )
    names = {known.experiment_id: known.name for known in experiments}
    return f"{names.get(run.info.experiment_id, 'deleted experiment')} {name[:8]}", run


def _known(client: MlflowClient, experiments: list[Experiment]) -> str:
    finished = [
        known.name
        for known in experiments
        if client.search_runs([known.experiment_id], "attributes.status = 'FINISHED'", max_results=1)
    ]
    return f"experiments with a finished run: {', '.join(sorted(finished)) or 'none'}"


def _load_run(client: MlflowClient, name: str, run: MlflowRun, folder: Path) -> RunResult:
    missing = [stored for stored in _METRICS.values() if stored not in run.data.metrics]
    if missing:
        record = (
            "PortAnaRecord (the backtest)" if missing[0].startswith("1day") else "SigAnaRecord (the signal's analysis)"
        )
        raise ResultsError(f"{name}: run {run.info.run_id} has no {missing[0]!r}; its workflow needs Qlib's {record}")
    with TemporaryDirectory() as scratch:
        try:
            report = pd.read_pickle(client.download_artifacts(run.info.run_id, _REPORT, scratch))
        except (MlflowException, OSError) as error:
            raise ResultsError(f"{name}: the backtest's report {_REPORT} cannot be read: {error}") from error
        try:
            config = _plain_pickle(Path(client.download_artifacts(run.info.run_id, "config", scratch)))
        except (MlflowException, OSError):
            config = {}  # only qrun saves it
    provider_uri = config.get("qlib_init", {}).get("provider_uri")
    return RunResult(
        name=name,
        run_id=run.info.run_id,
        metrics={own: run.data.metrics[stored] for own, stored in _METRICS.items()},
        report=report,
        provider_uri=provider_uri,
        synthetic=_is_demo_run(config, provider_uri, folder),
    )


def _is_demo_run(config: Mapping[str, Any], provider_uri: str | dict[str, str] | None, folder: Path) -> bool:
    """By the demo benchmark, which outlives the store, or the store's mark, looked for here and by the database."""
    if BENCHMARK in set(_strings(config)):
        return True
    if provider_uri is None:
        return False
    stores = provider_uri.values() if isinstance(provider_uri, Mapping) else [provider_uri]
    return any(is_synthetic(base / Path(store).expanduser()) for store in stores for base in (Path.cwd(), folder))


def _strings(config: Any) -> Iterator[str]:
    if isinstance(config, str):
        yield config
    elif isinstance(config, (Mapping, list, tuple)):
        for value in config.values() if isinstance(config, Mapping) else config:
            yield from _strings(value)


class _Unread:
    """Stands for any object in a pickle that is not plain data."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __setstate__(self, state: Any) -> None: ...
    def __setitem__(self, key: Any, value: Any) -> None: ...
    def append(self, value: Any) -> None: ...
    def extend(self, values: Any) -> None: ...
    def add(self, value: Any) -> None: ...


class _PlainUnpickler(pickle.Unpickler):
    """Reads mappings, lists, text, numbers, dates and paths; anything else becomes `_Unread`."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if module in ("datetime", "collections", "pathlib") else _Unread


def _plain_pickle(path: Path) -> dict[str, Any]:
    """Read qrun's `config`, into which Qlib has filled the trained model and the dataset; neither is wanted here."""
    with path.open("rb") as file:
        config = _PlainUnpickler(file).load()
    return config if isinstance(config, dict) else {}
