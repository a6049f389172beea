"""Fine-tune as the settings of a KronosModel say: the job, its run, what the recorder gets of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from qlib.data.dataset.weight import Reweighter
from qlib.log import get_module_logger

from kronos_qlib.data.dataset import KLineDataset, window_index
from kronos_qlib.data.extra import training_set
from kronos_qlib.data.windows import COLUMNS, STAMPS, Bars, Windows
from kronos_qlib.evaluation.training_report import write_training_report
from kronos_qlib.hardware.device import process_count, resolve_device, resolve_dtype
from kronos_qlib.nn import Kronos, KronosTokenizer
from kronos_qlib.train import Job
from kronos_qlib.train.adapters import check_freeze, require_peft
from kronos_qlib.train.batches import recency_weights
from kronos_qlib.train.job import EXTRA_DATA, STAGES
from kronos_qlib.train.launch import launch
from kronos_qlib.train.loop import evenly_spaced
from kronos_qlib.train.signals import TrainingStopped
from kronos_qlib.workflow.findings import segment_overlap
from kronos_qlib.workflow.recording import (
    active_recorder,
    end_as_failed,
    record_files,
    record_metrics,
    warn_of_pretraining_overlap,
)
from kronos_qlib.workflow.settings import ModelSettings, WorkflowFinetuneSettings
from kronos_qlib.workflow.training_folder import load_former_weights, next_settings, training_folder

logger = get_module_logger("KronosModel")
REPORT_WINDOWS = 1000  # of the validation segment, on which the report at the end of a training is made


def check_finetune(tokenizer: KronosTokenizer, model: Kronos, settings: ModelSettings) -> None:
    """Refuse a fine-tuning that these networks or this machine cannot do, before any data are loaded.

    Raises:
        ValueError: more processes than GPUs, more blocks to freeze than there are. ModuleNotFoundError: no peft.
    """
    if settings.finetune is None:
        return
    process_count("finetune", settings.finetune.processes, resolve_device(settings.device))
    for name, network in (("tokenizer", tokenizer), ("predictor", model)):
        stage = getattr(settings.finetune, name)
        if stage is None:
            continue
        try:
            check_freeze(network, stage.freeze_blocks)
            if stage.lora is not None:
                require_peft()
        except (ValueError, ModuleNotFoundError) as error:
            raise type(error)(f"KronosModel: finetune.{name}.{error}") from None


def check_groups(owner: str, model: Kronos, bars: Bars) -> None:
    """Raise a ValueError if bars have numbers of groups that a model's conditions do not."""
    most = bars.stamp[:, STAMPS:].max(axis=0, initial=0)
    for (name, groups), number in zip(model.conditions.items(), most):
        if number > groups:
            raise ValueError(
                f"{owner}: the model has {groups} groups of {name}, 0 … {groups - 1}; the bars have {number - 1}"
            )


def training_job(
    tokenizer: KronosTokenizer,
    model: Kronos,
    settings: ModelSettings,
    dataset: KLineDataset,
    reweighter: Reweighter | None = None,
    output_dir: Path | None = None,
    extra_dir: Path | None = None,
) -> Job:
    """Return the job of `finetune`: networks, windows and settings, ready to run.

    Args:
        output_dir: where to, from the present weights; by default the settings', from the weights that `start_from`
            names. Which folder that is, `training_folder` decides.
        extra_dir: where the windows of other stores are left; by default in `output_dir`.

    Raises:
        ValueError: finetune is null, a segment has no window, the reweighter gives no usable weights, or `start_from`
            names no training to start from.
    """
    finetune, device = settings.finetune, resolve_device(settings.device)
    if finetune is None:
        raise ValueError("KronosModel: finetune is null in the settings: there is nothing to train")
    own, valid = dataset.training_windows("train"), dataset.training_windows("valid")
    dataset.warn_of_left_out(own)
    dataset.warn_of_left_out(valid)
    overlap = segment_overlap(dataset, "train", "valid")
    if overlap:
        raise ValueError(f"KronosModel: {overlap}: the weights would be chosen on what they were trained on")
    if "test" in dataset.segments:  # what is wrong with it is an error now, not after the training
        test = dataset.score_windows("test")
        dataset.warn_of_left_out(test)
        warn_of_seen_dates(test, train=own, valid=valid)
        warn_of_pretraining_overlap(tokenizer, model, test)
    if len(dataset.handler.columns) > len(COLUMNS) and finetune.tokenizer is not None:
        tokenizer.config["columns"] = list(dataset.handler.columns[len(COLUMNS) :])
    learning = {"tokenizer": tokenizer, "predictor": model}
    learning = {name: network for name, network in learning.items() if getattr(finetune, name) is not None}
    place, start = output_dir or Path(finetune.output_dir), None
    if output_dir is None:
        start = load_former_weights("KronosModel", finetune.start_from, place, learning, own, valid)
    if start is not None:
        finetune = finetune.model_copy(update={name: next_settings(getattr(finetune, name)) for name in learning})
    folder = training_folder("KronosModel", place, finetune, learning, own, valid, settings.seed)
    train = training_set(own, dataset, finetune.extra_data, (extra_dir or folder) / EXTRA_DATA)
    check_groups("KronosModel", model, train.bars)
    return Job(
        tokenizer=tokenizer,
        model=model,
        train=train,
        valid=replace(valid, bars=train.bars),
        settings=finetune,
        folder=folder,
        seed=settings.seed,
        device=device,
        dtype=resolve_dtype(settings.dtype, device),
        draw_weights=_draw_weights(train, finetune, reweighter),
        recorder=active_recorder(),
        start=None if start is None else str(start),
    )


