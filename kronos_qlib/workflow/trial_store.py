"""Where the trials of a tuning are kept: in Optuna's storage, and each as a run of the workflow's MLflow store."""

import json
import logging
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState
from qlib.workflow.exp import Experiment
from qlib.workflow.expm import ExpManager
from qlib.workflow.recorder import Recorder
from sqlalchemy.exc import SQLAlchemyError

from kronos_qlib.train.step import derive_seed
from kronos_qlib.workflow.search_space import SearchSpace

TAG = "kronos_qlib.trial"
STUDY_TAG = "kronos_qlib.study"
STATE_TAG = "kronos_qlib.trial_state"
REASON_TAG = "kronos_qlib.trial_reason"
RECORD = "kronos_trial.json"


@dataclass(frozen=True)
class Trial:
    """A trial that has ended: what was tried, and what it was worth on the validation blocks.

    rank_ic, the mean of the folds' mean daily rank ICs, is None for a trial whose settings could not be used, for the
    `reason`. standard_error: of the mean of all days (Newey–West). seconds: wall-clock.
    """

    number: int
    values: dict[str, Any]
    rank_ic: float | None = None
    folds: tuple[float, ...] = ()
    standard_error: float | None = None
    reason: str | None = None
    seconds: float = 0.0


class TrialStore:
    """The trials of one study in an SQLite file of Optuna's. Only ended ones are in it: a killed one leaves nothing.

    Raises:
        ValueError: the file is no such database.
    """

    def __init__(self, file: Path, study: str, space: SearchSpace) -> None:
        optuna.logging.set_verbosity(logging.WARNING)
        file.parent.mkdir(parents=True, exist_ok=True)
        self.study, self.space = study, space
        try:
            self._study = optuna.create_study(
                storage=f"sqlite:///{file}", study_name=study, direction="maximize", load_if_exists=True
            )
        except (SQLAlchemyError, RuntimeError) as error:
            raise ValueError(f"{file}: cannot be used as the storage of trials ({error})") from error

    def trials(self) -> list[Trial]:
        """Return the trials that have ended, in their order."""
        return [self._trial(frozen) for frozen in self._study.get_trials(deepcopy=False)]

    def propose(self, seed: int) -> dict[str, Any]:
        """Return the settings to try next, by Optuna's TPE (Bergstra et al. 2011), from the seed and all former trials.

        The sampler's seed is derived from the number of trials, so that a tuning that was interrupted goes on as if it
        had not been.
        """
        former = self._study.get_trials(deepcopy=False)
        sampler = optuna.samplers.TPESampler(seed=derive_seed(seed, "trial", len(former)) % 2**32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study = optuna.create_study(sampler=sampler, direction="maximize")
            study.add_trials([frozen for frozen in former if frozen.params])
            return self.space.values(study.ask(self.space.distributions).params)

    def add(self, trial: Trial) -> None:
        """Add a trial that has ended. One outside the space, as the workflow's own may be, the sampler does not see."""
        parameters = self.space.parameters(trial.values)
        ended = TrialState.PRUNED if trial.rank_ic is None else TrialState.COMPLETE
        attributes: dict[str, Any] = {"values": json.dumps(trial.values, default=str), "folds": list(trial.folds)}
        attributes |= {"standard_error": trial.standard_error, "reason": trial.reason, "seconds": trial.seconds}
        self._study.add_trial(
            optuna.trial.create_trial(
                state=ended,
                value=trial.rank_ic,
                params=parameters,
                distributions=self.space.distributions if parameters else {},
                user_attrs=attributes,
            )
        )

    def _trial(self, frozen: FrozenTrial) -> Trial:
        said = frozen.user_attrs
        return Trial(
            frozen.number,
            json.loads(said["values"]),
            frozen.value if frozen.state == TrialState.COMPLETE else None,
            tuple(said["folds"]),
            said["standard_error"],
            said["reason"],
            said["seconds"],
        )


class TrialRuns:
    """The trials of one study as runs of an MLflow experiment, one each.

    Args:
        uri: of the workflow's MLflow store. details: what all trials share, saved with each.
    """

    def __init__(self, uri: str, experiment: str, study: str, details: Mapping[str, Any]) -> None:
        self.experiment, self.study, self.details = experiment, study, dict(details)
        self._client = MlflowClient(uri)
        self._recorded: set[int] | None = None
        self._id = ""

    def record(self, trials: list[Trial]) -> None:
        """Record the trials that have no run yet; a run that was killed half-way is made anew.

        Raises:
            ValueError: the store cannot be written.
        """
        try:
            if self._recorded is None:
                self._recorded = self._find_recorded()
            for trial in trials:
                if trial.number not in self._recorded:
                    self._record(trial)
                    self._recorded.add(trial.number)
        except MlflowException as error:
            raise ValueError(f"the trials cannot be recorded in experiment {self.experiment}: {error}") from error

    def _find_recorded(self) -> set[int]:
        experiment = self._client.get_experiment_by_name(self.experiment)
        self._id = experiment.experiment_id if experiment else self._client.create_experiment(self.experiment)
        found = set()
        for run in self._client.search_runs([self._id], f"tags.`{STUDY_TAG}` = '{self.study}'", max_results=50_000):
            if run.info.status == "FINISHED":
                found.add(int(run.data.tags[TAG]))
            else:
                self._client.delete_run(run.info.run_id)
        return found

    def _record(self, trial: Trial) -> None:
        tags = {TAG: str(trial.number), STUDY_TAG: self.study}
        tags[STATE_TAG] = "pruned" if trial.rank_ic is None else "complete"
        tags |= {REASON_TAG: trial.reason[:5000]} if trial.reason else {}
        values = {"rank_ic": trial.rank_ic, "rank_ic_standard_error": trial.standard_error, "seconds": trial.seconds}
        values |= {f"rank_ic_fold_{number}": value for number, value in enumerate(trial.folds, 1)}
        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, 0) for key, value in values.items() if value is not None]
        parameters = [Param(key, str(value)) for key, value in trial.values.items()]
        run = self._client.create_run(self._id, tags=tags, run_name=f"trial {trial.number}").info.run_id
        self._client.log_batch(run, metrics, parameters)
        self._client.log_text(run, json.dumps(self.details | {"trial": asdict(trial)}, indent=2, default=str), RECORD)
        self._client.set_terminated(run)


