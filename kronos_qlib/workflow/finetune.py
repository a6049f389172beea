"""A workflow's two stages of fine-tuning without its forecasts: what `kronos-qlib finetune` runs and foretells."""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from textwrap import indent
from typing import Any

import numpy as np
import qlib
import torch
from qlib.cli.run import render_template, sys_config
from qlib.config import C
from qlib.data.dataset.weight import Reweighter
from qlib.utils import init_instance_by_config
from qlib.utils.data import update_config
from qlib.workflow import R
from ruamel.yaml import YAML, YAMLError

from kronos_qlib.data.dataset import KLineDataset
from kronos_qlib.hardware.device import process_count
from kronos_qlib.train.batches import Plan, gather
from kronos_qlib.train.checkpoints import CHECKPOINTS, finished
from kronos_qlib.train.distributed import Compute, Group
from kronos_qlib.train.fingerprint import differences, identity_of
from kronos_qlib.train.job import Job
from kronos_qlib.train.memory_estimate import (
    bytes_of_state,
    bytes_per_waiting_window,
    bytes_per_window,
    part_size,
    room_for,
)
from kronos_qlib.train.stages import Stage
from kronos_qlib.workflow.model import KronosModel
from kronos_qlib.workflow.recording import end_as_failed, record_run

MIB, CODES_BYTES = 2**20, 4  # of a bar in the cache of codes: s1 and s2, uint16


class Finetuning:
    """The fine-tuning of a workflow file, with Qlib initialised and the data loaded.

    Raises:
        ValueError, FileNotFoundError: one line, for a file that is no workflow with a KronosModel to fine-tune, and
            for whatever the model, the handler and the dataset refuse.
    """

    def __init__(self, workflow: Path) -> None:
        config = read_workflow(workflow)
        self.name = config.get("experiment_name", workflow.stem)
        qlib.init(**config["qlib_init"])
        self.model = init_instance_by_config(config["task"]["model"], accept_types=KronosModel)
        if not isinstance(self.model, KronosModel):
            raise ValueError(f"{workflow}: task.model is a {type(self.model).__name__}, not a KronosModel")
        if self.model.settings.finetune is None:
            raise ValueError(f"{workflow}: finetune is null: there is nothing to train")
        self.dataset: KLineDataset = init_instance_by_config(config["task"]["dataset"])
        reweighter = config["task"].get("reweighter")
        self.reweighter = reweighter and init_instance_by_config(reweighter, accept_types=Reweighter)
        self._recording, self._saved = ExitStack(), ExitStack()
        self._job: Job | None = None

    @property
    def experiment(self) -> str:
        """The recorder's experiment: not the workflow's own, whose newest run should have scores."""
        return f"{self.name}_finetune"

    def run(self) -> None:
        """Train as `qrun` would."""
        with R.start(experiment_name=self.experiment):
            self.model.fit(self.dataset, self.reweighter)

    def prepare(self) -> Path:
        """Write the job for processes that a launcher has started: its folder."""
        self._recording.enter_context(R.start(experiment_name=self.experiment))
        record_run(self.model.settings, self.dataset)
        self._job = self.model.job(self.dataset, self.reweighter)
        return self._saved.enter_context(self._job.saved())

    def conclude(self) -> None:
        """Record what came of the job."""
        self._job.load_best()
        self._saved.close()
        self.model.conclude(self._job)
        self._recording.close()

    def give_up(self) -> None:
        """Record that the job has failed or was stopped."""
        self._saved.close()
        end_as_failed()

    def foretell(self) -> str:
        """What `run` would do, in words; nothing is trained and nothing is written."""
        with tempfile.TemporaryDirectory() as scratch:
            job = self.model.job(self.dataset, self.reweighter, extra_dir=Path(scratch))
            return "\n".join(self._told(job))

    def _told(self, job: Job) -> list[str]:
        handler, processes = self.dataset.handler, process_count("finetune", job.settings.processes, job.device)
        threads = f", {torch.get_num_threads()} threads in all" if job.device.type == "cpu" else ""
        bars, score = job.train.bars, self.dataset
        test = f"   test {len(score.score_windows('test')):,}" if "test" in score.segments else ""
        lines = [f"{self.name}: dry run, nothing is trained and nothing is written", ""]
        for name, network in (("tokenizer", job.tokenizer), ("model", job.model)):
            lines.append(_line(name, f"{network.n_parameters:,} parameters, {network.source or 'new'}"))
        lines += [
            _line("data", f"{C.dpm.get_data_uri(handler.freq)}, universe {handler.instruments}"),
            _line("", f"{len(bars):,} bars of {len(bars.instruments):,} instruments, to {handler.dates[-1].date()}"),
            _line(
                "windows",
                f"train {len(job.train):,}   valid {len(job.valid):,}{test}   of {job.train.lookback} + "
                f"{job.train.future} bars",
            ),
            _line(
                "runs on",
                f"{job.device}, {str(job.dtype).removeprefix('torch.')}, {processes} process"
                f"{'es' if processes > 1 else ''}{threads}",
            ),
        ]
        at_once = torch.get_num_threads() if job.device.type == "cpu" else 1
        with Compute.on(job.device, job.dtype, Group(0, processes)) as compute:
            for number, stage in enumerate(job.stages()):
                stage.network.to(job.device)
                lines += ["", *_stage(stage, job, compute, at_once, first=number == 0)]
        return lines


