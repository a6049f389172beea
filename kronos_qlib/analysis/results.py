"""Finished runs read from Qlib's recorders: metrics, scores, labels, backtest, whether the market is synthetic."""

import json
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from kronos_qlib.analysis import DEFAULT_URI
from kronos_qlib.data.demo_market import BENCHMARK, is_synthetic

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # read by mlflow; files here are small and local

from mlflow.entities import Experiment
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

_REPORT = "portfolio_analysis/report_normal_1day.pkl"
_TRADES = "portfolio_analysis/indicators_normal_1day_obj.pkl"
_METRICS = {
    "ic": "IC",
    "icir": "ICIR",
    "rank_ic": "Rank IC",
    "rank_icir": "Rank ICIR",
    "excess_return": "1day.excess_return_without_cost.annualized_return",
    "excess_return_with_cost": "1day.excess_return_with_cost.annualized_return",
    "information_ratio": "1day.excess_return_with_cost.information_ratio",
    "max_drawdown": "1day.excess_return_with_cost.max_drawdown",
}


class ResultsError(Exception):
    """A run cannot be compared; the message names the reason and the runs that there are."""


@dataclass(frozen=True)
class RunResult:
    """One finished run.

    name: the experiment's name, with the recorder id after it where a recorder was asked for.
    metrics: as Qlib's SigAnaRecord and PortAnaRecord stored them, by this package's names; IC as such, returns as
        ratios a year.
    report: Qlib's `report_normal_1day.pkl`, one row per backtest day with return, bench, cost, turnover as ratios.
    scores, labels: `pred.pkl` and the first column of `label.pkl`, index (datetime, instrument), sorted.
    trades: value of each trade of the backtest, index (datetime, instrument); None if not recorded.
    provider_uri: the Qlib store as the workflow named it; None if not recorded.
    store: the folder of that store (daily bars) as found from here or from beside the database; None if it is not.
    synthetic: the store is a demo market.
    horizon: trading days forecast, of a Kronos run; else None.
    forecast_digest: the folder in `forecast.cache_dir` that holds the run's forecasts; None if not recorded.
    overlap: KronosModel's warning that the scores fall into the pre-training data, if it gave one.
    config: qrun's, the plain data in it; kronos_run: kronos_run.json. Either is empty if the run has none.
    artifacts: the folder of the run's artifacts if they are files of this machine.
    """

    name: str
    run_id: str
    metrics: dict[str, float]
    report: pd.DataFrame
    scores: pd.Series
    labels: pd.Series
    trades: pd.Series | None
    provider_uri: str | dict[str, str] | None
    store: Path | None
    synthetic: bool
    horizon: int | None
    overlap: str | None
    forecast_digest: str | None
    config: dict[str, Any]
    kronos_run: dict[str, Any]
    artifacts: Path | None


def load_runs(names: Sequence[str], uri: str = DEFAULT_URI) -> list[RunResult]:
    """Load the newest finished run of each experiment in `names`, or the run itself where a name is a recorder id.

    Raises ResultsError if `uri` cannot be read, a name is unknown, has no finished run, or a run lacks its scores,
    labels, signal analysis or backtest. Artifacts are pickles: read only stores whose runs you trust.
    """
    database = _database(uri)
    try:
        client = MlflowClient(tracking_uri=uri)
        experiments = client.search_experiments()
    except (MlflowException, SQLAlchemyError) as error:
        raise ResultsError(f"the MLflow store {uri} cannot be read: {str(error).splitlines()[0]}") from error
    folder = database.parent if database else Path.cwd()
    found: dict[str, tuple[str, MlflowRun]] = {}
    for name in names:  # an experiment and its newest recorder are one run
        called, run = _find_run(client, experiments, name, uri)
        found.setdefault(run.info.run_id, (called, run))
    return [_load_run(client, name, run, folder) for name, run in found.values()]


