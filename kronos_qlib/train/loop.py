"""The training loop of one stage: data, optimiser, steps, validation, checkpoints, in that order."""

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
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from kronos_qlib.data.windows import Windows
from kronos_qlib.files import whole_file
from kronos_qlib.nn.checkpoint import WEIGHTS_FILE, HubModule
from kronos_qlib.train.adapters import add_lora, freeze_blocks, merge_lora, merged
from kronos_qlib.train.batches import Feed, Plan, Step, gather
from kronos_qlib.train.checkpoints import (
    CHECKPOINTS,
    Progress,
    load_checkpoint,
    newest_progress,
    newest_whole,
    no_space_is_told,
    save_checkpoint,
)
from kronos_qlib.train.code_cache import Codes, encode_windows
from kronos_qlib.train.distributed import ALONE, Compute, Group
from kronos_qlib.train.fingerprint import claim, digest_of_weights, digest_of_windows, identity_of
from kronos_qlib.train.memory_estimate import bytes_per_window, part_size, room_for
from kronos_qlib.train.metrics import History, Log
from kronos_qlib.train.settings import StageSettings
from kronos_qlib.train.signals import StopRequest, TrainingStopped, stop_requests
from kronos_qlib.train.stages import PredictorStage, Stage
from kronos_qlib.train.step import Diverged, Learner, seed_of

logger = logging.getLogger("qlib.KronosTrainer")  # Qlib's own, without importing Qlib into every training process
RESULT = "result.json"
JUDGED, JUDGED_ON_CPU = 64, 16  # windows at a time in validation, whichever process judges them


def train_stage(
    stage: Stage,
    train: Windows,
    valid: Windows,
    folder: str | os.PathLike[str],
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    checkpoint_every: int = 200,
    micro_batch_size: int | str = "auto",
    compiled: bool = False,
    weights: np.ndarray | None = None,
    group: Group = ALONE,
    launcher: int | None = None,
    log: Log = lambda metrics, step: None,
) -> dict[str, float]:
    """Train a stage's network in place and leave it with the weights of its best validation loss.

    A folder that holds this very training already is resumed from its newest checkpoint, or only read if it ended.

    Args:
        train, valid: windows with their future bars; validation uses a fixed, evenly spaced choice of `valid`.
        folder: gets history.csv, checkpoints/, best/ (hub format) and result.json; all processes see it.
        seed: decides the order of the windows, dropout and sampling.
        dtype: bfloat16 runs the forward pass under autocast.
        checkpoint_every: steps between two checkpoints.
        micro_batch_size: windows that go through the network at a time (on a CPU in each thread), or auto: a part for
            every core, or what an estimate finds room for. A resumed training keeps to what it began with.
        compiled: let torch.compile build the training step.
        weights: how often each training window is to be drawn, relative to the others: float `[len(train)]`.
        group: the processes that train together, of which this is one.
        launcher: the process whose end ends this one.
        log: called in the first process with the metrics of a logging step, e.g. to record them.

    Returns:
        The validation figures of the best weights.

    Raises:
        ValueError: the folder holds another training. FloatingPointError: the loss is not finite.
        OSError: the disk is full. TrainingStopped: by a signal, after a checkpoint. They reach every process.
    """
    folder, settings, network = Path(folder), stage.settings, stage.network.to(device)
    plan, judged = Plan.of(settings, len(train), seed, weights), evenly_spaced(valid, settings.valid_windows)
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        Compute.on(device, dtype, group) as compute,
        stop_requests(launcher) as stop,
        no_space_is_told(folder / CHECKPOINTS),
    ):
        what = stage, train, valid, seed, dtype, weights, micro_batch_size, compiled
        group.once(lambda: claim(folder, identity_of(*what)))
        size, held = _parts(stage, train, folder, micro_batch_size, compute)
        _announce(stage, plan, len(judged), size, compute)
        feed = Feed(train, plan, size, compute, _codes(stage, train, folder, compute, stop))
        with _learning_in_part(network, settings, seed_of(seed, stage.name)):
            learner = Learner(stage, plan.steps, seed, compute, held=held, compiled=compiled)
            _Run(stage, plan, learner, feed, judged, folder, checkpoint_every, compute, log, stop).all_steps()
        network.load_weights(folder / "best" / WEIGHTS_FILE)
        best = judge(stage, judged, compute)
        if group.first:
            logger.info(f"{stage.name}: best weights {', '.join(f'{key} {value:.4f}' for key, value in best.items())}")
        group.once(lambda: _write_result(folder, best))
        if any(group.gather(bool(stop.asked()))):  # after the last step: the stages to come would not know
            raise TrainingStopped(
                f"{stage.name}: stopped after its last step, with all saved in {folder}; run the same again to go on",
                stop.signal or signal.SIGTERM,
            )
    return best


