"""Questions made from the API's schema: each is answered as the schema says, and none with a failure of the server."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from ledgers import signal_set
from starlette.testclient import TestClient

from kronos_qlib.live.ledger import Ledger
from kronos_qlib.web.app import make_app
from kronos_qlib.web.settings import Limits, ServerSettings

schemathesis = pytest.importorskip("schemathesis")
checks = schemathesis.checks
CHECKS = [checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance]
CHECKS += [checks.response_schema_conformance, checks.allow_header_conformance]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def schema(market: Path, checkpoint: Path, database: Path, tmp_path_factory: pytest.TempPathFactory):
    limits = Limits(lookback=40, horizon=5, samples=4, bars=2000, upload_bytes=20_000)
    folder = tmp_path_factory.mktemp("server")
    Ledger(ledger := f"sqlite:///{folder}/ledger.db").record(signal_set(), region="cn")
    names = {"stores": {"market": market}, "models": {"tiny": str(checkpoint)}, "uploads": folder / "uploads"}
    own = ServerSettings(
        **names, ledger=ledger, runs=f"sqlite:///{database}", hosts=("testserver",), exchange="XSHG", limits=limits
    )
    app = make_app(own)
    with TestClient(app):
        yield schemathesis.openapi.from_asgi("/api/openapi.json", app)


def test_every_answer_is_as_the_schema_says(schema):
    asked = 0
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.as_strategy())
        def ask(case):
            case.call_and_validate(checks=CHECKS)

        ask()
        asked += 1
    assert asked > 20
