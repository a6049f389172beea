"""The training loop of one stage: batches, steps, history, validation and checkpoints, in the order they happen."""

import hashlib
import json
import logging
import math
import os
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from kronos_qlib.data.windows import Windows
from kronos_qlib.files import whole_file
from kronos_qlib.nn.checkpoint import WEIGHTS_FILE, HubModule
from kronos_qlib.text import csv_cell
from kronos_qlib.train.adapters import add_lora, freeze_blocks, merge_lora, merged_copy
from kronos_qlib.train.batches import BatchLoader, BatchSampler, SampledBatch, day_offsets, load_examples
from kronos_qlib.train.checkpoints import (
    CHECKPOINTS,
    RESULT_FILE,
    Progress,
    explain_full_disk,
    load_checkpoint,
    newest_progress,
    newest_undamaged,
    save_checkpoint,
)
from kronos_qlib.train.code_cache import CodeCache, encode_windows
from kronos_qlib.train.distributed import SINGLE_PROCESS, Compute, Group, open_compute
from kronos_qlib.train.fingerprint import claim_folder, digest_of_weights, digest_of_windows, fingerprint
from kronos_qlib.train.memory_estimate import bytes_per_window, estimate_micro_batch_size, windows_that_fit
from kronos_qlib.train.metrics import History, Log, read_history
from kronos_qlib.train.settings import LearningSettings
from kronos_qlib.train.signals import StopRequest, TrainingStopped, catch_stop_signals
from kronos_qlib.train.stages import Stage, StageSpecification
from kronos_qlib.train.step import Diverged, TrainingStep, derive_seed

logger = logging.getLogger("qlib.KronosTrainer")  # Qlib's own, without importing Qlib into every training process
VALIDATION_BATCH, VALIDATION_BATCH_ON_CPU = 64, 16  # windows, in whichever process


def train_stage(
    specification: StageSpecification,
    folder: str | os.PathLike[str],
    *,
    group: Group = SINGLE_PROCESS,
    launcher: int | None = None,
    log: Log = lambda metrics, step: None,
) -> dict[str, float]:
    """Train a stage's network in place and leave it with the weights of its best validation loss.

    A folder that holds this very training already is resumed from its newest checkpoint, or only read if it ended.

    Args:
        folder: gets history.csv, checkpoints/, best/ (hub format) and result.json; all processes see it.
        group: the processes that train together, of which this is one.
        launcher: the process whose end stops this one.
        log: called in the first process with the metrics of a logging step, e.g. to record them.

    Returns:
        The validation metrics of the best weights.

    Raises:
        ValueError: the folder holds another training. FloatingPointError: the loss is not finite.
        OSError: the disk is full. TrainingStopped: by a signal, after a checkpoint. They are raised in every process.
    """
    folder, stage, device, seed = Path(folder), specification.stage, specification.device, specification.seed
    network, settings = stage.network.to(device), stage.settings
    sampler, (valid, targets) = BatchSampler.from_specification(specification), validation_set(specification)
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        open_compute(device, specification.dtype, group) as compute,
        catch_stop_signals(launcher) as stop,
        explain_full_disk(folder / CHECKPOINTS),
    ):
        changes = group.run_on_first(lambda: claim_folder(folder, fingerprint(specification)))
        micro_batch_size, keep_latents = _fit_into_memory(specification, folder, compute)
        _log_start(stage, sampler, len(valid), micro_batch_size, compute)
        code_cache = _open_code_cache(specification, folder, compute, stop)
        loader = BatchLoader(
            specification.train, sampler, micro_batch_size, compute, code_cache, specification.train_targets
        )
        with _learning_parameters(network, settings, derive_seed(seed, stage.name)):
            training_step = TrainingStep(
                stage, sampler.steps, seed, compute, keep_latents=keep_latents, compile=specification.compile
            )
            _Loop(specification, folder, loader, training_step, valid, targets, log, stop, changes).run()
        network.load_weights(folder / "best" / WEIGHTS_FILE)
        best = validate(stage, valid, compute, targets)
        if group.is_first:
            logger.info(f"{stage.name}: best weights {', '.join(f'{key} {value:.4f}' for key, value in best.items())}")
        group.run_on_first(lambda: _write_result(folder, best))
        if any(group.all_gather(bool(stop.signal))):  # after the last step: the stages to come would not know
            raise TrainingStopped(
                f"{stage.name}: stopped after its last step, with all saved in {folder}; run the same again to go on",
                stop.signal or signal.SIGTERM,
            )
    return best


