"""Joins sets of windows, of one Qlib store or of several, into one training set."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kronos_qlib.data.windows import Bars, Windows


def join_windows(sources: Sequence[tuple[str, Windows]]) -> Windows:
    """Join the windows of several sources in their order; those of one store with equal instrument and date count once.

    A source is (store, windows). Sources of one store have the same name of the store, and the first of them that has a
    window gives it. The name goes before those of the instruments (`us_data:AAPL`), so that these and the random keys
    are unambiguous; that of the dataset's own store is empty and changes nothing.

    The first source's bars stay whole, at the same rows: other windows on them, such as the validation set, stay what
    they are on the bars of all sources (`replace(valid, bars=train.bars)`). Of the other sources only the bars in a
    window are kept. Instruments are sorted within each source; one that several sources of a store have is there
    several times.

    Raises ValueError for sources that differ in lookback, future, clip, normalisation or the bars' columns.
    """
    first = sources[0][1]
    for store, windows in sources[1:]:
        ours, theirs = ((each.lookback, each.future, each.clip, each.normalisation) for each in (first, windows))
        if ours != theirs:
            raise ValueError(
                f"windows of {store or 'the same store'} have (lookback, future, clip, normalisation) {theirs} "
                f"and the first ones {ours}: they cannot be joined"
            )
        if windows.bars.columns != first.bars.columns:
            raise ValueError(
                f"bars of {store or 'the same store'} have the columns {', '.join(windows.bars.columns)} and the first "
                f"ones {', '.join(first.bars.columns)}: they cannot be joined"
            )
    named = [(store, _name_instruments(store, windows)) for store, windows in sources]
    kept = [named[0][1], *(drop_unused_bars(_drop_repeats(named, i)) for i in range(1, len(named)))]
    if len(kept) == 1:
        return kept[0]
    bars = [windows.bars for windows in kept]
    first_rows = np.cumsum([0, *map(len, bars)])  # of each source's bars in those of all
    all_bars = Bars(
        values=np.concatenate([each.values for each in bars]),
        stamp=np.concatenate([each.stamp for each in bars]),
        dates=np.concatenate([each.dates for each in bars]),
        offsets=np.concatenate([[0], *(each.offsets[1:] + row for each, row in zip(bars, first_rows))]),
        instruments=tuple(name for each in bars for name in each.instruments),
        columns=first.bars.columns,
    )
    ends = np.concatenate([windows.ends + row for windows, row in zip(kept, first_rows)])
    return replace(first, bars=all_bars, ends=ends)


def drop_unused_bars(windows: Windows) -> Windows:
    """Return the same windows on a copy of no more bars than they need."""
    bars, count = windows.bars, len(windows.bars)
    begin = np.bincount(windows.ends - (windows.lookback - 1), minlength=count + 1)
    end = np.bincount(windows.ends + windows.future + 1, minlength=count + 1)
    used = (begin - end)[:-1].cumsum() > 0
    new_row = np.concatenate([[0], used.cumsum()])  # of every old row, and of the end
    offsets = new_row[bars.offsets]
    has_bars = np.diff(offsets) > 0
    used_bars = Bars(
        values=bars.values[used],
        stamp=bars.stamp[used],
        dates=bars.dates[used],
        offsets=np.append(offsets[:-1][has_bars], offsets[-1]),
        instruments=tuple(np.array(bars.instruments, object)[has_bars]),
        columns=bars.columns,
    )
    return replace(windows, bars=used_bars, ends=new_row[windows.ends])


def _name_instruments(store: str, windows: Windows) -> Windows:
    """Put the name of a store before those of the instruments."""
    if not store:
        return windows
    names = tuple(f"{store}:{name}" for name in windows.bars.instruments)
    return replace(windows, bars=replace(windows.bars, instruments=names))


def _drop_repeats(sources: Sequence[tuple[str, Windows]], i: int) -> Windows:
    """Return the windows of source `i` that no earlier source of the same store has."""
    store, windows = sources[i]
    earlier = [others for name, others in sources[:i] if name == store]
    if not earlier:
        return windows
    candidates = [windows, *earlier]
    numbers = {name: n for n, name in enumerate({name for each in candidates for name in each.bars.instruments})}
    dates = np.unique(np.concatenate([each.dates for each in candidates]))
    pairs = [_instrument_numbers(each, numbers) * len(dates) + dates.searchsorted(each.dates) for each in candidates]
    return windows.take(~np.isin(pairs[0], np.concatenate(pairs[1:])))


def _instrument_numbers(windows: Windows, numbers: dict[str, int]) -> np.ndarray:
    """Return the number of each window's instrument: int64 `[W]`."""
    codes = windows.bars.offsets.searchsorted(windows.ends, side="right") - 1
    return np.array([numbers[name] for name in windows.bars.instruments], np.int64)[codes]
