"""Several sets of windows as one, from one store or from several."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kronos_qlib.data.windows import Bars, Windows


def join(parts: Sequence[tuple[str, Windows]]) -> Windows:
    """All windows of the parts, in their order; those of one store with the same instrument and date count once.

    A part is (store, windows). Parts with the same label are of the same store, and the first of them that has a
    window gives it. The label goes before the instruments' names (`us_data:AAPL`), so that names and random keys are
    unambiguous; that of the dataset's own store is empty and changes nothing.

    The first part's bars stay whole, at the same rows: other windows on them, such as the validation set, stay what
    they are with the joined bars (`replace(valid, bars=joined.bars)`). Of the other parts only the bars in a window
    are kept. Instruments are sorted within each part; one that several parts of a store have is there several times.

    Raises ValueError for parts that differ in lookback, future or clip.
    """
    first = parts[0][1]
    for store, windows in parts[1:]:
        ours, theirs = ((part.lookback, part.future, part.clip) for part in (first, windows))
        if ours != theirs:
            raise ValueError(
                f"windows of {store or 'the same store'} have (lookback, future, clip) {theirs} and the first ones "
                f"{ours}: they cannot be joined"
            )
    labelled = [(store, _labelled(store, windows)) for store, windows in parts]
    kept = [windows if i == 0 else trim(_without_repeats(labelled, i)) for i, (_, windows) in enumerate(labelled)]
    if len(kept) == 1:
        return kept[0]
    bars = [windows.bars for windows in kept]
    rows_before = np.cumsum([0, *map(len, bars)])
    joined = Bars(
        values=np.concatenate([part.values for part in bars]),
        stamp=np.concatenate([part.stamp for part in bars]),
        dates=np.concatenate([part.dates for part in bars]),
        offsets=np.concatenate([[0], *(part.offsets[1:] + before for part, before in zip(bars, rows_before))]),
        instruments=tuple(name for part in bars for name in part.instruments),
    )
    ends = np.concatenate([windows.ends + before for windows, before in zip(kept, rows_before)])
    return replace(first, bars=joined, ends=ends)


def trim(windows: Windows) -> Windows:
    """The same windows on a copy of no more bars than they need."""
    bars, count = windows.bars, len(windows.bars)
    begin = np.bincount(windows.ends - (windows.lookback - 1), minlength=count + 1)
    end = np.bincount(windows.ends + windows.future + 1, minlength=count + 1)
    used = (begin - end)[:-1].cumsum() > 0
    new_row = np.concatenate([[0], used.cumsum()])  # of every old row, and of the end
    offsets = new_row[bars.offsets]
    there = np.diff(offsets) > 0
    trimmed = Bars(
        values=bars.values[used],
        stamp=bars.stamp[used],
        dates=bars.dates[used],
        offsets=np.append(offsets[:-1][there], offsets[-1]),
        instruments=tuple(np.array(bars.instruments, object)[there]),
    )
    return replace(windows, bars=trimmed, ends=new_row[windows.ends])


def _labelled(store: str, windows: Windows) -> Windows:
    if not store:
        return windows
    names = tuple(f"{store}:{name}" for name in windows.bars.instruments)
    return replace(windows, bars=replace(windows.bars, instruments=names))


def _without_repeats(parts: Sequence[tuple[str, Windows]], i: int) -> Windows:
    """The windows of part `i` that no earlier part of the same store has."""
    store, windows = parts[i]
    earlier = [before for label, before in parts[:i] if label == store]
    if not earlier:
        return windows
    together = [windows, *earlier]
    numbers = {name: n for n, name in enumerate({name for part in together for name in part.bars.instruments})}
    dates = np.unique(np.concatenate([part.dates for part in together]))
    pairs = [_instruments(part, numbers) * len(dates) + dates.searchsorted(part.dates) for part in together]
    return windows.take(~np.isin(pairs[0], np.concatenate(pairs[1:])))


def _instruments(windows: Windows, numbers: dict[str, int]) -> np.ndarray:
    """The number of each window's instrument: int64 `[W]`."""
    codes = windows.bars.offsets.searchsorted(windows.ends, side="right") - 1
    return np.array([numbers[name] for name in windows.bars.instruments], np.int64)[codes]
