"""How fast `kronos-qlib serve` answers: alone, to many clients at once, and how soon its page is there.

    python benchmarks/page.py
    python benchmarks/page.py --clients 1 20 --seconds 20
    python benchmarks/page.py --authors http://127.0.0.1:7070 bars.csv     the authors' page, where its code runs

The server is a process of its own on a synthetic market, with nano and with a network of mini's shape and new weights.
- One forecast: nano, 400 + 20 bars × 100 paths asked for (nano sees the last 80, as it was trained on windows of 100);
  from the request to the answer, each with a seed of its own. The limit is its matrix products at the rate of 2048²
  products on all cores.
- Clients: each asks for a forecast of 90 + 10 bars × 20 paths by mini's shape, waits for its answer and asks again;
  instruments and seeds differ, so that nothing is answered from what is kept. A client that is refused (429) waits as
  long as it is told and asks again; its time counts from the first request.
- First paint: Chromium's own measure, and when the page can be used; each time a new browser without a cache.

The authors' page has no samples to choose from beyond a mean, takes the first rows of a file and answers one request at
a time; it is asked for the same bars, horizon and samples by its own /api/predict, its model loaded beforehand.
"""

import argparse
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe, matrix_rate
from table import print_row
from work import attention, linears, triangle

from kronos_qlib import Kronos, KronosTokenizer
from kronos_qlib.data.demo_market import write_demo_market
from kronos_qlib.nn import zoo

ALONE = {"model": "nano", "lookback": 400, "horizon": 20, "samples": 100}
CLIENT = {"model": "mini-shape", "lookback": 90, "horizon": 10, "samples": 20}
INSTRUMENTS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 20, 100], help="(default: 1 20 100)")
    parser.add_argument("--seconds", type=float, default=40.0, help="for each number of clients (default: 40)")
    parser.add_argument("--rounds", type=int, default=15, help="forecasts one after the other (default: 15)")
    parser.add_argument("--authors", nargs=2, metavar=("URL", "FILE"), help="also ask the authors' page")
    options = parser.parse_args()
    print(describe("fastapi", "uvicorn"))
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder)) as address:
        ask = asker(address)
        alone(ask, options.rounds)
        for number, clients in enumerate(options.clients):
            print_row(load(ask, clients, options.seconds), with_heading=not number)
        paint(address)
    if options.authors:
        ask = authors(*options.authors)
        for number, clients in enumerate(options.clients):
            print_row(load(ask, clients, options.seconds), with_heading=not number)


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Start the command on a market, with nano and with new weights in mini's shape; give its address."""
    market = write_demo_market(folder / "market", instruments=INSTRUMENTS, days=500)
    shape = folder / "mini-shape"
    torch.manual_seed(0)
    KronosTokenizer(**zoo.TOKENIZERS[zoo.MODELS["mini"].tokenizer].config).save_pretrained(shape / "tokenizer")
    Kronos(**zoo.MODELS["mini"].config).save_pretrained(shape / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "kronos_qlib", "serve", "--store", str(market), "--model", "nano"]
    command += ["--model", str(shape), "--port", str(port)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, "the server did not start"
                time.sleep(0.05)
        print(f"started in {time.perf_counter() - started:.1f} s")
        yield address
    finally:
        process.terminate()
        process.wait(20)


def asker(address: str) -> Callable[[int], int]:
    """Return a function that asks for the forecast of a number, waits for it, and counts how often it was refused."""

    def ask(number: int, question: dict[str, Any] = CLIENT) -> int:
        asked = {"source": "market", "instrument": f"DEMO{number % INSTRUMENTS:04d}", "seed": number} | question
        refused = 0
        while True:
            try:
                status = request(f"{address}/api/forecasts", asked)
                break
            except urllib.error.HTTPError as error:
                if error.code != 429:
                    raise
                refused += 1
                time.sleep(float(error.headers["Retry-After"]))
        with urllib.request.urlopen(f"{address}/api/forecasts/{status['id']}/events", timeout=300) as events:
            last = [line for line in events.read().decode().splitlines() if line.startswith("data: ")][-1]
        answer = json.loads(last.removeprefix("data: "))
        assert answer["state"] == "done", answer
        return refused

    return ask


def authors(address: str, file: str) -> Callable[[int], int]:
    """Return a function that asks the authors' page for the same forecast."""
    shape = {"lookback": CLIENT["lookback"], "pred_len": CLIENT["horizon"], "sample_count": CLIENT["samples"]}

    def ask(_: int) -> int:
        request(f"{address}/api/predict", {"file_path": file, "temperature": 1.0, "top_p": 1.0, **shape})
        return 0

    return ask


def request(address: str, content: dict[str, Any]) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(address, json.dumps(content).encode(), headers)
    with urllib.request.urlopen(asked, timeout=600) as answer:
        return json.load(answer)


def alone(ask: Callable[..., int], rounds: int) -> None:
    """Time forecasts of nano one after the other."""
    taken = []
    for number in range(rounds + 2):
        started = time.perf_counter()
        ask(number, ALONE)
        taken.append(time.perf_counter() - started)
    taken = taken[2:]  # the first two warm up
    limit = products() / (matrix_rate(torch.float32) * 1e9)
    print(
        f"one forecast, nano, 80 + 20 × 100: median {statistics.median(taken):.2f} s, best {min(taken):.2f} s, "
        f"longest {max(taken):.2f} s; its products take {limit:.2f} s"
    )


def products() -> float:
    """Floating-point operations of nano's forecast: tokenizer and network over 80 bars, and 20 steps of 100 paths."""
    config, seen, steps, paths = zoo.MODELS["nano"].config, 80, 20, 100
    own = sum(seen + step for step in range(steps)) * paths
    network = linears(config, seen + steps * paths) + attention(config, triangle(seen) + own)
    heads = 2 * steps * paths * config["d_model"] * (2 ** config["s1_bits"] + 2 ** config["s2_bits"])
    return config["n_layers"] * network + heads


def load(ask: Callable[[int], int], clients: int, seconds: float) -> dict[str, float | str]:
    """Let clients ask for some time, and say how many were answered and how long they waited."""
    numbers, lock, taken, refused = iter(range(1_000_000 * clients, 10**12)), threading.Lock(), [], []
    begin = time.perf_counter()

    def client() -> None:
        while time.perf_counter() - begin < seconds:
            with lock:
                number = next(numbers)
            started = time.perf_counter()
            again = ask(number)
            with lock:
                taken.append(time.perf_counter() - started)
                refused.append(again)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent = time.perf_counter() - begin
    return {
        "clients": clients,
        "forecasts a minute": f"{60 * len(taken) / spent:.0f}",
        "median": f"{statistics.median(taken):.2f} s",
        "p95": f"{np.quantile(taken, 0.95):.2f} s",
        "refused first": f"{sum(count > 0 for count in refused)} of {len(refused)}",
    }


def paint(address: str, rounds: int = 5) -> None:
    """Time the page in Chromium, where it and playwright are installed."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        chromium = None
    if chromium is None:
        print("first paint: no Chromium with playwright here (make test-web)")
        return
    first, usable = [], []
    with sync_playwright() as playwright:
        for _ in range(rounds):
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page()
            page.goto(address)
            page.wait_for_selector("html[data-ready]")
            usable.append(page.evaluate("performance.now()"))
            page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length > 0")
            first.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
            browser.close()
    print(
        f"first paint {statistics.median(first):.0f} ms, usable after {statistics.median(usable):.0f} ms (of {rounds})"
    )


if __name__ == "__main__":
    main()
