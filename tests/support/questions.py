"""Questions to a server in this process, and their answers."""

import time
from collections.abc import Callable
from typing import Any

from starlette.testclient import TestClient

QUESTION = {"source": "market", "instrument": "DEMO0001", "lookback": 30, "horizon": 5, "samples": 8}
Make = Callable[..., TestClient]


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
