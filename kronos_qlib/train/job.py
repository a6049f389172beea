"""Both stages of a fine-tuning, by one process or many; a job on disk is all that a process needs to take part."""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from kronos_qlib.data.windows import Windows
from kronos_qlib.data.windows_on_disk import map_windows, save_windows
from kronos_qlib.files import save_array, scratch_folder, whole_file
from kronos_qlib.nn import Kronos, KronosTokenizer
from kronos_qlib.nn.checkpoint import WEIGHTS_FILE
from kronos_qlib.train.checkpoints import CHECKPOINTS, finished, no_space_is_told
from kronos_qlib.train.distributed import ALONE, Group
from kronos_qlib.train.loop import RESULT, train_stage
from kronos_qlib.train.metrics import Log, recorder_log, tolerant
from kronos_qlib.train.settings import FinetuneSettings
from kronos_qlib.train.stages import PredictorStage, Stage, TokenizerStage

logger = logging.getLogger("qlib.KronosTrainer")
JOB, WEIGHTS = "job.json", "weights.npy"
LOCK, LOCK_SECONDS = ".lock", 300  # processes of a killed training need a step, or a validation, to notice
EXTRA_DATA = "extra_data"  # beside the stages' folders
STAGES = ("tokenizer", "predictor")


@dataclass
class Job:
    """A fine-tuning that is ready to run.

    settings: what to do; folder: where to, its `output_dir` or a folder in its place.
    weights: how often each training window is to be drawn, or None: all alike.
    recorder: the MLflow store and run that get the metrics, or None.
    """

    tokenizer: KronosTokenizer
    model: Kronos
    train: Windows
    valid: Windows
    settings: FinetuneSettings
    folder: Path
    seed: int
    device: torch.device
    dtype: torch.dtype
    weights: np.ndarray | None = None
    recorder: dict[str, str] | None = None

    def stages(self) -> Iterator[Stage]:
        """The stages to train, in their order; the second uses what the first has made of the tokenizer."""
        if self.settings.tokenizer:
            yield TokenizerStage(self.tokenizer, self.settings.tokenizer)
        if self.settings.predictor:
            yield PredictorStage(self.model, self.tokenizer.to(self.device), self.settings.predictor)

    def run(self, group: Group = ALONE, launcher: int | None = None, log: Log | None = None) -> None:
        """Train the stages one after the other; the networks end with their best weights.

        Where that fails or is stopped, a single process's networks are as they were before: the same job, run again,
        goes on from its last checkpoint.

        Raises:
            ValueError, FloatingPointError, OSError, TrainingStopped: see `train_stage`.
            TimeoutError: another training is at work in the folder.
        """
        with _locked(self.folder, group), self._networks_kept(group):
            for stage in self.stages():
                train_stage(
                    stage,
                    self.train,
                    self.valid,
                    self.folder / stage.name,
                    seed=self.seed,
                    device=self.device,
                    dtype=self.dtype,
                    checkpoint_every=self.settings.checkpoint_every,
                    micro_batch_size=self.settings.micro_batch_size,
                    compiled=self.settings.compile,
                    weights=self.weights,
                    group=group,
                    launcher=launcher,
                    log=tolerant(log or recorder_log(self.recorder if group.first else None)),
                )
            group.gather(None)  # nobody leaves before all are done

    @contextmanager
    def _networks_kept(self, group: Group) -> Iterator[None]:
        """Give the networks their weights back where the block fails; several processes have nobody to use them."""
        networks = (self.tokenizer, self.model) if group.size == 1 else ()
        before = [{name: value.cpu().clone() for name, value in network.state_dict().items()} for network in networks]
        try:
            yield
        except BaseException:
            for network, weights in zip(networks, before, strict=True):
                network.load_state_dict(weights)
            raise

    def load_best(self) -> None:
        """Give the networks the best weights of a training that other processes have done."""
        for stage in self.stages():
            stage.network.load_weights(self.folder / stage.name / "best" / WEIGHTS_FILE)

    def results(self) -> dict[str, dict[str, float]]:
        """The validation figures of the best weights of every stage that was trained, by the stage's name."""
        return {
            name: json.loads((self.folder / name / RESULT).read_text())
            for name in STAGES
            if getattr(self.settings, name) is not None
        }

    def save(self, folder: Path) -> None:
        """Write what other processes need to take part: networks, windows (to be mapped, not copied) and settings."""
        places = [self.folder / name / CHECKPOINTS for name in STAGES]
        with no_space_is_told(next((place for place in reversed(places) if finished(place)), places[0])):
            self.tokenizer.save_pretrained(folder / "tokenizer")
            self.model.save_pretrained(folder / "model")
            save_windows(folder / "windows", {"train": self.train, "valid": self.valid})
            if self.weights is not None:
                save_array(folder / WEIGHTS, self.weights)
            said: dict[str, Any] = {
                "settings": self.settings.model_dump(exclude={"extra_data"}),
                "folder": str(self.folder.resolve()),
                "seed": self.seed,
                "device": self.device.type,
                "dtype": str(self.dtype).removeprefix("torch."),
                "weights": self.weights is not None,
                "recorder": self.recorder,
            }
            with whole_file(folder / JOB) as draft:
                draft.write_text(json.dumps(said, indent=2) + "\n")

    @contextmanager
    def saved(self) -> Iterator[Path]:
        """`save` in a folder of its own beside the stages', for the length of a block: several may wait for one."""
        parent = self.folder.resolve() / "job"
        with scratch_folder(parent, "job-") as folder:
            self.save(folder)
            yield folder
        with contextlib.suppress(OSError):  # another's is still there
            parent.rmdir()

    @classmethod
    def load(cls, folder: Path) -> "Job":
        """The job that `save` wrote, its windows mapped from the files.

        Raises:
            FileNotFoundError: this machine does not see the folder.
        """
        path = folder / JOB
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is not here: output_dir must lie on a file system that all machines of a training share"
            )
        said, windows = json.loads(path.read_text()), map_windows(folder / "windows")
        return cls(
            tokenizer=KronosTokenizer.from_pretrained(folder / "tokenizer"),
            model=Kronos.from_pretrained(folder / "model"),
            train=windows["train"],
            valid=windows["valid"],
            settings=FinetuneSettings(**said["settings"]),
            folder=Path(said["folder"]),
            seed=said["seed"],
            device=torch.device(said["device"]),
            dtype=getattr(torch, said["dtype"]),
            weights=np.load(folder / WEIGHTS, mmap_mode="r") if said["weights"] else None,
            recorder=said["recorder"],
        )


@contextmanager
def _locked(folder: Path, group: Group) -> Iterator[None]:
    """Keep other trainings out of the folder; the lock of a process that died is free."""
    lock = FileLock(folder / LOCK, timeout=LOCK_SECONDS)

    def acquire() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=1)
        except Timeout:
            logger.warning(f"another training is at work in {folder}; waiting up to {LOCK_SECONDS} s for its end")
            try:
                lock.acquire()
            except Timeout:
                raise TimeoutError(
                    f"another training is at work in {folder}; wait for its end, stop it, or choose another output_dir"
                ) from None

        for name in (*STAGES, EXTRA_DATA):
            for left in [*(folder / name).glob("**/*.tmp")]:  # by a training that was killed while it wrote
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)

    group.once(acquire)
    try:
        yield
    finally:
        lock.release()
