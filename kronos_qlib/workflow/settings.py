"""The keyword arguments of KronosModel, as a workflow file gives them."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from kronos_qlib.data.extra import ExtraData
from kronos_qlib.data.factors import FACTORS
from kronos_qlib.forecast.scores import SCORES
from kronos_qlib.hardware.device import DTYPES
from kronos_qlib.settings import Settings, read_settings
from kronos_qlib.train.settings import AutoOrCount, FinetuneSettings


def _network(value: Any) -> str | dict[str, Any]:
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


class WorkflowFinetuneSettings(FinetuneSettings):
    """The `finetune` mapping of a workflow: what a training knows, and what only Qlib and pandas can read.

    extra_data: further universes or stores to train on, see `kronos_qlib.data.extra.ExtraData`; validation stays with
        the dataset's own.
    """

    extra_data: Annotated[list[Any], BeforeValidator(_extra_data)] = []


class ForecastSettings(Settings):
    """The `forecast` mapping of a workflow.

    sample_count, temperature, top_p, top_k: how paths are drawn (see `kronos_qlib.forecast.engine.sampling.draw`).
    s2_rotation: "aligned" forecasts as trained, "reference" as published.
    sampling: "independent" samples, or "stratified": a window's samples divide each step's distribution among them, so
        that fewer of them are as precise.
    batch_size: windows that go through the networks together (on a CPU, that each thread has in hand); auto takes as
        many as the memory and the caches allow.
    processes: of this machine; auto is one per GPU, and one on a CPU.
    engine: "local", or "ray" for the cluster that Ray is connected to (extra `ray`).
    cache_dir: where finished chunks are kept, as Parquet files; what is there already is not computed again.
    keep_paths: keep the sample paths there too, not only scores and quantiles.
    """

    sample_count: int = Field(default=5, ge=1)
    temperature: float = Field(default=0.6, gt=0)
    top_p: float = Field(default=0.9, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    s2_rotation: Literal["aligned", "reference"] = "aligned"
    sampling: Literal["independent", "stratified"] = "independent"
    batch_size: AutoOrCount = "auto"
    processes: AutoOrCount = "auto"
    engine: Literal["local", "ray"] = "local"
    cache_dir: str | None = None
    keep_paths: bool = False

    @model_validator(mode="after")
    def _paths_need_a_place(self) -> "ForecastSettings":
        if self.keep_paths and self.cache_dir is None:
            raise ValueError("keep_paths needs a cache_dir to keep them in")
        return self

    @model_validator(mode="after")
    def _a_cluster_divides_its_own(self) -> "ForecastSettings":
        if self.engine == "ray" and self.processes != "auto":
            raise ValueError("processes are of this machine; with engine: ray leave them auto")
        return self


class ModelSettings(Settings):
    """The keyword arguments of `KronosModel`.

    neutralise: names of `kronos_qlib.data.factors.FACTORS`, whose part in the scores is taken out, day by day.
    """

    tokenizer: Annotated[Any, BeforeValidator(_network)]
    model: Annotated[Any, BeforeValidator(_network)]
    max_context: int = Field(default=512, ge=2)
    finetune: Annotated[WorkflowFinetuneSettings | None, Field(strict=False)] = None
    forecast: Annotated[ForecastSettings, Field(strict=False)] = ForecastSettings()
    score: str = "mean_return"
    neutralise: list[str] = []
    device: str = "auto"
    dtype: str = "auto"
    seed: int = Field(default=100, ge=0, lt=2**63)

    @field_validator("score")
    @classmethod
    def _known_score(cls, score: str) -> str:
        if score not in SCORES:
            raise ValueError(f"should be one of {', '.join(SCORES)}")
        return score

    @field_validator("neutralise")
    @classmethod
    def _known_factors(cls, names: list[str]) -> list[str]:
        if len(set(names) & set(FACTORS)) < len(names):
            raise ValueError(f"should be a list of different names among {', '.join(FACTORS)}")
        return names

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, dtype: str) -> str:
        if dtype != "auto" and dtype not in DTYPES:
            raise ValueError(f"should be auto, {' or '.join(DTYPES)}")
        return dtype

    @model_validator(mode="after")
    def _risk_needs_samples(self) -> "ModelSettings":
        if self.score == "return_to_risk" and self.forecast.sample_count < 2:
            raise ValueError("score return_to_risk needs forecast.sample_count of 2 or more: one sample has no spread")
        return self

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """Restore a pickle; in older ones `finetune` is the training's class, with extra_data among its attributes."""
        super().__setstate__(state)
        if type(self.finetune) is FinetuneSettings:
            self.finetune = WorkflowFinetuneSettings.model_construct(**vars(self.finetune))
