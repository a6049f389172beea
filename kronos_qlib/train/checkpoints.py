"""Training checkpoints: written aside and renamed, the last two kept, safetensors and JSON only."""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kronos_qlib.files import whole_file
from kronos_qlib.nn.checkpoint import WEIGHTS_FILE, CheckpointError, HubModule

KEPT = 2
OPTIMIZER_FILE, PROGRESS_FILE = "optimizer.safetensors", "progress.json"
_ASIDE = ".tmp"


@dataclass
class Progress:
    """How far a stage has come: optimiser steps done, the best validation loss, the losses since the last log row."""

    step: int = 0
    best: float = float("inf")
    losses: list[float] = field(default_factory=list)


def save_checkpoint(
    folder: Path, network: HubModule, optimizer: torch.optim.Optimizer, schedule: dict[str, Any], progress: Progress
) -> None:
    """Write `folder/step-N` with everything a resumed run needs, then drop all but the last two."""
    name = f"step-{progress.step:08d}"
    aside = folder / (name + _ASIDE)
    shutil.rmtree(aside, ignore_errors=True)
    network.save_pretrained(aside)
    tensors = {
        f"{index}.{key}": value.detach().cpu().contiguous()
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    with whole_file(aside / OPTIMIZER_FILE) as draft:
        save_file(tensors | {"rng": torch.get_rng_state()}, draft)
    with whole_file(aside / PROGRESS_FILE) as draft:
        draft.write_text(json.dumps({**asdict(progress), "schedule": schedule}))
    shutil.rmtree(folder / name, ignore_errors=True)
    os.replace(aside, folder / name)
    for old in _finished(folder)[:-KEPT]:
        shutil.rmtree(old)


def load_newest(
    folder: Path, network: HubModule, optimizer: torch.optim.Optimizer
) -> tuple[Progress, dict[str, Any]] | None:
    """Restore network, optimiser and random state from the newest checkpoint: progress and schedule, or None.

    Raises:
        CheckpointError: the newest checkpoint is damaged.
    """
    found = _finished(folder)
    if not found:
        return None
    newest = found[-1]
    try:
        tensors = load_file(newest / OPTIMIZER_FILE)
        saved = json.loads((newest / PROGRESS_FILE).read_text())
        schedule = saved.pop("schedule")
        progress = Progress(**saved)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{newest} is damaged ({error}); remove it to go on from the one before") from error
    network.load_weights(newest / WEIGHTS_FILE)
    torch.set_rng_state(tensors.pop("rng"))
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return progress, schedule


def _finished(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if not path.name.endswith(_ASIDE))
