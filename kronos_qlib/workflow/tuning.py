"""Tuning: settings of a workflow tried on walk-forward folds within train and valid; what `kronos-qlib tune` runs."""

import contextlib
import copy
import io
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import qlib
import statsmodels.api as sm
from filelock import FileLock, Timeout
from lightgbm.basic import LightGBMError
from qlib.config import C
from qlib.contrib.eva.alpha import calc_ic
from qlib.data.data import Cal
from qlib.data.dataset import DatasetH
from qlib.data.dataset.handler import DataHandlerLP
from qlib.data.dataset.weight import Reweighter
from qlib.log import get_module_logger
from qlib.utils import auto_filter_kwargs, class_casting, init_instance_by_config
from sqlalchemy.engine import make_url

from kronos_qlib.data.calendar import is_intraday, range_end
from kronos_qlib.data.expressions import sessions_ahead
from kronos_qlib.data.folds import Segments, purged_segments, walk_forward_folds
from kronos_qlib.train.step import derive_seed
from kronos_qlib.versions import package_version, package_versions
from kronos_qlib.workflow.check import recorder_findings
from kronos_qlib.workflow.findings import one_line
from kronos_qlib.workflow.search_space import MARK, read_space, with_values, write_tuned
from kronos_qlib.workflow.task_config import (
    bar_freq,
    horizon_of,
    label_expressions,
    output_dirs,
    replaced,
    seed_generators,
)
from kronos_qlib.workflow.trial_store import NoExpManager, Trial, TrialRuns, TrialStore
from kronos_qlib.workflow.workflow_file import read_workflow

logger = get_module_logger("tune")
HANDLER = "task.dataset.kwargs.handler"
# What says that these settings cannot be used together, if the workflow as it is could be; Qlib asserts such things.
_REFUSALS = (ValueError, FloatingPointError, AssertionError, NotImplementedError, LightGBMError)


