"""Kronos as factors: a Qlib data loader of what Kronos makes of each window, and a handler that joins it with Alpha158.

The factors of a window are a function of its bars, the weights and the settings; those of the PCA also of the windows
that it was fitted on, which end before the valid segment.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import BeforeValidator, Field, model_validator
from qlib.config import C
from qlib.contrib.data.handler import Alpha158
from qlib.data.dataset.loader import DataLoader, NestedDataLoader
from qlib.log import get_module_logger

from kronos_qlib.data.dataset import KLineDataset, Segment, check_segment, window_index
from kronos_qlib.data.demo_market import is_synthetic
from kronos_qlib.data.handler import KLineHandler
from kronos_qlib.data.loader import Universe
from kronos_qlib.data.windows import COLUMNS, NamedNormalisation, Windows
from kronos_qlib.forecast.embedding import HIDDEN, SURPRISES, EmbeddingTask
from kronos_qlib.forecast.engine.weights import beyond_training, check_pair
from kronos_qlib.forecast.forecaster import QUANTILES, quantile_columns
from kronos_qlib.forecast.run import embed, forecast
from kronos_qlib.forecast.scores import SCORES, SUMMARIES
from kronos_qlib.forecast.task import Task, digest_windows
from kronos_qlib.hardware.device import resolve_device, resolve_dtype
from kronos_qlib.nn import Kronos, KronosTokenizer
from kronos_qlib.nn.checkpoint import digest_of_weights
from kronos_qlib.settings import MISSING, Settings, read_settings
from kronos_qlib.versions import package_versions
from kronos_qlib.workflow.forecast_job import forecast_task, resolve_execution
from kronos_qlib.workflow.model import make_network
from kronos_qlib.workflow.projection import Projection
from kronos_qlib.workflow.recording import pretraining, record_factors, record_tags
from kronos_qlib.workflow.settings import ForecastSettings, ModelSettings, known_dtype, known_network

logger = get_module_logger("KronosFactors")
PREFIX = "kronos_"  # of the factors' names, which must not be those of another loader
FIT_WINDOWS = 20_000  # that a PCA is fitted on at most, evenly spaced: more change nothing that can be seen
LOADERS = "KronosFactors", "Alpha158Kronos"  # classes that compute for long when they are made
SPREAD = 90, 10  # per cent, the quantiles whose difference is the spread


def _check_fit(value: Any) -> Segment:
    """Check the dates that a PCA is fitted on. Raises ValueError."""
    start, end = check_segment(value)
    if end is None:
        raise ValueError("should end on the last date of the train segment, or before")
    return start, end


class PcaSettings(Settings):
    """The `pca` mapping of `KronosFactors`."""

    components: int = Field(default=16, ge=1)
    """Factors that the pooled hidden state becomes."""
    fit: Annotated[Any, BeforeValidator(_check_fit)]
    """[first, last] score date of the windows that the PCA is fitted on. It must end before the valid segment begins,
    such as with the train segment: the factors of later dates then depend on no later bar."""


class FactorSettings(Settings):
    """The keyword arguments of `KronosFactors`, and the `kronos` mapping of `Alpha158Kronos`."""

    tokenizer: Annotated[Any, BeforeValidator(known_network)]
    """As of `KronosModel`; it does not learn."""
    model: Annotated[Any, BeforeValidator(known_network)]
    """As of `KronosModel`; it does not learn."""
    lookback: int = Field(default=90, ge=2)
    """Bars that a window shows the model."""
    pca: Annotated[PcaSettings | None, Field(strict=False)]
    """How the pooled hidden state is reduced; null leaves it out."""
    pooled_bars: int = Field(default=5, ge=1)
    """Hidden states of so many last bars are averaged."""
    surprise_bars: int = Field(default=5, ge=1)
    """Surprise, the negative log-likelihood of a bar given those before it, is averaged over so many last bars."""
    forecast: Annotated[ForecastSettings | None, Field(strict=False)] = None
    """As of `KronosModel`, without a `cache_dir` of its own: factors of sampled forecasts, which take longer than the
    others: 2.4 times with nano, 5 samples and 5 bars. null leaves them out."""
    horizon: int = Field(default=10, ge=1)
    """Bars forecast."""
    max_context: int = Field(default=512, ge=2)
    """Bars that the model sees at most."""
    cache_dir: Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")] | None = None
    """Folder of what was computed, by digests of weights, settings and bars; nothing that is there is computed again,
    and after a kill the rest. null keeps nothing."""
    freq: str = Field(default="day", pattern=r"^(day|\d*min)$")
    """As of `KLineHandler`."""
    amount: Literal["auto", "amount", "vwap", "ohlc"] = "auto"
    """As of `KLineHandler`."""
    volume: Literal["required", "optional"] = "required"
    """As of `KLineHandler`."""
    exchange: str | None = None
    """As of `KLineDataset`."""
    normalisation: NamedNormalisation = "unit_free"
    """As of `KLineDataset`."""
    device: str = "auto"
    """`auto` takes CUDA, then MPS, then the CPU; or a device of torch, such as `cuda:1`."""
    dtype: Annotated[str, BeforeValidator(known_dtype)] = "auto"
    """`float32`, `bfloat16`, or `auto`: bfloat16 only where the hardware multiplies it."""
    seed: int = Field(default=100, ge=0, lt=2**63)
    """Decides new weights and every draw of a forecast."""

    @model_validator(mode="after")
    def _fit_together(self) -> "FactorSettings":
        for key in ("pooled_bars", "surprise_bars"):
            most = self.lookback - (key == "surprise_bars")  # the first bar has none before it
            if getattr(self, key) > most:
                raise ValueError(f"{key} ({getattr(self, key)}) is above {most}, for a lookback of {self.lookback}")
        if self.lookback > self.max_context:
            raise ValueError(f"lookback ({self.lookback}) is above max_context ({self.max_context})")
        if self.forecast is not None and self.forecast.cache_dir is not None:
            raise ValueError("forecast.cache_dir is not wanted: the factors' own cache_dir keeps the forecasts too")
        if self.forecast is not None and self.horizon >= self.max_context:
            raise ValueError(f"horizon ({self.horizon}) must be below max_context ({self.max_context})")
        return self


@dataclass(frozen=True)
class FactorWork:
    """What a load has to compute: windows of a dataset, and those that a PCA is still to be fitted on, or None."""

    dataset: KLineDataset
    windows: Windows
    fit: Windows | None

    @property
    def read(self) -> Windows:
        """All windows that go through the networks once, by instrument and date."""
        ends = self.windows.ends if self.fit is None else np.concatenate([self.windows.ends, self.fit.ends])
        return replace(self.windows, ends=np.unique(ends))


class KronosFactors(DataLoader):
    """Loads what Kronos makes of the window that ends on each date, as features named `kronos_…`, float32.

    Always: `surprise_s1`, `surprise_s2` (cross-entropy of the last bars' codes, nats a bar, coarse and fine) and
    `surprise_s1_last`, `surprise_s2_last` (of the last bar). With `pca`: `pc01`, `pc02`, …, principal components of
    the last bars' mean hidden state. With `forecast`: the ten scores; `q05` … `q95`, quantiles of the return to the
    last step's close, and `spread`, their 90 % less their 10 %; `range`, `volume_change` and `skew`.

    A date and instrument has factors if the instrument is a member and has `lookback` valid bars that end there.

    Args:
        tokenizer, model: as of `KronosModel`. The others: see `FactorSettings`.

    Raises:
        ValueError: an unknown key, a wrong type, an impossible value, networks with different bits, an absent device.
        FileNotFoundError: a checkpoint that is neither here nor on a hub within reach.
    """

    def __init__(
        self,
        tokenizer: str | Mapping[str, Any] = MISSING,
        model: str | Mapping[str, Any] = MISSING,
        pca: Mapping[str, Any] | None = MISSING,
        **others: Any,
    ) -> None:
        values = {"tokenizer": tokenizer, "model": model, "pca": pca, **others}
        self.settings = settings = read_settings(FactorSettings, "KronosFactors", values)
        resolve_dtype(settings.dtype, resolve_device(settings.device))
        self.tokenizer = make_network(KronosTokenizer, "KronosFactors: tokenizer", settings.tokenizer, settings.seed)
        self.model = make_network(Kronos, "KronosFactors: model", settings.model, settings.seed)
        check_pair(self.tokenizer, self.model)
        if self.model.conditions:
            raise ValueError("KronosFactors: takes no model with conditions")
        if self.tokenizer.d_in != len(COLUMNS):
            raise ValueError(
                f"KronosFactors: the tokenizer's d_in is {self.tokenizer.d_in}; bars have {len(COLUMNS)} columns"
            )
        if settings.pca is not None and settings.pca.components > self.model.d_model:
            raise ValueError(
                f"KronosFactors: pca.components ({settings.pca.components}) is above the width of the model's hidden "
                f"states ({self.model.d_model})"
            )
        try:
            resolve_execution(self._forecasting)  # what cannot be done is an error now
        except (ValueError, ModuleNotFoundError) as error:
            message = str(error).replace("KronosModel", "KronosFactors").replace("forecast.cache_dir", "cache_dir")
            raise type(error)(message) from None
        self._projections: dict[str, Projection] = {}  # by universe: fitted once, and kept in a pickle
        self.loaded: dict[str, Any] = {}  # what was loaded last, and what it was made of

    @property
    def names(self) -> list[str]:
        """The names of the factors, in the order of the columns."""
        settings, names = self.settings, list(SURPRISES)
        if settings.pca is not None:
            names += [f"pc{number + 1:02d}" for number in range(settings.pca.components)]
        if settings.forecast is not None:
            names += [*SCORES, *(f"q{quantile:02d}" for quantile in QUANTILES), "spread", *SUMMARIES]
        return [PREFIX + name for name in names]

    def load(self, instruments: Universe | None = None, start_time: Any = None, end_time: Any = None) -> pd.DataFrame:
        """Load the factors of a universe from start_time to end_time, computing what the cache does not have.

        Returns:
            float32, index (datetime, instrument) sorted, columns ("feature", name).

        Raises:
            ValueError: as of `KLineHandler` and `KLineDataset`; no window; fewer windows to fit the PCA on than it has
                components. RuntimeError: the processes of a forecast died too often.
        """
        for text in self.cautions():
            logger.warning(f"KronosFactors: {text}")
        work = self.work(instruments, start_time, end_time)
        work.dataset.warn_of_left_out(work.windows)
        self._warn_of_seen_dates(work.windows)
        logger.info(
            f"KronosFactors: {len(self.names)} factors of {len(work.windows):,} windows of "
            f"{self.settings.lookback} bars"
        )
        try:
            columns = self._read(work, instruments)
            if self.settings.forecast is not None:
                columns |= self._forecast(work)
        finally:
            for network in (self.tokenizer, self.model):
                network.cpu().eval()
        self.loaded = self._provenance(work, instruments)
        record_factors(self.loaded)
        values = np.column_stack([columns[name.removeprefix(PREFIX)] for name in self.names]).astype(np.float32)
        names = pd.MultiIndex.from_product([["feature"], self.names])
        return pd.DataFrame(values, window_index(work.windows), names, copy=False)

    def work(self, instruments: Universe | None = None, start_time: Any = None, end_time: Any = None) -> FactorWork:
        """Read the bars and select what `load` has to compute. Raises ValueError as `load` does.

        Bars are read from the store's first on, so that the windows do not depend on where a range begins.
        """
        settings, universe = self.settings, "all" if instruments is None else instruments
        try:
            segments = {"load": check_segment((start_time, end_time))}
        except ValueError as error:
            raise ValueError(f"KronosFactors: start_time and end_time: {error}") from None
        last, pca = segments["load"][1], settings.pca
        if _key(instruments) in self._projections:
            pca = None  # it is fitted
        if pca is not None:
            segments["fit"] = pca.fit
            last = None if last is None else max(last, pca.fit[1])
        range_and_label = None, last, settings.freq, "$close"  # some label is asked for
        handler = KLineHandler(universe, *range_and_label, settings.amount, settings.volume)
        shape = settings.lookback, settings.horizon, settings.exchange
        dataset = KLineDataset(handler, segments, *shape, normalisation=settings.normalisation)
        fit = None
        if pca is not None:
            fit = dataset.score_windows("fit")
            if len(fit) < pca.components:
                raise ValueError(
                    f"KronosFactors: pca.fit: {fit.segment} has {len(fit)} windows, fewer than the "
                    f"{pca.components} components"
                )
            rows = np.linspace(0, len(fit) - 1, min(len(fit), FIT_WINDOWS)).round().astype(np.int64)
            fit = fit.take(rows)
        return FactorWork(dataset, dataset.score_windows("load"), fit)

    def embedding_task(self, windows: Windows) -> EmbeddingTask:
        """Return the task of the pass over some windows."""
        settings, device = self.settings, resolve_device(self.settings.device)
        return EmbeddingTask(
            self.tokenizer,
            self.model,
            windows,
            settings.surprise_bars,
            settings.pooled_bars,
            resolve_dtype(settings.dtype, device),
            device,
        )

    def forecast_task(self, work: FactorWork) -> Task:
        """Return the task of the forecasts, which are those of a `KronosModel` with the same settings."""
        task = forecast_task(self.tokenizer, self.model, self._forecasting, work.dataset, work.windows)
        return replace(task, summaries=True)

    @property
    def cache_dir(self) -> Path | None:
        """The folder of what was computed."""
        return Path(self.settings.cache_dir).expanduser() if self.settings.cache_dir else None

    def cautions(self) -> Iterator[str]:
        """Yield what speaks against the networks: random weights, windows longer than those of their training."""
        for name in ("tokenizer", "model"):
            if getattr(self, name).source is None:
                yield f"the {name} is new: factors of random weights"
        horizon = self.settings.horizon if self.settings.forecast is not None else 0
        beyond = beyond_training(self.model, self.settings.lookback + horizon)
        if beyond:
            yield beyond

    def seen_dates(self, windows: Windows) -> str | None:
        """Say how many of the windows are of dates that a network was trained on; None if none is known.

        Simulated bars were never seen.
        """
        if is_synthetic(C.dpm.get_data_uri(self.settings.freq)):
            return None
        for known, until in pretraining(self.tokenizer, self.model):
            seen = int((windows.dates <= np.datetime64(until)).sum())
            if seen:
                return (
                    f"{known} trained on data up to {until}, and {seen:,} of {len(windows):,} windows are of dates up "
                    "to then: their factors are in sample. A model may be trained on them, though it may trust them "
                    "more than later ones deserve; a valid segment among them chooses too kindly"
                )
        return None

    def _provenance(self, work: FactorWork, instruments: Universe | None) -> dict[str, Any]:
        """Return what the factors are made of: settings, weights, data and versions."""
        handler, settings = work.dataset.handler, self.settings
        folder = C.dpm.get_data_uri(settings.freq)
        projection = self._projections.get(_key(instruments))
        dates = work.windows.dates
        return {
            "settings": settings.model_dump(),
            "weights": {name: digest_of_weights(getattr(self, name)) for name in ("tokenizer", "model")},
            "data": {
                "provider_uri": str(folder),
                "synthetic": is_synthetic(folder),
                "universe": handler.instruments,
                "amount": handler.amount_rule,
                "first": pd.Timestamp(dates.min()),
                "last": pd.Timestamp(dates.max()),
                "windows": len(work.windows),
            },
            "pca": None if projection is None else {"explained_variance": projection.explained.tolist()},
            "seen": self.seen_dates(work.windows),
            "packages": package_versions(),
        }

    @property
    def _forecasting(self) -> ModelSettings:
        """The settings of a KronosModel that forecasts as the factors do."""
        settings = self.settings
        options = (settings.forecast or ForecastSettings()).model_copy(update={"cache_dir": settings.cache_dir})
        shared = ("tokenizer", "model", "max_context", "device", "dtype", "seed")
        return ModelSettings.model_construct(
            forecast=options, finetune=None, **{key: getattr(settings, key) for key in shared}
        )

    def _read(self, work: FactorWork, instruments: Universe | None) -> dict[str, np.ndarray]:
        """Read windows in one pass: surprises, and components of the hidden states."""
        windows, pca = work.read, self.settings.pca
        task = self.embedding_task(windows)
        columns = embed(task, self.cache_dir, [*SURPRISES, *([HIDDEN] if pca else [])]).columns
        rows = windows.ends.searchsorted(work.windows.ends)
        result = {name: columns[name][rows] for name in SURPRISES}
        if pca is not None:
            if work.fit is not None:
                hidden = columns[HIDDEN][windows.ends.searchsorted(work.fit.ends)]
                self._projections[_key(instruments)] = self._fit(task, work.fit, hidden, pca.components)
            projected = self._projections[_key(instruments)].apply(columns[HIDDEN], rows)
            result |= {f"pc{number + 1:02d}": column for number, column in enumerate(projected.T)}
        return result

    def _fit(self, task: EmbeddingTask, windows: Windows, hidden: np.ndarray, components: int) -> Projection:
        """Find the PCA of these windows in the cache, or fit it and keep it there."""
        fitted_on = digest_windows(windows).tobytes() + str(components).encode()
        name = f"pca-{hashlib.blake2b(fitted_on, digest_size=8).hexdigest()}.safetensors"
        path = self.cache_dir / task.digest / name if self.cache_dir else None
        projection = Projection.load(path) if path else None
        if projection is None:
            projection = Projection.fit(hidden, components)
            if path:
                projection.save(path)
        first, last = (pd.Timestamp(date).date() for date in (windows.dates.min(), windows.dates.max()))
        logger.info(
            f"KronosFactors: PCA of {len(windows):,} windows of {first} … {last}: {components} of "
            f"{hidden.shape[1]} components hold {projection.explained.sum():.0%} of the variance"
        )
        return projection

    def _forecast(self, work: FactorWork) -> dict[str, np.ndarray]:
        """Forecast windows: scores, and what else there is to say of the paths."""
        task, horizon = self.forecast_task(work), self.settings.horizon
        last_step = [name for name in quantile_columns(horizon) if name.endswith(f"_{horizon}")]
        names = ["last_close", *SCORES, *last_step, *SUMMARIES]
        columns = forecast(task, resolve_execution(self._forecasting), names).columns
        close = columns.pop("last_close")
        returns = {name.split("_")[0]: columns.pop(name) / close - 1 for name in last_step}
        high, low = (returns[f"q{quantile:02d}"] for quantile in SPREAD)
        return columns | returns | {"spread": high - low}

    def _warn_of_seen_dates(self, windows: Windows) -> None:
        seen = self.seen_dates(windows)
        if seen:
            logger.warning(f"KronosFactors: {seen}")
            record_tags({"pretraining_overlap": seen})


class Alpha158Kronos(Alpha158):
    """Qlib's Alpha158 with the factors of `KronosFactors` beside its own, joined by date and instrument.

    Label and processors are Alpha158's, and so are all arguments but these. Where an instrument has no factors (too few
    bars, a day without trade) they are NaN, as Alpha158's own may be: models that take no NaN need Qlib's `Fillna`.

    Args:
        kronos: the arguments of `KronosFactors`; its `freq` is the handler's by default.
        init_data: load the data now.
    """

    data_loader: DataLoader

    def __init__(self, *args: Any, kronos: Mapping[str, Any] = MISSING, init_data: bool = True, **kwargs: Any) -> None:
        if not isinstance(kronos, Mapping):
            given = "missing" if kronos is MISSING else f"{kronos!r:.80}"
            raise ValueError(f"Alpha158Kronos: kronos should be a mapping of KronosFactors' arguments, not {given}")
        factors = KronosFactors(**{"freq": kwargs.get("freq", "day")} | dict(kronos))
        super().__init__(*args, init_data=False, **kwargs)
        self.data_loader = NestedDataLoader([self.data_loader, factors], join="left")
        if init_data:
            self.setup_data()


def without_data(dataset: Any) -> Any:
    """Return a dataset's configuration; if it has Kronos' factors, its handler loads nothing when it is made."""
    handler = dataset.get("kwargs", {}).get("handler") if isinstance(dataset, Mapping) else None
    if not isinstance(handler, Mapping) or not any(name in str(handler) for name in LOADERS):
        return dataset
    handler = {**handler, "kwargs": {**handler.get("kwargs", {}), "init_data": False}}
    return {**dataset, "kwargs": {**dataset["kwargs"], "handler": handler}}


def factor_loaders(loader: DataLoader) -> list[KronosFactors]:
    """Return the loaders of Kronos' factors in a Qlib data loader, which may hold others."""
    if isinstance(loader, NestedDataLoader):
        return [found for each in loader.data_loader_l for found in factor_loaders(each)]
    return [loader] if isinstance(loader, KronosFactors) else []


def _key(instruments: Universe | None) -> str:
    return json.dumps(instruments, sort_keys=True, default=str)
