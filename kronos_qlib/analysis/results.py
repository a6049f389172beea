"""Finished runs read from Qlib's recorders: metrics, scores, labels, backtest, whether the market is synthetic."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from kronos_qlib.addresses import check_answers
from kronos_qlib.analysis import DEFAULT_URI
from kronos_qlib.analysis.pickles import read_plain, read_table
from kronos_qlib.analysis.portfolio import QLIB_DAYS_A_YEAR, QLIB_YEARS_REGION, steps_a_year
from kronos_qlib.data.demo_market import BENCHMARK, is_synthetic
from kronos_qlib.files import digest_of_file

# Read by mlflow: files here are small and local, and a server that does not answer is not asked again and again.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")

from mlflow.entities import Experiment
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

SECONDS_TO_ANSWER = 5.0
TRIALS = "_trials"  # after an experiment's name: where its trials are
_ALL, _MOST_RUNS = ":all", 50_000
_SQLITE = b"SQLite format 3\0"
_BACKTEST = "portfolio_analysis"
_REPORT, _TRADES = "report_normal_{freq}.pkl", "indicators_normal_{freq}_obj.pkl"
_REPORT_COLUMNS = ("account", "return", "bench", "cost", "turnover")
_SIGNAL_METRICS = {"ic": "IC", "icir": "ICIR", "rank_ic": "Rank IC", "rank_icir": "Rank ICIR"}
_BACKTEST_METRICS = {
    "excess_return": "{freq}.excess_return_without_cost.annualized_return",
    "excess_return_with_cost": "{freq}.excess_return_with_cost.annualized_return",
    "information_ratio": "{freq}.excess_return_with_cost.information_ratio",
    "max_drawdown": "{freq}.excess_return_with_cost.max_drawdown",
}


class ResultsError(Exception):
    """A run cannot be compared; the message names the reason and the runs that there are."""


@dataclass(frozen=True)
class RunResult:
    """One finished run.

    name: the experiment's name, with the recorder id after it where a recorder was asked for.
    metrics: as Qlib's SigAnaRecord and PortAnaRecord stored them, by this package's names; IC as such, returns as
        ratios a year. NaN: not recorded, as those of the backtest in a run without one.
    report: Qlib's `report_normal_….pkl`, one row per step of the backtest with return, bench, cost, turnover as ratios;
        without a row if the run has no backtest.
    freq: the backtest's frequency as Qlib writes it, such as 1day or 30minute; "" if the run has none.
    scores, labels: `pred.pkl` and the first column of `label.pkl`, index (datetime, instrument), sorted.
    trades: value of each trade of the backtest, index (datetime, instrument); None if not recorded.
    provider_uri: the Qlib store as the workflow named it; None if not recorded.
    bar_freq: of the bars that are scored, as the store names it: day, 1week, 5min.
    store: the folder of that store's bars as found from here or from beside the database; None if it is not.
    year: how many steps of the backtest a year has, those of a day taken together: in Qlib's region cn as many as
        Qlib counts, elsewhere those of the store's calendar, see `portfolio.steps_a_year`.
    synthetic: the store is a demo market.
    horizon: trading days forecast, of a Kronos run; else None.
    forecast_digest: the folder in `forecast.cache_dir` that holds the run's forecasts; None if not recorded.
    trials: settings that were tried up to this run: the finished runs of its experiment and of the experiment with
        `_trials` after its name, where `kronos-qlib tune` leaves them. trial_rank_ics: those that the latter recorded.
    overlap: KronosModel's warning that the scores fall into the pre-training data, if it gave one.
    config: qrun's, the plain data in it; kronos_run: kronos_run.json. Either is empty if the run has none.
    artifacts: the folder of the run's artifacts if they are files of this machine.
    """

    name: str
    run_id: str
    metrics: dict[str, float]
    report: pd.DataFrame
    freq: str
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
    bar_freq: str = "day"
    year: float = QLIB_DAYS_A_YEAR
    trials: int = 1
    trial_rank_ics: tuple[float, ...] = ()


def load_runs(names: Sequence[str], uri: str = DEFAULT_URI) -> list[RunResult]:
    """Load the newest finished run of each experiment in `names`, or the run itself where a name is a recorder id.

    A name with `:all` after it stands for all finished runs of an experiment, such as those of several seeds.

    Raises ResultsError if `uri` cannot be read, a name is unknown, has no finished run, or a run lacks its scores,
    labels or signal analysis, or an artifact is damaged or holds something else.
    """
    client, experiments, folder = _open(uri)
    found: dict[str, tuple[str, MlflowRun]] = {}
    for name in names:  # an experiment and its newest recorder are one run
        for called, run in _find_runs(client, experiments, name, uri):
            found.setdefault(run.info.run_id, (called, run))
    trials = {run.info.experiment_id: _trials(client, experiments, run) for _, run in found.values()}
    return [
        replace(_load_run(client, name, run, folder), **trials[run.info.experiment_id]) for name, run in found.values()
    ]


def find_run(name: str, uri: str = DEFAULT_URI) -> "FoundRun":
    """Find the newest finished run of an experiment, or the run itself where the name is a recorder id.

    Raises ResultsError if `uri` cannot be read, the name is unknown or has no finished run.
    """
    client, experiments, folder = _open(uri)
    run = _find_runs(client, experiments, name, uri)[-1][1]
    names = {known.experiment_id: known.name for known in experiments}
    return FoundRun(names.get(run.info.experiment_id, ""), run.info.run_id, client, folder)


def list_runs(uri: str = DEFAULT_URI, most: int = 500) -> list[dict[str, Any]]:
    """List the newest finished runs: experiment, id, start (UTC) and metrics, by this package's names where recorded.

    Raises ResultsError if `uri` cannot be read.
    """
    client, experiments, _ = _open(uri)
    names = {known.experiment_id: known.name for known in experiments}
    newest = ["attributes.start_time DESC"]
    found = client.search_runs(list(names), "attributes.status = 'FINISHED'", order_by=newest, max_results=most)
    stored = _SIGNAL_METRICS | {own: name.format(freq="1day") for own, name in _BACKTEST_METRICS.items()}
    return [
        {
            "experiment": names[run.info.experiment_id],
            "id": run.info.run_id,
            "start": str(pd.Timestamp(run.info.start_time, unit="ms").floor("s")),
            "metrics": {own: run.data.metrics[name] for own, name in stored.items() if name in run.data.metrics},
        }
        for run in found
    ]


def _open(uri: str) -> tuple[MlflowClient, list[Experiment], Path]:
    """Return a client of an MLflow store, its experiments, and the folder of its database."""
    _check_reachable(uri)
    database = _database(uri)
    try:
        client = MlflowClient(tracking_uri=uri)
        experiments = client.search_experiments()
    except (MlflowException, SQLAlchemyError, ImportError, OSError, ValueError) as error:
        raise ResultsError(f"the MLflow store {uri} cannot be read: {str(error).splitlines()[0]}") from error
    return client, experiments, database.parent if database else Path.cwd()


def _check_reachable(uri: str) -> None:
    """Refuse a uri that names no store, and a server that does not answer: MLflow itself would try for minutes."""
    if not uri.strip():
        raise ResultsError(f"--uri is empty; name an MLflow store, such as {DEFAULT_URI}")
    try:
        check_answers(uri, SECONDS_TO_ANSWER)
    except (ValueError, OSError) as error:
        raise ResultsError(f"the MLflow store {uri} cannot be read: {error}") from None


def _database(uri: str) -> Path | None:
    """Find the file of an SQLite uri. It must exist: MLflow would make an empty one, and 'no experiments' misleads."""
    if not uri.startswith("sqlite:///"):
        return None
    try:
        database = Path(uri.removeprefix("sqlite:///")).resolve()
        if not database.is_file():
            raise ResultsError(
                f"there is no MLflow database {database}; run a workflow with qrun first, or name another by --uri"
            )
        with database.open("rb") as file:
            begins = file.read(len(_SQLITE))
    except (OSError, ValueError, RuntimeError) as error:
        raise ResultsError(f"the MLflow database of --uri {uri!r} cannot be read: {error}") from None
    if begins != _SQLITE:
        raise ResultsError(f"{database} cannot be read: it is no SQLite database, and so no MLflow store")
    return database


def _trials(client: MlflowClient, experiments: list[Experiment], run: MlflowRun) -> dict[str, Any]:
    """Count the finished runs of a run's experiment and of its trials, and collect the rank ICs of the latter."""
    names = {known.experiment_id: known.name for known in experiments}
    tried = f"{names.get(run.info.experiment_id)}{TRIALS}"
    own, others = (
        [each for known in experiments if known.name == name for each in _finished(client, known)]
        for name in (names.get(run.info.experiment_id), tried)
    )
    rank_ics = tuple(each.data.metrics["rank_ic"] for each in others if "rank_ic" in each.data.metrics)
    return {"trials": max(len(own), 1) + len(others), "trial_rank_ics": rank_ics}


