"""KronosModel: Kronos as a Qlib model, from windows of bars to scores."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from qlib.data.dataset.weight import Reweighter
from qlib.log import get_module_logger
from qlib.model.base import ModelFT

from kronos_qlib.data.dataset import KLineDataset
from kronos_qlib.data.extra import training_set
from kronos_qlib.data.windows import COLUMNS, Windows
from kronos_qlib.evaluation.training_report import write_report
from kronos_qlib.forecast.engine.generate import Sampling
from kronos_qlib.forecast.engine.weights import check_pair
from kronos_qlib.forecast.forecaster import quantile_columns
from kronos_qlib.forecast.ray_cluster import require_ray
from kronos_qlib.forecast.run import Run, forecast
from kronos_qlib.forecast.scores import SCORES
from kronos_qlib.forecast.task import Task, future_stamps
from kronos_qlib.hardware.device import process_count, resolve_device, resolve_dtype
from kronos_qlib.nn import Kronos, KronosTokenizer, zoo
from kronos_qlib.nn.checkpoint import HubModule
from kronos_qlib.settings import read_settings
from kronos_qlib.train import FinetuneSettings, Job
from kronos_qlib.train.adapters import check_freeze, require_peft
from kronos_qlib.train.batches import recency_weights
from kronos_qlib.train.job import EXTRA_DATA, STAGES
from kronos_qlib.train.launch import launch
from kronos_qlib.train.loop import evenly_spaced
from kronos_qlib.train.signals import TrainingStopped
from kronos_qlib.workflow.neutralise import factor_ranks, neutralised
from kronos_qlib.workflow.recording import (
    active_recorder,
    end_as_failed,
    pretraining_overlap,
    record_files,
    record_metrics,
    record_run,
    record_tags,
)
from kronos_qlib.workflow.settings import ModelSettings

logger = get_module_logger("KronosModel")
REPORTED = 1000  # windows of the validation segment on which the report at the end of a training is made


class KronosModel(ModelFT):
    """Fine-tunes Kronos on a KLineDataset and scores its windows by sampled forecasts.

    Args:
        tokenizer, model: a hub id, a local folder, a name of the zoo (mini, small, base, tokenizer-base,
            tokenizer-2k; nano is a new network) or a mapping of constructor arguments, which makes a new network.
        max_context: bars the model sees at most.
        finetune: see `FinetuneSettings`; None uses the checkpoints as they are.
        forecast: see `ForecastSettings`.
        score: one of `kronos_qlib.forecast.scores.SCORES`.
        device: auto, cpu, mps, cuda, cuda:N. dtype: auto, float32, bfloat16 (of the matrix products).
        seed: decides new weights, the order of training windows, dropout and every draw.
        neutralise: names of `kronos_qlib.data.factors`, such as volatility and size: what they explain of a day's
            scores is taken out of them.

    Raises:
        ValueError: an unknown key, a wrong type, an impossible value, networks with different bits, an absent device.
        FileNotFoundError: a checkpoint that is neither here nor on a hub within reach.
    """

    def __init__(
        self,
        tokenizer: str | Mapping[str, Any],
        model: str | Mapping[str, Any],
        max_context: int = 512,
        finetune: Mapping[str, Any] | None = None,
        forecast: Mapping[str, Any] | None = None,
        score: str = "mean_return",
        device: str = "auto",
        dtype: str = "auto",
        seed: int = 100,
        neutralise: Sequence[str] = (),
        **unknown: Any,
    ) -> None:
        values = {"tokenizer": tokenizer, "model": model, "max_context": max_context, "finetune": finetune}
        values |= {
            "forecast": forecast or {},
            "score": score,
            "neutralise": list(neutralise) if isinstance(neutralise, (list, tuple)) else neutralise,
            "device": device,
            "dtype": dtype,
            "seed": seed,
            **unknown,
        }
        self.settings = read_settings(ModelSettings, "KronosModel", values)
        resolve_dtype(dtype, resolve_device(device))  # an absent device is an error now, not after the data are loaded
        self.tokenizer = _network(KronosTokenizer, "tokenizer", self.settings.tokenizer, seed)
        self.model = _network(Kronos, "model", self.settings.model, seed)
        check_pair(self.tokenizer, self.model)
        self._run()  # what it cannot do is said now, not after the training
        if self.settings.finetune is not None:
            self._check_finetune(self.settings.finetune)
        if self.tokenizer.d_in != len(COLUMNS):
            raise ValueError(
                f"KronosModel: the tokenizer's d_in is {self.tokenizer.d_in}; bars have {len(COLUMNS)} columns"
            )

    def fit(self, dataset: KLineDataset, reweighter: Reweighter | None = None) -> None:
        """Run the stages of `finetune` on the train segment, judged on the valid segment; without it, nothing.

        Ctrl-C and SIGTERM save a checkpoint, end the recorder as failed and the process with status 128 + the signal;
        the same `fit` then goes on from there.

        Args:
            reweighter: how often each window is drawn, relative to the others. Its `reweight` gets the bars of the
                score dates (columns open … amount, price units) by (datetime, instrument).

        Raises:
            ValueError: a segment has no window, `output_dir` holds another training, a reweighter without need.
            FloatingPointError: the loss is not finite. OSError: the disk is full. RuntimeError: processes died.
        """
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
            return
        self._train(self.job(dataset, reweighter), dataset)

    def finetune(self, dataset: KLineDataset, output_dir: str | Path | None = None) -> None:
        """Go on training from the present weights with the settings of `finetune`.

        Args:
            output_dir: where to; by default the folder `finetune` in the settings' output_dir.
        """
        if self.settings.finetune is None:
            raise ValueError("KronosModel: finetune is null in the settings; give its stages to fine-tune")
        folder = Path(output_dir) if output_dir else Path(self.settings.finetune.output_dir) / "finetune"
        self._train(replace(self.job(dataset), folder=folder), dataset)

    def job(self, dataset: KLineDataset, reweighter: Reweighter | None = None, scratch: Path | None = None) -> Job:
        """What `fit` would train: networks, windows and settings, ready to run.

        Args:
            scratch: where windows of other stores are left; by default in output_dir.

        Raises:
            ValueError: finetune is null, or a segment has no window.
        """
        settings = self.settings.finetune
        if settings is None:
            raise ValueError("KronosModel: finetune is null in the settings: there is nothing to train")
        self._check(dataset)
        folder = Path(settings.output_dir)
        own, valid = dataset.training_windows("train"), dataset.training_windows("valid")
        if "test" in dataset.segments:  # what is wrong with it is said now, not after the training
            test = dataset.score_windows("test")
            _warn_of_seen_dates(test, train=own, valid=valid)
            self._warn_of_overlap(test)
        train = training_set(own, dataset, settings.extra_data, (scratch or folder) / EXTRA_DATA)
        device = resolve_device(self.settings.device)
        return Job(
            tokenizer=self.tokenizer,
            model=self.model,
            train=train,
            valid=replace(valid, bars=train.bars),
            settings=settings,
            folder=folder,
            seed=self.settings.seed,
            device=device,
            dtype=resolve_dtype(self.settings.dtype, device),
            draw_weights=_window_weights(train, settings, reweighter),
            recorder=active_recorder(),
        )

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
        score = self.forecast(dataset, segment, [name])[name].rename("score")
        return score if ranks is None else neutralised(score, ranks)

    def forecast(
        self, dataset: KLineDataset, segment: str | slice = "test", columns: Sequence[str] | None = None
    ) -> pd.DataFrame:
        """Forecast every window of a segment; with a `cache_dir`, only those that were not forecast before.

        Args:
            columns: which to return: `last_close`, any score, quantiles of the close (`q05_1`: 5 %, one bar ahead; for
                5, 10, 25, 50, 75, 90 and 95 %), all of those by default.

        Returns:
            The columns indexed by (datetime, instrument), sorted; prices in the store's units.

        Raises:
            ValueError: an unknown column. RuntimeError: processes died again and again.
        """
        self._check(dataset)
        known = ["last_close", *SCORES, *quantile_columns(dataset.horizon)]
        unknown = [name for name in columns or [] if name not in known]
        if unknown:
            raise ValueError(f"KronosModel: unknown column {unknown[0]!r} of a forecast; known: {', '.join(known)}")
        windows = dataset.score_windows(segment)
        self._warn_of_overlap(windows)
        record_run(self.settings, dataset)
        return pd.DataFrame(self._forecast(dataset, windows, columns or known), _rows(windows), copy=False)

    def paths(self, dataset: KLineDataset, segment: str | slice = "test") -> tuple[pd.MultiIndex, np.ndarray]:
        """The sample paths of every window of a segment; those that are in `cache_dir` are read there.

        Returns:
            Index (datetime, instrument), sorted, of W windows, and float32 [W, S, P, 6] in the store's units: S samples
            of P bars of open, high, low, close, volume and amount. 60,000 windows of 5 samples of 10 bars take 70 MiB.

        Raises:
            ValueError: `forecast.keep_paths` is false. RuntimeError: processes died again and again.
        """
        self._check(dataset)
        samples, horizon = self.settings.forecast.sample_count, dataset.horizon
        if not self.settings.forecast.keep_paths:
            raise ValueError("KronosModel: the sample paths are not kept: set forecast.keep_paths and a cache_dir")
        windows = dataset.score_windows(segment)
        self._warn_of_overlap(windows)
        record_run(self.settings, dataset)
        flat = self._forecast(dataset, windows, ["paths"])["paths"]
        return _rows(windows), flat.reshape(len(windows), samples, horizon, len(COLUMNS))

    def _train(self, job: Job, dataset: KLineDataset) -> None:
        record_run(self.settings, dataset)
        processes = process_count("finetune", job.settings.processes, job.device)
        try:
            if processes == 1:
                job.run(log=record_metrics)
            else:
                launch(job, processes)
        except TrainingStopped as stopped:
            logger.warning(str(stopped))
            end_as_failed()
            raise SystemExit(128 + stopped.signal) from None
        self.conclude(job)

    def conclude(self, job: Job) -> None:
        """Record what came of a job that has run, with its figures, and let the networks rest."""
        for stage, best in job.results().items():
            record_metrics({f"{stage}.best_{name}": value for name, value in best.items()}, None)
        paths, figures = write_report(job.folder, self.tokenizer, evenly_spaced(job.valid, REPORTED), job.device)
        record_metrics(figures, None)
        record_files(paths)
        logger.info(f"KronosModel: curves, use of codes and reconstruction errors are in {job.folder / 'training.png'}")
        self._to("cpu")

    def _check_finetune(self, settings: FinetuneSettings) -> None:
        process_count("finetune", settings.processes, resolve_device(self.settings.device))
        for name, network in (("tokenizer", self.tokenizer), ("predictor", self.model)):
            stage = getattr(settings, name)
            if stage is None:
                continue
            try:
                check_freeze(network, stage.freeze_blocks)
                if stage.lora is not None:
                    require_peft()
            except (ValueError, ModuleNotFoundError) as error:
                raise type(error)(f"KronosModel: finetune.{name}.{error}") from None

    def _forecast(self, dataset: KLineDataset, windows: Windows, columns: Sequence[str]) -> dict[str, np.ndarray]:
        options, device = self.settings.forecast, resolve_device(self.settings.device)
        task = Task(
            tokenizer=self.tokenizer,
            model=self.model,
            windows=windows,
            future_stamp=future_stamps(windows, dataset.horizon, dataset.calendar.stamps_after),
            sampling=Sampling(
                options.sample_count,
                options.temperature,
                options.top_k,
                options.top_p,
                self.settings.seed,
                options.s2_rotation,
                options.sampling,
            ),
            max_context=self.settings.max_context,
            dtype=resolve_dtype(self.settings.dtype, device),
            device=device,
            part=None if options.batch_size == "auto" else options.batch_size,
            paths=options.keep_paths,
        )
        started = time.perf_counter()
        try:
            values, resumed = forecast(task, self._run(), columns)
        finally:
            self._to("cpu")
        figures = {"seconds": time.perf_counter() - started, "windows": len(windows), "resumed": resumed}
        record_metrics({f"forecast.{name}": value for name, value in figures.items()}, None)
        return values

    def _run(self) -> Run:
        """How forecasts are worked on.

        Raises:
            ValueError: more processes than GPUs, a cache_dir that cannot be written. ModuleNotFoundError: no Ray.
        """
        options, ray = self.settings.forecast, self.settings.forecast.engine == "ray"
        processes = process_count("KronosModel: forecast", options.processes, resolve_device(self.settings.device))
        if ray:
            require_ray()
        cache_dir = Path(options.cache_dir).expanduser() if options.cache_dir else None
        if cache_dir is not None:
            there = next(place for place in (cache_dir, *cache_dir.absolute().parents) if place.exists())
            if not there.is_dir() or not os.access(there, os.W_OK):
                raise ValueError(f"KronosModel: forecast.cache_dir: {cache_dir} cannot be made or written: see {there}")
        return Run(cache_dir, 1 if ray else processes, options.engine)

    def _to(self, device: torch.device | str) -> None:
        """Move both networks; they rest on the CPU, where they can be pickled for any machine."""
        self.tokenizer.to(device).eval()
        self.model.to(device).eval()

    def _check(self, dataset: KLineDataset) -> None:
        if not isinstance(dataset, KLineDataset):
            raise ValueError(f"KronosModel: the dataset must be a KLineDataset, not a {type(dataset).__name__}")
        limit = self.settings.max_context
        if dataset.horizon >= limit:
            raise ValueError(
                f"KronosModel: the dataset's horizon ({dataset.horizon}) must be below max_context ({limit})"
            )
        lookback, horizon = dataset.lookback, dataset.horizon
        if lookback + horizon > limit:
            logger.warning(
                f"KronosModel: lookback ({lookback}) + horizon ({horizon}) is above max_context ({limit}): the window "
                "slides and every step beyond max_context is computed anew, which is slow"
            )

    def _warn_of_overlap(self, windows: Windows) -> None:
        overlap = pretraining_overlap(self.tokenizer, self.model, windows.dates.min())
        if overlap:
            logger.warning(f"KronosModel: {overlap}")
            record_tags({"pretraining_overlap": overlap})


def _rows(windows: Windows) -> pd.MultiIndex:
    """The windows' (datetime, instrument), by which a dataset's are sorted."""
    return pd.MultiIndex.from_arrays([windows.dates, windows.instruments], names=["datetime", "instrument"])


def _warn_of_seen_dates(test: Windows, **trained: Windows) -> None:
    """Warn if windows that decide the weights reach into the dates to be scored."""
    first = test.dates.min()
    for name, windows in trained.items():
        last = windows.bars.dates[windows.ends + windows.future].max()
        if last >= first:
            days = np.datetime_as_string(np.array([last, first]), unit="D")
            logger.warning(
                f"KronosModel: the {name} segment has bars to {days[0]} and the test segment starts on {days[1]}: "
                "up to then its scores are not out of sample"
            )


def _window_weights(windows: Windows, settings: FinetuneSettings, reweighter: Reweighter | None) -> np.ndarray | None:
    """How often each training window is to be drawn, float `[W]`, or None if all alike."""
    weights = None
    if settings.half_life_days is not None:
        weights = recency_weights(windows.dates, settings.half_life_days)
    if reweighter is not None:
        if any(
            stage is not None and stage.windows_per_epoch is None for stage in (settings.tokenizer, settings.predictor)
        ):
            raise ValueError(
                "KronosModel: a reweighter needs windows_per_epoch: an epoch of all windows draws all once"
            )
        given = reweighter.reweight(pd.DataFrame(windows.bars.values[windows.ends], _rows(windows), list(COLUMNS)))
        weights = np.asarray(given, np.float64).reshape(-1) * (1.0 if weights is None else weights)
        if weights.shape != (len(windows),) or not (np.isfinite(weights).all() and (weights > 0).all()):
            raise ValueError(
                f"KronosModel: the reweighter should give a weight above 0 for each of the {len(windows)} windows"
            )
    for name in STAGES if weights is not None else ():
        stage = getattr(settings, name)
        if stage is not None and stage.windows_per_epoch >= len(windows):
            logger.warning(
                f"KronosModel: finetune: {name}.windows_per_epoch ({stage.windows_per_epoch:,}) takes all "
                f"{len(windows):,} training windows, so half_life_days or a reweighter changes nothing there"
            )
    return weights


def _network(kind: type[HubModule], key: str, value: str | Mapping[str, Any], seed: int) -> HubModule:
    """A network from what a workflow says: a mapping, a name of the zoo, a folder or a hub id."""
    entries = zoo.TOKENIZERS if kind is KronosTokenizer else zoo.MODELS
    entry = entries.get(value) if isinstance(value, str) else None
    if entry and entry.hub_id:
        value = entry.hub_id
    elif entry:
        value = entry.config
    if isinstance(value, str):
        try:
            return kind.from_pretrained(value)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"KronosModel: {key}: {error}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind.from_config(dict(value), f"KronosModel: {key}")
