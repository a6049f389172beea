"""A server in this process: the demo market, tiny networks, and a client that asks it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from networks import make_networks
from questions import Make
from starlette.testclient import TestClient

from kronos_qlib.data.demo_market import write_demo_market
from kronos_qlib.web.app import make_app
from kronos_qlib.web.settings import Limits, ServerSettings

ADDRESS = "http://127.0.0.1"


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