@dataclass
class _Loop:
    """The steps of a stage, from its newest checkpoint to the last."""

    specification: StageSpecification
    folder: Path
    loader: BatchLoader
    training_step: TrainingStep
    valid: Windows
    targets: np.ndarray | None
    log: Log
    stop: StopRequest
    changes: list[str]

    def __post_init__(self) -> None:
        self.stage, self.sampler = self.specification.stage, self.loader.sampler
        self.compute, self.group = self.loader.compute, self.loader.compute.group

    def run(self) -> None:
        """Take the steps, with a row of the history, validation and a checkpoint where one is due."""
        self.progress = self._resume()
        if self.progress.history is None:
            self.progress.history = read_history(self.folder / "history.csv", self.progress.step)
        self.history = History(self.folder / "history.csv", self.progress.history)
        self.since = time.perf_counter(), self.progress.step
        if self._is_out_of_patience():
            return
        with tqdm(
            total=self.sampler.windows_drawn(self.sampler.steps),
            initial=self.sampler.windows_drawn(self.progress.step),
            desc=self.stage.name,
            unit=self.sampler.unit,
            disable=not self.group.is_first,
        ) as self.bar:
            for batch, micro_batches in self.loader.batches(self.progress.step):
                lr = self.training_step.lr
                try:
                    loss, stopped = self.training_step.take(batch.step, micro_batches, bool(self.stop.signal))
                except Diverged:
                    raise FloatingPointError(self._divergence_message(batch)) from None
                self.progress.step += 1
                self.progress.losses.append(loss)
                self.bar.update(self.sampler.windows_drawn(self.progress.step) - self.bar.n)
                epoch_ended = self.progress.step % self.sampler.steps_per_epoch == 0
                if epoch_ended or self.progress.step % self.stage.settings.log_every == 0:
                    self._log_metrics(batch, lr, epoch_ended)
                if epoch_ended or stopped or self.progress.step % self.specification.checkpoint_every == 0:
                    self._save_checkpoint()
                if stopped:
                    raise TrainingStopped(
                        f"{self.stage.name}: stopped after step {self.progress.step:,} of {self.sampler.steps:,}, "
                        f"which is saved in {self.folder / CHECKPOINTS}; run the same again to go on",
                        self.stop.signal or signal.SIGTERM,
                    )
                if epoch_ended and self._is_out_of_patience():
                    break

    def _resume(self) -> Progress:
        """Load the newest checkpoint, if there is one, in every process."""
        state = self.stage.network, self.training_step.optimizer
        newest = self.group.run_on_first(lambda: newest_undamaged(self.folder / CHECKPOINTS, *state))
        if newest is None:
            return Progress(micro_batch_size=self.loader.micro_batch_size)
        progress = load_checkpoint(newest, *state)
        self.training_step.resume(progress.step)
        if self.group.is_first:
            logger.info(f"{self.folder}: resumed after step {progress.step:,} of {self.sampler.steps:,}")
            if self.changes:
                rest = f", and follows the schedule of all {self.sampler.steps:,} steps from here: learning rate "
                rest = f"{rest}{self.training_step.lr:.3g}" if progress.step < self.sampler.steps else ""
                logger.info(f"{self.stage.name}: goes on with other settings ({'; '.join(self.changes)}){rest}")
        return progress

    def _log_metrics(self, batch: SampledBatch, lr: float, epoch_ended: bool) -> None:
        """Add a row to the history and the log; at the end of an epoch validate, and keep the best weights."""
        metrics = {"lr": lr, "train_loss": statistics.fmean(self.progress.losses)} | self._measure_speed()
        self.progress.losses.clear()
        if epoch_ended:
            metrics |= validate(self.stage, self.valid, self.compute, self.targets)
            if not math.isfinite(metrics["val_loss"]):
                raise FloatingPointError(
                    f"{self.stage.name}: the validation loss is not finite after step {self.progress.step}; the "
                    f"checkpoint before is kept in {self.folder / CHECKPOINTS}"
                )
            self.progress.stale += 1
            if metrics["val_loss"] < self.progress.best:
                self.progress.best, self.progress.stale = metrics["val_loss"], 0
                self.group.run_on_first(self._save_best)
            self.since = time.perf_counter(), self.progress.step  # validation is not part of the training's speed
        self.history.append({"step": self.progress.step, "epoch": batch.epoch, **metrics})
        if self.group.is_first:
            self.log({f"{self.stage.name}.{key}": value for key, value in metrics.items()}, self.progress.step)
        shown = {key: f"{metrics[key]:.4g}" for key in ("train_loss", "val_loss", "lr") if key in metrics}
        self.bar.set_postfix(shown)

    def _measure_speed(self) -> dict[str, float]:
        """Measure windows a second since the last row, over all processes, and the share of time waited for data."""
        now, (then, step) = time.perf_counter(), self.since
        windows = self.sampler.windows_drawn(self.progress.step) - self.sampler.windows_drawn(step)
        waited, self.loader.seconds_waited = self.loader.seconds_waited, 0.0
        self.since = now, self.progress.step
        return {f"{self.sampler.unit}s_per_second": windows / (now - then), "data_wait": waited / (now - then)}

    def _save_checkpoint(self) -> None:
        if self.training_step.synchronise() and self.group.is_first:
            logger.warning(
                f"{self.stage.name}: the processes' weights differed by rounding; all go on with those of the first"
            )

        def save() -> None:
            self.history.flush()
            folder, optimizer = self.folder / CHECKPOINTS, self.training_step.optimizer
            save_checkpoint(folder, self.stage.network, optimizer, self.progress)

        self.group.run_on_first(save)

    def _save_best(self) -> None:
        merged_copy(self.stage.network).save_pretrained(self.folder / "best")

    def _is_out_of_patience(self) -> bool:
        patience = self.stage.settings.patience
        if patience is None or self.progress.stale < patience:
            return False
        if self.group.is_first and self.progress.step < self.sampler.steps:
            logger.info(
                f"{self.stage.name}: no better validation loss in {patience} epochs, ended after step "
                f"{self.progress.step:,} of {self.sampler.steps:,}"
            )
        return True

    def _divergence_message(self, batch: SampledBatch) -> str:
        """Describe a batch whose loss is not finite, and write all its windows to diverged.csv."""
        windows, path = self.loader.windows, self.folder / "diverged.csv"
        names, dates = windows.instruments[batch.rows], np.datetime_as_string(windows.dates[batch.rows], unit="m")
        lines = [f"{csv_cell(name)},{date}" for name, date in zip(names, dates, strict=True)]
        if self.group.is_first:
            with whole_file(path) as draft:
                draft.write_text("\n".join(["instrument,datetime", *lines]) + "\n")
        return (
            f"{self.stage.name}: the loss or its gradient is not finite at step {batch.step + 1}; its batch has "
            f"{len(lines)} windows such as {', '.join(line.replace(',', ' ') for line in lines[:3])} (all are in "
            f"{path}). The last good checkpoint is kept in {self.folder / CHECKPOINTS}; lower learning_rate or look "
            "at these bars"
        )


