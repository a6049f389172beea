"""Training checkpoints: written aside and renamed, the last two kept, safetensors and JSON only."""

import errno
import json
import logging
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import AdamW

from kronos_qlib.files import digest_of_file, whole_file
from kronos_qlib.nn.checkpoint import WEIGHTS_FILE, CheckpointError, HubModule

logger = logging.getLogger("qlib.KronosTrainer")
KEPT = 2
CHECKPOINTS = "checkpoints"
OPTIMIZER_FILE, PROGRESS_FILE = "optimizer.safetensors", "progress.json"
RESULT_FILE = "result.json"  # of a stage that has ended, beside its checkpoints' folder
_NAME, _DRAFT_SUFFIX = re.compile(r"step-\d{8,}"), ".tmp"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class Progress:
    """How far a stage has come.

    step: optimiser steps done; with the seed it decides the place in the epoch and every random number to come.
    best: the best validation loss. stale: epochs since. losses: those of the steps since the last row of the history.
    micro_batch_size: windows that go through the network at a time; another size would round differently.
    history: the rows of history.csv up to the step; None in checkpoints of earlier versions.
    checksums: of the checkpoint's other files, by name; none in those of earlier versions.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    step: int = 0
    best: float = float("inf")
    stale: int = 0
    losses: list[float] = field(default_factory=list)
    micro_batch_size: int = 0
    history: list[dict[str, float | int | str]] | None = None
    checksums: dict[str, str] = field(default_factory=dict)


_PROGRESS = TypeAdapter(Progress)


def save_checkpoint(folder: Path, network: HubModule, optimizer: AdamW, progress: Progress) -> None:
    """Write `folder/step-N` with everything that a resumed training needs, then remove all but the last two.

    Raises:
        OSError: the disk is full; the checkpoints before are untouched.
    """
    name = f"step-{progress.step:08d}"
    draft_folder = folder / (name + _DRAFT_SUFFIX)
    with explain_full_disk(folder):
        try:
            shutil.rmtree(draft_folder, ignore_errors=True)
            network.save_pretrained(draft_folder)
            with whole_file(draft_folder / OPTIMIZER_FILE) as draft:
                save_file(_optimizer_tensors(optimizer), draft)
            checksums = {path.name: digest_of_file(path) for path in sorted(draft_folder.iterdir())}
            values = asdict(progress) | {"checksums": checksums}
            with whole_file(draft_folder / PROGRESS_FILE) as draft:
                draft.write_text(json.dumps(values | {"checksum": _checksum(values)}))
            shutil.rmtree(folder / name, ignore_errors=True)
            os.replace(draft_folder, folder / name)
        finally:
            shutil.rmtree(draft_folder, ignore_errors=True)
    for old in whole_checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)  # the new one is there: a file that somebody has open is no error


def remove_drafts(folder: Path) -> None:
    """Remove the unfinished checkpoints that a killed training has left."""
    for draft in folder.glob(f"step-*{_DRAFT_SUFFIX}"):
        if _NAME.fullmatch(draft.stem) and draft.is_dir() and not draft.is_symlink():
            shutil.rmtree(draft)


def load_checkpoint(folder: Path, network: HubModule, optimizer: AdamW) -> Progress:
    """Restore network and optimiser from one checkpoint, and return how far it had come.

    Raises:
        CheckpointError: it is damaged.
    """
    progress = read_progress(folder)
    try:
        for name, checksum in progress.checksums.items():
            if digest_of_file(folder / name) != checksum:
                raise ValueError(f"{name} is not as it was written")
        network.load_weights(folder / WEIGHTS_FILE)
        _load_optimizer(optimizer, load_file(folder / OPTIMIZER_FILE))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is damaged ({error})") from error
    return progress


def _optimizer_tensors(optimizer: AdamW) -> dict[str, Tensor]:
    """Name the state: `INDEX.step`, `INDEX.exp_avg` and `INDEX.exp_avg_sq` of each parameter."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": tensor.cpu() for index, own in state.items() for name, tensor in own.items()}


def _load_optimizer(optimizer: AdamW, tensors: dict[str, Tensor]) -> None:
    """Restore a state.

    Raises:
        ValueError: it is that of other parameters.
    """
    state: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state[int(index)][name] = tensor.clone()  # not mapped from the file, which is going to be removed
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    expected = [{"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape} for p in parameters]
    if {index: {name: t.shape for name, t in own.items()} for index, own in state.items()} != dict(enumerate(expected)):
        raise ValueError("the optimiser's state is that of other parameters")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def read_progress(folder: Path) -> Progress:
    """Read how far a checkpoint had come.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        progress = json.loads((folder / PROGRESS_FILE).read_text())
        progress.pop("schedule", None)  # once written too, though it follows from the step
        if "part_size" in progress:  # the former name
            progress["micro_batch_size"] = progress.pop("part_size")
        if "checksum" in progress and progress.pop("checksum") != _checksum(progress):  # earlier versions wrote none
            raise ValueError(f"{PROGRESS_FILE} is not as it was written")
        if "step" not in progress:
            raise ValueError(f"{PROGRESS_FILE} has no step")
        return _PROGRESS.validate_json(json.dumps(progress))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} is damaged ({' '.join(str(error).split())})") from error


def _checksum(values: dict[str, Any]) -> str:
    return blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def newest_progress(folder: Path) -> Progress | None:
    """Read the progress of the newest checkpoint where it can be read; None if there is none."""
    for path in reversed(whole_checkpoints(folder)):
        try:
            return read_progress(path)
        except CheckpointError:
            continue  # `newest_undamaged` warns of it
    return None


def newest_undamaged(folder: Path, network: HubModule, optimizer: AdamW) -> Path | None:
    """Load the newest checkpoint that can be loaded, with a warning for each that cannot; None if there is none.

    Raises:
        CheckpointError: all there are are damaged.
    """
    found = whole_checkpoints(folder)
    for path in reversed(found):
        try:
            load_checkpoint(path, network, optimizer)
            return path
        except CheckpointError as error:
            logger.warning(f"{error}; the one before is tried")
    if found:
        raise CheckpointError(f"{folder}: all checkpoints are damaged; remove the folder above to train anew")
    return None


def whole_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints that were written to their end, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Explain a full disk to the user of the training whose checkpoints are in `folder`: what is kept, what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _errno_in(str(error))
        if number not in _FULL or isinstance(error.__cause__, (OSError, SafetensorError)):  # explained already
            raise
        names = [path.name for path in whole_checkpoints(folder)]
        kept = f"the last whole checkpoint is {names[-1]}" if names else "there is no checkpoint yet"
        raise OSError(
            number,
            f"{os.strerror(number)} while writing to {folder}; {kept}. Free some space and run the same again: it goes "
            "on from there",
        ) from error


def _errno_in(message: str) -> int | None:
    """Find the error number that safetensors puts into the text of its errors."""
    return next((number for number in _FULL if f"os error {number}" in message), None)
