"""A job: both stages of a fine-tuning, run by one process or many; on disk it is all that a process needs to join."""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from filelock import FileLock, Timeout

from kronos_qlib.data.windows import Windows
from kronos_qlib.data.windows_on_disk import map_windows, save_windows
from kronos_qlib.files import is_draft, save_array, scratch_folder, whole_file
from kronos_qlib.nn import Kronos, KronosTokenizer
from kronos_qlib.nn.checkpoint import WEIGHTS_FILE, HubModule
from kronos_qlib.nn.ranker import KronosRankNetwork
from kronos_qlib.settings import Settings
from kronos_qlib.train.checkpoints import CHECKPOINTS, RESULT_FILE, explain_full_disk, remove_drafts, whole_checkpoints
from kronos_qlib.train.distributed import SINGLE_PROCESS, Group
from kronos_qlib.train.loop import train_stage
from kronos_qlib.train.metrics import Log, guarded_log, recorder_log
from kronos_qlib.train.settings import FinetuneSettings, RankerSettings
from kronos_qlib.train.stages import PredictorStage, RankStage, Stage, StageSpecification, TokenizerStage

logger = logging.getLogger("qlib.KronosTrainer")
JOB_FILE, DRAW_WEIGHTS = "job.json", "draw_weights.npy"
LOCK, LOCK_SECONDS = ".lock", 300  # processes of a killed training need a step, or a validation, to notice
STAGES = ("tokenizer", "predictor")
TARGETS = "train_targets", "valid_targets"
EXTRA_DATA = "extra_data"  # the folder of windows from other stores, beside those of the stages


@dataclass(frozen=True, eq=False)
class Job:
    """A fine-tuning that is ready to run.

    settings: what to do. folder: where to write, its `output_dir` or a folder in its place.
    draw_weights: how often each training window is to be drawn, or None: all alike.
    recorder: the MLflow store and run that get the metrics, or None.
    start: the folder of the training whose weights the networks have, or None.
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
    draw_weights: np.ndarray | None = None
    recorder: dict[str, str] | None = None
    start: str | None = None
    settings_kind: ClassVar[type[Settings]] = FinetuneSettings

    @property
    def networks(self) -> dict[str, HubModule]:
        """The networks that learn, by the name of their stage."""
        pairs = dict(zip(STAGES, (self.tokenizer, self.model)))
        return {name: pairs[name] for name in self.stage_names}

    @property
    def stage_names(self) -> list[str]:
        """The names of the stages to train, in their order."""
        return [name for name in STAGES if getattr(self.settings, name) is not None]

    def specifications(self) -> Iterator[StageSpecification]:
        """Specify the stages to train, in their order; the second uses the tokenizer that the first has trained."""
        if self.settings.tokenizer:
            yield self._specification(TokenizerStage(self.tokenizer, self.settings.tokenizer))
        if self.settings.predictor:
            tokenizer = self.tokenizer.to(self.device)
            yield self._specification(PredictorStage(self.model, tokenizer, self.settings.predictor))

    def _specification(self, stage: Stage) -> StageSpecification:
        return StageSpecification(
            stage=stage,
            train=self.train,
            valid=self.valid,
            seed=self.seed,
            device=self.device,
            dtype=self.dtype,
            micro_batch_size=self.settings.micro_batch_size,
            compile=self.settings.compile,
            checkpoint_every=self.settings.checkpoint_every,
            draw_weights=self.draw_weights,
            start=self.start,
        )

    def run(self, group: Group = SINGLE_PROCESS, launcher: int | None = None, log: Log | None = None) -> None:
        """Train the stages one after the other; the networks end with their best weights.

        Where that fails or is stopped, a single process's networks get their former weights back: the same job, run
        again, goes on from its last checkpoint.

        Args:
            group, launcher: see `train_stage`.
            log: gets the metrics instead of the job's recorder.

        Raises:
            ValueError, FloatingPointError, OSError, TrainingStopped: see `train_stage`.
            TimeoutError: another training is at work in the folder.
        """
        log = guarded_log(log or recorder_log(self.recorder if group.is_first else None))
        with _folder_lock(self.folder, self.stage_names, group), self._weight_backup(group):
            for specification in self.specifications():
                folder = self.folder / specification.stage.name
                train_stage(specification, folder, group=group, launcher=launcher, log=log)
            group.all_gather(None)  # no process leaves before all are done

    @contextmanager
    def _weight_backup(self, group: Group) -> Iterator[None]:
        """Restore the networks' weights if the block fails; of several processes nobody uses the networks then."""
        networks = [*self.networks.values()] if group.size == 1 else []
        before = [{name: value.cpu().clone() for name, value in network.state_dict().items()} for network in networks]
        try:
            yield
        except BaseException:
            for network, weights in zip(networks, before, strict=True):
                network.load_state_dict(weights)
            raise

    def load_best(self) -> None:
        """Load the best weights of a training that other processes have done into the networks."""
        for name, network in self.networks.items():
            network.load_weights(self.folder / name / "best" / WEIGHTS_FILE)

    def results(self) -> dict[str, dict[str, float]]:
        """Read the validation metrics of the best weights of every stage that was trained, by the stage's name."""
        return {name: json.loads((self.folder / name / RESULT_FILE).read_text()) for name in self.stage_names}

    def newest_checkpoint(self) -> Path | None:
        """Find the newest checkpoint of the last stage that has one."""
        found = [path for name in self.stage_names for path in whole_checkpoints(self.folder / name / CHECKPOINTS)]
        return found[-1] if found else None

    def save(self, folder: Path) -> None:
        """Write what other processes need to join: networks, windows (to be mapped, not copied) and settings."""
        newest = self.newest_checkpoint()
        with explain_full_disk(newest.parent if newest else self.folder / self.stage_names[0] / CHECKPOINTS):
            self.tokenizer.save_pretrained(folder / "tokenizer")
            self.model.save_pretrained(folder / "model")
            save_windows(folder / "windows", {"train": self.train, "valid": self.valid})
            if self.draw_weights is not None:
                save_array(folder / DRAW_WEIGHTS, self.draw_weights)
            manifest: dict[str, Any] = {
                "kind": type(self).__name__,
                "settings": self.settings.model_dump(include=set(self.settings_kind.model_fields)),  # no workflow's own
                "folder": str(self.folder.resolve()),
                "seed": self.seed,
                "device": self.device.type,
                "dtype": str(self.dtype).removeprefix("torch."),
                "draw_weights": self.draw_weights is not None,
                "recorder": self.recorder,
                "start": self.start,
                "quantizer": self.tokenizer.own_quantizer,
            }
            self._save_own(folder)
            with whole_file(folder / JOB_FILE) as draft:
                draft.write_text(json.dumps(manifest, indent=2) + "\n")

    @contextmanager
    def scratch_copy(self) -> Iterator[Path]:
        """Save the job to a folder of its own beside the stages', for a block; trainings that wait have their own."""
        parent = self.folder.resolve() / "job"
        with scratch_folder(parent, "job-") as folder:
            self.save(folder)
            yield folder
        with contextlib.suppress(OSError):  # another's is still there
            parent.rmdir()

    @classmethod
    def load(cls, folder: Path) -> "Job":
        """Load the job that `save` wrote, its windows mapped from the files.

        Raises:
            FileNotFoundError: this machine does not see the folder.
        """
        path = folder / JOB_FILE
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is not here: output_dir must lie on a file system that all machines of a training share"
            )
        manifest, windows = json.loads(path.read_text()), map_windows(folder / "windows")
        kind = next(kind for kind in (Job, RankerJob) if kind.__name__ == manifest["kind"])
        return kind(
            tokenizer=KronosTokenizer.from_pretrained(
                folder / "tokenizer", trusted={"quantizer": manifest["quantizer"]}
            ),
            model=Kronos.from_pretrained(folder / "model"),
            train=windows["train"],
            valid=windows["valid"],
            settings=kind.settings_kind(**manifest["settings"]),
            folder=Path(manifest["folder"]),
            seed=manifest["seed"],
            device=torch.device(manifest["device"]),
            dtype=getattr(torch, manifest["dtype"]),
            draw_weights=np.load(folder / DRAW_WEIGHTS, mmap_mode="r") if manifest["draw_weights"] else None,
            recorder=manifest["recorder"],
            start=manifest["start"],
            **kind._load_own(folder),
        )

    def _save_own(self, folder: Path) -> None:
        """Write what only this kind of job has."""

    @classmethod
    def _load_own(cls, folder: Path) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, eq=False)
