"""KronosRanker: a Kronos with a head that ranks the instruments of a day, as a Qlib model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from pydantic import BeforeValidator, Field
from qlib.data.dataset.handler import DataHandlerLP
from qlib.log import get_module_logger
from qlib.model.base import ModelFT
from tqdm.auto import tqdm

from kronos_qlib.data.dataset import KLineDataset, window_index
from kronos_qlib.data.expressions import sessions_ahead
from kronos_qlib.data.windows import Windows
from kronos_qlib.forecast.engine.weights import beyond_training
from kronos_qlib.hardware.device import process_count, resolve_device, resolve_dtype
from kronos_qlib.nn.ranker import BAR_COLUMNS, KronosRankNetwork
from kronos_qlib.settings import MISSING, Settings, read_settings
from kronos_qlib.train.adapters import check_freeze, require_peft
from kronos_qlib.train.distributed import Compute, open_compute
from kronos_qlib.train.job import RankerJob, ranker_names
from kronos_qlib.train.settings import RankerSettings
from kronos_qlib.train.stages import rank_scores
from kronos_qlib.train.step import derive_seed
from kronos_qlib.workflow.findings import segment_overlap
from kronos_qlib.workflow.model import (
    IDLE,
    check_columns,
    check_conditions,
    make_networks,
    untrained_columns,
)
from kronos_qlib.workflow.recording import (
    active_recorder,
    record_metrics,
    record_run,
    task_findings,
    warn_of_pretraining_overlap,
)
from kronos_qlib.workflow.settings import known_dtype, known_network
from kronos_qlib.workflow.training_folder import load_former_weights, next_settings, training_folder
from kronos_qlib.workflow.training_job import run_job, warn_of_seen_dates

logger = get_module_logger("KronosRanker")
SCORED_TOGETHER = 32  # windows in a forward pass, always: a score must not depend on how many there are


class RankerModelSettings(Settings):
    """The keyword arguments of `KronosRanker`."""

    tokenizer: Annotated[Any, BeforeValidator(known_network)]
    """As of `KronosModel`; it does not learn."""
    model: Annotated[Any, BeforeValidator(known_network)]
    """As of `KronosModel`: a checkpoint, whose weights the ranker begins with, or a new network."""
    ranker: Annotated[RankerSettings, Field(strict=False)]
    """How the ranker learns."""
    device: str = "auto"
    """`auto` takes CUDA, then MPS, then the CPU; or a device of torch, such as `cuda:1`."""
    dtype: Annotated[str, BeforeValidator(known_dtype)] = "auto"
    """`float32`, `bfloat16`, or `auto`: bfloat16 only where the hardware multiplies it."""
    seed: int = Field(default=100, ge=0, lt=2**63)
    """Decides new weights, the order of training days and dropout; each member of an ensemble adds its number to it."""


class KronosRanker(ModelFT):
    """Train a Kronos to rank the instruments of a day by the dataset's label, and score windows in one pass each.

    The first label of the handler is learned. Score dates whose label reaches past the end of their segment are left
    out of training and validation, so that no label of one segment is made of bars of the next.

    Args:
        tokenizer, model: as of `KronosModel`; the ranker begins with the model's weights.
        ranker: see `RankerSettings`.
        device: auto, cpu, mps, cuda, cuda:N. dtype: auto, float32, bfloat16 (of the matrix products).
        seed: decides new weights, the order of training days and dropout.

    Raises:
        ValueError: an unknown key, a wrong type, an impossible value, networks with different bits, an absent device.
        FileNotFoundError: a checkpoint that is neither here nor on a hub within reach.
    """

    def __init__(
        self,
        tokenizer: str | Mapping[str, Any] = MISSING,
        model: str | Mapping[str, Any] = MISSING,
        ranker: Mapping[str, Any] = MISSING,
        device: str = "auto",
        dtype: str = "auto",
        seed: int = 100,
        **unknown: Any,
    ) -> None:
        values: dict[str, Any] = {"tokenizer": tokenizer, "model": model, "ranker": ranker}
        values |= {"device": device, "dtype": dtype, "seed": seed, **unknown}
        self.settings = read_settings(RankerModelSettings, "KronosRanker", values)
        options = self.settings.ranker
        process_count("ranker", options.processes, resolve_device(device))
        resolve_dtype(dtype, resolve_device(device))
        self.tokenizer, self.model = make_networks("KronosRanker", self.settings.tokenizer, self.settings.model, seed)
        if self.model.conditions:
            raise ValueError("KronosRanker: takes no model with conditions")
        self.rankers = [self._new_ranker(number) for number in range(options.ensemble)]
        try:
            check_freeze(self.rankers[0], options.freeze_blocks)
            if options.lora is not None:
                require_peft()
        except (ValueError, ModuleNotFoundError) as error:
            raise type(error)(f"KronosRanker: ranker.{error}") from None

    def fit(self, dataset: KLineDataset, reweighter: None = None) -> None:
        """Train the rankers on the train segment; the weights with the best rank IC on the valid segment are kept.

        Ctrl-C and SIGTERM save a checkpoint and end the process with status 128 + the signal; the same `fit` then goes
        on from there.

        Raises:
            ValueError: a segment has no day with two labels, or `output_dir` holds another training.
            FloatingPointError: the loss is not finite. OSError: the disk is full. RuntimeError: processes died.
        """
        for finding in task_findings():
            logger.warning(f"{finding.subject}: {finding.text}")
        if reweighter is not None:
            raise ValueError("KronosRanker: takes no reweighter: days are drawn alike")
        self._train(self.job(dataset), dataset)

    def finetune(self, dataset: KLineDataset, output_dir: str | Path | None = None) -> None:
        """Train the present rankers further.

        Args:
            output_dir: where to; by default the folder `finetune` in the settings' output_dir.
        """
        folder = Path(output_dir or Path(self.settings.ranker.output_dir) / "finetune")
        self._train(self.job(dataset, folder), dataset)

    def predict(self, dataset: KLineDataset, segment: str | slice = "test") -> pd.Series:
        """Score every window of a segment.

        Returns:
            The Series `score`, float64, indexed by (datetime, instrument), sorted. Of a single ranker it is the
            network's own number; of an ensemble the mean of the rankers' ranks within the day, between 0 and 1.
        """
        self._check(dataset)
        windows = dataset.score_windows(segment)
        dataset.warn_of_left_out(windows)
        warn_of_pretraining_overlap(self.tokenizer, self.model, windows)
        record_run(self.settings, dataset)
        index, device = window_index(windows), resolve_device(self.settings.device)
        try:
            with open_compute(device, resolve_dtype(self.settings.dtype, device)) as compute:
                scores = [pd.Series(self._score(network, windows, compute), index) for network in self.rankers]
        finally:
            self._to_cpu()
        if len(scores) > 1:
            scores = [own.groupby(level="datetime").rank(pct=True) for own in scores]
        return (sum(scores[1:], scores[0]) / len(scores)).rename("score")

    def job(self, dataset: KLineDataset, output_dir: Path | None = None) -> RankerJob:
        """Return what `fit` would train: networks, windows, labels and settings, ready to run.

        Args:
            output_dir: where to, from the present weights; by default the settings', from the weights that `start_from`
                names. Which folder that is, `training_folder` decides.

        Raises:
            ValueError: a segment has no day with two labels, one reaches into the next, or `start_from` names no
                training to start from.
        """
        self._check(dataset)
        overlap = segment_overlap(dataset, "train", "valid")
        if overlap:
            raise ValueError(f"KronosRanker: {overlap}: the weights would be chosen on what they were trained on")
        train, train_targets = labelled_windows(dataset, "train")
        valid, valid_targets = labelled_windows(dataset, "valid")
        settings, place, start = self.settings.ranker, output_dir or Path(self.settings.ranker.output_dir), None
        learning = dict(zip(ranker_names(len(self.rankers)), self.rankers))
        if output_dir is None:
            start = load_former_weights("KronosRanker", settings.start_from, place, learning, train, valid)
        if start is not None:
            settings = next_settings(settings)
        targets = train_targets, valid_targets
        folder = training_folder("KronosRanker", place, settings, learning, train, valid, self.settings.seed, targets)
        for windows in (train, valid):
            dataset.warn_of_left_out(windows)
        if "test" in dataset.segments:
            test = dataset.score_windows("test")
            warn_of_seen_dates(test, train=train, valid=valid)
            warn_of_pretraining_overlap(self.tokenizer, self.model, test)
        device = resolve_device(self.settings.device)
        return RankerJob(
            tokenizer=self.tokenizer,
            model=self.model,
            train=train,
            valid=valid,
            settings=settings,
            folder=folder,
            seed=self.settings.seed,
            device=device,
            dtype=resolve_dtype(self.settings.dtype, device),
            recorder=active_recorder(),
            start=None if start is None else str(start),
            rankers=tuple(self.rankers),
            train_targets=train_targets,
            valid_targets=valid_targets,
        )

    def _train(self, job: RankerJob, dataset: KLineDataset) -> None:
        record_run(self.settings, dataset)
        run_job(job)
        for stage, best in job.results().items():
            record_metrics({f"{stage}.best_{name}": value for name, value in best.items()}, None)
        self._to_cpu()

    def _score(self, network: KronosRankNetwork, windows: Windows, compute: Compute) -> np.ndarray:
        """Score windows [W] in float64, in passes of SCORED_TOGETHER; the last is filled up with its last window."""
        network = network.to(compute.device).eval()
        tokenizer = self.tokenizer.to(compute.device).eval() if network.inputs == "tokens" else None

        @torch.inference_mode()
        def score(start: int) -> np.ndarray:
            rows = np.minimum(np.arange(start, start + SCORED_TOGETHER), len(windows) - 1)
            batch = windows.normalised(rows)
            x, stamp = (torch.from_numpy(values).to(compute.device) for values in (batch.x, batch.stamp))
            with compute.autocast:
                return rank_scores(network, tokenizer, x, stamp).double().cpu().numpy()

        starts = range(0, len(windows), SCORED_TOGETHER)
        with tqdm(total=len(windows), desc="score", unit="window") as bar:
            parts = []
            for part in compute.map_on_cores(score, starts):
                parts.append(part)
                bar.update(min(SCORED_TOGETHER, len(windows) - bar.n))
        return np.concatenate(parts)[: len(windows)]

    def _new_ranker(self, number: int) -> KronosRankNetwork:
        options = self.settings.ranker
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.settings.seed + number, "ranker"))
            return KronosRankNetwork.on(self.model, options.inputs, options.volume, options.pooled_bars)

    def _to_cpu(self) -> None:
        """Move all networks to the CPU: a recorder's pickle of them then loads on any machine."""
        for network in (self.tokenizer, self.model, *self.rankers):
            network.cpu().eval()

    def _check(self, dataset: KLineDataset) -> None:
        if not isinstance(dataset, KLineDataset):
            raise ValueError(f"KronosRanker: the dataset must be a KLineDataset, not a {type(dataset).__name__}")
        check_columns("KronosRanker", self.tokenizer, dataset)
        check_conditions("KronosRanker", self.model, dataset)
        if untrained_columns(self.tokenizer):
            raise ValueError(
                f"KronosRanker: {IDLE.format(untrained_columns(self.tokenizer))}: train it with a KronosModel"
            )
        if self.settings.ranker.inputs == "bars" and len(dataset.handler.columns) > BAR_COLUMNS:
            raise ValueError(f"KronosRanker: with inputs: bars it takes {BAR_COLUMNS} columns; use tokens for more")
        pooled = self.settings.ranker.pooled_bars
        if pooled > dataset.lookback:
            raise ValueError(f"KronosRanker: ranker.pooled_bars ({pooled}) is above the lookback ({dataset.lookback})")
        beyond = beyond_training(self.model, dataset.lookback)
        if beyond:
            logger.info(f"KronosRanker: {beyond}, which its training as a ranker may mend")


