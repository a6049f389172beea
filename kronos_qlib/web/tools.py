"""The tools that `kronos-qlib mcp` offers to assistants: the functions of the API, with its limits."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

from kronos_qlib.web.forecasts import prepare
from kronos_qlib.web.jobs import ENDED, Job
from kronos_qlib.web.problems import Problem
from kronos_qlib.web.schema import ComparisonQuestion, ForecastQuestion, MarketQuestion, SignalsQuestion
from kronos_qlib.web.service import Service
from kronos_qlib.web.settings import ServerSettings

_INSTRUCTIONS = """\
Forecasts of K-lines (open, high, low, close, volume) by the foundation model Kronos. First ask `sources` for the
stores, models and universes that there are. Returns are ratios: 0.05 is 5 %. A forecast is a distribution, not a
promise: say its range beside its median, and what the notes say of the model.
"""
_SENT = (
    "instrument",
    "model",
    "seen",
    "last_close",
    "times",
    "quantiles",
    "prob_up",
    "came",
    "figures",
    "notes",
    "ledger",
)
_MOST_ROWS = 100


def make_tools(settings: ServerSettings) -> MCPServer:
    """Make the server of the tools: networks are loaded at once. Raises ValueError if one cannot be."""
    service = Service(settings)

    @asynccontextmanager
    async def lifespan(_: MCPServer) -> AsyncIterator[None]:
        sys.stdout = sys.stderr  # what a library prints is no message of the protocol, which has its own hold of stdout
        try:
            yield
        finally:
            sys.stdout = sys.__stdout__
            await asyncio.to_thread(service.close)

    server = MCPServer("kronos-qlib", instructions=_INSTRUCTIONS, lifespan=lifespan, log_level="WARNING")

    @server.tool()
    def sources() -> dict[str, Any]:
        """List the stores of bars with their universes and dates, the models, the files, and the finished runs."""
        found: dict[str, Any] = {"stores": service.stores(), "models": service.models()}
        for name, given, read in (("files", settings.uploads, _files), ("runs", settings.runs, _runs)):
            if given is not None:
                found[name] = _told(read, service)
        return found

    @server.tool()
    def instruments(source: str, query: str = "") -> dict[str, Any]:
        """Search the instruments of a store or file: those whose names have the query in them, 50 at most."""
        return _told(service.instruments, source, query, 50)

    @server.tool()
    async def forecast(question: ForecastQuestion, context: Context) -> dict[str, Any]:
        """Forecast the bars of an instrument: quantiles of the close, probability up, and what came where it is known.

        A question with an earlier date `at` shows how far off the forecast would have been, beside the last value and
        historical volatility.
        """

        def submit() -> Job:
            return service.ask_forecast(prepare(question, service.sources, service.networks, settings.limits))

        answer = await _answer(service, await asyncio.to_thread(_told, submit), context)
        return {name: answer[name] for name in _SENT}

    @server.tool()
    async def rank(question: MarketQuestion, context: Context) -> dict[str, Any]:
        """Rank the instruments of a universe, or of a watchlist, by the mean return that is forecast for a date."""
        return _ranking(await _answer(service, await asyncio.to_thread(_told, service.ask_market, question), context))

    @server.tool()
    async def signals(question: SignalsQuestion, context: Context) -> dict[str, Any]:
        """Rank the universe of a finished run by its model's scores of a date, as `kronos-qlib signals` does."""
        return _ranking(await _answer(service, await asyncio.to_thread(_told, service.ask_signals, question), context))

    @server.tool()
    async def compare(question: ComparisonQuestion, context: Context) -> str:
        """Compare finished runs: IC, backtest, significance and verdicts, as `kronos-qlib compare` prints them."""
        answer = await _answer(service, await asyncio.to_thread(_told, service.ask_comparison, question), context)
        return str(answer["text"])

    @server.tool()
    def ledger(set_id: int | None = None) -> dict[str, Any]:
        """Read the ledger: the sets of forecasts and what the record is worth; or, with set_id, the rows of a set."""
        return _told(service.ledger) if set_id is None else _told(service.ledger_set, set_id)

    return server


def _ranking(answer: dict[str, Any]) -> dict[str, Any]:
    rows = [{name: value for name, value in row.items() if name != "sparkline"} for row in answer["rows"]]
    return {**answer, "rows": rows[:_MOST_ROWS], "instruments": len(rows)}


def _files(service: Service) -> list[dict[str, Any]]:
    return [
        {"id": each.id, "name": each.name, "instruments": each.instruments[:50]} for each in service.uploads().list()
    ]


def _runs(service: Service) -> list[dict[str, Any]]:
    return service.runs()


def _told(function: Any, *arguments: Any) -> Any:
    """Call a function, whose Problem becomes the tool's error: a sentence."""
    try:
        return function(*arguments)
    except Problem as problem:
        raise ToolError(problem.detail) from None


async def _answer(service: Service, job: Job, context: Context) -> dict[str, Any]:
    """Wait for a job, report its progress, and return its result. It is cancelled where nobody waits any more."""
    try:
        async for _ in service.queue(job.task.kind).changes(job, 5.0):
            await context.report_progress(job.progress, 1.0)
    finally:
        if job.state not in ENDED:
            service.cancel(job.task.kind, job.id)
    if job.result is None:
        raise ToolError(job.problem["detail"] if job.problem else "The job was cancelled.")
    return job.result
