"""The training loop of one stage: data, optimiser, schedule, steps, validation, checkpoints, in that order."""

import csv
import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from qlib.log import get_module_logger
from torch import Tensor
from tqdm.auto import tqdm

from kronos_qlib.data.windows import Windows
from kronos_qlib.files import whole_file
from kronos_qlib.nn.checkpoint import HubModule
from kronos_qlib.train.checkpoints import Progress, load_newest, save_checkpoint
from kronos_qlib.train.settings import StageSettings
from kronos_qlib.train.stages import PredictorStage, Stage

logger = get_module_logger("KronosTrainer")
HISTORY = ["step", "epoch", "lr", "train_loss", "val_loss"]
Log = Callable[[dict[str, float], int], None]


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
    log: Log = lambda metrics, step: None,
) -> dict[str, float]:
    """Train a stage's network in place and leave it with the weights of its best validation loss.

    A folder that holds this very training already is resumed from its newest checkpoint, or only read if it ended.

    Args:
        train, valid: windows with their future bars; validation uses a fixed, evenly spaced choice of `valid`.
        folder: gets history.csv, checkpoints/ and best/ (hub format).
        seed: decides the order of the windows, dropout and sampling.
        dtype: bfloat16 runs the forward pass under autocast.
        checkpoint_every: steps between two checkpoints.
        log: called with the metrics of a logging step, e.g. to record them.

    Returns:
        The validation figures of the best weights.

    Raises:
        ValueError: the folder holds another training; FloatingPointError: the loss is not finite.
    """
    folder, settings, network = Path(folder), stage.settings, stage.network.to(device)
    _claim(folder, _identity(stage, train, valid, seed, dtype))
    plan, judged = _Plan.of(settings, len(train), seed), _evenly_spaced(valid, settings.valid_windows)
    logger.info(
        f"{stage.name}: {network.n_parameters:,} parameters on {device} ({str(dtype).removeprefix('torch.')}), "
        f"{plan.epochs * plan.per_epoch:,} windows in {plan.steps:,} steps of {plan.batch_size}, "
        f"judged on {len(judged):,} windows"
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        optimizer, schedule = _optimizer(network, settings, plan.steps)
        progress = _resume(folder / "checkpoints", network, optimizer, schedule)
        history = _History(folder / "history.csv", progress.step)
        bar = tqdm(total=plan.steps, initial=progress.step, desc=stage.name, unit="step")
        for epoch, rows in plan.batches(progress.step):
            loss = _step(stage, *_tensors(train, rows, device), optimizer, dtype)
            if not math.isfinite(loss):
                raise FloatingPointError(_divergence(stage, train, rows, progress.step, folder))
            lr = schedule.get_last_lr()[0]
            schedule.step()
            progress.step += 1
            progress.losses.append(loss)
            bar.update()
            ended = progress.step % plan.epoch_steps == 0
            if ended or progress.step % settings.log_every == 0:
                row = {"lr": lr, "train_loss": statistics.fmean(progress.losses)}
                progress.losses.clear()
                if ended:
                    row |= _judge(stage, judged, device, dtype)
                if row.get("val_loss", math.inf) < progress.best:
                    progress.best = row["val_loss"]
                    network.save_pretrained(folder / "best")
                history.append({"step": progress.step, "epoch": epoch, **row})
                log({f"{stage.name}.{key}": value for key, value in row.items()}, progress.step)
                bar.set_postfix({key: f"{value:.4g}" for key, value in row.items()})
            if ended or progress.step % checkpoint_every == 0:
                history.flush()
                save_checkpoint(folder / "checkpoints", network, optimizer, schedule.state_dict(), progress)
        bar.close()
    network.load_weights(folder / "best" / "model.safetensors")
    best = _judge(stage, judged, device, dtype)
    logger.info("%s: best weights %s", stage.name, ", ".join(f"{key} {value:.4f}" for key, value in best.items()))
    return best


@dataclass(frozen=True)
class _Plan:
    """Which windows every step learns from: each epoch a draw without replacement that only the seed decides."""

    size: int
    per_epoch: int
    batch_size: int
    epochs: int
    seed: int

    @classmethod
    def of(cls, settings: StageSettings, size: int, seed: int) -> "_Plan":
        return cls(size, min(settings.windows_per_epoch or size, size), settings.batch_size, settings.epochs, seed)

    @property
    def epoch_steps(self) -> int:
        return math.ceil(self.per_epoch / self.batch_size)

    @property
    def steps(self) -> int:
        return self.epochs * self.epoch_steps

    def batches(self, done: int) -> Iterator[tuple[int, np.ndarray]]:
        """Epoch and window rows of every step after the first `done`."""
        for epoch in range(done // self.epoch_steps, self.epochs):
            order = np.random.default_rng((self.seed % 2**64, epoch)).permutation(self.size)[: self.per_epoch]
            skip = done % self.epoch_steps if epoch == done // self.epoch_steps else 0
            for start in range(skip * self.batch_size, self.per_epoch, self.batch_size):
                yield epoch, order[start : start + self.batch_size]


def _evenly_spaced(windows: Windows, count: int) -> Windows:
    positions = np.linspace(0, len(windows) - 1, min(count, len(windows)))
    return windows.take(np.unique(positions.round().astype(int)))


def _optimizer(
    network: HubModule, settings: StageSettings, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.OneCycleLR]:
    """AdamW under a OneCycle schedule with 3 % warm-up from a tenth of the peak; the betas stay as they are set."""
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=settings.learning_rate,
        betas=tuple(settings.betas),
        weight_decay=settings.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=steps, pct_start=0.03, div_factor=10, cycle_momentum=False
    )
    return optimizer, schedule


def _resume(
    folder: Path,
    network: HubModule,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.OneCycleLR,
) -> Progress:
    """Take up the newest checkpoint if there is one."""
    found = load_newest(folder, network, optimizer)
    if found is None:
        return Progress()
    progress, schedule_state = found
    schedule.load_state_dict(schedule_state)
    for group, lr in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = lr  # loading a schedule does not tell the optimiser
    logger.info("%s: resumed after step %s", folder.parent, f"{progress.step:,}")
    return progress


def _step(stage: Stage, x: Tensor, stamp: Tensor, optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> float:
    """One optimiser step on a batch; nothing is changed if its loss is not finite."""
    stage.network.train()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
        loss = stage.loss(x, stamp)
    value = loss.item()
    if math.isfinite(value):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stage.network.parameters(), stage.settings.clip_norm)
        optimizer.step()
    return value


def _tensors(windows: Windows, rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    batch = windows.gather(rows)
    return torch.from_numpy(batch.x).to(device), torch.from_numpy(batch.stamp).to(device)


@torch.no_grad()
def _judge(stage: Stage, windows: Windows, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Validation figures over all windows, each counted once."""
    stage.network.eval()
    sums: dict[str, float] = {}
    for start in range(0, len(windows), stage.settings.batch_size):
        rows = np.arange(start, min(start + stage.settings.batch_size, len(windows)))
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            figures = stage.judge(*_tensors(windows, rows, device))
        for name, value in figures.items():
            sums[name] = sums.get(name, 0.0) + value.item() * len(rows)
    return {name: value / len(windows) for name, value in sums.items()}


def _divergence(stage: Stage, train: Windows, rows: np.ndarray, step: int, folder: Path) -> str:
    names, dates = train.instruments[rows], np.datetime_as_string(train.dates[rows], unit="D")
    first = ", ".join(f"{name} {date}" for name, date in list(zip(names, dates, strict=True))[:3])
    return (
        f"{stage.name}: the loss is not finite at step {step + 1}; its batch has {len(rows)} windows such as {first}. "
        f"The last good checkpoint is kept in {folder / 'checkpoints'}; lower learning_rate or look at these bars"
    )


class _History:
    """history.csv: one row per logging step, rewritten whole so that a kill never leaves half a row."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.rows = path, []
        if step and path.exists():
            with path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]

    def append(self, row: dict[str, float]) -> None:
        self.rows.append({key: row.get(key, "") for key in HISTORY})

    def flush(self) -> None:
        with whole_file(self.path) as draft, draft.open("w", newline="") as file:
            writer = csv.DictWriter(file, HISTORY)
            writer.writeheader()
            writer.writerows(self.rows)


def _identity(stage: Stage, train: Windows, valid: Windows, seed: int, dtype: torch.dtype) -> dict[str, object]:
    """What decides the result of a training: two runs with equal identities give equal weights."""
    identity: dict[str, object] = {f"settings.{key}": value for key, value in stage.settings.model_dump().items()}
    identity |= {f"network.{key}": value for key, value in stage.network.config.items()}
    identity |= {"seed": seed, "dtype": str(dtype), "initial weights": _digest_of_weights(stage.network)}
    if isinstance(stage, PredictorStage):
        identity["tokenizer weights"] = _digest_of_weights(stage.tokenizer)
    for name, windows in (("training windows", train), ("validation windows", valid)):
        identity[name] = f"{len(windows)} × ({windows.lookback} + {windows.future}) {_digest_of_bars(windows)}"
    return identity


def _digest_of_bars(windows: Windows) -> str:
    """A digest of the bars in any of the windows, and of the windows' instruments and dates."""
    edges = np.zeros(len(windows.bars) + 1, np.int64)
    np.add.at(edges, windows.ends - windows.lookback + 1, 1)
    np.add.at(edges, windows.ends + windows.future + 1, -1)
    used = edges[:-1].cumsum() > 0
    digest = hashlib.blake2b(windows.keys.tobytes(), digest_size=16)
    for rows in (windows.bars.values[used], windows.bars.stamp[used]):
        digest.update(rows.tobytes())
    return digest.hexdigest()


def _digest_of_weights(network: HubModule) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _claim(folder: Path, identity: dict[str, object]) -> None:
    """Make the folder this training's own, or refuse one that holds another."""
    path = folder / "identity.json"
    if path.exists():
        theirs = json.loads(path.read_text())
        differing = [key for key in {**identity, **theirs} if identity.get(key) != theirs.get(key)]
        if differing:
            changes = "; ".join(f"{key}: {theirs.get(key)!r} there, {identity.get(key)!r} now" for key in differing)
            raise ValueError(
                f"{folder} holds another training ({changes}); choose another output_dir or remove that one"
            )
        return
    with whole_file(path) as draft:
        draft.write_text(json.dumps(identity, indent=2, default=str) + "\n")
