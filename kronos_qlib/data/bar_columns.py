"""Columns of a bar beyond the six: Qlib expressions, or classes of a user's own."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kronos_qlib.data.expressions import check_expression, sessions_ahead
from kronos_qlib.data.windows import COLUMNS
from kronos_qlib.extensions import call_extension, load_extension
from kronos_qlib.settings import check_configuration

Floats = NDArray[np.float64]
_TRIED = 60, 41  # bars of the random walk that a class is tried on, and of its beginning, which it is given alone too


class BarColumn(Protocol):
    """A column of a user's own, a value of the setting `columns` of a KLineHandler as a configuration."""

    def __call__(self, bars: Floats) -> Floats:
        """Compute the column of one instrument.

        Args:
            bars: its valid bars, oldest first, in the store's units [N, 6], columns `kronos_qlib.data.windows.COLUMNS`.

        Returns:
            A number for each bar [N], a function of the bars up to it; NaN where there is none yet, and the bar is then
            left out.
        """


def check_columns(value: Any) -> dict[str, Any]:
    """Check the setting `columns`: expressions and configurations by name. Raises ValueError."""
    if not isinstance(value, Mapping):
        raise ValueError("should be a mapping of names to Qlib expressions or configurations")
    for name, column in value.items():
        if not isinstance(name, str) or not name.isidentifier() or name in COLUMNS:
            raise ValueError(f"has {name!r}: a name is letters, digits and _, and none of {', '.join(COLUMNS)}")
        try:
            if isinstance(column, Mapping):
                load_column(check_configuration(column))
            elif not isinstance(column, str):
                raise ValueError("should be a Qlib expression or a configuration")
            else:
                check_expression(column)
                if sessions_ahead(column) > 0:
                    raise ValueError(f"{column} looks {sessions_ahead(column)} sessions ahead: no score may know them")
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return dict(value)


def check_conditions(value: Any) -> dict[str, str]:
    """Check the setting `conditions`: expressions by name. Raises ValueError."""
    columns = check_columns(value)
    classes = [name for name, text in columns.items() if not isinstance(text, str)]
    if classes:
        raise ValueError(f"{classes[0]}: should be a Qlib expression")
    return columns


def load_column(configuration: Mapping[str, Any]) -> BarColumn:
    """Make a column of a user's own, and try it on a random walk, and on the walk's beginning alone.

    Raises:
        ValueError: it cannot be made, fails, returns another shape or something infinite, or looks ahead.
    """
    column: BarColumn = load_extension(configuration)
    count, known = _TRIED
    walk = 100 * np.exp(np.random.default_rng(0).normal(0, 0.01, (count, len(COLUMNS))).cumsum(0))
    walk[:, 1], walk[:, 2] = walk[:, :4].max(1), walk[:, :4].min(1)  # high and low
    whole, beginning = (call_extension(column, (len(bars),), bars) for bars in (walk, walk[:known].copy()))
    if np.isinf(whole).any():
        raise ValueError(f"{type(column).__name__} returns what is infinite for a random walk")
    if not np.allclose(whole[:known], beginning, rtol=1e-6, equal_nan=True):
        raise ValueError(f"{type(column).__name__} looks ahead: later bars change what it returns for earlier ones")
    return column
