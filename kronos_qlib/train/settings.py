"""The settings of two-stage fine-tuning, as a workflow file gives them; defaults are the published recipe."""

from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from kronos_qlib.extensions import identify
from kronos_qlib.settings import Settings, check_configuration
from kronos_qlib.train.adapters import LoraSettings
from kronos_qlib.train.losses import load_loss

Fraction = Annotated[float, Field(ge=0, lt=1)]
PLACES = "task", "train_start", "train_end"  # of an output_dir, filled in for each training


def _auto_or_count(value: Any) -> int | str:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError("should be auto or a whole number from 1")


AutoOrCount = Annotated[Any, BeforeValidator(_auto_or_count)]


def _known_places(folder: str) -> str:
    """Check the places in braces of an output_dir. Raises ValueError."""
    known = " and ".join(f"{{{name}}}" for name in PLACES)
    try:
        parts = list(Formatter().parse(folder))
    except ValueError:
        parts = [("", "", "", None)]
    if any(name is not None and (name not in PLACES or spec or conversion) for _, name, spec, conversion in parts):
        raise ValueError(f"should have no other braces than {known}")
    return folder


OutputDir = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$"), AfterValidator(_known_places)]
StartFrom = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]


def _own_loss(value: Any) -> Any:
    """Check a loss of the user's own, and identify it. Raises ValueError."""
    if value is None:
        return None
    identified = identify(check_configuration(value))
    load_loss(identified)
    return identified


class LearningSettings(Settings):
    """The keys that all stages have, the ranker's too."""

    epochs: int = Field(ge=1)
    """Each is a draw of windows, or of days, without replacement."""
    learning_rate: float = Field(gt=0)
    """Peak of a OneCycle schedule that starts at a tenth of it and warms up for 3 % of the steps."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Of AdamW."""
    clip_norm: float = Field(gt=0)
    """Norm to which the gradients of a step are clipped."""
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)]
    """Of AdamW."""
    patience: int | None = Field(default=None, ge=1)
    """Epochs without a better validation loss after which the stage ends; null: it never ends early."""
    freeze_blocks: int = Field(default=0, ge=0)
    """The first blocks, with the embeddings before them, that do not learn."""
    lora: Annotated[LoraSettings | None, Field(strict=False)] = None
    """Train low-rank adapters instead of the weights (extra `lora`); they are merged into best/."""
    log_every: int = Field(default=20, ge=1)
    """Steps between two rows of history.csv."""
    next_epochs: int | None = Field(default=None, ge=1)
    """Epochs of a training that starts from the weights of a former one (`start_from`); null: as many as `epochs`."""
    next_learning_rate: float | None = Field(default=None, gt=0)
    """Likewise its peak learning rate; null: `learning_rate`."""

    @model_validator(mode="after")
    def _frozen_or_adapted(self) -> "LearningSettings":
        if self.freeze_blocks and self.lora is not None:
            raise ValueError("has both freeze_blocks and lora; with adapters all other weights are frozen already")
        return self


class StageSettings(LearningSettings):
    """The keys that tokenizer and predictor have."""

    windows_per_epoch: int | None = Field(default=None, ge=1)
    """Training windows of an epoch; null: all."""
    batch_size: int = Field(default=50, ge=1)
    """Windows of an optimiser step, over all processes."""
    valid_windows: int = Field(default=2000, ge=1)
    """Windows that validate each epoch, evenly spaced over the validation segment."""
    loss: Annotated[Any, BeforeValidator(_own_loss)] = None
    """A class of your own (class, module_path, kwargs) that weighs the errors of a window's bars, see
    [Extending](extending.md); null: their mean. What validates is not changed by it."""


class TokenizerSettings(StageSettings):
    """Stage 1: the tokenizer learns to reconstruct bars."""

    learning_rate: float = Field(default=2e-4, gt=0)
    clip_norm: float = Field(default=2.0, gt=0)
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999]


class PredictorSettings(StageSettings):
    """Stage 2: the model learns to continue codes."""

    learning_rate: float = Field(default=4e-5, gt=0)
    clip_norm: float = Field(default=3.0, gt=0)
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    s1_query: Literal["sampled", "teacher_forced"] = "sampled"
    """The s1 that the s2 head attends from in training: `sampled` from the model's own logits, as published, or the
    true one, `teacher_forced`."""
    cache_codes: bool = False
    """Encode all training windows once, on disk, before the first step; faster if the epochs together draw more windows
    than there are."""

    @model_validator(mode="after")
    def _a_loss_needs_bars(self) -> "PredictorSettings":
        if self.loss is not None and self.cache_codes:
            raise ValueError("has a loss of your own, which is given bars, and cache_codes, which keeps codes alone")
        return self


