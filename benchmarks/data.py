"""Time and memory from a Qlib store to windows: loading a universe, and normalising 10,000 windows on one core.

    QLIB_DATA=/path/to/cn_data python benchmarks/data.py

Run it twice: the first time may wait for the disk.
"""

import argparse
import logging
import os
import resource
import statistics
import time
from pathlib import Path

import numpy as np
import qlib
from machine import describe, peak_memory
from qlib.config import C

from kronos_qlib import KLineDataset, KLineHandler

LOOKBACK, HORIZON = 90, 10  # a training window is 90 + 10 + 1 bars


def load(universe: str) -> tuple[KLineHandler, float]:
    """A handler whose bars and membership are loaded, and the seconds that took."""
    started = time.perf_counter()
    handler = KLineHandler(universe)
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
    options = parser.parse_args()

    print(describe("pandas", "pyqlib"))
    qlib.init(provider_uri=str(Path(options.qlib_data).expanduser()), region="cn", logging_level=logging.WARNING)
    before = peak_memory(resource.RUSAGE_SELF)
    handler, loading = load(options.universe)
    ours, worker = peak_memory(resource.RUSAGE_SELF), peak_memory(resource.RUSAGE_CHILDREN)
    bars = handler.bars()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    seconds = normalise_windows(handler, options.windows, options.repeats)

    first, last = (np.datetime_as_string(date, unit="D") for date in (bars.dates.min(), bars.dates.max()))
    print(f"store     {options.qlib_data}, universe {options.universe}")
    print(f"bars      {len(bars):,} of {len(bars.instruments)} instruments, {first} … {last}")
    print()
    print(f"load handler, bars, members     {loading:8.2f} s")
    print(f"  peak memory, this process     {ours:8.0f} MiB  ({before:.0f} MiB of it before loading)")
    if C.kernels > 1:
        print(f"  peak memory, largest worker   {worker:8.0f} MiB  (Qlib read with up to {C.kernels} of them)")
    print(f"normalise {options.windows:,} × {LOOKBACK + HORIZON + 1} × 6, {len(seconds)} times on one core")
    print(f"  best                          {min(seconds):8.3f} s")
    print(f"  median                        {statistics.median(seconds):8.3f} s")


if __name__ == "__main__":
    main()