def _stage(stage: Stage, job: Job, compute: Compute, parts_at_once: int, first: bool) -> list[str]:
    plan = Plan.of(stage.settings, len(job.train), job.seed, job.weights)
    weights, cached = stage.network.n_parameters * 4, getattr(stage.settings, "cache_codes", False)
    codes = len(job.train) * (job.train.lookback + job.train.future) * CODES_BYTES * cached
    rows = next(plan.after(0)).rows
    first_two = job.train.take(rows[:2])
    names = [f"{i} {np.datetime_as_string(d, 'D')}" for i, d in zip(first_two.instruments, first_two.dates)]
    lines = [
        _line(
            stage.name,
            f"{plan.windows(plan.steps):,} windows in {plan.steps:,} steps of {plan.batch_size}: {plan.epochs} epoch"
            f"{'s' if plan.epochs > 1 else ''} of {plan.epoch_steps:,} steps; judged on "
            f"{min(stage.settings.valid_windows, len(job.valid)):,} windows",
        ),
        _line("", _memory(stage, job, plan, compute, parts_at_once)),
        _line(
            "",
            f"disk up to {(weights + 3 * 3 * weights + codes) / MIB:,.0f} MiB for best/ and checkpoints/"
            + (f", {codes / MIB:,.0f} of them for the codes of all windows" if cached else ""),
        ),
        _line("", f"first batch: {_shapes(job, rows, cached)}; {', '.join(names)}, …"),
    ]
    folder = job.folder / stage.name
    if first:
        lines.append(_line("", _state(stage, job, folder)))
    return lines


def _memory(stage: Stage, job: Job, plan: Plan, compute: Compute, parts_at_once: int) -> str:
    """What a stage takes of the memory of a GPU, or of the machine by all its processes."""
    state, window = bytes_of_state(stage, compute), bytes_per_window(stage, job.train, compute)
    size, alone = job.settings.micro_batch_size, compute.group.size == 1
    if size == "auto":
        size = part_size(plan.batch_size, room_for(window, compute.device), compute)
    batch, whose = plan.batch_size, "the GPU's"
    if compute.device.type == "cpu":
        state, whose = state * compute.group.size, "this machine's"
    else:
        batch = -(-batch // compute.group.size)
    at_once = min(batch, size * parts_at_once)
    waiting = (batch - at_once) * bytes_per_waiting_window(stage, job.train, compute)
    return (
        f"memory about {(state + at_once * window + waiting) / MIB:,.0f} MiB of {whose}, beside torch and the data: "
        f"{state / MIB:,.0f} for weights, gradients and moments{'' if alone else ' of all processes'}, "
        f"{window / MIB:,.1f} for each of {at_once} windows at a time"
        + (f", {waiting / MIB:,.0f} for the rest of the batch, which waits for them" if waiting else "")
    )


def _shapes(job: Job, rows: np.ndarray, cached: bool) -> str:
    examples = vars(gather(job.train, rows))
    if cached:
        examples |= {"x": None, "codes": torch.empty(*examples["x"].shape[:2], 2, dtype=torch.int32, device="meta")}
    return ", ".join(
        f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in examples.items()
        if tensor is not None
    )


def _state(stage: Stage, job: Job, folder: Path) -> str:
    """Whether a training in the folder would be gone on with."""
    how = job.settings.micro_batch_size, job.settings.compile
    what = stage, job.train, job.valid, job.seed, job.dtype, job.weights, *how
    if not finished(folder / CHECKPOINTS):
        return f"{folder} holds no training yet"
    found = differences(folder, identity_of(*what))
    return f"REFUSED: {folder} holds another training ({found})" if found else f"goes on with the training in {folder}"


def _line(title: str, text: str) -> str:
    return f"{title:<11}" + indent(text, "")


def read_workflow(path: Path) -> dict[str, Any]:
    """A workflow file as `qrun` reads it: templates filled from the environment, laid over its BASE_CONFIG_PATH.

    Raises:
        FileNotFoundError: there is no such file, or not the base that it names. ValueError: it is no workflow.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such workflow file")
    yaml = YAML(typ="safe", pure=True)
    try:
        config = yaml.load(render_template(str(path)))
        base = config.get("BASE_CONFIG_PATH") if isinstance(config, dict) else None
        if base is not None:
            places = [Path(base), path.absolute().parent / base]
            found = next((place for place in places if place.is_file()), None)
            if found is None:
                raise FileNotFoundError(f"{path}: BASE_CONFIG_PATH {base} is neither here nor beside the workflow")
            config = update_config(yaml.load(found.read_text()), config)
    except YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({error})") from error
    task = config.get("task") if isinstance(config, dict) else None
    if not isinstance(task, dict) or not {"model", "dataset"} <= task.keys() or "qlib_init" not in config:
        raise ValueError(f"{path}: no workflow: it needs qlib_init, task.model and task.dataset")
    sys_config(config, str(path))
    return config
