"""A server in this process: the demo market, tiny networks, and a client that asks it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from networks import make_networks
from starlette.testclient import TestClient

from kronos_qlib.data.demo_market import write_demo_market
from kronos_qlib.web.app import make_app
from kronos_qlib.web.settings import Limits, ServerSettings

ADDRESS = "http://127.0.0.1"
QUESTION = {"source": "market", "instrument": "DEMO0001", "lookback": 30, "horizon": 5, "samples": 8}
Make = Callable[..., TestClient]


@pytest.fixture(scope="session")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_market(tmp_path_factory.mktemp("store") / "market", instruments=12, days=160)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("networks") / "tiny"
    tokenizer, model = make_networks()
    tokenizer.save_pretrained(folder / "tokenizer")
    model.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def settings(market: Path, checkpoint: Path, tmp_path: Path) -> ServerSettings:
    return ServerSettings({"market": market}, {"tiny": str(checkpoint)}, tmp_path / "uploads")


@pytest.fixture
def make_client(settings: ServerSettings) -> Iterator[Make]:
    """Makes servers of changed settings and limits; they end with the test."""
    opened = []

    def make(limits: dict[str, Any] | None = None, **changes: Any) -> TestClient:
        own = replace(settings, limits=Limits(**(limits or {})), **changes)
        client = TestClient(make_app(own), ADDRESS, raise_server_exceptions=False)
        opened.append(client.__enter__())
        return client

    yield make
    for client in opened:
        client.__exit__(None, None, None)


@pytest.fixture
def client(make_client: Make) -> TestClient:
    return make_client()


def wait_for(client: TestClient, place: str, job_id: str, seconds: float = 60.0) -> dict[str, Any]:
    """Ask for a job until it has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        status = client.get(f"/api/{place}/{job_id}").json()
        if status["state"] not in ("queued", "running"):
            return status
        time.sleep(0.02)
    raise AssertionError(f"the job has not ended in {seconds} s")


def ask(client: TestClient, **changes: Any) -> dict[str, Any]:
    """Ask for a forecast, and wait for it."""
    answer = client.post("/api/forecasts", json=QUESTION | changes)
    assert answer.status_code == 202, answer.text
    return wait_for(client, "forecasts", answer.json()["id"])
