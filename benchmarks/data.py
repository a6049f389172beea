"""Time and memory from a Qlib store to windows: loading a universe, and normalising 10,000 windows on one core.

    QLIB_DATA=/path/to/cn_data python benchmarks/data.py
    python benchmarks/data.py --minutes              # 17 million bars of five minutes, synthetic; two minutes more

Run it twice: the first time may wait for the disk. With `--minutes` a demo market of 300 instruments and five years is
written first (half a GiB, removed afterwards), and Qlib's own loader then reads the same fields of it.
"""

import argparse
import contextlib
import logging
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import qlib
from machine import cores, describe, peak_memory
from qlib.data import D

from kronos_qlib import KLineDataset, KLineHandler
from kronos_qlib.data.demo_market import UNIVERSE, write_demo_market
from kronos_qlib.data.handler import LABEL

LOOKBACK, HORIZON = 90, 10  # a training window is 90 + 10 + 1 bars


MINUTES = {"instruments": 300, "days": 1215}  # five years of 48 bars a day


def load(universe: str, freq: str) -> tuple[KLineHandler, float]:
    """A handler whose bars and membership are loaded, and the seconds that took."""
    started = time.perf_counter()
    handler = KLineHandler(universe, freq=freq)
    handler.bars(), handler.members()
    return handler, time.perf_counter() - started


def normalise_windows(handler: KLineHandler, count: int, repeats: int) -> list[float]:
    """Seconds that it took to normalise `count` random windows, each of `repeats` times, after one not counted."""
    windows = KLineDataset(handler, {"all": [None, None]}, LOOKBACK, HORIZON).training_windows("all")
    random, seconds = np.random.default_rng(0), []
    for _ in range(repeats + 1):
        rows = random.integers(0, len(windows), count)
        started = time.perf_counter()
        batch = windows.normalised(rows)
        seconds.append(time.perf_counter() - started)
        assert batch.x.shape == (count, LOOKBACK + HORIZON + 1, 6)
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("QLIB_DATA") or "~/.qlib/qlib_data/cn_data"
    parser.add_argument("--qlib-data", default=default, help=f"the Qlib store (default: QLIB_DATA, now {default})")
    parser.add_argument("--universe", default="csi300", help="universe of the store (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=10_000, help="windows at a time (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="times measured (default: %(default)s)")
    parser.add_argument("--minutes", action="store_true", help="of a synthetic market of 5-minute bars instead")
    options = parser.parse_args()

    print(describe("pandas", "pyqlib"))
    with contextlib.ExitStack() as stack:
        freq, folder = "day", str(Path(options.qlib_data).expanduser())
        if options.minutes:
            freq, options.universe = "5min", UNIVERSE
            options.qlib_data = folder = stack.enter_context(tempfile.TemporaryDirectory())
            # By a process of its own, whose memory is not counted here.
            make = partial(write_demo_market, f"{folder}/market", **MINUTES, freq=freq)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                folder = str(pool.submit(make).result())
        measure(options, folder, freq)


def measure(options: argparse.Namespace, folder: str, freq: str) -> None:
    """Load, normalise, and print what it took."""
    qlib.init(provider_uri={freq: folder}, region="cn", kernels=cores(), logging_level=logging.ERROR)
    before = peak_memory(resource.RUSAGE_SELF)
    handler, loading = load(options.universe, freq)
    ours = peak_memory(resource.RUSAGE_SELF)
    bars = handler.bars()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    seconds = normalise_windows(handler, options.windows, options.repeats)

    first, last = (np.datetime_as_string(date, unit="D") for date in (bars.dates.min(), bars.dates.max()))
    print(f"store     {options.qlib_data}, universe {options.universe}")
    print(f"bars      {len(bars):,} of {len(bars.instruments)} instruments, {first} … {last}")
    print()
    print(f"load handler, bars, members     {loading:8.2f} s")
    if options.minutes:
        del handler
        fields = [f"${name}" for name in ("open", "high", "low", "close", "volume", "change")] + [LABEL]
        started = time.perf_counter()
        D.features(sorted(bars.instruments), fields, freq=freq)
        print(f"  Qlib's D.features alone       {time.perf_counter() - started:8.2f} s  (the same fields)")
    print(f"  peak memory, this process     {ours:8.0f} MiB  ({before:.0f} MiB of it before loading)")
    print(f"normalise {options.windows:,} × {LOOKBACK + HORIZON + 1} × 6, {len(seconds)} times on one core")
    print(f"  best                          {min(seconds):8.3f} s")
    print(f"  median                        {statistics.median(seconds):8.3f} s")


if __name__ == "__main__":
    main()
