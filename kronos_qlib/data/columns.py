"""The columns of a bar under the names that sources of bars give them."""

from collections.abc import Hashable, Iterable, Mapping

import numpy as np
import pandas as pd

NAMES: Mapping[str, tuple[str, ...]] = {
    "open": ("open", "open_price", "o", "开盘", "开盘价"),
    "high": ("high", "high_price", "h", "最高", "最高价"),
    "low": ("low", "low_price", "l", "最低", "最低价"),
    "close": ("close", "close_price", "c", "收盘", "收盘价"),
    "volume": ("volume", "vol", "v", "成交量", "tickvol"),
    "amount": ("amount", "amt", "money", "total_turnover", "quote_volume", "成交额", "turnover"),
}
"""Of each column of a bar, the names by which it is recognised, the surest first; they are compared by `plain_name`."""

# Of the bar, but no number that a network sees.
_LABELS = frozenset(
    "date time datetime timestamp timestamps trade_date tradedate day open_time window_start symbol instrument code "
    "ts_code order_book_id ticker 日期 时间 股票代码".split()
)
_RATE = 1e-4  # a turnover below this share of price × volume is a rate, not money: units differ by 1,000 at most


def plain_name(label: Hashable) -> str:
    """Return a column's label without the differences that do not matter: case, spaces, MetaTrader's < and >."""
    return str(label).strip().strip("<>").lower().replace(" ", "_")


def find_columns(labels: Iterable[Hashable]) -> dict[str, Hashable]:
    """Find which label stands for which column of a bar; a column that none stands for is absent.

    Raises:
        ValueError: two labels differ in case or spaces only, so that either may be meant.
    """
    found: dict[str, list[Hashable]] = {}
    for label in labels:
        found.setdefault(plain_name(label), []).append(label)
    columns: dict[str, Hashable] = {}
    for column, names in NAMES.items():
        labels_found = next((found[name] for name in names if name in found), [])
        if column in labels_found:
            columns[column] = column
        elif len(labels_found) > 1:
            raise ValueError(f"columns {', '.join(map(repr, labels_found))} may each be the {column}; keep one of them")
        elif labels_found:
            columns[column] = labels_found[0]
    return columns


def unused_columns(labels: Iterable[Hashable], columns: Mapping[str, Hashable]) -> list[Hashable]:
    """List the labels that stand neither for a column of a bar nor for its time or instrument."""
    return [label for label in labels if label not in columns.values() and plain_name(label) not in _LABELS]


def is_rate(turnover: pd.Series, close: pd.Series, volume: pd.Series | None) -> bool:
    """Return whether a column called turnover is a rate (traded shares per share outstanding), and so no amount."""
    if volume is None:
        return bool(turnover.abs().max() <= 100)
    money = (close * volume).abs()
    return bool(np.nanmedian(turnover.abs() / money.where(money > 0)) < _RATE) if (money > 0).any() else False
