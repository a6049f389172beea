"""KronosModel: Kronos as a Qlib model, from windows of bars to scores."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd
import torch
from qlib.data.dataset.weight import Reweighter
from qlib.log import get_module_logger
from qlib.model.base import ModelFT

from kronos_qlib.data.dataset import KLineDataset, window_index
from kronos_qlib.data.windows import COLUMNS, Windows, normalisation_identity
from kronos_qlib.extensions import call_extension
from kronos_qlib.forecast.calibration import FILE, Calibration, ForecastIdentity
from kronos_qlib.forecast.engine.sampling import is_whole
from kronos_qlib.forecast.engine.weights import beyond_training, check_max_context, check_pair
from kronos_qlib.forecast.forecaster import quantile_columns
from kronos_qlib.forecast.scores import BLOCK, SCORES, PathScore, load_score
from kronos_qlib.hardware.device import resolve_device, resolve_dtype
from kronos_qlib.nn import Kronos, KronosTokenizer
from kronos_qlib.nn.checkpoint import HubModule
from kronos_qlib.settings import MISSING, read_settings
from kronos_qlib.train import Job
from kronos_qlib.workflow.calibration_job import (
    calibrated_columns,
    calibration_windows,
    check_calibration,
    drawn_outcomes,
    fit_on_segment,
)
from kronos_qlib.workflow.forecast_job import forecast_windows, resolve_execution, sampling_of
from kronos_qlib.workflow.neutralise import factor_ranks, neutralise
from kronos_qlib.workflow.recording import (
    pretraining_overlap,
    record_files,
    record_run,
    task_findings,
    warn_of_pretraining_overlap,
)
from kronos_qlib.workflow.settings import ModelSettings
from kronos_qlib.workflow.training_job import (
    check_finetune,
    check_groups,
    record_results,
    run_job,
    training_job,
)

logger = get_module_logger("KronosModel")
Network = TypeVar("Network", bound=HubModule)
START_FROM = "start_from"
IDLE = (
    "{} columns beyond six have no effect: their weights in the tokenizer are zero and do not learn; "
    "finetune.tokenizer trains them, without freeze_blocks and lora"
)


class KronosModel(ModelFT):
    """Fine-tune Kronos on a KLineDataset and score its windows by sampled forecasts, as a Qlib model.

    Args:
        tokenizer, model: a hub id, a local folder, a name of the zoo (mini, small, base, tokenizer-base,
            tokenizer-2k; nano, which is in this package; nano-new, a new network) or a mapping of constructor
            arguments, which makes a new network. {start_from: …, d_in: …} is a tokenizer for bars of more columns.
        max_context: bars the model sees at most.
        finetune: see `FinetuneSettings`; None uses the checkpoints as they are.
        forecast: see `ForecastSettings`.
        score: one of `kronos_qlib.forecast.scores.SCORES`, or the configuration (class, module_path, kwargs) of a
            `kronos_qlib.forecast.scores.PathScore`, which needs the paths: `forecast.keep_paths` or a calibration.
        device: auto, cpu, mps, cuda, cuda:N. dtype: auto, float32, bfloat16 (of the matrix products).
        seed: decides new weights, the order of training windows, dropout and every draw.
        neutralise: names of `kronos_qlib.data.factors`, such as volatility and size: what they explain of a day's
            scores is taken out of them.
        calibration: see `CalibrationSettings`; None issues forecasts as they are drawn. The attribute `calibration`
            holds the fitted one, and so does a pickle.

    Raises:
        ValueError: an unknown key, a wrong type, an impossible value, networks with different bits, an absent device.
        FileNotFoundError: a checkpoint that is neither here nor on a hub within reach.
    """

    calibration: Calibration | None = None  # of models pickled before there was one

    def __init__(
        self,
        tokenizer: str | Mapping[str, Any] = MISSING,
        model: str | Mapping[str, Any] = MISSING,
        max_context: int = 512,
        finetune: Mapping[str, Any] | None = None,
        forecast: Mapping[str, Any] | None = None,
        score: str | Mapping[str, Any] = "mean_return",
        device: str = "auto",
        dtype: str = "auto",
        seed: int = 100,
        neutralise: Sequence[str] = (),
        calibration: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        values: dict[str, Any] = {
            "tokenizer": tokenizer,
            "model": model,
            "max_context": max_context,
            "finetune": finetune,
            "forecast": {} if forecast is None else forecast,
            "score": score,
            "neutralise": list(neutralise) if isinstance(neutralise, (list, tuple)) else neutralise,
            "calibration": calibration,
            "device": device,
            "dtype": dtype,
            "seed": seed,
            **unknown,
        }
        self.settings = read_settings(ModelSettings, "KronosModel", values)
        resolve_dtype(dtype, resolve_device(device))  # an absent device is an error now, not after the data are loaded
        self.tokenizer, self.model = make_networks("KronosModel", self.settings.tokenizer, self.settings.model, seed)
        check_max_context(self.settings.max_context, self.model)
        resolve_execution(self.settings)  # what cannot be done is an error now, not after the training
        check_finetune(self.tokenizer, self.model, self.settings)

    def fit(self, dataset: KLineDataset, reweighter: Reweighter | None = None) -> None:
        """Train the stages of `finetune` on the train segment, judged on the valid segment; without it, train nothing.

        With `calibration`, the days that it names are then forecast and a calibration is fitted on them.

        Ctrl-C and SIGTERM save a checkpoint, end the recorder as failed and the process with status 128 + the signal;
        the same `fit` then goes on from there.

        Args:
            reweighter: how often each window is drawn, relative to the others. Its `reweight` gets the bars of the
                score dates (columns open … amount, price units) by (datetime, instrument).

        Raises:
            ValueError: a segment has no window, `output_dir` holds another training, or a reweighter is given and
                `finetune` is null.
            FloatingPointError: the loss is not finite. OSError: the disk is full. RuntimeError: processes died.
        """
        for finding in task_findings():
            logger.warning(f"{finding.subject}: {finding.text}")
        self.calibration = None
        if self.idle_columns:
            logger.warning(f"KronosModel: {IDLE.format(self.idle_columns)}")
        if self.settings.calibration is not None and isinstance(dataset, KLineDataset):
            check_calibration(dataset, self.settings.calibration)
        if self.settings.finetune is None:
            self._check(dataset)
            if reweighter is not None:
                raise ValueError("KronosModel: a reweighter was given, but finetune is null")
            new = [name for name in ("tokenizer", "model") if getattr(self, name).source is None]
            if new:
                logger.warning(
                    f"KronosModel: finetune is null and the {' and '.join(new)} new: scores of random weights"
                )
            record_run(self.settings, dataset)
            self.calibrate(dataset)
            return
        self._train(self.job(dataset, reweighter), dataset)

    def finetune(self, dataset: KLineDataset, output_dir: str | Path | None = None) -> None:
        """Train the present weights further with the settings of `finetune`.

        Args:
            output_dir: where to; by default the folder `finetune` in the settings' output_dir.
        """
        if self.settings.finetune is None:
            raise ValueError("KronosModel: finetune is null in the settings; give its stages to fine-tune")
        folder = Path(output_dir) if output_dir else Path(self.settings.finetune.output_dir) / "finetune"
        self._train(self.job(dataset, output_dir=folder), dataset)

    def job(
        self,
        dataset: KLineDataset,
        reweighter: Reweighter | None = None,
        output_dir: Path | None = None,
        extra_dir: Path | None = None,
    ) -> Job:
        """Return what `fit` would train: networks, windows and settings, ready to run.

        Args:
            output_dir: where to; by default the settings'.
            extra_dir: where the windows of other stores are left; by default in `output_dir`.

        Raises:
            ValueError: finetune is null, or a segment has no window.
        """
        self._check(dataset)
        return training_job(self.tokenizer, self.model, self.settings, dataset, reweighter, output_dir, extra_dir)

    def calibrate(self, dataset: KLineDataset, output_dir: Path | None = None) -> Calibration | None:
        """Fit the calibration that the settings ask for, unless that is done: `fit` and the first forecast call this.

        It is saved as calibration.json in the active recorder.

        Args:
            output_dir: where it is saved too; `fit` gives the training's.

        Returns:
            The calibration; None if the settings ask for none.

        Raises:
            ValueError: the segment is unknown, has too few windows or does not end before test; samples coincide.
        """
        options = self.settings.calibration
        if options is None or self.calibration is not None:
            return self.calibration
        self._check(dataset)
        check_calibration(dataset, options)
        windows = calibration_windows(dataset, options)
        every, days = (len(np.unique(each.dates)) for each in (dataset.score_windows(options.segment), windows))
        logger.info(
            f"KronosModel: calibrating on {days} of {every} days of {windows.segment}: {len(windows):,} windows × "
            f"{self.settings.forecast.sample_count} samples × {dataset.horizon} bars"
        )
        overlap = pretraining_overlap(self.tokenizer, self.model, windows.dates.min())
        if overlap:
            logger.warning(f"KronosModel: calibration: {overlap}, and a spread that is fitted on them may be too small")
        drawn = self._draw(dataset, windows, ["last_close", "paths"])
        try:
            outcomes = drawn_outcomes(windows, dataset.horizon, drawn)
            self.calibration = fit_on_segment(dataset, options.segment, outcomes, self.identity_on(dataset))
        except ValueError as error:
            raise ValueError(f"KronosModel: calibration: {error}") from None
        logger.info(f"KronosModel: calibration {self.calibration.describe()}")
        record_run(self.settings, dataset, self.calibration)
        with tempfile.TemporaryDirectory() as scratch:
            record_files([self.calibration.save((output_dir or Path(scratch)) / FILE)])
        return self.calibration

    def predict(self, dataset: KLineDataset, segment: str | slice = "test") -> pd.Series:
        """Score every window of a segment.

        Returns:
            The Series `score`, float64, indexed by (datetime, instrument), sorted. A score at t is a function of the
            bars up to t, the weights, the settings and the seed.

        Raises:
            ValueError: `neutralise` is set and too few instruments are scored on every day; if that is so on some
                days, these have no score.
        """
        self._check(dataset)
        name, factors = self.settings.score, self.settings.neutralise
        ranks = factor_ranks(dataset, dataset.score_windows(segment), factors) if factors else None
        if isinstance(name, Mapping):
            score = self._score_paths(dataset, segment, self._own_score(dataset))
        else:
            score = self.forecast(dataset, segment, [name])[name].rename("score")
        return score if ranks is None else neutralise(score, ranks)

    def _own_score(self, dataset: KLineDataset) -> PathScore:
        """Make the score of the user's own, and try it. Raises ValueError."""
        try:
            samples = self.settings.forecast.sample_count
            shape = samples, dataset.horizon, dataset.lookback, len(dataset.handler.columns)
            return load_score(self.settings.score, *shape)
        except ValueError as error:
            raise ValueError(f"KronosModel: score: {error}") from None

    def _score_paths(self, dataset: KLineDataset, segment: str | slice, score: PathScore) -> pd.Series:
        index, paths = self.paths(dataset, segment)
        windows, found = dataset.score_windows(segment), np.empty(len(index))
        for start in range(0, len(index), BLOCK):
            rows = np.arange(start, min(start + BLOCK, len(index)))
            of_block = paths[rows].astype(np.float64), windows.values(rows).astype(np.float64)
            try:
                found[rows] = call_extension(score, (len(rows),), *of_block)
            except ValueError as error:
                raise ValueError(f"KronosModel: score: {error}") from None
        wrong = np.flatnonzero(~np.isfinite(found))
        if len(wrong):
            date, name = index[wrong[0]]
            raise ValueError(
                f"KronosModel: score: {type(score).__name__} returns {found[wrong[0]]} for {name} on {date}, and for "
                f"{len(wrong):,} of {len(found):,} windows what is no finite number"
            )
        return pd.Series(found, index, name="score")

    def forecast(
        self,
        dataset: KLineDataset,
        segment: str | slice = "test",
        columns: Sequence[str] | None = None,
        calibrated: bool = True,
    ) -> pd.DataFrame:
        """Forecast every window of a segment; with a `cache_dir`, only those that were not forecast before.

        With `calibration` in the settings the columns are those of calibrated paths, whose calibration is fitted first
        if that is not done; `cache_dir` holds the paths as they were drawn.

        Args:
            calibrated: false returns the columns of the paths as they were drawn, whatever the settings.
            columns: which to return: `last_close`, any score, quantiles of the close (`q05_1`: 5 %, one bar ahead; for
                5, 10, 25, 50, 75, 90 and 95 %), all of those by default.

        Returns:
            The columns indexed by (datetime, instrument), sorted; prices in the store's units.

        Raises:
            ValueError: an unknown column. RuntimeError: processes died too often.
        """
        self._check(dataset)
        known = ["last_close", *_scores_of(dataset), *quantile_columns(dataset.horizon)]
        unknown = [name for name in columns or [] if name not in known]
        if unknown:
            raise ValueError(f"KronosModel: unknown column {unknown[0]!r} of a forecast; known: {', '.join(known)}")
        windows = dataset.score_windows(segment)
        names = columns or known
        return pd.DataFrame(self._forecast(dataset, windows, names, calibrated), window_index(windows), copy=False)

    def paths(
        self, dataset: KLineDataset, segment: str | slice = "test", calibrated: bool = True
    ) -> tuple[pd.MultiIndex, np.ndarray]:
        """Return the sample paths of every window of a segment; those in `cache_dir` are read there.

        Args:
            calibrated: as of `forecast`.

        Returns:
            Index (datetime, instrument), sorted, of W windows, and float32 [W, S, P, D] in the store's units: S samples
            of P bars of open, high, low, close, volume and amount. 60,000 windows of 5 samples of 10 bars take 70 MiB.

        Raises:
            ValueError: neither `forecast.keep_paths` nor `calibration` is set. RuntimeError: processes died too often.
        """
        self._check(dataset)
        samples, horizon = self.settings.forecast.sample_count, dataset.horizon
        if not self.settings.forecast.keep_paths and self.settings.calibration is None:
            raise ValueError("KronosModel: the sample paths are not kept: set forecast.keep_paths and a cache_dir")
        windows = dataset.score_windows(segment)
        flat = self._forecast(dataset, windows, ["paths"], calibrated)["paths"]
        return window_index(windows), flat.reshape(len(windows), samples, horizon, -1)

    @property
    def identity(self) -> ForecastIdentity:
        """What decides the distribution of forecasts of bars normalised as usual: weights, and how paths are drawn."""
        return ForecastIdentity.of(self.tokenizer, self.model, sampling_of(self.settings))

    def identity_on(self, dataset: KLineDataset) -> ForecastIdentity:
        """Return what decides the distribution of forecasts of a dataset: how its bars are normalised, too."""
        return self.identity.model_copy(update={"normalisation": normalisation_identity(dataset.normalisation)})

    def conclude(self, job: Job) -> None:
        """Record the results of a job that has run, and move the networks back to the CPU."""
        record_results(job)
        self._to_cpu()
        self.calibration = None  # it is of other weights

    def _train(self, job: Job, dataset: KLineDataset) -> None:
        record_run(self.settings, dataset)
        run_job(job)
        self.conclude(job)
        self.calibrate(dataset, job.folder)

    def _forecast(
        self, dataset: KLineDataset, windows: Windows, columns: Sequence[str], calibrated: bool = True
    ) -> dict[str, np.ndarray]:
        """Forecast windows: columns of the paths as they were drawn, or of calibrated ones."""
        calibration, options = self.calibrate(dataset) if calibrated else None, self.settings.calibration
        dataset.warn_of_left_out(windows)
        warn_of_pretraining_overlap(self.tokenizer, self.model, windows)
        if calibration is None or options is None:
            return self._draw(dataset, windows, columns)
        try:
            calibration.check(self.identity_on(dataset), dataset.horizon)
        except ValueError as error:
            raise ValueError(f"KronosModel: {error}") from None
        until = calibration.fitted_on.until
        seen = f"; those up to {until} are not out of sample" if windows.dates.min() <= np.datetime64(until) else ""
        logger.info(
            f"KronosModel: forecasts of {windows.segment} are calibrated, {options.bands} bands, "
            f"{calibration.describe()}{seen}"
        )
        drawn = self._draw(dataset, windows, ["last_close", "paths"])
        return calibrated_columns(calibration, options.bands, dataset.horizon, windows, drawn, columns)

    def _draw(self, dataset: KLineDataset, windows: Windows, columns: Sequence[str]) -> dict[str, np.ndarray]:
        """Forecast windows, not calibrated."""
        record_run(self.settings, dataset, self.calibration)
        try:
            return forecast_windows(self.tokenizer, self.model, self.settings, dataset, windows, columns)
        finally:
            self._to_cpu()

    @property
    def idle_columns(self) -> int:
        """How many columns beyond six the tokenizer ignores, as their weights are zero and do not learn."""
        finetune = self.settings.finetune
        stage = None if finetune is None else finetune.tokenizer
        learns = stage is not None and not stage.freeze_blocks and stage.lora is None
        return 0 if learns else untrained_columns(self.tokenizer)

    def check_bars(self, dataset: KLineDataset) -> None:
        """Refuse a dataset whose columns, conditions or prices the networks and settings are not made for.

        Raises:
            ValueError: one line that names the key.
        """
        check_columns("KronosModel", self.tokenizer, dataset)
        check_conditions("KronosModel", self.model, dataset)
        if dataset.handler.prices == "positive":
            return
        score, known = self.settings.score, _scores_of(dataset)
        below = "of prices, which may be zero or less (prices: any)"
        if isinstance(score, str) and score not in known:
            raise ValueError(
                f"KronosModel: score {score} is a ratio {below}; use {', '.join(known)}, or one of your own"
            )
        for key, what in (("calibration", "logarithms"), ("neutralise", "ratios")):
            if getattr(self.settings, key):
                raise ValueError(f"KronosModel: {key} takes {what} {below}")

    def _to_cpu(self) -> None:
        """Move both networks to the CPU: a recorder's pickle of them then loads on any machine."""
        for network in (self.tokenizer, self.model):
            network.cpu().eval()

    def _check(self, dataset: KLineDataset) -> None:
        if not isinstance(dataset, KLineDataset):
            raise ValueError(f"KronosModel: the dataset must be a KLineDataset, not a {type(dataset).__name__}")
        self.check_bars(dataset)
        limit = self.settings.max_context
        if dataset.horizon >= limit:
            raise ValueError(
                f"KronosModel: the dataset's horizon ({dataset.horizon}) must be below max_context ({limit})"
            )
        if isinstance(self.settings.score, Mapping):
            self._own_score(dataset)  # what does not work is said before a training
        lookback, horizon = dataset.lookback, dataset.horizon
        beyond = beyond_training(self.model, min(lookback + horizon, limit))
        if beyond and self.settings.finetune is None:
            logger.warning(f"KronosModel: {beyond}")
        if lookback + horizon > limit:
            logger.warning(
                f"KronosModel: lookback ({lookback}) + horizon ({horizon}) is above max_context ({limit}): the window "
                "slides and every step beyond max_context is computed anew, which is slow"
            )