def validate(stage: Stage, windows: Windows, compute: Compute, targets: np.ndarray | None = None) -> dict[str, float]:
    """Compute the validation metrics over all windows, or days if there are targets, divided among the processes.

    The batches are the same for any number of processes, and their sums are added exactly.
    """
    stage.network.eval()
    group = compute.group
    if targets is None:
        size = VALIDATION_BATCH_ON_CPU if compute.device.type == "cpu" else VALIDATION_BATCH
        edges = np.append(np.arange(0, len(windows), size), len(windows))
    else:
        edges = day_offsets(windows.dates)
    batches = [np.arange(*pair) for pair in pairwise(edges)][group.rank :: group.size]
    own = list(compute.map_on_cores(lambda rows: _metric_sums(stage, windows, rows, compute, targets), batches))
    sums = [batch for batches in group.all_gather(own) for batch in batches]
    count = len(windows) if targets is None else len(edges) - 1
    return {name: math.fsum(batch[name] for batch in sums) / count for name in sums[0]}


@torch.no_grad()
def _metric_sums(
    stage: Stage, windows: Windows, rows: np.ndarray, compute: Compute, targets: np.ndarray | None
) -> dict[str, float]:
    examples = load_examples(windows, rows, targets=None if targets is None else targets[rows])
    with compute.autocast:
        means = stage.validation_metrics(examples.to(compute.device))
    return {name: mean.item() * (len(rows) if targets is None else 1) for name, mean in means.items()}


