"""A forecast so small that it takes a second, and a process of its own that works on it."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from forks import forked
from networks import make_networks
from walks import random_walks

from kronos_qlib.data.stamps import stamps
from kronos_qlib.data.windows import Windows
from kronos_qlib.forecast import chunk_store as store
from kronos_qlib.forecast import run as runs
from kronos_qlib.forecast.engine.sampling import Sampling
from kronos_qlib.forecast.forecaster import quantile_columns
from kronos_qlib.forecast.run import Execution, forecast
from kronos_qlib.forecast.scores import SCORES
from kronos_qlib.forecast.task import Task, future_stamps

LOOKBACK, HORIZON, DAYS, NAMES = 20, 3, 120, ("A", "B", "C", "D", "E")
BITS = {"s1_bits": 6, "s2_bits": 6}
COLUMNS = ["last_close", *SCORES, *quantile_columns(HORIZON)]


def make_windows(last=DAYS, seed=0):
    """A window of each of five random walks on each day from the 20th up to `last`, day by day."""
    bars = random_walks(NAMES, DAYS, seed)
    ends = (np.arange(LOOKBACK - 1, last)[:, None] + np.arange(len(NAMES)) * DAYS).reshape(-1)
    return Windows(bars, ends, LOOKBACK, 0)


def make_task(windows=None, samples=3, seed=1, **changes):
    """New networks and the windows that they are to forecast, a few at a time."""
    windows = windows or make_windows()
    tokenizer, model = make_networks(BITS, BITS)
    return Task(
        tokenizer=tokenizer,
        model=model,
        windows=windows,
        future_stamp=future_stamps(windows, HORIZON, stamps_after),
        sampling=Sampling(samples, seed=seed),
        max_context=64,
        **{"batch_size": 8} | changes,
    )


def stamps_after(dates, horizon):
    return np.stack([stamps(pd.bdate_range(date, periods=horizon + 1)[1:]) for date in dates])


def with_bar_changed(windows, instrument, day):
    """The same windows after one instrument's bar of one day has been put right."""
    values = windows.bars.values.copy()
    values[instrument * DAYS + day] *= 1.01
    return replace(windows, bars=replace(windows.bars, values=values))


def run(task, cache_dir=None, **options):
    return forecast(task, Execution(Path(cache_dir) if cache_dir else None, **options), COLUMNS)


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def chunks(cache_dir):
    return sorted(Path(cache_dir).glob("*/chunk-*.parquet"))


def started(cache_dir, slow=False, **options):
    """A process of its own that works on the task; a slow one rests after every chunk."""
    return forked(Path(cache_dir).with_suffix(".txt"), _work, cache_dir, slow, options)


def _work(cache_dir, slow, options):
    runs.CHUNK_WINDOWS, write = 64, store.ChunkStore.write
    if slow:
        store.ChunkStore.write = lambda *given: (write(*given), time.sleep(0.2))[0]
    run(make_task(), cache_dir, **options)
