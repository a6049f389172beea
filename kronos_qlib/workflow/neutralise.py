"""Neutralisation of scores against simple factors, day by day."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from qlib.log import get_module_logger

from kronos_qlib.data.dataset import KLineDataset
from kronos_qlib.data.factors import amount_expression, read_factors, residuals
from kronos_qlib.data.windows import Windows

logger = get_module_logger("KronosModel")


def factor_ranks(dataset: KLineDataset, windows: Windows, names: Sequence[str]) -> pd.DataFrame:
    """Rank each day's windows by the named factors of `kronos_qlib.data.factors`, read from the Qlib store.

    Days with no more windows than twice the factors are left out, with a warning: a fit on them means little. A factor
    that is not known for a window (a bar that its expression looks back to is missing) ranks in the middle of its day;
    how many there are is a warning.

    Returns:
        Index (datetime, instrument), sorted; a column per factor, 1 … n of n windows that day.

    Raises:
        ValueError: no day has enough windows.
    """
    windows = _with_enough(windows, names)
    instruments, freq = sorted(set(windows.instruments)), dataset.handler.freq
    first, last = pd.Timestamp(windows.dates.min()), pd.Timestamp(windows.dates.max())
    amount = _amount_of_first_scores(dataset) if "size" in names else "$volume"
    index = pd.MultiIndex.from_arrays([windows.dates, windows.instruments], names=["datetime", "instrument"])
    index = index.sort_values()
    # Equal indices are not always of the same unit of time: the windows' is kept.
    factors = read_factors(names, instruments, first, last, amount, freq).reindex(index).set_axis(index)
    factors = factors.replace([np.inf, -np.inf], np.nan)
    unknown = int(factors.isna().any(axis=1).sum())
    if unknown:
        example = factors.index[factors.isna().any(axis=1)][0]
        logger.warning(
            f"KronosModel: neutralise: of {unknown:,} of {len(factors):,} windows a factor is not known, such as of "
            f"{example[1]} on {example[0].date()}; they count as middling"
        )
    days = factors.groupby(level="datetime")
    ranks = days.rank()
    middle = ranks.groupby(level="datetime").transform("mean")
    return ranks.fillna(middle).fillna(1.0)  # of nobody on that day: all alike


def neutralise(score: pd.Series, ranks: pd.DataFrame) -> pd.Series:
    """Replace scores by the residuals of each day's least-squares fit on a constant and ranks, in the score's unit.

    A residual depends on all scores of its day, no longer on that instrument's bars alone. Both are indexed by
    (datetime, instrument); rows are those of the ranks.
    """
    score = score.reindex(ranks.index)
    left = np.empty(len(score))
    values, against = score.to_numpy(np.float64), ranks.to_numpy(np.float64)
    for rows in score.groupby(level="datetime").indices.values():
        left[rows] = residuals(values[rows], against[rows])
    return pd.Series(left, score.index, name=score.name)


def _amount_of_first_scores(dataset: KLineDataset) -> str:
    """Choose the expression of the traded amount by the bars before the first scores that the data allow.

    So it is the same for all segments and does not depend on a bar after a score.
    """
    windows = dataset.score_windows((None, None))
    first = windows.dates.min()
    members, handler = sorted(windows.instruments[windows.dates == first]), dataset.handler
    return amount_expression(members, handler.dates[0], pd.Timestamp(first), handler.freq)


def _with_enough(windows: Windows, names: Sequence[str]) -> Windows:
    """Select the windows of days that have more windows than twice the factors; a fit on fewer means little."""
    days, day, counts = np.unique(windows.dates, return_inverse=True, return_counts=True)
    few = counts <= 2 * len(names)
    if not few.any():
        return windows
    message = (
        f"KronosModel: neutralise: {len(names)} factors need {2 * len(names) + 1} instruments a day; on "
        f"{np.datetime_as_string(days[few][0], 'D')} there are {counts[few][0]}"
    )
    if few.all():
        raise ValueError(f"{message}, and no day has enough")
    logger.warning(f"{message}: {few.sum():,} of {len(days):,} days have too few and get no score")
    return windows.take(~few[day])
