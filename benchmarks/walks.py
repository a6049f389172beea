"""Windows of random walks, as many as a benchmark wants, and a forecast of them."""

import numpy as np
import pandas as pd
import torch

from kronos_qlib import Kronos, KronosTokenizer
from kronos_qlib.data.stamps import stamps
from kronos_qlib.data.windows import Bars, Windows
from kronos_qlib.forecast.engine.sampling import Sampling
from kronos_qlib.forecast.forecaster import choose_batch_size
from kronos_qlib.forecast.task import Task, future_stamps
from kronos_qlib.nn import zoo


def make_windows(instruments: int, days: int, lookback: int, count: int | None = None) -> Windows:
    """The last `count` windows, day by day, of instruments that walk randomly (all there are by default)."""
    random = np.random.default_rng(0)
    values = np.empty((instruments * days, 6), np.float32)
    for start in range(0, instruments, 100):  # a hundred instruments at a time: they may be many
        here = min(100, instruments - start)
        close = 10 * np.exp(np.cumsum(random.normal(0, 0.02, (here, days)), axis=1))
        prices = close[..., None] * (1 + random.normal(0, 0.005, (here, days, 4)))
        volume = 1e6 * np.exp(random.normal(0, 0.5, (here, days, 1)))
        bars = np.concatenate([prices, volume, volume * prices.mean(-1, keepdims=True)], -1)
        values[start * days : (start + here) * days] = bars.reshape(-1, 6)
    dates = pd.bdate_range("2015-01-05", periods=days)
    bars = Bars(
        values=values,
        stamp=np.tile(stamps(dates).astype(np.int8), (instruments, 1)),
        dates=np.tile(dates.to_numpy("datetime64[ns]"), instruments),
        offsets=np.arange(instruments + 1) * days,
        instruments=tuple(f"W{number:06d}" for number in range(instruments)),
    )
    ends = (np.arange(lookback - 1, days)[:, None] + np.arange(instruments) * days).reshape(-1)
    return Windows(bars, ends[-count:] if count else ends, lookback, 0)


def make_task(model: str, windows: Windows, horizon: int, samples: int, sharpen: float = 5.0) -> Task:
    """New networks of the zoo's shapes, with heads as sharp as trained ones, and the windows to forecast."""
    torch.manual_seed(0)
    entry = zoo.MODELS[model]
    network = Kronos(**entry.config)
    with torch.no_grad():
        for head in (network.head.proj_s1, network.head.proj_s2):
            head.weight *= sharpen
    return Task(
        tokenizer=KronosTokenizer(**zoo.TOKENIZERS[entry.tokenizer].config),
        model=network,
        windows=windows,
        future_stamp=future_stamps(windows, horizon, _stamps_after),
        sampling=Sampling(samples, 0.6, 0, 0.9, s2_rotation="aligned"),
        max_context=512,
        batch_size=choose_batch_size(entry.config, windows.lookback, horizon, samples, torch.device("cpu")),
    )


def _stamps_after(dates: np.ndarray, horizon: int) -> np.ndarray:
    return np.stack([stamps(pd.bdate_range(date, periods=horizon + 1)[1:]) for date in dates])
