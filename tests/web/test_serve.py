"""`kronos-qlib serve` as a process: what it refuses at start, a crowd, a file of a gigabyte, a client that goes."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import uvicorn
from questions import QUESTION

from kronos_qlib.cli import main
from kronos_qlib.web.safety import PunctualProtocol


@contextmanager
def served(market: Path, checkpoint: Path, *more: str) -> Iterator[tuple[str, psutil.Process]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "kronos_qlib", "serve", "--store", str(market), "--model", str(checkpoint)]
    process = subprocess.Popen(
        [*command, "--port", str(port), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert f"http://127.0.0.1:{port}" in process.stdout.readline()
        end = time.monotonic() + 30
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < end
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(20)


def fetch(address: str, question: dict | None = None) -> tuple[int, dict]:
    body = None if question is None else json.dumps(question).encode()
    try:
        with urllib.request.urlopen(
            urllib.request.Request(address, body, {"Content-Type": "application/json"})
        ) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def wait_until_done(address: str, question: dict) -> None:
    _, job = fetch(f"{address}/api/forecasts", question)
    while (state := fetch(f"{address}/api/forecasts/{job['id']}")[1]["state"]) != "done":
        assert state in ("queued", "running")
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--host", "0.0.0.0"], "name a --token"),
        (["--token", "short"], "16"),
        (["--store", "/nowhere"], "no Qlib store"),
        (["--model", "unknown"], "neither a folder nor one of"),
    ],
)
def test_what_cannot_be_served_is_one_line(options: list[str], reason: str, capsys: pytest.CaptureFixture[str]):
    assert main(["serve", *options]) == 2
    told = capsys.readouterr().err
    assert told.startswith("kronos-qlib serve: error: ") and reason in told and told.count("\n") == 1


@pytest.mark.slow
@pytest.mark.long
def test_two_hundred_at_once_are_answered_and_the_next_request_works(market: Path, checkpoint: Path):
    with served(market, checkpoint) as (address, process):
        fetch(f"{address}/api/forecasts", QUESTION)
        before, threads = process.memory_info().rss, process.num_threads()

        def ask(number: int) -> tuple[int, dict]:
            return fetch(
                f"{address}/api/forecasts", QUESTION | {"seed": number % 50, "instrument": f"DEMO000{number % 4}"}
            )

        with ThreadPoolExecutor(200) as crowd:
            answers = list(crowd.map(ask, range(200)))
        assert {status for status, _ in answers} <= {202, 429}
        taken = [content["id"] for status, content in answers if status == 202]
        assert len(taken) >= 64, "as many as may wait"
        end = time.monotonic() + 120
        while any(fetch(f"{address}/api/forecasts/{job}")[1]["state"] != "done" for job in taken):
            assert time.monotonic() < end
        assert fetch(f"{address}/api/health")[1]["waiting"] == 0
        assert fetch(f"{address}/api/forecasts", QUESTION | {"seed": 999})[0] == 202
        assert process.memory_info().rss < before + 300 * 2**20 and process.num_threads() < threads + 50


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("declared", [True, False])
def test_a_file_of_a_gigabyte_is_refused_before_it_has_come(
    market: Path, checkpoint: Path, tmp_path: Path, declared: bool
):
    with served(market, checkpoint, "--uploads", str(tmp_path / "uploads")) as (address, process):
        port, size = int(address.rpartition(":")[2]), 2**30
        length = f"Content-Length: {size}" if declared else "Transfer-Encoding: chunked"
        piece = b"x" * 2**20
        sent, answer = 0, b""
        before = process.memory_info().rss
        with socket.create_connection(("127.0.0.1", port), 30) as line:
            line.sendall(
                f"POST /api/uploads?name=big.csv HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{length}\r\n\r\n".encode()
            )
            reader = threading.Thread(target=lambda: chunks.append(line.recv(65536)))
            chunks: list[bytes] = []
            reader.start()
            try:
                while sent < size and not chunks:
                    line.sendall(piece if declared else b"%x\r\n%s\r\n" % (len(piece), piece))
                    sent += len(piece)
            except OSError:
                pass
            reader.join(30)
            answer = b"".join(chunks)
        assert b" 413 " in answer.split(b"\r\n")[0]
        assert sent < 200 * 2**20
        assert not list((tmp_path / "uploads").iterdir())
        assert process.memory_info().rss < before + 200 * 2**20
        assert fetch(f"{address}/api/health")[0] == 200


@pytest.mark.slow
@pytest.mark.long
def test_a_client_that_goes_in_the_middle_of_its_events_leaves_nothing(market: Path, checkpoint: Path):
    with served(market, checkpoint) as (address, process):
        port = int(address.rpartition(":")[2])
        _, job = fetch(f"{address}/api/forecasts", QUESTION | {"samples": 1000, "horizon": 300})
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port)) as line:
                path = f"/api/forecasts/{job['id']}/events"
                line.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
                assert b"text/event-stream" in line.recv(4096)
        request = urllib.request.Request(f"{address}/api/forecasts/{job['id']}", method="DELETE")
        assert json.loads(urllib.request.urlopen(request).read())["state"] == "cancelled"
        assert fetch(f"{address}/api/forecasts", QUESTION)[0] == 202
        end = time.monotonic() + 10
        while any(each.status == "ESTABLISHED" for each in process.net_connections()):
            assert time.monotonic() < end, "a connection of a client that has gone is still open"
            time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.long
def test_a_server_that_is_killed_in_a_forecast_starts_again_with_what_it_had(
    market: Path, checkpoint: Path, tmp_path: Path
):
    folder, ledger = tmp_path / "uploads", f"sqlite:///{tmp_path}/ledger.db"
    more = ("--uploads", str(folder), "--ledger", ledger, "--exchange", "XSHG")
    with served(market, checkpoint, *more) as (address, process):
        wait_until_done(address, QUESTION)
        assert fetch(f"{address}/api/forecasts", QUESTION | {"samples": 1000, "horizon": 60})[0] == 202
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as half:
            half.sendall(b"POST /api/uploads?name=a.csv HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\nhalf")
            while not any(folder.glob(".draft-*")):
                time.sleep(0.02)
        process.kill()
        process.wait(10)
    with served(market, checkpoint, *more) as (address, process):
        assert not list(folder.iterdir()), "half an upload is gone"
        wait_until_done(address, QUESTION | {"seed": 4})
        sets = fetch(f"{address}/api/ledger")[1]["sets"]
        assert [entry["id"] for entry in sets] == list(range(len(sets), 0, -1)) and len(sets) in (2, 3)


@pytest.mark.slow
@pytest.mark.long
def test_memory_returns_after_large_forecasts(market: Path, checkpoint: Path):
    with served(market, checkpoint) as (address, process):
        sizes = []
        for seed in range(40):
            wait_until_done(address, QUESTION | {"seed": seed, "samples": 1000, "horizon": 60})
            sizes.append(process.memory_info().rss / 2**20)
        assert max(sizes[8:]) < max(sizes[:8]) + 40, sizes  # MiB; the paths of these thirty-two take 88


class Hasty(PunctualProtocol):
    seconds = 0.3


@contextlib.asynccontextmanager
async def hasty_server(body: bytes) -> AsyncIterator[tuple[uvicorn.Server, tuple[str, int]]]:
    """A server that answers with these bytes and waits for nobody longer than 0.3 s."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    server, own = uvicorn.Server(uvicorn.Config(app, http=Hasty, log_level="error", lifespan="off")), socket.socket()
    own.bind(("127.0.0.1", 0))
    serving = asyncio.create_task(server.serve([own]))
    while not server.started:
        await asyncio.sleep(0.01)
    yield server, own.getsockname()
    server.should_exit = True
    await serving