def untrained_columns(tokenizer: KronosTokenizer) -> int:
    """Count the columns beyond six whose weights are zero: they change no code."""
    return int((tokenizer.embed.weight[:, len(COLUMNS) :] == 0).all(0).sum())


def check_conditions(owner: str, model: Kronos, dataset: KLineDataset) -> None:
    """Raise a ValueError if a model has other conditions than a dataset's handler, or fewer groups than its bars."""
    names = dataset.handler.conditions
    if tuple(model.conditions) != names:
        raise ValueError(
            f"{owner}: the model's conditions are {', '.join(model.conditions) or 'none'}, the handler's "
            f"{', '.join(names) or 'none'}: they should be the same, in the same order"
        )
    if names:
        check_groups(owner, model, dataset.handler.bars())


def _scores_of(dataset: KLineDataset) -> list[str]:
    """Return the scores that mean something of a dataset's prices: no ratios where these may be zero or less."""
    positive = dataset.handler.prices == "positive"
    return [name for name in SCORES if positive or name.startswith("z_") or name == "prob_up"]


def make_networks(
    owner: str, tokenizer: str | Mapping[str, Any], model: str | Mapping[str, Any], seed: int
) -> tuple[KronosTokenizer, Kronos]:
    """Make or load the networks that a workflow names, which must be a pair for bars.

    Args:
        owner: the Qlib model, for errors.
        seed: of new networks' weights.
    """
    pair = (
        make_network(KronosTokenizer, f"{owner}: tokenizer", tokenizer, seed),
        make_network(Kronos, f"{owner}: model", model, seed),
    )
    check_pair(*pair)
    return pair