@dataclass
class _Run:
    """The steps of a stage, from where its folder stands to their end."""

    stage: Stage
    plan: Plan
    learner: Learner
    feed: Feed
    judged: Windows
    folder: Path
    checkpoint_every: int
    compute: Compute
    log: Log
    stop: StopRequest

    def all_steps(self) -> None:
        """The story of a stage."""
        self.progress = self._resume()
        self.history = History(self.folder / "history.csv", self.progress.step)
        self.since = time.perf_counter(), self.progress.step
        if self._ended_early():
            return
        with tqdm(
            total=self.plan.windows(self.plan.steps),
            initial=self.plan.windows(self.progress.step),
            desc=self.stage.name,
            unit="window",
            disable=not self.compute.group.first,
        ) as self.bar:
            self._steps()

    def _steps(self) -> None:
        for step, parts in self.feed.after(self.progress.step):
            lr = self.learner.optimizer.rate(step.number)
            try:
                loss, stopped = self.learner.step(step.number, parts, bool(self.stop.asked()))
            except Diverged:
                raise FloatingPointError(self._divergence(step)) from None
            self.progress.step += 1
            self.progress.losses.append(loss)
            self.bar.update(len(step.rows))
            ended = self.progress.step % self.plan.epoch_steps == 0
            if ended or self.progress.step % self.stage.settings.log_every == 0:
                self._note(step, lr, ended)
            if ended or stopped or self.progress.step % self.checkpoint_every == 0:
                if self.learner.align() and self.compute.group.first:
                    logger.warning(f"{self.stage.name}: the processes' weights differed by rounding; the first's count")
                self.compute.group.once(self._save)
            if stopped:
                raise TrainingStopped(
                    f"{self.stage.name}: stopped after step {self.progress.step:,} of {self.plan.steps:,}, which is "
                    f"saved in {self.folder / CHECKPOINTS}; run the same again to go on",
                    self.stop.signal or signal.SIGTERM,
                )
            if ended and self._ended_early():
                break

    def _note(self, step: Step, lr: float, ended: bool) -> None:
        """A row of the history; at the end of an epoch with validation, and the best weights kept."""
        row = {"lr": lr, "train_loss": statistics.fmean(self.progress.losses)} | self._speed()
        self.progress.losses.clear()
        if ended:
            row |= judge(self.stage, self.judged, self.compute)
            if not math.isfinite(row["val_loss"]):
                raise FloatingPointError(
                    f"{self.stage.name}: the validation loss is not finite after step {self.progress.step}; the "
                    f"checkpoint before is kept in {self.folder / CHECKPOINTS}"
                )
            self.progress.stale += 1
            if row["val_loss"] < self.progress.best:
                self.progress.best, self.progress.stale = row["val_loss"], 0
                self.compute.group.once(self._keep_as_best)
            self.since = time.perf_counter(), self.progress.step  # validation is not part of the training's speed
        self.history.append({"step": self.progress.step, "epoch": step.epoch, **row})
        if self.compute.group.first:
            self.log({f"{self.stage.name}.{key}": value for key, value in row.items()}, self.progress.step)
        shown = {key: f"{row[key]:.4g}" for key in ("train_loss", "val_loss", "lr") if key in row}
        self.bar.set_postfix(shown)

    def _speed(self) -> dict[str, float]:
        """Windows a second since the last row, over all processes, and the share of the time spent waiting for data."""
        now, (then, step) = time.perf_counter(), self.since
        windows = self.plan.windows(self.progress.step) - self.plan.windows(step)
        waited, self.feed.waited = self.feed.waited, 0.0
        self.since = now, self.progress.step
        return {"windows_per_second": windows / (now - then), "data_wait": waited / (now - then)}

    def _resume(self) -> Progress:
        """Take up the newest checkpoint if there is one, in every process."""
        ours = self.stage.network, self.learner.optimizer
        found = self.compute.group.once(lambda: newest_whole(self.folder / CHECKPOINTS, *ours))
        if found is None:
            return Progress(part_size=self.feed.part_size)
        progress = load_checkpoint(found, *ours)
        if self.compute.group.first:
            logger.info(f"{self.folder}: resumed after step {progress.step:,} of {self.plan.steps:,}")
        return progress

    def _save(self) -> None:
        self.history.flush()
        save_checkpoint(self.folder / CHECKPOINTS, self.stage.network, self.learner.optimizer, self.progress)

    def _keep_as_best(self) -> None:
        merged(self.stage.network).save_pretrained(self.folder / "best")

    def _ended_early(self) -> bool:
        patience = self.stage.settings.patience
        if patience is None or self.progress.stale < patience:
            return False
        if self.compute.group.first and self.progress.step < self.plan.steps:
            logger.info(
                f"{self.stage.name}: no better validation loss in {patience} epochs, ended after step "
                f"{self.progress.step:,} of {self.plan.steps:,}"
            )
        return True

    def _divergence(self, step: Step) -> str:
        """What to say of a batch whose loss is not finite; all its windows are in diverged.csv."""
        windows, path = self.feed.windows, self.folder / "diverged.csv"
        names, dates = windows.instruments[step.rows], np.datetime_as_string(windows.dates[step.rows], unit="m")
        lines = [f"{name},{date}" for name, date in zip(names, dates, strict=True)]
        if self.compute.group.first:
            with whole_file(path) as draft:
                draft.write_text("\n".join(["instrument,datetime", *lines]) + "\n")
        return (
            f"{self.stage.name}: the loss or its gradient is not finite at step {step.number + 1}; its batch has "
            f"{len(lines)} windows such as {', '.join(line.replace(',', ' ') for line in lines[:3])} (all are in "
            f"{path}). The last good checkpoint is kept in {self.folder / CHECKPOINTS}; lower learning_rate or look "
            "at these bars"
        )


