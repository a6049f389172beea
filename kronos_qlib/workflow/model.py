"""KronosModel: Kronos as a Qlib model, from windows of bars to scores."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from qlib.data.dataset.weight import Reweighter
from qlib.log import get_module_logger
from qlib.model.base import ModelFT
from tqdm.auto import tqdm

from kronos_qlib.data.dataset import KLineDataset
from kronos_qlib.data.settings import read_settings
from kronos_qlib.data.windows import CLOSE, COLUMNS, Windows, denormalise
from kronos_qlib.forecast.generate import Sampling, generate
from kronos_qlib.forecast.scores import scores
from kronos_qlib.forecast.weights import check_pair, prepare
from kronos_qlib.nn import Kronos, KronosTokenizer, zoo
from kronos_qlib.nn.checkpoint import HubModule
from kronos_qlib.nn.device import resolve_device, resolve_dtype
from kronos_qlib.train import FinetuneSettings, PredictorStage, TokenizerStage, train_stage
from kronos_qlib.workflow.provenance import pretraining_overlap, record_metrics, record_run, record_tags
from kronos_qlib.workflow.settings import ModelSettings

logger = get_module_logger("KronosModel")
# What the keys, values and activations of one batch may take. On a CPU a batch that stays near the caches is faster.
CPU_BATCH_BYTES, GPU_BATCH_BYTES = 128 * 2**20, 2 * 2**30


class KronosModel(ModelFT):
    """Fine-tunes Kronos on a KLineDataset and scores its windows by sampled forecasts.

    Args:
        tokenizer, model: a hub id, a local folder, a name of the zoo (mini, small, base, tokenizer-base,
            tokenizer-2k; nano is a new network) or a mapping of constructor arguments, which makes a new network.
        max_context: bars the model sees at most.
        finetune: see `FinetuneSettings`; None uses the checkpoints as they are.
        forecast: see `ForecastSettings`.
        score: one of `kronos_qlib.forecast.scores.SCORES`.
        device: auto, cpu, mps, cuda, cuda:N. dtype: auto, float32, bfloat16 (of the matrix products).
        seed: decides new weights, the order of training windows, dropout and every draw.

    Raises:
        ValueError: an unknown key, a wrong type, an impossible value, networks with different bits, an absent device.
        FileNotFoundError: a checkpoint that is neither here nor on a hub within reach.
    """

    def __init__(
        self,
        tokenizer: str | Mapping[str, Any],
        model: str | Mapping[str, Any],
        max_context: int = 512,
        finetune: Mapping[str, Any] | None = None,
        forecast: Mapping[str, Any] | None = None,
        score: str = "mean_return",
        device: str = "auto",
        dtype: str = "auto",
        seed: int = 100,
        **unknown: Any,
    ) -> None:
        values = {"tokenizer": tokenizer, "model": model, "max_context": max_context, "finetune": finetune}
        values |= {
            "forecast": forecast or {},
            "score": score,
            "device": device,
            "dtype": dtype,
            "seed": seed,
            **unknown,
        }
        self.settings = read_settings(ModelSettings, "KronosModel", values)
        resolve_dtype(dtype, resolve_device(device))  # an absent device is an error now, not after the data are loaded
        self.tokenizer = _network(KronosTokenizer, "tokenizer", self.settings.tokenizer, seed)
        self.model = _network(Kronos, "model", self.settings.model, seed)
        check_pair(self.tokenizer, self.model)
        if self.tokenizer.d_in != len(COLUMNS):
            raise ValueError(
                f"KronosModel: the tokenizer's d_in is {self.tokenizer.d_in}; bars have {len(COLUMNS)} columns"
            )

    def fit(self, dataset: KLineDataset, reweighter: Reweighter | None = None) -> None:
        """Run the stages of `finetune` on the train segment, judged on the valid segment; without it, nothing.

        Raises:
            ValueError: a reweighter was given, or a segment has no window.
        """
        if reweighter is not None:
            raise ValueError("KronosModel: a reweighter is not supported")
        if self.settings.finetune is None:
            self._check(dataset)
            new = [name for name in ("tokenizer", "model") if getattr(self, name).source is None]
            if new:
                logger.warning(
                    f"KronosModel: finetune is null and the {' and '.join(new)} new: scores of random weights"
                )
            record_run(self.settings, dataset)
            return
        self._train(dataset, self.settings.finetune, Path(self.settings.finetune.output_dir))

    def finetune(self, dataset: KLineDataset, output_dir: str | Path | None = None) -> None:
        """Go on training from the present weights with the settings of `finetune`.

        Args:
            output_dir: where to; by default the folder `finetune` in the settings' output_dir.
        """
        if self.settings.finetune is None:
            raise ValueError("KronosModel: finetune is null in the settings; give its stages to fine-tune")
        settings = self.settings.finetune
        self._train(dataset, settings, Path(output_dir) if output_dir else Path(settings.output_dir) / "finetune")

    def predict(self, dataset: KLineDataset, segment: str | slice = "test") -> pd.Series:
        """Score every window of a segment.

        Returns:
            The Series `score`, float64, indexed by (datetime, instrument), sorted. A score at t is a function of the
            bars up to t, the weights, the settings and the seed.
        """
        self._check(dataset)
        windows = dataset.score_windows(segment)
        self._warn_of_overlap(windows)
        record_run(self.settings, dataset)
        values = self._forecast(dataset, windows)[self.settings.score]
        index = pd.MultiIndex.from_arrays([windows.dates, windows.instruments], names=["datetime", "instrument"])
        return pd.Series(values, index=index, name="score").sort_index()

    def _train(self, dataset: KLineDataset, settings: FinetuneSettings, folder: Path) -> None:
        self._check(dataset)
        train, valid = dataset.training_windows("train"), dataset.training_windows("valid")
        if "test" in dataset.segments:  # what is wrong with it is said now, not after the training
            test = dataset.score_windows("test")
            _warn_of_seen_dates(test, train=train, valid=valid)
            self._warn_of_overlap(test)
        record_run(self.settings, dataset)
        device = resolve_device(self.settings.device)
        dtype = resolve_dtype(self.settings.dtype, device)
        stages = []
        if settings.tokenizer:
            stages.append(TokenizerStage(self.tokenizer, settings.tokenizer))
        if settings.predictor:
            stages.append(PredictorStage(self.model, self.tokenizer.to(device), settings.predictor))
        for stage in stages:
            best = train_stage(
                stage,
                train,
                valid,
                folder / stage.name,
                seed=self.settings.seed,
                device=device,
                dtype=dtype,
                checkpoint_every=settings.checkpoint_every,
                log=record_metrics,
            )
            record_metrics({f"{stage.name}.best_{name}": value for name, value in best.items()}, None)
        self._to("cpu")

    def _forecast(self, dataset: KLineDataset, windows: Windows) -> dict[str, np.ndarray]:
        """All scores, float64 [W] each."""
        options, device = self.settings.forecast, resolve_device(self.settings.device)
        dtype = resolve_dtype(self.settings.dtype, device)
        self._to(device)
        net = prepare(self.tokenizer, self.model, self.settings.max_context, dtype, windows.lookback)
        sampling = Sampling(
            options.sample_count,
            options.temperature,
            options.top_k,
            options.top_p,
            self.settings.seed,
            options.s2_rotation,
        )
        size = options.batch_size
        if size == "auto":
            size = self._batch_size(windows.lookback, dataset.horizon, device)
        logger.info(
            f"KronosModel: forecasting {len(windows):,} windows × {options.sample_count} samples × {dataset.horizon} "
            f"bars on {device} ({str(dtype).removeprefix('torch.')}, {size} windows a batch, "
            f"{torch.get_num_threads()} threads)"
        )
        started, parts = time.perf_counter(), []
        with tqdm(total=len(windows), desc="forecast", unit="window") as bar:
            for start in range(0, len(windows), size):
                # Always `size` rows, the last batch filled up: how a row is rounded may hang on their number, and
                # that of the last batch on bars to come.
                rows = np.minimum(np.arange(start, start + size), len(windows) - 1)
                batch = windows.gather(rows)
                y_stamp = dataset.calendar.stamps_after(windows.dates[rows], dataset.horizon)
                paths = generate(
                    net,
                    *(torch.from_numpy(array) for array in (batch.x, batch.stamp, y_stamp)),
                    sampling,
                    windows.keys[rows],
                )
                close = paths[..., CLOSE].cpu().double().numpy()  # [B, S, P]
                mean, scale = batch.mean[:, :, CLOSE], batch.scale[:, :, CLOSE]  # [B, 1]
                close = denormalise(close, mean[:, None], scale[:, None])
                parts.append(scores(close, batch.last_close, scale[:, 0]))
                bar.update(min(size, len(windows) - start))
        self._to("cpu")
        record_metrics({"forecast.seconds": time.perf_counter() - started, "forecast.windows": len(windows)}, None)
        return {name: np.concatenate([part[name] for part in parts])[: len(windows)] for name in parts[0]}

    def _to(self, device: torch.device | str) -> None:
        """Move both networks; they rest on the CPU, where they can be pickled for any machine."""
        self.tokenizer.to(device).eval()
        self.model.to(device).eval()

    def _batch_size(self, lookback: int, horizon: int, device: torch.device) -> int:
        """Windows whose keys, values and widest activations fit into the budget of the device."""
        config = self.model.config
        cached = config["n_layers"] * 2 * config["d_model"]
        active = 5 * config["d_model"] + 4 * config["ff_dim"]
        positions = lookback + self.settings.forecast.sample_count * horizon
        budget = CPU_BATCH_BYTES if device.type == "cpu" else GPU_BATCH_BYTES
        return max(1, budget // (4 * positions * (cached + active)))

    def _check(self, dataset: KLineDataset) -> None:
        if not isinstance(dataset, KLineDataset):
            raise ValueError(f"KronosModel: the dataset must be a KLineDataset, not a {type(dataset).__name__}")
        limit = self.settings.max_context
        if dataset.horizon >= limit:
            raise ValueError(
                f"KronosModel: the dataset's horizon ({dataset.horizon}) must be below max_context ({limit})"
            )
        lookback, horizon = dataset.lookback, dataset.horizon
        if lookback + horizon > limit:
            logger.warning(
                f"KronosModel: lookback ({lookback}) + horizon ({horizon}) is above max_context ({limit}): the window "
                "slides and every step beyond max_context is computed anew, which is slow"
            )

    def _warn_of_overlap(self, windows: Windows) -> None:
        overlap = pretraining_overlap(self.tokenizer, self.model, windows.dates.min())
        if overlap:
            logger.warning(f"KronosModel: {overlap}")
            record_tags({"pretraining_overlap": overlap})


def _warn_of_seen_dates(test: Windows, **trained: Windows) -> None:
    """Warn if windows that decide the weights reach into the dates to be scored."""
    first = test.dates.min()
    for name, windows in trained.items():
        last = windows.bars.dates[windows.ends + windows.future].max()
        if last >= first:
            days = np.datetime_as_string(np.array([last, first]), unit="D")
            logger.warning(
                f"KronosModel: the {name} segment has bars to {days[0]} and the test segment starts on {days[1]}: "
                "up to then its scores are not out of sample"
            )


def _network(kind: type[HubModule], key: str, value: str | Mapping[str, Any], seed: int) -> HubModule:
    """A network from what a workflow says: a mapping, a name of the zoo, a folder or a hub id."""
    entries = zoo.TOKENIZERS if kind is KronosTokenizer else zoo.MODELS
    entry = entries.get(value) if isinstance(value, str) else None
    if entry and entry.hub_id:
        value = entry.hub_id
    elif entry:
        value = entry.config
    if isinstance(value, str):
        try:
            return kind.from_pretrained(value)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"KronosModel: {key}: {error}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind.from_config(dict(value), f"KronosModel: {key}")
