"""Bars of random walks, the market of all tests that need windows but no Qlib store."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from kronos_qlib.data.stamps import stamps
from kronos_qlib.data.windows import Bars

FIRST_DAY = "2020-01-01"


def random_walks(names: Sequence[str], days: int, seed: int = 0) -> Bars:
    """Daily bars of independent walks about 20, on business days; high and low enclose open and close."""
    rng = np.random.default_rng(seed)
    count = len(names)
    close = 20 * np.exp(np.cumsum(rng.normal(0, 0.02, (count, days)), 1))
    spread = np.abs(rng.normal(0, 0.01, (count, days)))
    volume = np.exp(rng.normal(10, 0.5, (count, days)))
    columns = [close * (1 - spread / 2), close * (1 + spread), close * (1 - spread), close, volume, volume * close]
    dates = pd.bdate_range(FIRST_DAY, periods=days)
    return Bars(
        values=np.stack(columns, -1).reshape(-1, 6).astype(np.float32),
        stamp=np.tile(stamps(dates), (count, 1)).astype(np.int8),
        dates=np.tile(dates.to_numpy("datetime64[ns]"), count),
        offsets=np.arange(count + 1) * days,
        instruments=tuple(names),
    )