def _database(uri: str) -> Path | None:
    """Find the file of an SQLite uri. It must exist: MLflow would make an empty one, and 'no experiments' misleads."""
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
        files = _Artifacts(client, name, run.info.run_id, scratch)
        report = files.frame(_REPORT, "PortAnaRecord")
        scores = _rows(files.frame("pred.pkl", "SignalRecord"), name, "pred.pkl")
        labels = _rows(files.frame("label.pkl", "SignalRecord"), name, "label.pkl")
        traded, saved, kronos = files.path(_TRADES), files.path("config"), files.path("kronos_run.json")
        trades = _trades(pd.read_pickle(traded)) if traded else None
        config = _plain_pickle(saved) if saved else {}  # only qrun saves it
        kronos_run = json.loads(kronos.read_text()) if kronos else {}
    recorded = kronos_run.get("data", {}).get("provider_uri")
    provider_uri = config.get("qlib_init", {}).get("provider_uri") or recorded
    stores = [*_stores(recorded, folder), *_stores(provider_uri, folder)]
    store = next((store for store in stores if (store / "calendars" / "day.txt").is_file()), None)
    return RunResult(
        name=name,
        run_id=run.info.run_id,
        metrics={own: run.data.metrics[stored] for own, stored in _METRICS.items()},
        report=report,
        scores=scores,
        labels=labels,
        trades=trades,
        provider_uri=provider_uri,
        store=store,
        synthetic=BENCHMARK in set(_strings(config)) or (store is not None and is_synthetic(store)),
        horizon=kronos_run.get("data", {}).get("horizon"),
        overlap=run.data.tags.get("pretraining_overlap"),
        forecast_digest=run.data.tags.get("forecast.digest"),
        config=config,
        kronos_run=kronos_run,
        artifacts=_local(run.info.artifact_uri),
    )


@dataclass(frozen=True)
class _Artifacts:
    """The files of one run, fetched to a folder as they are asked for."""

    client: MlflowClient
    name: str
    run_id: str
    folder: str

    def path(self, artifact: str) -> Path | None:
        try:
            return Path(self.client.download_artifacts(self.run_id, artifact, self.folder))
        except (MlflowException, OSError):
            return None

    def frame(self, artifact: str, record: str) -> Any:
        path = self.path(artifact)
        if path is None:
            raise ResultsError(
                f"{self.name}: {artifact} of run {self.run_id} cannot be read; its workflow needs Qlib's {record}"
            )
        return pd.read_pickle(path)


def _rows(table: pd.DataFrame | pd.Series | None, name: str, artifact: str) -> pd.Series:
    """Take the first column, by (datetime, instrument)."""
    column = table.iloc[:, 0] if isinstance(table, pd.DataFrame) and table.shape[1] else table
    if not isinstance(column, pd.Series) or set(column.index.names) != {"datetime", "instrument"}:
        raise ResultsError(f"{name}: {artifact} holds no column by datetime and instrument")
    rows = column.reorder_levels(["datetime", "instrument"]).sort_index().astype(float)
    if rows.index.has_duplicates:
        raise ResultsError(f"{name}: {artifact} has {rows.index.duplicated().sum()} rows twice")
    return rows


def _trades(indicator: Any) -> pd.Series:
    """Compute the value of each trade, from Qlib's Indicator of the backtest."""
    found = {day: orders.data.get("trade_value") for day, orders in indicator.order_indicator_his.items()}
    # not Qlib's to_series, which fails with pandas 3
    days = {
        day: pd.Series(values.data, index=pd.Index(values.index.tolist(), name="instrument")).abs()
        for day, values in found.items()
        if values is not None and len(values.data)
    }
    if not days:
        return pd.Series(dtype=float, index=pd.MultiIndex.from_arrays([[], []], names=["datetime", "instrument"]))
    return pd.concat(days, names=["datetime", "instrument"]).astype(float)


def _local(uri: str) -> Path | None:
    path = Path(uri.removeprefix("file://"))
    return path if path.is_dir() else None


def _stores(provider_uri: str | Mapping[str, str] | None, folder: Path) -> list[Path]:
    """List where the store of daily bars may lie: as named, relative to the database, where qrun ran, and to here."""
    named = provider_uri.get("day") if isinstance(provider_uri, Mapping) else provider_uri
    return [base / Path(named).expanduser() for base in (folder, Path.cwd())] if named else []


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
