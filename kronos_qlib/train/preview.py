"""The dry run of a job: what it would train, in how many steps, with how much memory and disk, in words."""

from pathlib import Path

import numpy as np
import torch

from kronos_qlib.hardware.cpu import MIB
from kronos_qlib.train.batches import BatchSampler, load_examples
from kronos_qlib.train.checkpoints import CHECKPOINTS, whole_checkpoints
from kronos_qlib.train.distributed import Compute, Group, open_compute
from kronos_qlib.train.fingerprint import compare, fingerprint
from kronos_qlib.train.job import Job
from kronos_qlib.train.loop import validation_set
from kronos_qlib.train.memory_estimate import (
    bytes_of_state,
    bytes_per_waiting_window,
    bytes_per_window,
    estimate_micro_batch_size,
)
from kronos_qlib.train.stages import StageSpecification

CODES_BYTES = 4  # of a bar in the cache of codes: s1 and s2, uint16
CHECKPOINTS_AT_ONCE = 3  # two are kept while the next is written


def preview(job: Job, processes: int) -> list[str]:
    """Describe what a job would do in some processes: a list of lines. Nothing is trained and nothing is written."""
    bars, train = job.train.bars, job.train
    on_cpu = job.device.type == "cpu"
    threads = torch.get_num_threads() if on_cpu else 1
    places = [
        f"{job.device}",
        f"{job.dtype}".removeprefix("torch."),
        f"{processes} process{'es' if processes > 1 else ''}",
        *([f"{threads} threads in all"] if on_cpu else []),
    ]
    last = np.datetime_as_string(bars.dates.max(), "D")
    lines = [
        titled_line("bars", f"{len(bars):,} bars of {len(bars.instruments):,} instruments, to {last}"),
        titled_line(
            "windows", f"train {len(train):,}   valid {len(job.valid):,}   of {train.lookback} + {train.future} bars"
        ),
        *(
            titled_line(name, f"{network.n_parameters:,} parameters, {network.source or 'new'}")
            for name, network in (("tokenizer", job.tokenizer), ("model", job.model))
        ),
        titled_line("runs on", ", ".join(places)),
    ]
    with open_compute(job.device, job.dtype, Group(0, processes)) as compute:
        for number, specification in enumerate(job.specifications()):
            specification.stage.network.to(job.device)
            lines += ["", *_stage_lines(specification, compute, threads)]
            if number == 0:  # a later stage's fingerprint depends on what the first one makes of the tokenizer
                lines.append(titled_line("", _folder_state(specification, job.folder / specification.stage.name)))
    return lines


def titled_line(title: str, text: str) -> str:
    """Format a line of the dry run."""
    return f"{title:<11}{text}"


def _stage_lines(specification: StageSpecification, compute: Compute, threads: int) -> list[str]:
    sampler, stage = BatchSampler.from_specification(specification), specification.stage
    return [
        titled_line(
            stage.name,
            f"{sampler.windows_drawn(sampler.steps):,} windows in {sampler.steps:,} steps of {sampler.batch_size}: "
            f"{sampler.epochs} epoch{'s' if sampler.epochs > 1 else ''} of {sampler.steps_per_epoch:,} steps; "
            f"validated on {len(validation_set(specification)[0]):,} windows",
        ),
        titled_line("", _memory(specification, sampler, compute, threads)),
        titled_line("", _disk(specification)),
        titled_line("", _first_batch(specification, sampler)),
    ]


def _memory(specification: StageSpecification, sampler: BatchSampler, compute: Compute, threads: int) -> str:
    """Estimate what a stage takes of the memory of a GPU, or of the machine by all its processes."""
    stage, train, size = specification.stage, specification.train, specification.micro_batch_size
    state, window = bytes_of_state(stage, compute), bytes_per_window(stage, train, compute)
    batch, processes = sampler.batch_size, compute.group.size
    if size == "auto":
        size = estimate_micro_batch_size(batch, window, compute)
    if compute.device.type == "cpu":
        state, whose = state * processes, "this machine's"
    else:
        batch, whose = -(-batch // processes), "the GPU's"
    at_once = min(batch, size * threads)
    waiting = (batch - at_once) * bytes_per_waiting_window(stage, train, compute)
    return (
        f"memory about {(state + at_once * window + waiting) / MIB:,.0f} MiB of {whose}, beside torch and the data: "
        f"{state / MIB:,.0f} for weights, gradients and moments{' of all processes' if processes > 1 else ''}, "
        f"{window / MIB:,.1f} for each of {at_once} windows at a time"
        + (f", {waiting / MIB:,.0f} for the rest of the batch, which waits for them" if waiting else "")
    )


def _disk(specification: StageSpecification) -> str:
    stage, train = specification.stage, specification.train
    weights = stage.network.n_parameters * 4
    codes = len(train) * (train.lookback + train.future) * CODES_BYTES if stage.cache_codes else 0
    total = weights + CHECKPOINTS_AT_ONCE * 3 * weights + codes  # best/, and checkpoints of weights and two moments
    of_codes = f", {codes / MIB:,.0f} of them for the codes of all windows" if codes else ""
    return f"disk up to {total / MIB:,.0f} MiB for best/ and checkpoints/{of_codes}"


def _first_batch(specification: StageSpecification, sampler: BatchSampler) -> str:
    rows = next(sampler.batches()).rows
    examples, first = vars(load_examples(specification.train, rows)), specification.train.take(rows[:2])
    if specification.stage.cache_codes:
        shape = (*examples["x"].shape[:2], 2)
        examples |= {"x": None, "codes": torch.empty(shape, dtype=torch.int32, device="meta")}
    tensors = [
        f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in examples.items()
        if tensor is not None
    ]
    names = [f"{name} {np.datetime_as_string(date, 'D')}" for name, date in zip(first.instruments, first.dates)]
    return f"first batch: {', '.join(tensors)}; {', '.join(names)}, …"


def _folder_state(specification: StageSpecification, folder: Path) -> str:
    """Describe whether a training in the folder would be resumed."""
    if not whole_checkpoints(folder / CHECKPOINTS):
        return f"{folder} holds no training yet"
    differences, changes = compare(folder, fingerprint(specification))
    if differences:
        return f"REFUSED: {folder} holds another training ({differences})"
    return f"goes on with the training in {folder}{''.join(f'; {change}' for change in changes.values())}"