def _finished(client: MlflowClient, experiment: Experiment, most: int = _MOST_RUNS) -> list[MlflowRun]:
    """List the finished runs of an experiment, the newest first."""
    newest = ["attributes.start_time DESC"]
    return client.search_runs(
        [experiment.experiment_id], "attributes.status = 'FINISHED'", order_by=newest, max_results=most
    )


def _find_runs(client: MlflowClient, experiments: list[Experiment], name: str, uri: str) -> list[tuple[str, MlflowRun]]:
    """Find the runs that a name stands for, and what to call each."""
    experiment = next((known for known in experiments if known.name == name), None)
    whole = next((known for known in experiments if f"{known.name}{_ALL}" == name), None)
    if experiment is None and whole is not None:
        runs = _finished(client, whole)
        if runs:
            return [(f"{whole.name} {run.info.run_id[:8]}", run) for run in runs[::-1]]
        experiment = whole
    if experiment is not None:
        runs = _finished(client, experiment, 1)
        if not runs:
            raise ResultsError(f"experiment {name!r} in {uri} has no finished run; {_known(client, experiments)}")
        return [(name, runs[0])]
    try:
        run = client.get_run(name)
    except MlflowException as error:
        raise ResultsError(f"no experiment or recorder {name!r} in {uri}; {_known(client, experiments)}") from error
    if run.info.status != "FINISHED":
        raise ResultsError(
            f"recorder {name!r} in {uri} is not finished but {run.info.status}; {_known(client, experiments)}"
        )
    names = {known.experiment_id: known.name for known in experiments}
    return [(f"{names.get(run.info.experiment_id, 'deleted experiment')} {name[:8]}", run)]


