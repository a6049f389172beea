"""Time stamps of bars: the five fields of date and time that Kronos embeds."""

import numpy as np
import pandas as pd

STAMP_FIELDS = ("minute", "hour", "weekday", "day", "month")


def stamps(timestamps: pd.DatetimeIndex | pd.Series | np.ndarray) -> np.ndarray:
    """Return minute, hour, weekday (Monday 0), day and month of each timestamp, on the clock of its zone if it has one.

    Args:
        timestamps: of any shape `[...]`; a `DatetimeIndex` or a Series has one axis.

    Returns:
        int64 `[..., 5]`, in the order of `STAMP_FIELDS`.
    """
    if isinstance(timestamps, pd.DatetimeIndex):
        index = timestamps
    else:
        index = pd.DatetimeIndex(np.asarray(timestamps).reshape(-1))
    # DatetimeIndex.weekday is deprecated in pandas 3.1
    fields = (index.minute, index.hour, index.day_of_week, index.day, index.month)
    return np.stack([np.asarray(field, np.int64) for field in fields], axis=-1).reshape(*np.shape(timestamps), 5)
