"""The API, and the page that uses nothing else."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from kronos_qlib.versions import package_version
from kronos_qlib.web import schema
from kronos_qlib.web.forecasts import are_days, as_text, bars_as_columns, prepare, read_date, split_bars
from kronos_qlib.web.jobs import Job
from kronos_qlib.web.problems import MEDIA_TYPE, Problem
from kronos_qlib.web.safety import Safety
from kronos_qlib.web.service import Service
from kronos_qlib.web.settings import ServerSettings

PAGE = Path(__file__).with_name("page")
_VERSION = package_version("kronos-qlib") or "0"
HEARTBEAT = 15.0  # seconds after which a stream without news sends a comment
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ProblemDetails, "content": {MEDIA_TYPE: {}}, "description": text}
    for status, text in {
        400: "The request cannot be read.",
        401: "The token is missing or wrong.",
        403: "The request comes from a page of another site.",
        404: "There is nothing of this name.",
        408: "The request came too slowly.",
        413: "The request is too large.",
        415: "No kind of file that is read here.",
        421: "The server is not called so.",
        422: "A value is out of range, or bars cannot be used.",
        429: "Too many jobs wait.",
        503: "Too many requests are being served.",
    }.items()
}


def make_app(settings: ServerSettings) -> Callable[..., Any]:
    """Make the server's ASGI application: networks are loaded at once. Raises ValueError if one cannot be."""
    service = Service(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="kronos-qlib",
        version=_VERSION,
        description="Forecasts of K-lines, rankings of a market, and the record of both.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/openapi.json",
        responses=_PROBLEMS,
    )
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_problem)
    app.add_exception_handler(Exception, _failure)
    _add_offers(app, service)
    _add_uploads(app, service)
    _add_jobs(app, service)
    _add_records(app, service)
    _add_page(app)
    application = Safety(app, settings)
    application.service = service  # type: ignore[attr-defined]
    return application


def _add_offers(app: FastAPI, service: Service) -> None:
    @app.get("/api/health", response_model=schema.Health)
    def health() -> Any:
        """Say that the server answers, and what it was started with."""
        return service.health(_VERSION)

    @app.get("/api/models", response_model=list[schema.ModelEntry])
    def models() -> Any:
        """List the networks."""
        return service.models()

    @app.get("/api/stores", response_model=list[schema.StoreEntry])
    def stores() -> Any:
        """List the Qlib stores."""
        return service.stores()

    @app.get("/api/instruments", response_model=schema.InstrumentList)
    def instruments(
        source: schema.Name,
        query: Annotated[str, Query(max_length=64)] = "",
        limit: Annotated[int, Query(ge=1, le=5000)] = 50,
    ) -> Any:
        """Search the instruments of a store or an upload: those whose names have the query in them."""
        return service.instruments(source, query, limit)

    @app.get("/api/bars", response_model=schema.BarsAnswer)
    def bars(
        source: schema.Name,
        instrument: schema.Name | None = None,
        at: Annotated[str | None, Query(max_length=40)] = None,
        count: Annotated[int, Query(ge=1, le=5000)] = 400,
    ) -> Any:
        """Return the last bars of an instrument, up to a date."""
        until = read_date(at)
        found = service.sources.bars(source, instrument, until)
        before, _ = split_bars(found.bars, until)
        daily = are_days(found.bars.bars.index)
        ends = as_text(pd.DatetimeIndex(found.bars.bars.index[[0, -1]]), daily)
        return {
            "instrument": found.bars.instrument,
            "bars": bars_as_columns(before.iloc[-count:], daily),
            "first": ends[0],
            "last": ends[1],
            "total": len(found.bars.bars),
            "findings": found.bars.findings,
        }


def _add_uploads(app: FastAPI, service: Service) -> None:
    body = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}

    @app.get("/api/uploads", response_model=list[schema.UploadEntry])
    def uploads() -> Any:
        """List the files that users brought, the newest first."""
        return service.uploads().list()

    @app.post(
        "/api/uploads",
        response_model=schema.UploadEntry,
        status_code=201,
        openapi_extra={"requestBody": body | {"required": True}},
    )
    async def upload(request: Request, name: Annotated[str, Query(min_length=1, max_length=255)]) -> Any:
        """Take a file of bars: the request's body is the file, CSV, Parquet, zip or gz."""
        kept = service.uploads()
        with kept.draft(name) as draft:
            with draft.open("xb") as file:
                async for piece in request.stream():
                    file.write(piece)
            return await asyncio.to_thread(kept.keep, draft, name)

    @app.delete("/api/uploads/{upload_id}", status_code=204)
    def remove(upload_id: str) -> Response:
        """Remove a file."""
        if not service.uploads().remove(upload_id):
            raise Problem(404, "There is no such upload.")
        return Response(status_code=204)