def _known(client: MlflowClient, experiments: list[Experiment]) -> str:
    finished = [known.name for known in experiments if _finished(client, known, 1)]
    return f"experiments with a finished run: {', '.join(sorted(finished)) or 'none'}"


def _load_run(client: MlflowClient, name: str, run: MlflowRun, folder: Path) -> RunResult:
    missing = [stored for stored in _SIGNAL_METRICS.values() if stored not in run.data.metrics]
    if missing:
        raise ResultsError(
            f"{name}: run {run.info.run_id} has no {missing[0]!r}; its workflow needs Qlib's SigAnaRecord (the "
            "signal's analysis)"
        )
    with TemporaryDirectory() as scratch:
        files = _Artifacts(client, name, run.info.run_id, scratch)
        freq = files.backtest_freq()
        report = files.read(f"{_BACKTEST}/{_REPORT}".format(freq=freq), _report, "PortAnaRecord") if freq else _report()
        scores = files.read("pred.pkl", _rows, "SignalRecord")
        labels = files.read("label.pkl", _rows, "SignalRecord")
        trades = files.read(f"{_BACKTEST}/{_TRADES}".format(freq=freq), _trades) if freq else None
        config = files.read("config", dict, reader=read_plain) or {}  # only qrun saves it
        kronos_run = files.read("kronos_run.json", _mapping, reader=_read_json) or {}
    metrics = _SIGNAL_METRICS | {own: stored.format(freq=freq) for own, stored in _BACKTEST_METRICS.items()}
    recorded, region = kronos_run.get("data", {}).get("provider_uri"), config.get("qlib_init", {}).get("region", "cn")
    provider_uri = config.get("qlib_init", {}).get("provider_uri") or recorded
    bar_freq = _bar_freq(config, kronos_run, scores)
    stores = [*_stores(recorded, bar_freq, folder), *_stores(provider_uri, bar_freq, folder)]
    store = next((store for store in stores if _calendar(store, bar_freq).is_file()), None)
    return RunResult(
        name=name,
        run_id=run.info.run_id,
        metrics={own: run.data.metrics.get(stored, math.nan) for own, stored in metrics.items()},
        report=report,
        freq=freq,
        scores=scores,
        labels=labels,
        trades=trades,
        provider_uri=provider_uri,
        bar_freq=bar_freq,
        store=store,
        year=steps_a_year(freq, read_sessions(store, bar_freq) if store and region != QLIB_YEARS_REGION else None),
        synthetic=BENCHMARK in set(_strings(config)) or (store is not None and is_synthetic(store)),
        horizon=kronos_run.get("data", {}).get("horizon"),
        overlap=run.data.tags.get("pretraining_overlap"),
        forecast_digest=run.data.tags.get("forecast.digest"),
        config=config,
        kronos_run=kronos_run,
        artifacts=_local(run.info.artifact_uri),
    )


