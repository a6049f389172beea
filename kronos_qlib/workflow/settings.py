"""The keyword arguments of KronosModel, as a workflow file gives them."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from kronos_qlib.data.extra import ExtraData
from kronos_qlib.data.factors import FACTORS
from kronos_qlib.extensions import identify, load_extension
from kronos_qlib.forecast.calibration import BandKind
from kronos_qlib.forecast.engine.sampling import load_filter
from kronos_qlib.forecast.scores import SCORES
from kronos_qlib.hardware.device import DTYPES
from kronos_qlib.settings import Settings, check_configuration, read_settings
from kronos_qlib.train.settings import AutoOrCount, FinetuneSettings


def known_network(value: Any) -> str | dict[str, Any]:
    """Check a setting that names a network. Raises ValueError."""
    if isinstance(value, (str, dict)) and value:
        return value
    raise ValueError("should be a hub id, a folder, a name of the zoo or a mapping of constructor arguments")


def _extra_data(value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError("should be a list of mappings, each with the key 'instruments'")
    return [
        entry
        if isinstance(entry, ExtraData)
        else read_settings(ExtraData, f"entry {index}", dict(entry) if isinstance(entry, dict) else {"": entry})
        for index, entry in enumerate(value)
    ]


def known_dtype(dtype: Any) -> Any:
    """Check the name of a precision. Raises ValueError."""
    if not isinstance(dtype, str) or (dtype != "auto" and dtype not in DTYPES):
        raise ValueError(f"should be auto, {' or '.join(DTYPES)}")
    return dtype


def known_score(score: Any) -> Any:
    """Check a score: a name, or the configuration of a class of the user's own. Raises ValueError."""
    if isinstance(score, Mapping):
        load_extension(check_configuration(score))
    elif not isinstance(score, str):
        raise ValueError("Input should be a valid string")
    elif score not in SCORES:
        raise ValueError(f"should be one of {', '.join(SCORES)}")
    return score


def _known_filter(value: Any) -> Any:
    """Check a filter of the user's own. Raises ValueError."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError("should be a configuration with the keys class, module_path and kwargs, or null")
    load_filter(identify(check_configuration(value)))
    return value


class WorkflowFinetuneSettings(FinetuneSettings):
    """The `finetune` mapping of a workflow: the keys of a training, and those that need Qlib and pandas."""

    extra_data: Annotated[list[Any], BeforeValidator(_extra_data)] = []
    """Further universes or stores to train on, a list of mappings; validation stays with the dataset's own."""