def validation_set(specification: StageSpecification) -> tuple[Windows, np.ndarray | None]:
    """Choose the fixed windows that every epoch is validated on; of a ranker those of whole days, and their targets."""
    valid, targets, settings = specification.valid, specification.valid_targets, specification.stage.settings
    if targets is None:
        return evenly_spaced(valid, settings.valid_windows), None
    days = np.unique(valid.dates)
    chosen = np.linspace(0, len(days) - 1, min(settings.valid_days, len(days))).round().astype(int)
    kept = np.isin(valid.dates, days[chosen])
    return valid.take(kept), targets[kept]


def evenly_spaced(windows: Windows, count: int) -> Windows:
    """Choose `count` windows from the first to the last, or all if there are fewer."""
    positions = np.linspace(0, len(windows) - 1, min(count, len(windows)))
    return windows.take(np.unique(positions.round().astype(int)))


@contextmanager
def _learning_parameters(network: HubModule, settings: LearningSettings, seed: int) -> Iterator[None]:
    """Freeze blocks or add adapters as the settings say; afterwards the network is plain and all of it learns."""
    learning = [parameter.requires_grad for parameter in network.parameters()]
    try:
        freeze_blocks(network, settings.freeze_blocks)
        if settings.lora is not None:
            torch.manual_seed(seed)
            add_lora(network, settings.lora)
        yield
    finally:
        merge_lora(network)
        for parameter, learns in zip(network.parameters(), learning, strict=True):
            parameter.requires_grad_(learns)


def _log_start(
    stage: Stage, sampler: BatchSampler, valid_windows: int, micro_batch_size: int, compute: Compute
) -> None:
    group, device = compute.group, compute.device
    if not group.is_first:
        return
    by_day = sampler.unit == "day"
    where = f"{group.size} processes on {device.type}" if group.size > 1 else str(device)
    logger.info(
        f"{stage.name}: {stage.network.n_parameters:,} parameters, {compute.precision} on {where}, "
        f"{sampler.windows_drawn(sampler.steps):,} {sampler.unit}s in {sampler.steps:,} steps of {sampler.batch_size}, "
        f"in micro-batches of {'a day' if by_day else micro_batch_size}; validated on {valid_windows:,} windows"
    )
    count = sampler.batch_size if by_day else math.ceil(sampler.batch_size / micro_batch_size)
    if count < group.size:
        logger.warning(
            f"{stage.name}: a batch has {count} micro-batches for {group.size} processes: some have nothing to do"
        )


def _fit_into_memory(specification: StageSpecification, folder: Path, compute: Compute) -> tuple[int, bool]:
    """Choose the micro-batch size, the same in every process, and whether all latents of a batch may be kept."""
    stage, group, size = specification.stage, compute.group, specification.micro_batch_size
    batch_size = stage.settings.batch_size
    at_once = -(-batch_size // group.size)
    if compute.device.type == "cpu":
        at_once *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # they share this machine's memory
    window_bytes = bytes_per_window(stage, specification.train, compute)
    if size == "auto":
        before = group.run_on_first(lambda: newest_progress(folder / CHECKPOINTS))
        size = before.micro_batch_size if before else estimate_micro_batch_size(batch_size, window_bytes, compute)
    choices = group.all_gather((size, at_once <= windows_that_fit(window_bytes, compute.device)))
    return min(size for size, _ in choices), all(keep_latents for _, keep_latents in choices)


def _open_code_cache(
    specification: StageSpecification, folder: Path, compute: Compute, stop: StopRequest
) -> CodeCache | None:
    """Read or make the cache of codes, if the stage wants one."""
    stage, train = specification.stage, specification.train
    if not stage.cache_codes:
        return None
    tokenizer = stage.frozen_tokenizer
    key = (digest_of_weights(tokenizer), digest_of_windows(train), str(compute.dtype))
    name = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).hexdigest()
    code_cache = encode_windows(folder / "codes" / name, tokenizer, train, compute, lambda: stop.signal)
    if code_cache is None:
        raise TrainingStopped(
            f"{stage.name}: stopped while windows were encoded, the files so far kept; run the same again to go on",
            stop.signal or signal.SIGTERM,
        )
    return code_cache


def _write_result(folder: Path, best: dict[str, float]) -> None:
    with whole_file(folder / RESULT_FILE) as draft:
        draft.write_text(json.dumps(best, indent=2) + "\n")
