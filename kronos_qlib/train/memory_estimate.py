"""The memory that a training needs, measured on a window or two instead of computed from formulas."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kronos_qlib.data.windows import Windows
from kronos_qlib.hardware.cpu import cores
from kronos_qlib.hardware.device import total_memory
from kronos_qlib.train.batches import load_examples
from kronos_qlib.train.distributed import Compute
from kronos_qlib.train.stages import Examples, Stage

ACTIVATIONS_SHARE = 0.5  # of a device's memory; the rest is for weights, other programs and what was not foreseen
BACKWARD_FACTOR = 1.5  # what backward holds for a moment, relative to what forward leaves behind
MIN_MICRO_BATCHES, MAX_MICRO_BATCHES = 4, 16  # of a batch on a CPU: the results depend on their number


def estimate_micro_batch_size(batch_size: int, window_bytes: int, compute: Compute) -> int:
    """Choose how many windows go through the network at a time, each of which takes `window_bytes`.

    On a CPU a batch has a micro-batch for every core of the machine, but 4 at least and 16 at most, whatever the number
    of processes that divide them; on a GPU one for every process. It has more where the memory does not suffice.
    """
    if compute.device.type == "cpu":
        at_once, count = cores(), max(MIN_MICRO_BATCHES, min(cores(), MAX_MICRO_BATCHES))
    else:
        at_once, count = 1, compute.group.size
    return max(1, min(-(-batch_size // count), windows_that_fit(window_bytes, compute.device) // at_once))


def windows_that_fit(window_bytes: int, device: torch.device) -> int:
    """Return how many windows may be on their way through the network at a time, in a GPU's or the machine's memory."""
    return int(total_memory(device) * ACTIVATIONS_SHARE / window_bytes)


def bytes_per_window(stage: Stage, windows: Windows, compute: Compute) -> int:
    """Measure what one window more in a pass takes: the tensors that its forward pass keeps for the backward pass."""
    one, two = (_bytes_kept(stage.loss, stage, windows, count, compute) for count in (1, 2))
    return int((two - one) * BACKWARD_FACTOR)


def bytes_per_waiting_window(stage: Stage, windows: Windows, compute: Compute) -> int:
    """Measure what a window takes between the two halves of its loss (see `Stage`), 0 if the loss has none."""
    if stage.latent is None:
        return 0
    one, two = (_bytes_kept(stage.latent, stage, windows, count, compute) for count in (1, 2))
    return two - one


def bytes_of_state(stage: Stage, compute: Compute) -> int:
    """Return what weights, gradients, AdamW's two moments, the micro-batches' gradients and their sum take."""
    values = 4 + (2 + MIN_MICRO_BATCHES if compute.device.type == "cpu" else 2)
    return stage.network.n_parameters * 4 * values


def _bytes_kept(run: Callable[[Examples], Tensor], stage: Stage, windows: Windows, count: int, compute: Compute) -> int:
    own = {parameter.untyped_storage().data_ptr() for parameter in stage.network.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no other takes its place
        return tensor

    rows = np.zeros(count, int)
    uniforms = np.full((count, windows.lookback + windows.future - 1), 0.5, np.float32)
    examples = load_examples(windows, rows, uniforms=uniforms).to(compute.device)
    with torch.random.fork_rng(devices=[compute.device] if compute.device.type == "cuda" else []):
        stage.network.train()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), compute.autocast:
            run(examples)
    return sum(size for size, _ in kept.values())