class RankerSettings(LearningSettings):
    """The `ranker` mapping of a KronosRanker: how a Kronos learns to rank the instruments of a day."""

    output_dir: OutputDir
    """Gets ranker/ (ranker_1/ … of an ensemble), each with history.csv, checkpoints/ and best/ (hub format). As of
    `finetune`, with `{task}` and so on."""
    start_from: StartFrom | None = None
    """As of `finetune`."""
    epochs: int = Field(default=4, ge=1)
    days_per_epoch: int | None = Field(default=None, ge=1)
    """Training days of an epoch; null: all."""
    batch_size: int = Field(default=4, ge=1)
    """Days of an optimiser step, over all processes; a day goes through the network whole."""
    instruments_per_day: int | None = Field(default=None, ge=2)
    """So many instruments of a training day are drawn; null: all. Fewer take less time and memory."""
    learning_rate: float = Field(default=3e-4, gt=0)
    clip_norm: float = Field(default=1.0, gt=0)
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    patience: int | None = Field(default=2, ge=1)
    valid_days: int = Field(default=60, ge=2)
    """Days that validate each epoch by their mean rank IC, evenly spaced over the validation segment."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Each block learns at so much of the rate of the block above it, the embeddings at that of a block below the
    first."""
    loss: Literal["pearson", "listnet", "mse"] = "pearson"
    """Of a day's scores and labels: 1 − the correlation of the scores with the labels' ranks (`pearson`), the
    cross-entropy of the softmax of both (`listnet`, Cao et al. 2007), or the squared error against the labels' z-scores
    (`mse`)."""
    inputs: Literal["tokens", "bars"] = "tokens"
    """What the network sees: the codes of the tokenizer, or the normalised bars, through a layer of their own."""
    volume: bool = True
    """false hides volume and amount, which are then 0 in normalised units."""
    pooled_bars: int = Field(default=1, ge=1)
    """The score is read from the mean hidden state of so many last bars."""
    ensemble: int = Field(default=1, ge=1)
    """Networks trained with seeds of their own; the score is the mean of their ranks within the day."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Steps between two checkpoints; the last two are kept."""
    processes: AutoOrCount = "auto"
    """Processes that train together; `auto` is one for each GPU, one on a CPU."""
    max_restarts: int = Field(default=3, ge=0)
    """How often dead processes are started again, from the last checkpoint."""


class FinetuneSettings(Settings):
    """The keys of a workflow's `finetune` mapping that a training knows; `extra_data` is the workflow's own."""

    output_dir: OutputDir
    """Gets tokenizer/ and predictor/, each with history.csv, checkpoints/ and best/ (hub format). `{task}` in it is
    replaced by a digest of all that decides the training, `{train_start}` and `{train_end}` by its dates, so that the
    trainings of rolling tasks lie side by side, see [Rolling](rolling.md)."""
    start_from: StartFrom | None = None
    """`previous` starts from the weights of the newest finished training beside this one whose dates end earlier, or,
    if there is none, as `tokenizer` and `model` say; the folder of a finished training starts from that one."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Steps between two checkpoints; the last two are kept."""
    tokenizer: Annotated[TokenizerSettings | None, Field(strict=False)] = None
    """Stage 1; null skips it."""
    predictor: Annotated[PredictorSettings | None, Field(strict=False)] = None
    """Stage 2; null skips it."""
    processes: AutoOrCount = "auto"
    """Processes that train together; `auto` is one for each GPU, one on a CPU. On a CPU the result does not depend on
    it. On GPUs with `micro_batch_size: auto` each has a micro-batch of its own, with its own dropout and rounding."""
    max_restarts: int = Field(default=3, ge=0)
    """How often dead processes are started again, from the last checkpoint."""
    micro_batch_size: AutoOrCount = "auto"
    """Windows of a micro-batch, on a CPU of each thread; the gradients of a batch are accumulated over its
    micro-batches. `auto` is one for every core, or what an estimate finds room for."""
    compile: bool = False
    """Let torch.compile build the training step: slow to start, and without a clear gain on a CPU."""
    half_life_days: float | None = Field(default=None, gt=0)
    """Draw older windows less often, half as often for every so many days before the newest."""

    @model_validator(mode="after")
    def _trains_something(self) -> "FinetuneSettings":
        if self.tokenizer is None and self.predictor is None:
            raise ValueError("gives no stage to train; name tokenizer or predictor, or set finetune to null")
        return self

    @model_validator(mode="after")
    def _draws_fewer_than_all(self) -> "FinetuneSettings":
        for name in ("tokenizer", "predictor"):
            stage = getattr(self, name)
            if self.half_life_days is not None and stage is not None and stage.windows_per_epoch is None:
                raise ValueError(
                    f"has half_life_days, which needs {name}.windows_per_epoch: an epoch of all windows draws none "
                    "more often than another"
                )
        return self