class ForecastSettings(Settings):
    """The `forecast` mapping of a workflow."""

    sample_count: int = Field(default=5, ge=1, le=1_000_000)
    """Sample paths of a window."""
    temperature: float = Field(default=0.6, gt=0)
    """Divides the logits before a code is drawn: below 1 the likely codes are drawn more often."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """A code is drawn among the most likely ones that together reach this probability."""
    top_k: int = Field(default=0, ge=0)
    """A code is drawn among so many of the most likely ones; 0 keeps all."""
    anchor: bool = False
    """Measure paths from the last bar as the tokenizer decodes it, so that its error there is not forecast."""
    s2_rotation: Literal["aligned", "reference"] = "aligned"
    """`aligned` forecasts as the model was trained; `reference` repeats the published generation, with its fault."""
    sampling: Literal["independent", "stratified"] = "independent"
    """`independent` samples, or `stratified`: the samples of a window divide the distribution of each step among them,
    so that fewer are as precise."""
    batch_size: AutoOrCount = "auto"
    """Windows of a forward batch; on a CPU of each thread. `auto` takes as many as memory and caches allow."""
    processes: AutoOrCount = "auto"
    """Processes on this machine; `auto` is one for each GPU, one on a CPU."""
    engine: Literal["local", "ray"] = "local"
    """`local`, or `ray`: the cluster that Ray is connected to (extra `ray`)."""
    cache_dir: Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")] | None = None
    """Folder of the finished chunks, Parquet files; a chunk that is there is not computed again."""
    keep_paths: bool = False
    """Keep the sample paths in `cache_dir` too, not only scores and quantiles."""
    filter: Annotated[Any, BeforeValidator(_known_filter)] = None
    """A class of your own (class, module_path, kwargs) that says which codes are drawn among, such as min-p, see
    [Extending](extending.md); with `top_p: 1.0`. null: `top_p` and `top_k` say it."""

    @model_validator(mode="after")
    def _paths_need_a_place(self) -> "ForecastSettings":
        if self.keep_paths and self.cache_dir is None:
            raise ValueError("keep_paths needs a cache_dir to keep them in")
        return self

    @model_validator(mode="after")
    def _one_filter(self) -> "ForecastSettings":
        if self.filter is not None and (self.top_p < 1 or self.top_k):
            raise ValueError("a filter of your own takes the place of top_p and top_k: set top_p to 1.0 and top_k to 0")
        return self

    @model_validator(mode="after")
    def _a_cluster_divides_its_own(self) -> "ForecastSettings":
        if self.engine == "ray" and self.processes != "auto":
            raise ValueError("processes are of this machine; with engine: ray leave them auto")
        return self


class CalibrationSettings(Settings):
    """The `calibration` mapping of a workflow."""

    segment: str = "valid"
    """The segment on whose forecasts, and the bars that came within it, the calibration is fitted; before test."""
    days: int = Field(default=40, ge=2)
    """Score dates of the segment that are forecast for it, evenly spaced: what the calibration costs."""
    bands: BandKind = "split"
    """`split`: conformal quantiles as fitted on the segment. `adaptive`: from each forecast's first date on they follow
    the misses of the bars that have come, of all instruments; scores and paths are the same."""


class ModelSettings(Settings):
    """The keyword arguments of `KronosModel`."""

    tokenizer: Annotated[Any, BeforeValidator(known_network)]
    """Hub id, local folder, name of the zoo, which wins over a folder of that name (`tokenizer-base`, `tokenizer-2k`;
    `nano`, in this package; `nano-new`: a new network), or a mapping of constructor arguments: a new network; or
    `{start_from: nano, d_in: 8}`: one of these, for bars of more [columns](extending.md)."""
    model: Annotated[Any, BeforeValidator(known_network)]
    """Likewise; names of the zoo: `mini`, `small`, `base`, `nano`; `nano-new`: a new network."""
    max_context: int = Field(default=512, ge=2)
    """Bars that the model sees at most. Lookback + horizon above it works, slowly."""
    finetune: Annotated[WorkflowFinetuneSettings | None, Field(strict=False)] = None
    """null uses the checkpoints as they are."""
    forecast: Annotated[ForecastSettings, Field(strict=False)] = ForecastSettings()
    """How sample paths are drawn, executed and kept."""
    score: Annotated[Any, BeforeValidator(known_score)] = "mean_return"
    """What a score is, see [Scores](scores.md); or a class of your own (class, module_path, kwargs), which gets the
    sample paths, see [Extending](extending.md)."""
    neutralise: list[str] = []
    """Factors, such as `[volatility, size]`, also `reversal`, `momentum`, `volume_change`: the scores are the residuals
    of a regression on the factors' ranks, each day."""
    calibration: Annotated[CalibrationSettings | None, Field(strict=False)] = None
    """Fit a calibration after the training and apply it to every forecast, see
    [Calibration](forecasting.md#calibration); null: none."""
    device: str = "auto"
    """`auto` takes CUDA, then MPS, then the CPU; or a device of torch, such as `cuda:1`."""
    dtype: Annotated[str, BeforeValidator(known_dtype)] = "auto"
    """`float32`, `bfloat16`, or `auto`: bfloat16 only where the hardware multiplies it."""
    seed: int = Field(default=100, ge=0, lt=2**63)
    """Decides new weights, the order of training windows, dropout and every draw of a forecast."""

    @field_validator("neutralise")
    @classmethod
    def _known_factors(cls, names: list[str]) -> list[str]:
        if len(set(names) & set(FACTORS)) < len(names):
            raise ValueError(f"should be a list of different names among {', '.join(FACTORS)}")
        return names

    @model_validator(mode="after")
    def _a_spread_needs_samples(self) -> "ModelSettings":
        if self.calibration is not None and self.forecast.sample_count < 2:
            raise ValueError("calibration needs forecast.sample_count of 2 or more: one sample has no spread")
        return self

    @model_validator(mode="after")
    def _a_score_of_paths_needs_them(self) -> "ModelSettings":
        if isinstance(self.score, Mapping) and not self.forecast.keep_paths and self.calibration is None:
            raise ValueError("a score of your own needs the sample paths: set forecast.keep_paths and a cache_dir")
        return self

    @model_validator(mode="after")
    def _risk_needs_samples(self) -> "ModelSettings":
        if self.score == "return_to_risk" and self.forecast.sample_count < 2:
            raise ValueError("score return_to_risk needs forecast.sample_count of 2 or more: one sample has no spread")
        return self

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """Restore a pickle; in older ones `finetune` is the training's class."""
        super().__setstate__(state)
        if type(self.finetune) is FinetuneSettings:
            self.finetune = WorkflowFinetuneSettings.model_construct(**vars(self.finetune))
