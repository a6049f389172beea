"""Training checkpoints: written aside and renamed, the last two kept, safetensors and JSON only."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kronos_qlib.files import whole_file
from kronos_qlib.nn.checkpoint import WEIGHTS_FILE, CheckpointError, HubModule
from kronos_qlib.train.optimizer import AdamW

logger = logging.getLogger("qlib.KronosTrainer")
KEPT = 2
CHECKPOINTS = "checkpoints"
OPTIMIZER_FILE, PROGRESS_FILE = "optimizer.safetensors", "progress.json"
_ASIDE = ".tmp"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class Progress:
    """How far a stage has come.

    step: optimiser steps done; it is the position in the epoch and, with the seed, the state of every random number.
    best: the best validation loss. stale: epochs since. losses: those of the steps since the last row of the history.
    part_size: windows that go through the network at a time; with another size a resumed run would round otherwise.
    """

    step: int = 0
    best: float = float("inf")
    stale: int = 0
    losses: list[float] = field(default_factory=list)
    part_size: int = 0


def save_checkpoint(folder: Path, network: HubModule, optimizer: AdamW, progress: Progress) -> None:
    """Write `folder/step-N` with everything a resumed run needs, then drop all but the last two.

    Raises:
        OSError: the disk is full; the checkpoints before are untouched.
    """
    name = f"step-{progress.step:08d}"
    aside = folder / (name + _ASIDE)
    with no_space_is_told(folder):
        try:
            shutil.rmtree(aside, ignore_errors=True)
            network.save_pretrained(aside)
            with whole_file(aside / OPTIMIZER_FILE) as draft:
                save_file({name: tensor.cpu() for name, tensor in optimizer.tensors().items()}, draft)
            with whole_file(aside / PROGRESS_FILE) as draft:
                draft.write_text(json.dumps(asdict(progress)))
            shutil.rmtree(folder / name, ignore_errors=True)
            os.replace(aside, folder / name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    for old in finished(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)  # the new one is there: a file that somebody has open ends no training


def load_checkpoint(folder: Path, network: HubModule, optimizer: AdamW) -> Progress:
    """Restore network and optimiser from one checkpoint: how far it had come.

    Raises:
        CheckpointError: it is damaged.
    """
    progress = read_progress(folder)
    try:
        network.load_weights(folder / WEIGHTS_FILE)
        optimizer.load(load_file(folder / OPTIMIZER_FILE))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is damaged ({error})") from error
    return progress


def read_progress(folder: Path) -> Progress:
    """How far a checkpoint had come.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        said = json.loads((folder / PROGRESS_FILE).read_text())
        said.pop("schedule", None)  # once written too, though it follows from the step
        return Progress(**said)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is damaged ({error})") from error


def newest_progress(folder: Path) -> Progress | None:
    """That of the newest checkpoint whose progress can be read; None if there is none."""
    for path in reversed(finished(folder)):
        try:
            return read_progress(path)
        except CheckpointError:
            continue  # `newest_whole` tells of it
    return None


def newest_whole(folder: Path, network: HubModule, optimizer: AdamW) -> Path | None:
    """The newest checkpoint that can be loaded, into these; None if there is none yet. Damaged ones are told of.

    Raises:
        CheckpointError: all there are are damaged.
    """
    found = finished(folder)
    for path in reversed(found):
        try:
            load_checkpoint(path, network, optimizer)
            return path
        except CheckpointError as error:
            logger.warning(f"{error}; the one before is tried")
    if found:
        raise CheckpointError(f"{folder}: all checkpoints are damaged; remove the folder above to train anew")
    return None


def finished(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if not path.name.endswith(_ASIDE))


@contextmanager
def no_space_is_told(folder: Path) -> Iterator[None]:
    """Say what a full disk means for the training whose checkpoints are in `folder`: nothing is lost, what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _errno_told(str(error))
        if number not in _FULL or isinstance(error.__cause__, (OSError, SafetensorError)):  # told already
            raise
        whole = [path.name for path in finished(folder)]
        kept = f"the last whole checkpoint is {whole[-1]}" if whole else "there is no checkpoint yet"
        raise OSError(
            number,
            f"{os.strerror(number)} while writing to {folder}; {kept}. Free some space and run the same again: it goes "
            "on from there",
        ) from error


def _errno_told(message: str) -> int | None:
    """The error number that safetensors puts into the text of its errors."""
    return next((number for number in _FULL if f"os error {number}" in message), None)