class RankerJob(Job):
    """The training of rankers, one after the other; tokenizer and model do not learn.

    rankers: one for each member of the ensemble. train_targets, valid_targets: labels of the windows, float32 `[W]`.
    """

    settings: RankerSettings
    rankers: tuple[KronosRankNetwork, ...] = ()
    train_targets: np.ndarray | None = None
    valid_targets: np.ndarray | None = None
    settings_kind: ClassVar[type[Settings]] = RankerSettings

    @property
    def stage_names(self) -> list[str]:
        """The names of the rankers: `ranker`, or `ranker_1` … of an ensemble."""
        return ranker_names(len(self.rankers))

    @property
    def networks(self) -> dict[str, HubModule]:
        """The rankers by name."""
        return dict(zip(self.stage_names, self.rankers))

    def specifications(self) -> Iterator[StageSpecification]:
        """Specify the training of each ranker, which differs from the others by its seed."""
        tokenizer = self.tokenizer.to(self.device)
        for number, (name, network) in enumerate(zip(self.stage_names, self.rankers)):
            yield StageSpecification(
                stage=RankStage(network, tokenizer, self.settings, name),
                train=self.train,
                valid=self.valid,
                seed=self.seed + number,
                device=self.device,
                dtype=self.dtype,
                checkpoint_every=self.settings.checkpoint_every,
                train_targets=self.train_targets,
                valid_targets=self.valid_targets,
                start=self.start,
            )

    def _save_own(self, folder: Path) -> None:
        for name, network in self.networks.items():
            network.save_pretrained(folder / name)
        for name in TARGETS:
            save_array(folder / f"{name}.npy", getattr(self, name))

    @classmethod
    def _load_own(cls, folder: Path) -> dict[str, Any]:
        names = ranker_names(len(list(folder.glob("ranker*"))))
        rankers = tuple(KronosRankNetwork.from_pretrained(folder / name) for name in names)
        return {"rankers": rankers} | {name: np.load(folder / f"{name}.npy") for name in TARGETS}


def ranker_names(count: int) -> list[str]:
    """Name the stages of so many rankers: `ranker`, or `ranker_1`, `ranker_2` …"""
    return ["ranker"] if count == 1 else [f"ranker_{number}" for number in range(1, count + 1)]


@contextmanager
def _folder_lock(folder: Path, stages: Sequence[str], group: Group) -> Iterator[None]:
    """Keep other trainings out of the folder, for a block; the lock of a process that died is free."""
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

        for name in (*stages, EXTRA_DATA):
            for draft in [*(folder / name).glob("**/*.tmp")]:  # of a training that was killed while it wrote
                if is_draft(draft):
                    draft.unlink(missing_ok=True)
        for name in stages:
            remove_drafts(folder / name / CHECKPOINTS)

    group.run_on_first(acquire)
    try:
        yield
    finally:
        lock.release()