class Tuning:
    """Trials of a workflow's settings, each worth its mean daily rank IC on the validation blocks of all folds.

    Trial 0 is the workflow as it is. Nothing after the end of its valid segment is read: the handler's data end
    so many sessions before it as a label looks ahead, and there is no test segment. Qlib is initialised, with a
    recorder that keeps nothing of the fits; the trials become runs of the experiment `NAME_trials` of the workflow's
    own store.

    Args:
        workflow: a file for qrun. space: a file of its dotted keys and their ranges.
        trials: in all, those of before an interruption included.
        folds: walk-forward folds within the range of the train and valid segments; 0 or 1: these segments themselves.
        valid_sessions: of each fold's validation block; by default as many as in the workflow's valid segment.
        train_sessions: the most that a fold is trained on; None: all before the embargo.
        seed: of the sampler, and of models that draw from the global generators of Python, NumPy or torch.
        storage: Optuna's SQLite file; by default optuna.db beside the MLflow database, or here.
        out: the workflow with the best settings; by default NAME_tuned.yaml.

    Raises:
        ValueError, FileNotFoundError: one line, for what is wrong with the files, the segments or the folds.
    """

    def __init__(
        self,
        workflow: Path,
        space: Path,
        trials: int,
        folds: int = 3,
        valid_sessions: int | None = None,
        train_sessions: int | None = None,
        seed: int = 0,
        storage: Path | None = None,
        out: Path | None = None,
    ) -> None:
        if trials < 1 or folds < 0 or min(valid_sessions or 1, train_sessions or 1) < 1 or seed < 0:
            raise ValueError("trials and sessions should be 1 or more, folds and seed 0 or more")
        self.workflow, self.count, self.number_of_folds, self.seed = workflow, trials, folds, seed
        self.valid_sessions, self.train_sessions = valid_sessions, train_sessions
        self.config = read_workflow(workflow)
        self.name = self.config.get("experiment_name", "workflow")
        self.space = read_space(space, self.config, workflow)
        self.out = out or Path(f"{self.name}_tuned.yaml")
        if self.out.exists() and not self.out.read_text(encoding="utf-8").startswith(MARK):
            raise ValueError(f"{self.out} is there already and was not written by tune; name another file by --out")
        manager = self.config["qlib_init"]["exp_manager"]
        for finding in recorder_findings(self.config["qlib_init"]):
            if finding.level == "error":
                raise ValueError(f"{workflow}: {finding.text}")
        self.storage = storage or _beside(manager["kwargs"]["uri"])
        nothing_kept = manager | {"class": NoExpManager.__name__, "module_path": NoExpManager.__module__}
        qlib.init(**self.config["qlib_init"] | {"exp_manager": copy.deepcopy(nothing_kept)})
        absent = [folder for folder in C.dpm.provider_uri.values() if not Path(folder).is_dir()]
        if absent:
            raise ValueError(f"{workflow}: qlib_init.provider_uri: there is no Qlib store at {absent[0]}")
        task = self.config["task"]
        handler = task["dataset"].get("kwargs", {}).get("handler")
        if not isinstance(handler, Mapping):
            raise ValueError(f"{workflow}: {HANDLER} should be a configuration, whose data can be cut")
        self._freq = bar_freq(handler)
        labels = label_expressions(handler)
        if not labels:
            raise ValueError(f"{workflow}: {HANDLER}.kwargs.label should name the label, whose reach is the embargo")
        self.reach = max(sessions_ahead(label) for label in labels)
        self._train, self._valid = self._read_segments()
        self.folds = self._folds(task)
        self.last = self.folds[-1]["valid"][1]
        self._reweighter: Reweighter | None = None
        if task.get("reweighter"):
            self._reweighter = init_instance_by_config(task["reweighter"])
        self._handlers: dict[str, DataHandlerLP] = {}

    @property
    def experiment(self) -> str:
        """The MLflow experiment of the trials."""
        return f"{self.name}_trials"

    def preview(self) -> str:
        """Describe folds, rows, space and budget; the data are loaded, nothing is fitted and nothing is written."""
        task = self._task({})
        init_instance_by_config(self._model(task, Path("trial")))
        lines = [f"{self.name}: dry run, nothing is fitted and nothing is written", ""]
        ends = f"labels up to {self.last.date()}, bars up to {self._valid[1].date()}"
        lines.append(f"data     {C.dpm.get_data_uri(self._freq)}, {ends}")
        for number, fold in enumerate(self.folds, 1):
            dataset = self._dataset(task, fold)
            parts = [
                f"{name} {start.date()} … {end.date()} ({len(_label(dataset, name).dropna()):,} labels)"
                for name, (start, end) in fold.items()
            ]
            lines.append(f"fold {number}   {'; '.join(parts)}")
        lines += [f"space    {key}: {each}" for key, each in self.space.ranges.items()]
        lines.append(f"budget   {self.count} trials, trial 0 the workflow as it is; {len(self.folds)} fits each")
        return "\n".join(lines)

    def run(self) -> Iterator[Trial]:
        """Yield every trial, those of before an interruption first, until there are as many as were asked for.

        Raises:
            ValueError: the workflow as it is cannot be fitted, or another process tunes with this storage.
        """
        self.storage.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(f"{self.storage}.lock", timeout=0):
                yield from self._run()
        except Timeout:
            raise ValueError(f"{self.storage}: another process tunes with this storage") from None

    def write_best(self, trials: list[Trial]) -> Path:
        """Write the workflow with the best trial's settings, and how it came about, to `out`.

        Raises:
            ValueError: no trial could be fitted.
        """
        known = [each for each in trials if each.rank_ic is not None]
        if not known:
            raise ValueError(f"{self.workflow}: no trial could be fitted")
        best = max(known, key=lambda each: each.rank_ic or 0.0)
        name, first = f"{self.name}_tuned", self.folds[0]["valid"][0].date()
        comment = [
            f"{MARK}: {self.workflow.name} with the best settings of {len(trials)} trials (trial {best.number}), by",
            f"# the mean daily rank IC on {len(self.folds)} validation blocks, {first} … {self.last.date()}: "
            f"{best.rank_ic:+.4f}, as it was {trials[0].rank_ic:+.4f}.",
            "# The best of many is too good by its choice; no bar after the valid segment was read.",
            "",
        ]
        folders = {key: f"{folder}_tuned" for key, folder in output_dirs(self.config["task"]["model"], "task.model")}
        return write_tuned(self.workflow, self.out, name, folders | best.values, comment)

    def _run(self) -> Iterator[Trial]:
        study, uri = f"{self.name}-{self._digest()}", self.config["qlib_init"]["exp_manager"]["kwargs"]["uri"]
        store = TrialStore(self.storage, study, self.space)
        runs = TrialRuns(uri, self.experiment, study, self._details())
        folder = self.storage.absolute().with_name(f"{self.storage.stem}_{study}")
        ended = store.trials()
        runs.record(ended)
        yield from ended[: self.count]
        while len(ended) < self.count:
            trial = self._evaluate(len(ended), store, folder)
            store.add(trial)
            ended = store.trials()
            runs.record(ended)
            yield ended[-1]

    def _evaluate(self, number: int, store: TrialStore, folder: Path) -> Trial:
        values = store.propose(self.seed) if number else self.space.present(self.config)
        started, work, days = time.monotonic(), folder / f"trial_{number}", []
        reason = None
        try:
            task = self._task(values)
            for position, fold in enumerate(self._folds(task), 1):
                days.append(self._score(task, fold, position, work / f"fold_{position}"))
        except _REFUSALS as error:
            reason = one_line(error)
            if not number:
                raise ValueError(f"{self.workflow} as it is: {reason}") from error
        shutil.rmtree(work, ignore_errors=True)  # what a killed trial leaves in it, its training goes on from
        with contextlib.suppress(OSError):
            folder.rmdir()
        seconds = round(time.monotonic() - started, 1)
        if reason is not None:
            return Trial(number, values, reason=reason, seconds=seconds)
        means = tuple(float(each.mean()) for each in days)
        spread = _standard_error(pd.concat(days), self.reach)
        return Trial(number, values, float(np.mean(means)), means, spread, seconds=seconds)

    def _score(self, task: Mapping[str, Any], fold: Segments, position: int, folder: Path) -> pd.Series:
        """Fit the task's model on a fold and return its daily rank ICs on the validation block."""
        model = init_instance_by_config(self._model(task, folder))
        dataset = self._dataset(task, fold)
        seed_generators(derive_seed(self.seed, "fold", position))
        with contextlib.redirect_stdout(io.StringIO()):  # LightGBM prints its rounds
            auto_filter_kwargs(model.fit)(dataset, reweighter=self._reweighter)
            scores = model.predict(dataset, segment="valid")
        return daily_rank_ic(scores, _label(dataset, "valid"))

    def _task(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return with_values(self.config, values)["task"]

    def _model(self, task: Mapping[str, Any], folder: Path) -> Any:
        """Return the model's configuration with a folder of the trial's own wherever it names an output_dir."""
        return replaced(task["model"], {"output_dir": str(folder)})

    def _dataset(self, task: Mapping[str, Any], fold: Segments) -> DatasetH:
        """Make a fold's dataset; a handler that was made before with the same settings is used again."""
        dates = {"fit_start_time": fold["train"][0], "fit_end_time": fold["train"][1]}
        dataset = replaced(task["dataset"], dates)
        handler = dataset["kwargs"]["handler"]
        handler["kwargs"] = handler.get("kwargs", {}) | {"end_time": _exact(self.last, self._freq)}
        key = json.dumps(handler, sort_keys=True, default=str)
        if key not in self._handlers:
            if self.space.touches(HANDLER):
                self._handlers.clear()  # those of other trials
            self._handlers[key] = init_instance_by_config(handler)
        ends = {name: (start, _exact(end, self._freq)) for name, (start, end) in fold.items()}
        dataset["kwargs"] = dataset["kwargs"] | {"handler": self._handlers[key], "segments": ends}
        return init_instance_by_config(dataset)

    def _folds(self, task: Mapping[str, Any]) -> list[Segments]:
        """Return the folds within the train and valid segments, with an embargo of the label and the task's horizon."""
        (start, train_end), (valid_start, end) = self._train, self._valid
        horizon = horizon_of(task["dataset"])
        try:
            sessions = pd.DatetimeIndex(Cal.calendar(start, end, freq=self._freq))
            if self.number_of_folds > 1:
                size = self.valid_sessions or max(int((sessions >= valid_start).sum()) - self.reach, 1)
                return walk_forward_folds(
                    sessions, self.number_of_folds, self.reach, horizon, size, self.train_sessions
                )
            if self.valid_sessions or self.train_sessions:
                raise ValueError("the sessions of a fold's train and valid are of two folds and more")
            (fold,) = purged_segments(sessions, valid_start, self.reach, horizon)
        except ValueError as error:
            raise ValueError(f"{self.workflow}: {error}") from None
        own = sessions[sessions <= train_end]
        return [fold | {"train": (fold["train"][0], min(fold["train"][1], own[-1]))}]

    def _read_segments(self) -> tuple[tuple[pd.Timestamp, pd.Timestamp], tuple[pd.Timestamp, pd.Timestamp]]:
        """Return the workflow's train and valid segments. Raises ValueError where they, or test, are out of order."""
        owner = f"{self.workflow}: task.dataset.kwargs.segments"
        segments = self.config["task"]["dataset"].get("kwargs", {}).get("segments") or {}
        known = {}
        for name in ("train", "valid"):
            pair = segments.get(name)
            if not isinstance(pair, (list, tuple)) or len(pair) != 2 or None in pair:
                raise ValueError(f"{owner}.{name} should be two dates, the range of the folds")
            known[name] = pd.Timestamp(pair[0]), range_end(pd.Timestamp(pair[1]), self._freq)
        dates = [*known["train"], *known["valid"]]
        dates += [pd.Timestamp(segments["test"][0])] if segments.get("test") and segments["test"][0] else []
        if any(later <= earlier for earlier, later in zip(dates, dates[1:])):
            raise ValueError(f"{owner}: train, valid and test should follow each other, without overlap")
        return known["train"], known["valid"]

    def _digest(self) -> str:
        """Return a digest of all that decides a trial's value: settings, space, folds, seed and the labels."""
        task = self._task({})
        label = _label(self._dataset(task, self.folds[-1]), slice(None))
        what = [task["model"], task["dataset"], task.get("reweighter"), self.seed]
        what += [{key: str(each) for key, each in self.space.ranges.items()}, self.folds, self.train_sessions]
        digest = blake2b(json.dumps(what, sort_keys=True, default=str).encode(), digest_size=5)
        digest.update(pd.util.hash_pandas_object(label).to_numpy().tobytes())
        return digest.hexdigest()

    def _details(self) -> dict[str, Any]:
        """Return what the record of every trial says beside its own values."""
        return {
            "workflow": str(self.workflow),
            "task": self._task({}),
            "space": {key: str(each) for key, each in self.space.ranges.items()},
            "folds": [
                {name: [str(date.date()) for date in dates] for name, dates in fold.items()} for fold in self.folds
            ],
            "seed": self.seed,
            "provider_uri": str(C.dpm.get_data_uri(self._freq)),
            "packages": package_versions() | {name: package_version(name) for name in ("optuna", "lightgbm")},
        }


def daily_rank_ic(scores: pd.Series | pd.DataFrame, label: pd.Series) -> pd.Series:
    """Compute the rank IC of each day, as Qlib's SigAnaRecord; 0 on days where all scores, or labels, are equal.

    Raises:
        ValueError: no score has a label, or all scores are equal on every day.
    """
    scores = scores.iloc[:, 0] if isinstance(scores, pd.DataFrame) else scores
    both = pd.DataFrame({"score": scores, "label": label}).dropna()
    if both.empty:
        raise ValueError("no score of the validation block has a label")
    if both.groupby(level="datetime")["score"].nunique().max() < 2:
        raise ValueError("the scores of a day are all equal, on every day of the validation block")
    return calc_ic(both["score"], both["label"])[1].fillna(0.0)


def results_text(trials: list[Trial], most: int = 10) -> str:
    """Lay out the best trials as a table: value, standard error, folds, settings."""
    best = sorted((each for each in trials if each.rank_ic is not None), key=lambda each: -(each.rank_ic or 0))[:most]
    if not best:
        return "no trial could be fitted"
    names = _short_names(list(best[0].values))
    rows = [
        {"trial": each.number, "rank IC": f"{each.rank_ic:+.4f}", "s.e.": f"{each.standard_error or np.nan:.4f}"}
        | {f"fold {number}": f"{value:+.4f}" for number, value in enumerate(each.folds, 1)}
        | {
            name: f"{value:.4g}" if isinstance(value, float) else value
            for name, value in zip(names, each.values.values())
        }
        for each in best
    ]
    return pd.DataFrame(rows).to_string(index=False)


def _label(dataset: DatasetH, segment: str | slice) -> pd.Series:
    """Return the raw labels of a segment, as Qlib's SignalRecord reads them; the first where there are several."""
    with class_casting(dataset, DatasetH):  # a dataset of time series would return samples
        labels = dataset.prepare(segment, col_set="label", data_key=DataHandlerLP.DK_R)
    return labels.iloc[:, 0]


def _exact(end: pd.Timestamp, freq: str) -> pd.Timestamp:
    """Return an end that stands for this bar alone: a date without a time is a whole day of bars within days."""
    return end + pd.Timedelta(1, "ns") if is_intraday(freq) and end == end.normalize() else end


def _standard_error(daily: pd.Series, lag: int) -> float | None:
    """Compute the standard error of the mean, robust to autocorrelation (Newey & West 1987)."""
    if len(daily) < max(4 * lag, 4):
        return None
    fit = sm.OLS(daily.to_numpy(), np.ones(len(daily))).fit(cov_type="HAC", cov_kwds={"maxlags": lag})
    return float(fit.bse[0])


def _beside(uri: str) -> Path:
    """Return where Optuna's file stands by default: beside the MLflow database, or in the working directory."""
    database = make_url(uri).database if uri.startswith("sqlite:///") else None
    return Path(database).with_name("optuna.db") if database else Path("optuna.db")


def _short_names(keys: list[str]) -> list[str]:
    """Return the last part of each dotted key, or all of it where another ends alike."""
    last = [key.split(".")[-1] for key in keys]
    return [name if last.count(name) == 1 else key for name, key in zip(last, keys)]
