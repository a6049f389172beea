"""What the API takes and gives: pydantic models, from which its OpenAPI description is made."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^/\\\x00-\x1f]+$")]
State = Literal["queued", "running", "done", "failed", "cancelled"]


class Request(BaseModel):
    """Base of what is asked: unknown keys and infinite numbers are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Draws(Request):
    """How paths are drawn."""

    model: Name | None = Field(None, description="name of a model; the first one named at start by default")
    lookback: int = Field(400, ge=2, description="bars seen at most")
    horizon: int = Field(20, ge=1, description="bars forecast")
    samples: int = Field(100, ge=1, description="sample paths")
    temperature: float = Field(1.0, gt=0, le=10)
    top_p: float = Field(1.0, gt=0, le=1, description="1 draws from all tokens")
    top_k: int = Field(0, ge=0, le=2**20, description="0 draws from all tokens")
    seed: int = Field(0, ge=0, lt=2**53, description="of the random numbers")


class ForecastQuestion(Draws):
    """A forecast of one instrument."""

    source: Name = Field(description="name of a store, or id of an upload")
    instrument: Name | None = Field(None, description="of the source; an upload's first by default")
    at: str | None = Field(None, max_length=40, description="forecast from the last bar up to this date or time")


class MarketQuestion(Draws):
    """A ranking of the instruments of a universe."""

    store: Name
    universe: Name = "all"
    instruments: list[Name] | None = Field(None, max_length=10_000, description="a watchlist instead of the universe")
    at: str | None = Field(None, max_length=40, description="score this date; the store's last by default")
    lookback: int = Field(90, ge=2, description="bars seen")
    horizon: int = Field(10, ge=1, description="bars forecast")
    samples: int = Field(20, ge=1, description="sample paths of each instrument")
    top: int = Field(10, ge=1, le=1000, description="instruments that are marked")


class ComparisonQuestion(Request):
    """A comparison of finished runs."""

    names: list[Name] = Field(min_length=1, max_length=10, description="experiments or recorder ids")


class SignalsQuestion(Request):
    """A ranking by a finished run: the signals of its own universe on one date."""

    run: Name = Field(description="an experiment, whose newest finished run is meant, or a recorder id")
    store: Name
    at: str | None = Field(None, max_length=40, description="score this date; the store's last by default")


class CheckQuestion(Request):
    """A health check of a store, or of the store that `kronos-qlib ingest` makes of a file."""

    source: Name = Field(description="name of a store, or id of an upload")


class RecordQuestion(Request):
    """What the ledger's record is worth, after the bars that came were filled in."""


class JobStatus(BaseModel):
    """Where a job stands; `partial` while it runs, `result` when it is done, `problem` when it has failed."""

    id: str
    kind: str
    state: State
    progress: float = Field(ge=0, le=1, description="share that is done")
    place: int | None = Field(None, description="jobs before it that wait")
    seconds: float | None = Field(None, description="that the computation took")
    question: dict[str, Any]
    partial: dict[str, Any] | None = Field(None, description="what the first paths of a long forecast show")
    result: dict[str, Any] | None = None
    problem: dict[str, Any] | None = None


class Health(BaseModel):
    """Whether the server answers, and what it offers."""

    status: Literal["ok"] = "ok"
    version: str
    waiting: int
    running: int
    uploads: bool
    ledger: bool
    runs: bool
    limits: dict[str, float]


class ModelEntry(BaseModel):
    """A network by its name."""

    name: str
    parameters: int
    context: int = Field(description="bars that it sees and forecasts together at most")
    trained_until: str | None
    note: str


class StoreEntry(BaseModel):
    """A store by its name."""

    name: str
    freqs: list[str]
    universes: list[str]
    instruments: int
    first: str
    last: str


class InstrumentList(BaseModel):
    """Instruments of a source, and how many there are in all."""

    instruments: list[str]
    total: int


class Bars(BaseModel):
    """Bars as columns; unknown numbers are null."""

    time: list[str]
    open: list[float | None]
    high: list[float | None]
    low: list[float | None]
    close: list[float | None]
    volume: list[float | None] | None = None


class BarsAnswer(BaseModel):
    """The last bars of an instrument up to a date."""

    instrument: str
    bars: Bars
    first: str
    last: str
    total: int
    findings: list[str]


class UploadEntry(BaseModel):
    """A file that a user brought, and what was found in it."""

    id: str = Field(description="its name here")
    name: str = Field(description="as the user called it")
    instruments: list[str]
    bars: int
    first: str
    last: str
    findings: list[str] = Field(description="what was found, in words")
    rejected: int = Field(description="rows that are no bars")
    examples: list[dict[str, Any]] = Field(description="the first of them: line and reason")


class ProblemDetails(BaseModel):
    """An error, as RFC 9457 has it."""

    type: str
    title: str
    status: int
    detail: str