@dataclass(frozen=True)
class FoundRun:
    """A finished run: its experiment's name, its recorder id, the MLflow store, the folder of the store's database."""

    experiment: str
    run_id: str
    client: MlflowClient
    folder: Path

    def read(self, artifact: str) -> Any:
        """Read scores or labels as a series by (datetime, instrument), a .json file, or the plain data of a mapping.

        Returns None for an artifact that is not there. Raises ResultsError for a damaged one.
        """
        kinds: dict[str, tuple[Callable[[Path], Any], Callable[[Any], Any]]] = {
            ".pkl": (read_table, _rows),
            ".json": (_read_json, _mapping),
        }
        reader, check = kinds.get(Path(artifact).suffix, (read_plain, dict))
        with TemporaryDirectory() as scratch:
            return _Artifacts(self.client, self.experiment, self.run_id, scratch).read(artifact, check, reader=reader)

    def digest(self, artifact: str) -> str:
        """Digest the file of an artifact. Raises ResultsError if it is not there."""
        with TemporaryDirectory() as scratch:
            path = _Artifacts(self.client, self.experiment, self.run_id, scratch).path(artifact)
            if path is None:
                raise ResultsError(f"{self.experiment}: {artifact} of run {self.run_id} cannot be read")
            return digest_of_file(path)

    def stores(self, provider_uri: str | Mapping[str, str] | None, freq: str) -> list[Path]:
        """List the folders with bars of `freq` that a store's name may stand for, here and beside the database."""
        found = _stores(provider_uri, freq, self.folder)
        return [store for store in found if _calendar(store, freq).is_file()]


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
            if self._is_listed(artifact):
                raise ResultsError(
                    f"{self.name}: {artifact} of run {self.run_id} cannot be copied to "
                    f"{self.folder}; is that disk full?"
                ) from None
            return None

    def _is_listed(self, artifact: str) -> bool:
        folder = str(Path(artifact).parent)
        try:
            listed = self.client.list_artifacts(self.run_id, None if folder == "." else folder)
        except (MlflowException, OSError):
            return False
        return any(file.path == artifact for file in listed)

    def backtest_freq(self) -> str:
        """Return the frequency of the recorded backtest, the daily one of several; "" if there is none."""
        try:
            names = [Path(file.path).name for file in self.client.list_artifacts(self.run_id, _BACKTEST)]
        except (MlflowException, OSError):
            return ""
        before, _, after = _REPORT.partition("{freq}")
        freqs = [name[len(before) : -len(after)] for name in names if name.startswith(before) and name.endswith(after)]
        return min(freqs, key=lambda freq: (freq != "1day", freq), default="")

    def read(
        self,
        artifact: str,
        check: Callable[[Any], Any],
        record: str = "",
        reader: Callable[[Path], Any] = read_table,
    ) -> Any:
        """Read an artifact and pass it through `check`, which raises ValueError for what it should not hold.

        One that is not there is None, or an error if a `record` of Qlib's should have written it.
        """
        path = self.path(artifact)
        if path is None and not record:
            return None
        try:
            if path is None:
                raise ValueError(f"cannot be read; its workflow needs Qlib's {record}")
            return check(reader(path))
        except (ValueError, OSError) as error:
            raise ResultsError(f"{self.name}: {artifact} of run {self.run_id} {error}") from error