class NoRecorder(Recorder):
    """Keeps nothing."""

    def log_params(self, **kwargs: Any) -> None:
        """Keep nothing."""

    def log_metrics(self, step: int | None = None, **kwargs: Any) -> None:
        """Keep nothing."""

    def set_tags(self, **kwargs: Any) -> None:
        """Keep nothing."""

    def log_artifact(self, local_path: str, artifact_path: str | None = None) -> None:
        """Keep nothing."""

    def save_objects(self, local_path: str | None = None, artifact_path: str | None = None, **kwargs: Any) -> None:
        """Keep nothing."""


class NoExperiment(Experiment):
    """Its recorder keeps nothing."""

    def get_recorder(self, *args: Any, **kwargs: Any) -> NoRecorder:
        """Return a recorder that keeps nothing."""
        return NoRecorder(self.id, self.name)


class NoExpManager(ExpManager):
    """The recorder of fits within a trial: what a model logs of each round, some thousand values, is not kept.

    A trial's run holds its settings and its value; the rounds of several folds under one name would be a tangle.
    """

    def get_exp(self, **kwargs: Any) -> NoExperiment:
        """Return an experiment whose recorder keeps nothing."""
        return NoExperiment("0", "trial")

    def _end_exp(self, *args: Any, **kwargs: Any) -> None:
        """Qlib ends what is active when a process ends; nothing is."""
