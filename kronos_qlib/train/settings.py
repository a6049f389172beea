"""The settings of two-stage fine-tuning, as a workflow file gives them; defaults are the published recipe."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from kronos_qlib.data.settings import Settings

Fraction = Annotated[float, Field(ge=0, lt=1)]


class StageSettings(Settings):
    """What both stages have in common.

    epochs: each a seeded draw of windows without replacement.
    windows_per_epoch: how many of the training windows; null is all of them.
    learning_rate: the peak of a OneCycle schedule with 3 % warm-up from a tenth of it.
    valid_windows: fixed windows, evenly spaced over the validation segment, on which every epoch is judged.
    log_every: steps between two rows of history.csv.
    """

    epochs: int = Field(ge=1)
    windows_per_epoch: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=50, ge=1)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_norm: float = Field(gt=0)
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)]
    valid_windows: int = Field(default=2000, ge=1)
    log_every: int = Field(default=20, ge=1)


class TokenizerSettings(StageSettings):
    """Stage 1: the tokenizer learns to reconstruct bars."""

    learning_rate: float = Field(default=2e-4, gt=0)
    clip_norm: float = Field(default=2.0, gt=0)
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999]


class PredictorSettings(StageSettings):
    """Stage 2: the model learns to continue codes.

    s1_query: the s1 that the s2 head is asked about in training: drawn from the model's own logits, as published
        ("sampled"), or the true one ("teacher_forced").
    """

    learning_rate: float = Field(default=4e-5, gt=0)
    clip_norm: float = Field(default=3.0, gt=0)
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    s1_query: Literal["sampled", "teacher_forced"] = "sampled"


class FinetuneSettings(Settings):
    """The `finetune` mapping of a workflow.

    output_dir: gets tokenizer/ and predictor/, each with history.csv, checkpoints/ and best/ (hub format).
    checkpoint_every: steps between two checkpoints; the last two are kept.
    tokenizer, predictor: the stages; null skips one.
    """

    output_dir: str = Field(min_length=1)
    checkpoint_every: int = Field(default=200, ge=1)
    tokenizer: Annotated[TokenizerSettings | None, Field(strict=False)] = None
    predictor: Annotated[PredictorSettings | None, Field(strict=False)] = None
    processes: Literal["auto"] | int = "auto"

    @model_validator(mode="after")
    def _trains_something(self) -> "FinetuneSettings":
        if self.tokenizer is None and self.predictor is None:
            raise ValueError("gives no stage to train; name tokenizer or predictor, or set finetune to null")
        return self

    @field_validator("processes", mode="before")
    @classmethod
    def _one_process(cls, processes: Any) -> str | int:
        if processes not in ("auto", 1):
            raise ValueError("should be auto or 1: training in several processes is not built yet")
        return processes