def _add_jobs(app: FastAPI, service: Service) -> None:
    def accepted(job: Job) -> JSONResponse:
        headers = {"Location": f"/api/{service.place(job)}/{job.id}"}
        return JSONResponse(service.status(job), 202, headers)

    @app.post("/api/forecasts", response_model=schema.JobStatus, status_code=202)
    def ask(question: schema.ForecastQuestion) -> Any:
        """Ask for a forecast. The same question is answered at once; others wait, 429 if too many do."""
        prepared = prepare(question, service.sources, service.networks, service.settings.limits)
        return accepted(service.ask_forecast(prepared))

    @app.post("/api/market", response_model=schema.JobStatus, status_code=202)
    def rank(question: schema.MarketQuestion) -> Any:
        """Ask for a ranking of a universe's instruments, or of a watchlist's."""
        return accepted(service.ask_market(question))

    @app.post("/api/signals", response_model=schema.JobStatus, status_code=202)
    def signals(question: schema.SignalsQuestion) -> Any:
        """Ask for a ranking by a finished run: what `kronos-qlib signals` says of a date."""
        return accepted(service.ask_signals(question))

    @app.post("/api/comparisons", response_model=schema.JobStatus, status_code=202)
    def compare(question: schema.ComparisonQuestion) -> Any:
        """Ask for the comparison report of finished runs."""
        return accepted(service.ask_comparison(question))

    @app.post("/api/checks", response_model=schema.JobStatus, status_code=202)
    def check(question: schema.CheckQuestion) -> Any:
        """Ask for the health check of a store, or of what `kronos-qlib ingest` makes of a file."""
        return accepted(service.ask_check(question))

    @app.post("/api/records", response_model=schema.JobStatus, status_code=202)
    def record(question: schema.RecordQuestion) -> Any:
        """Ask for what came to be filled in the ledger, and for its record to be judged with paper portfolios."""
        return accepted(service.ask_record(question))

    def add(place: str, kind: str) -> None:
        @app.get(f"/api/{place}/{{job_id}}", response_model=schema.JobStatus, name=f"{kind}_status")
        def status(job_id: str) -> Any:
            """Say where a job stands, with its result when it is done."""
            return JSONResponse(service.status(service.job(kind, job_id)))

        @app.delete(f"/api/{place}/{{job_id}}", response_model=schema.JobStatus, name=f"{kind}_cancel")
        def cancel(job_id: str) -> Any:
            """Cancel a job that waits or is being answered."""
            return JSONResponse(service.status(service.cancel(kind, job_id), result=False))

        @app.get(f"/api/{place}/{{job_id}}/events", name=f"{kind}_events", response_class=StreamingResponse)
        async def events(job_id: str) -> Any:
            """Tell where a job stands as server-sent events: queued, progress, and result, failed or cancelled."""
            job = service.job(kind, job_id)
            return StreamingResponse(_events(service, job), media_type="text/event-stream")

    for place, kind in service.places.items():
        add(place, kind)

    @app.get("/api/comparisons/{job_id}/report", response_class=HTMLResponse)
    def report(job_id: str) -> Any:
        """Return the page of a comparison, for a sandboxed frame."""
        return HTMLResponse(service.report(job_id))


def _add_records(app: FastAPI, service: Service) -> None:
    @app.get("/api/runs")
    def runs() -> list[dict[str, Any]]:
        """List the finished runs of the MLflow store."""
        return service.runs()

    @app.get("/api/ledger")
    def ledger() -> dict[str, Any]:
        """Return what the ledger has: sets of forecasts, and what its record is worth."""
        return service.ledger()

    @app.get("/api/ledger/{set_id}")
    def ledger_set(set_id: int) -> dict[str, Any]:
        """Return the rows of one set of forecasts: scores, quantiles, and what came."""
        return service.ledger_set(set_id)


def _add_page(app: FastAPI) -> None:
    spec = find_spec("plotly")  # its folder only: to import it takes a second
    assert spec is not None and spec.submodule_search_locations
    plotly = Path(spec.submodule_search_locations[0]) / "package_data" / "plotly.min.js"
    files = {path.name: path for path in PAGE.iterdir() if path.suffix in _KINDS}
    headers = {"Cache-Control": "no-cache"}

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(files["index.html"], headers=headers)

    @app.get("/page/{name}", include_in_schema=False)
    def part(name: str) -> FileResponse:
        path = plotly if name == "plotly.min.js" else files.get(name)
        if path is None:
            raise Problem(404, "There is no such part of the page.")
        kind = f"{_KINDS[path.suffix]}; charset=utf-8"
        return FileResponse(path, media_type=kind, headers=headers)


async def _events(service: Service, job: Job) -> AsyncIterator[bytes]:
    shown = None
    with suppress(asyncio.CancelledError):
        async for changed in service.queue(job.task.kind).changes(job, HEARTBEAT):
            if not changed:
                yield b": still here\n\n"
                continue
            names = {"queued": "queued", "running": "progress", "done": "result"}
            status = service.status(job)
            name = names.get(status["state"], status["state"])
            if name in ("queued", "progress"):
                del status["question"], status["result"], status["problem"]
                if status["partial"] is shown:  # said before
                    del status["partial"]
                else:
                    shown = status["partial"]
            yield f"event: {name}\ndata: {json.dumps(status, ensure_ascii=False)}\n\n".encode()


async def _problem(_: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return Response(error.body(), error.status, error.headers, MEDIA_TYPE)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    if first["type"] == "json_invalid":
        return await _problem(_, Problem(400, "The request's body is no JSON."))
    name = ".".join(place) or "The request"
    if first["type"] == "string_pattern_mismatch":
        return await _problem(_, Problem(422, f"{name}: a name has no slash and no control character."))
    return await _problem(_, Problem(422, f"{name}: {first['msg']}."))


async def _http_problem(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    details = {404: "There is no such address here.", 405: "This address does not answer such a request."}
    headers = dict(error.headers or {})
    return await _problem(_, Problem(error.status_code, details.get(error.status_code, str(error.detail)), headers))


async def _failure(_: Request, __: Exception) -> Response:
    return await _problem(_, Problem(500, "Something failed here; the server's log says what."))
