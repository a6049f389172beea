"""Walk-forward folds: training and validation segments in order, purged of labels that reach from one to the other."""

from typing import TypeAlias

import numpy as np
import pandas as pd
from sklearn.model_selection import TimeSeriesSplit

Segments: TypeAlias = dict[str, tuple[pd.Timestamp, pd.Timestamp]]
"""`train` and `valid`, the first and the last score date of each."""


def walk_forward_folds(
    sessions: pd.DatetimeIndex,
    folds: int,
    reach: int,
    horizon: int = 0,
    valid_sessions: int | None = None,
    train_sessions: int | None = None,
) -> list[Segments]:
    """Divide a range of sessions into folds, each validated on a block after the sessions that it is trained on.

    The validation blocks follow each other without gap or overlap. No label of a score date in them is made of bars
    after the range, and between training and validation lies an embargo of `reach` + `horizon` sessions: neither a
    label nor the future of a training window touches a validation bar (López de Prado 2018, chapter 7).

    Args:
        sessions: those of the range, sorted; no bar after the last of them is used by anything.
        folds: 2 or more.
        reach: sessions that a label looks ahead of its date. horizon: bars that a training window has ahead of it.
        valid_sessions: of a block; by default the range is divided by folds + 1.
        train_sessions: the most that are trained on, the last before the embargo: a rolling window. None: all, an
            expanding one.

    Raises:
        ValueError: fewer than two folds, or they do not fit into the range.
    """
    if folds < 2:
        raise ValueError(f"walk-forward folds are two or more, not {folds}")
    scored, embargo = len(sessions) - reach, reach + horizon
    size = scored // (folds + 1) if valid_sessions is None else valid_sessions
    trained = scored - folds * size - embargo
    if size < 1 or trained < 1:
        raise ValueError(
            f"{folds} folds of {max(size, 1):,} sessions and an embargo of {embargo} leave nothing to train on: "
            f"{_shown(sessions)} has {len(sessions):,} sessions"
        )
    split = TimeSeriesSplit(folds, max_train_size=train_sessions, test_size=size, gap=embargo)
    return [
        {"train": (sessions[train[0]], sessions[train[-1]]), "valid": (sessions[valid[0]], sessions[valid[-1]])}
        for train, valid in split.split(np.arange(scored))
    ]


def purged_segments(
    sessions: pd.DatetimeIndex, valid_start: pd.Timestamp, reach: int, horizon: int = 0
) -> list[Segments]:
    """Divide a range of sessions once: valid from `valid_start` on, train up to the embargo before it.

    As one fold of `walk_forward_folds`.
    """
    first, embargo = int(sessions.searchsorted(valid_start)), reach + horizon
    if first - embargo < 1 or first >= len(sessions) - reach:
        raise ValueError(
            f"the embargo of {embargo} sessions leaves nothing to train on or to validate: {_shown(sessions)} has "
            f"{first:,} sessions before {valid_start.date()} and {len(sessions) - first:,} from then on"
        )
    train, valid = sessions[: first - embargo], sessions[first : len(sessions) - reach]
    return [{"train": (train[0], train[-1]), "valid": (valid[0], valid[-1])}]


def _shown(sessions: pd.DatetimeIndex) -> str:
    return f"{sessions[0].date()} … {sessions[-1].date()}" if len(sessions) else "the range"