def _rows(table: Any) -> pd.Series:
    """Take the first column of scores or labels, by (datetime, instrument)."""
    column = table.iloc[:, 0] if isinstance(table, pd.DataFrame) and table.shape[1] else table
    if not isinstance(column, pd.Series) or set(column.index.names) != {"datetime", "instrument"}:
        raise ValueError("holds no column by datetime and instrument")
    if not pd.api.types.is_numeric_dtype(column):
        raise ValueError(f"holds {column.dtype} values, not numbers")
    rows = column.reorder_levels(["datetime", "instrument"]).sort_index().astype(float)
    if rows.index.has_duplicates:
        raise ValueError(f"has {rows.index.duplicated().sum()} rows twice")
    return rows


def _report(table: Any = None) -> pd.DataFrame:
    """Check Qlib's report of a backtest; without one, return a report without rows."""
    if table is None:
        return pd.DataFrame(columns=list(_REPORT_COLUMNS), index=pd.DatetimeIndex([]), dtype=float)
    if not isinstance(table, pd.DataFrame) or not isinstance(table.index, pd.DatetimeIndex) or table.empty:
        raise ValueError("holds no report of a backtest by datetime")
    lacking = [column for column in _REPORT_COLUMNS if column not in table]
    if lacking:
        raise ValueError(f"has no column {lacking[0]!r}")
    return table


def _mapping(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError("holds no mapping")
    return values


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON ({error})") from None


def _trades(indicator: Any) -> pd.Series:
    """Compute the value of each trade, from Qlib's Indicator of the backtest."""
    try:
        found = {day: orders.data.get("trade_value") for day, orders in indicator.order_indicator_his.items()}
    except AttributeError:
        raise ValueError("holds no indicator of a backtest") from None
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


def _bar_freq(config: Mapping[str, Any], kronos_run: Mapping[str, Any], scores: pd.Series) -> str:
    """Return the frequency of the bars that are scored: as recorded or configured, else as far apart as the scores."""
    dataset = config.get("task", {}).get("dataset")
    handler = dataset.get("kwargs", {}).get("handler") if isinstance(dataset, Mapping) else None
    configured = handler.get("kwargs", {}).get("freq") if isinstance(handler, Mapping) else None
    named = kronos_run.get("data", {}).get("freq") or configured
    if isinstance(named, str):
        return named
    times = scores.index.unique("datetime")
    distance = pd.Series(times).diff().median()
    if pd.isna(distance) or (times == times.normalize()).all():
        return "1week" if distance == pd.Timedelta(days=7) else "day"
    return f"{distance // pd.Timedelta(minutes=1)}min"


def _stores(provider_uri: str | Mapping[str, str] | None, freq: str, folder: Path) -> list[Path]:
    """List where the store of these bars may lie: as named, relative to the database, where qrun ran, and to here."""
    named = provider_uri.get(freq, provider_uri.get("day")) if isinstance(provider_uri, Mapping) else provider_uri
    return [base / Path(named).expanduser() for base in (folder, Path.cwd())] if named else []


def _calendar(store: Path, freq: str) -> Path:
    return store / "calendars" / f"{freq}.txt"


def read_sessions(store: Path, freq: str) -> pd.DatetimeIndex:
    """Read the calendar of a store's bars of a frequency."""
    return pd.DatetimeIndex(_calendar(store, freq).read_text().splitlines())


def _strings(config: Any) -> Iterator[str]:
    if isinstance(config, str):
        yield config
    elif isinstance(config, (Mapping, list, tuple)):
        for value in config.values() if isinstance(config, Mapping) else config:
            yield from _strings(value)