def labelled_windows(dataset: KLineDataset, segment: str) -> tuple[Windows, np.ndarray]:
    """Select the windows of a segment that have a label within it, and these labels, float32 [W].

    The last sessions of the segment, whose label is made of later ones, are left out, and days with a single label.

    Raises:
        ValueError: there is none.
    """
    windows, handler = dataset.score_windows(segment), dataset.handler
    end = dataset.segments[segment][1]
    sessions = handler.dates if end is None else handler.dates[handler.dates <= end]
    reach = sessions_ahead(handler.data_loader.label[0])
    if reach >= len(sessions):
        raise ValueError(f"KronosRanker: {windows.segment} has only the {reach} sessions that a label looks ahead")
    last = sessions[-1 - reach].to_numpy()
    labels = dataset.prepare(segment, col_set="label", data_key=DataHandlerLP.DK_R).iloc[:, 0]
    targets = labels.reindex(window_index(windows)).to_numpy(np.float32)
    kept = np.isfinite(targets) & (windows.dates <= last)
    _, day, counts = np.unique(windows.dates[kept], return_inverse=True, return_counts=True)
    kept[np.flatnonzero(kept)[counts[day] < 2]] = False
    if not kept.any():
        raise ValueError(f"KronosRanker: {windows.segment} has no day with labels of two instruments or more")
    return windows.take(kept), np.ascontiguousarray(targets[kept])