def run_job(job: Job) -> None:
    """Run a job in the processes that its settings ask for; the networks end with their best weights.

    Raises:
        SystemExit: the training was stopped by a signal, after a checkpoint; the recorder ends as failed.
        whatever `Job.run` and `launch` raise.
    """
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


def record_results(job: Job) -> None:
    """Write the report of a job that has run, and record it with the validation figures of the best weights."""
    for stage, best in job.results().items():
        record_metrics({f"{stage}.best_{name}": value for name, value in best.items()}, None)
    paths, figures = write_training_report(
        job.folder, job.tokenizer, evenly_spaced(job.valid, REPORT_WINDOWS), job.device
    )
    record_metrics(figures, None)
    record_files(paths)
    logger.info(f"KronosModel: curves, use of codes and reconstruction errors are in {job.folder / 'training.png'}")


def warn_of_seen_dates(test: Windows, **trained: Windows) -> None:
    """Warn if windows that decide the weights reach into the dates to be scored."""
    first = test.dates.min()
    for segment, windows in trained.items():
        last = windows.bars.dates[windows.ends + windows.future].max()
        if last >= first:
            days = np.datetime_as_string(np.array([last, first]), unit="D")
            logger.warning(
                f"KronosModel: the {segment} segment has bars to {days[0]} and the test segment starts on {days[1]}: "
                "up to then its scores are not out of sample"
            )


def _draw_weights(
    windows: Windows, settings: WorkflowFinetuneSettings, reweighter: Reweighter | None
) -> np.ndarray | None:
    """How often each training window is to be drawn, float `[W]`, or None if all alike."""
    weights = None
    if settings.half_life_days is not None:
        weights = recency_weights(windows.dates, settings.half_life_days)
    stages = {name: stage for name in STAGES if (stage := getattr(settings, name)) is not None}
    if reweighter is not None:
        if any(stage.windows_per_epoch is None for stage in stages.values()):
            raise ValueError(
                "KronosModel: a reweighter needs windows_per_epoch: an epoch of all windows draws all once"
            )
        given = reweighter.reweight(
            pd.DataFrame(windows.bars.values[windows.ends], window_index(windows), list(windows.bars.columns))
        )
        weights = np.asarray(given, np.float64).reshape(-1) * (1.0 if weights is None else weights)
        if weights.shape != (len(windows),) or not (np.isfinite(weights).all() and (weights > 0).all()):
            raise ValueError(
                f"KronosModel: the reweighter should give a weight above 0 for each of the {len(windows)} windows"
            )
    for name, stage in stages.items() if weights is not None else ():
        if stage.windows_per_epoch >= len(windows):
            logger.warning(
                f"KronosModel: finetune: {name}.windows_per_epoch ({stage.windows_per_epoch:,}) takes all "
                f"{len(windows):,} training windows, so half_life_days or a reweighter changes nothing there"
            )
    return weights
