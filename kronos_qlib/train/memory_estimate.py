"""How much memory a training needs, measured on a window or two instead of guessed from formulas."""

from collections.abc import Callable

import numpy as np
import psutil
import torch
from torch import Tensor

from kronos_qlib.data.windows import Windows
from kronos_qlib.hardware.cpu import cores
from kronos_qlib.train.batches import gather
from kronos_qlib.train.distributed import Compute
from kronos_qlib.train.stages import Examples, Stage

ALLOWED = 0.5  # of a device's memory, by activations: the rest is for weights, other programs and what was not foreseen
PASSING = 1.5  # what backward holds for a moment, relative to what forward leaves behind
PARTS = 4, 16  # of a batch on a CPU, at least and at most: a part's result must not hang on who takes it


def part_size(batch_size: int, room: int, compute: Compute) -> int:
    """How many windows to take through the network at a time, where `room` fit into the memory.

    On a CPU a batch has a part for every core of the machine (PARTS, at least and at most), whatever the number of
    processes that divide them, and on a GPU one for every process; more if an estimate finds no room for so large ones.
    """
    if compute.device.type == "cpu":
        at_once, parts = cores(), max(PARTS[0], min(cores(), PARTS[1]))
    else:
        at_once, parts = 1, compute.group.size
    wanted = -(-batch_size // parts)
    return max(1, min(wanted, room // at_once))


def room_for(window_bytes: int, device: torch.device) -> int:
    """How many windows may be on their way through the network at a time, on a GPU or in all of a machine's memory."""
    return int(total_memory(device) * ALLOWED / window_bytes)


def bytes_per_window(stage: Stage, windows: Windows, compute: Compute) -> int:
    """What one window more in a pass of a stage takes: the tensors that its forward pass keeps for the backward."""
    one, two = (_kept(stage.loss, stage, windows, count, compute) for count in (1, 2))
    return int((two - one) * PASSING)


def bytes_per_waiting_window(stage: Stage, windows: Windows, compute: Compute) -> int:
    """What a window takes that waits half the way for the others of its batch (see `Stage`)."""
    if stage.latent is None:
        return 0
    one, two = (_kept(stage.latent, stage, windows, count, compute) for count in (1, 2))
    return two - one


def bytes_of_state(stage: Stage, compute: Compute) -> int:
    """What weights, gradients, AdamW's two moments, the parts' gradients and their sum take."""
    values = 4 + (2 + PARTS[0] if compute.device.type == "cpu" else 2)
    return stage.network.n_parameters * 4 * values


def total_memory(device: torch.device) -> int:
    """Bytes of memory of a GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def _kept(run: Callable[[Examples], Tensor], stage: Stage, windows: Windows, count: int, compute: Compute) -> int:
    own = {parameter.untyped_storage().data_ptr() for parameter in stage.network.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no other takes its place
        return tensor

    rows = np.zeros(count, int)
    chance = np.full((count, windows.lookback + windows.future - 1), 0.5, np.float32)
    examples = gather(windows, rows, chance=chance).to(compute.device)
    with torch.random.fork_rng(devices=[compute.device] if compute.device.type == "cuda" else []):
        stage.network.train()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), compute.autocast:
            run(examples)
    return sum(size for size, _ in kept.values())
