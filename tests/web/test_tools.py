"""The tools of `kronos-qlib mcp`, asked as an assistant asks them."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from ledgers import signal_set
from questions import QUESTION

from kronos_qlib.live.ledger import Ledger
from kronos_qlib.web.settings import ServerSettings

mcp = pytest.importorskip("mcp")


def call(server: Any, *calls: tuple[str, dict]) -> list[Any]:
    """Call tools one after the other; an error is its text."""

    async def run() -> list[Any]:
        found = []
        async with mcp.Client(server) as client:
            for name, arguments in calls:
                answer = await client.call_tool(name, arguments)
                text = "".join(part.text for part in answer.content)
                found.append(f"error: {text}" if answer.is_error else answer.structured_content or text)
        return found

    return asyncio.run(run())


def test_an_assistant_finds_forecasts_and_ranks(settings: ServerSettings, market: Path):
    from kronos_qlib.web.tools import make_tools

    ranking = {"store": "market", "universe": "demo", "lookback": 20, "horizon": 3, "samples": 2}
    sources, names, forecast, ranked, unknown, large, ledger = call(
        make_tools(settings),
        ("sources", {}),
        ("instruments", {"source": "market", "query": "0001"}),
        ("forecast", {"question": QUESTION | {"at": "2018-07-02"}}),
        ("rank", {"question": ranking}),
        ("forecast", {"question": QUESTION | {"source": "elsewhere"}}),
        ("forecast", {"question": QUESTION | {"samples": 5000}}),
        ("ledger", {}),
    )
    assert sources["stores"][0]["name"] == "market" and str(market.parent) not in json.dumps(sources)
    assert names["instruments"] == ["DEMO0001"]
    assert len(forecast["quantiles"]["q50"]) == 5 and forecast["figures"]["came"] == 5 and "bars" not in forecast
    assert ranked["rows"][0]["rank"] == 1 and "sparkline" not in ranked["rows"][0]
    assert unknown.startswith("error") and "no store or upload" in unknown
    assert large.startswith("error") and "1,000 is the most" in large
    assert "has no ledger" in ledger


@pytest.mark.slow
def test_the_command_speaks_the_protocol_over_stdin_and_stdout(market: Path, checkpoint: Path, tmp_path: Path):
    url = f"sqlite:///{tmp_path}/ledger.db"
    Ledger(url).record(signal_set(), region="cn")
    arguments = ["-m", "kronos_qlib", "mcp", "--store", str(market), "--model", str(checkpoint), "--ledger", url]
    server = mcp.StdioServerParameters(command=sys.executable, args=arguments, env=dict(os.environ))
    forecast, ledger = call(server, ("forecast", {"question": QUESTION}), ("ledger", {}))
    assert len(forecast["times"]) == 5
    assert ledger["sets"][0]["experiment"] == "kronos_csi300"