def check_columns(owner: str, tokenizer: KronosTokenizer, dataset: KLineDataset) -> None:
    """Raise a ValueError if a tokenizer is not for as many columns as the bars of a dataset have."""
    columns = dataset.handler.columns
    if tokenizer.d_in != len(columns):
        raise ValueError(
            f"{owner}: the tokenizer's d_in is {tokenizer.d_in}; bars have {len(columns)} columns, "
            f"{', '.join(columns)}; the handler's setting columns adds some, and a tokenizer of more is made by "
            f"{{start_from: …, d_in: {len(columns)}}}"
        )
    known, own = tokenizer.config.get("columns"), list(columns[len(COLUMNS) :])
    if known is not None and known != own:
        raise ValueError(f"{owner}: the tokenizer was trained on the columns {', '.join(known)}, not {', '.join(own)}")


def make_network(kind: type[Network], key: str, value: str | Mapping[str, Any], seed: int) -> Network:
    """Make or load the network that a workflow names: a mapping, a name of the zoo, a folder or a hub id.

    Args:
        key: of the setting, for errors.
        seed: of a new network's weights.
    """
    if isinstance(value, Mapping) and START_FROM in value:
        return _started_from(kind, key, value, seed)
    entry = kind.entries.get(value) if isinstance(value, str) else None
    if entry and not (entry.hub_id or entry.folder):
        value = entry.config
    if isinstance(value, str):
        try:
            return kind.from_pretrained(value)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{key}: {error}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind.from_config(dict(value), key)


def _started_from(kind: type[Network], key: str, value: Mapping[str, Any], seed: int) -> Network:
    """Make the tokenizer of {start_from: …, d_in: …, quantizer: …}: a known one, for bars of more columns, or with
    the user's own quantizer, which its config.json names without a place.
    """
    allowed, d_in = {START_FROM, "d_in", "quantizer"}, value.get("d_in")
    if kind is not KronosTokenizer or len(value) < 2 or not value.keys() <= allowed:
        raise ValueError(f"{key}: {START_FROM} is of a tokenizer's {{{START_FROM}: …, d_in: …}}, not {dict(value)}")
    if d_in is not None and not is_whole(d_in):
        raise ValueError(f"{key}: d_in should be a whole number, not {d_in!r}")
    try:
        if value.get("quantizer") is None:
            start = make_network(KronosTokenizer, key, value[START_FROM], seed)
        else:
            start = KronosTokenizer.from_pretrained(value[START_FROM], trusted={"quantizer": value["quantizer"]})
        return cast(Network, start if d_in is None else start.widened(d_in))
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        raise type(error)(text if text.startswith(key) else f"{key}: {text}") from None