def test_a_head_that_does_not_come_in_time_ends_its_connection():
    async def run() -> tuple[bytes, bytes, float]:
        async with hasty_server(b"") as (_, address):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answered = await reader.readuntil(b"0\r\n\r\n")
            began, rest = time.monotonic(), b""
            with contextlib.suppress(ConnectionError):  # it was reset while a byte was on its way
                for letter in b"GET / HTTP/1.1\r\nX: " + b"x" * 1000:  # one now and then keeps no connection open
                    writer.write(bytes([letter]))
                    await writer.drain()
                    await asyncio.sleep(0.02)
            with contextlib.suppress(ConnectionError):
                rest = await reader.read()
            return answered, rest, time.monotonic() - began

    answered, rest, seconds = asyncio.run(run())
    assert answered.startswith(b"HTTP/1.1 200") and rest == b"" and seconds < 10


def test_a_client_that_takes_no_answer_is_left():
    async def run() -> int:
        async with hasty_server(b"x" * 2**26) as (server, address):
            _, writer = await asyncio.open_connection(*address, limit=1024)
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while not server.server_state.connections:
                await asyncio.sleep(0.01)
            end = time.monotonic() + 10
            while server.server_state.connections and time.monotonic() < end:
                await asyncio.sleep(0.05)
            left = len(server.server_state.connections)
            writer.close()
            return left

    assert asyncio.run(run()) == 0
