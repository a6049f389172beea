"""The keyword arguments of KronosModel, as a workflow file gives them."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from kronos_qlib.data.settings import Settings
from kronos_qlib.forecast.scores import SCORES
from kronos_qlib.nn.device import DTYPES
from kronos_qlib.train.settings import AutoOrCount, FinetuneSettings


def _network(value: Any) -> str | dict[str, Any]:
    if isinstance(value, (str, dict)) and value:
        return value
    raise ValueError("should be a hub id, a folder, a name of the zoo or a mapping of constructor arguments")


class ForecastSettings(Settings):
    """The `forecast` mapping of a workflow.

    sample_count, temperature, top_p, top_k: how paths are drawn (see `kronos_qlib.forecast.sampling.draw`).
    s2_rotation: "aligned" forecasts as trained, "reference" as published.
    batch_size: windows at a time; auto follows from the network's size.
    """

    sample_count: int = Field(default=5, ge=1)
    temperature: float = Field(default=0.6, gt=0)
    top_p: float = Field(default=0.9, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    s2_rotation: Literal["aligned", "reference"] = "aligned"
    batch_size: AutoOrCount = "auto"
    cache_dir: str | None = None

    @field_validator("cache_dir")
    @classmethod
    def _no_cache(cls, cache_dir: str | None) -> None:
        if cache_dir is not None:
            raise ValueError("should be null: resumable forecasts are not built yet")


class ModelSettings(Settings):
    """The keyword arguments of `KronosModel`."""

    tokenizer: Annotated[Any, BeforeValidator(_network)]
    model: Annotated[Any, BeforeValidator(_network)]
    max_context: int = Field(default=512, ge=2)
    finetune: Annotated[FinetuneSettings | None, Field(strict=False)] = None
    forecast: Annotated[ForecastSettings, Field(strict=False)] = ForecastSettings()
    score: str = "mean_return"
    device: str = "auto"
    dtype: str = "auto"
    seed: int = Field(default=100, ge=0, lt=2**63)

    @field_validator("score")
    @classmethod
    def _known_score(cls, score: str) -> str:
        if score not in SCORES:
            raise ValueError(f"should be one of {', '.join(SCORES)}")
        return score

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
