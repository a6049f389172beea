"""Memory of forecasting a universe as large as all A-shares: 5,000 instruments × 10 years of six columns.

    python benchmarks/universe.py                    # five minutes, most of it for making the bars and their digests
    python benchmarks/universe.py --instruments 1000

All of them would take most of a day, so only the first chunks are computed. All else is as in a whole forecast: every
window is planned and looked for in the cache by its digest, and the result has room for all of them. Memory is the
largest resident size of the process, imports included.
"""

import argparse
import resource
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from machine import describe, peak_memory, timed
from walks import make_task, make_windows

from kronos_qlib.forecast import run as runs
from kronos_qlib.forecast.chunk_store import ChunkStore, divide

LOOKBACK, HORIZON, SAMPLES, DAYS = 90, 10, 5, 2430


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instruments", type=int, default=5000, help="(default: %(default)s)")
    parser.add_argument("--chunks", type=int, default=4, help="that are computed (default: %(default)s)")
    options = parser.parse_args()
    print(describe())
    before = peak_memory(resource.RUSAGE_SELF)
    windows = make_windows(options.instruments, DAYS, LOOKBACK)
    print(f"windows   {len(windows):,} of {len(windows.bars):,} bars")
    task = make_task("nano", windows, HORIZON, SAMPLES)
    with tempfile.TemporaryDirectory() as folder:
        store, result = ChunkStore(Path(folder), task), runs._Columns(len(task), ["mean_return"])
        seconds = timed(lambda: list(store.read(runs.CHUNK_WINDOWS)))
        missing = divide(np.ones(len(task), bool), runs.CHUNK_WINDOWS)
        print(f"planned   {len(missing):,} chunks in {seconds:.0f} s, peak {peak_memory(resource.RUSAGE_SELF):.0f} MiB")
        for rows, table in islice(runs._compute_here(task, store, missing, lambda count: None), options.chunks):
            result.put(rows, table)
        print(f"computed  {options.chunks} chunks, peak {peak_memory(resource.RUSAGE_SELF):.0f} MiB")
        there = sum(len(rows) for rows, _ in store.read(runs.CHUNK_WINDOWS))
        print(f"resumed   {there:,} windows, peak {peak_memory(resource.RUSAGE_SELF):.0f} MiB")
    print(f"of which  {before:.0f} MiB before the bars, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