def judge(stage: Stage, windows: Windows, compute: Compute) -> dict[str, float]:
    """Validation figures over all windows, each counted once, whatever the number of processes that divide them.

    The batches are the same for any number, and their sums are added exactly.
    """
    stage.network.eval()
    group, size = compute.group, JUDGED_ON_CPU if compute.device.type == "cpu" else JUDGED
    starts = range(group.rank * size, len(windows), group.size * size)
    batches = (np.arange(start, min(start + size, len(windows))) for start in starts)
    sums = compute.each(lambda rows: _sums(stage, windows, rows, compute), batches)
    everywhere = [part for parts in group.gather(list(sums)) for part in parts]
    return {name: math.fsum(part[name] for part in everywhere) / len(windows) for name in everywhere[0]}


@torch.no_grad()
def _sums(stage: Stage, windows: Windows, rows: np.ndarray, compute: Compute) -> dict[str, float]:
    with compute.autocast:
        figures = stage.judge(gather(windows, rows).to(compute.device))
    return {name: value.item() * len(rows) for name, value in figures.items()}


def evenly_spaced(windows: Windows, count: int) -> Windows:
    """`count` of the windows, or all if there are fewer, from the first to the last."""
    positions = np.linspace(0, len(windows) - 1, min(count, len(windows)))
    return windows.take(np.unique(positions.round().astype(int)))


@contextmanager
def _learning_in_part(network: HubModule, settings: StageSettings, seed: int) -> Iterator[None]:
    """Freeze blocks or add adapters as the settings say; afterwards the network is plain again and all of it learns."""
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


def _announce(stage: Stage, plan: Plan, judged: int, part: int, compute: Compute) -> None:
    group, device = compute.group, compute.device
    if not group.first:
        return
    where = f"{group.size} processes on {device.type}" if group.size > 1 else str(device)
    logger.info(
        f"{stage.name}: {stage.network.n_parameters:,} parameters, {compute.precision} on {where}, "
        f"{plan.windows(plan.steps):,} windows in {plan.steps:,} steps of {plan.batch_size}, in parts of {part}; "
        f"judged on {judged:,} windows"
    )
    parts = math.ceil(plan.batch_size / part)
    if parts < group.size:
        logger.warning(f"{stage.name}: a batch has {parts} parts for {group.size} processes: some have nothing to do")


def _parts(
    stage: Stage, train: Windows, folder: Path, micro_batch_size: int | str, compute: Compute
) -> tuple[int, bool]:
    """Windows to take through the network at a time, the same in every process, and if a whole share of them fits."""
    group = compute.group
    share = -(-stage.settings.batch_size // group.size)
    if compute.device.type == "cpu":
        share *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # they share this machine's memory
    room = room_for(bytes_per_window(stage, train, compute), compute.device)
    size, held = micro_batch_size, share <= room
    if size == "auto":
        before = group.once(lambda: newest_progress(folder / CHECKPOINTS))
        size = before.part_size if before else part_size(stage.settings.batch_size, room, compute)
    told = group.gather((size, held))
    return min(size for size, _ in told), all(held for _, held in told)


def _write_result(folder: Path, best: dict[str, float]) -> None:
    with whole_file(folder / RESULT) as draft:
        draft.write_text(json.dumps(best, indent=2) + "\n")


def _codes(stage: Stage, train: Windows, folder: Path, compute: Compute, stop: StopRequest) -> Codes | None:
    """The cache of codes, if the stage wants one."""
    if not (isinstance(stage, PredictorStage) and stage.settings.cache_codes):
        return None
    what = (digest_of_weights(stage.tokenizer), digest_of_windows(train), str(compute.dtype))
    name = hashlib.blake2b(json.dumps(what).encode(), digest_size=8).hexdigest()
    codes = encode_windows(folder / "codes" / name, stage.tokenizer, train, compute, stop.asked)
    if codes is None:
        raise TrainingStopped(
            f"{stage.name}: stopped while windows were encoded, the files so far kept; run the same again to go on",
            stop.signal or signal.SIGTERM,
        )
    return codes
