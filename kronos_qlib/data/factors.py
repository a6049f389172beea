"""Simple factors (reversal, momentum, volatility, …) of the Qlib store in use, and the residuals of scores on them.

A score may rank instruments by such a factor without anybody noticing: `read_factors` reads their values, `residuals`
takes them out of a day's scores. A factor's value at bar t is made of bars up to t.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from qlib.data import D

from kronos_qlib.data.loader import store_folder

# Qlib expressions. AMOUNT stands for the value traded, which `amount_expression` finds an expression for.
FACTORS = {
    "reversal": "Ref($close, 5)/$close",
    "momentum": "$close/Ref($close, 20)",
    "volatility": "Std($close/Ref($close, 1), 20)",
    "volume_change": "Mean($volume, 5)/(Mean($volume, 20)+1e-12)",  # turnover over its own past: no share counts here
    "size": "Log(Mean(AMOUNT, 20)+1)",
}
# Up to here a 32-bit float resolves quarters, so that a whole number differs from one divided by a factor.
_RESOLVED = 2**21


def read_factors(
    names: Sequence[str], instruments: Sequence[str], first: pd.Timestamp, last: pd.Timestamp, amount: str, freq: str
) -> pd.DataFrame:
    """Read the named factors from `first` to `last`, both included.

    Args:
        names: of `FACTORS`, or `amount`, the value traded in the market's currency.
        amount: the expression of the value traded, see `amount_expression`.

    Returns:
        Index (datetime, instrument), sorted; a column per name. Days without a bar are missing; a value that cannot be
        computed, such as those of an instrument's first 20 days, is NaN.
    """
    fields = [{**FACTORS, "amount": "AMOUNT"}[name].replace("AMOUNT", amount) for name in names]
    rows = D.features(list(instruments), fields, start_time=first, end_time=last, freq=freq)
    return rows.set_axis(list(names), axis=1).swaplevel().sort_index()


def amount_expression(instruments: Sequence[str], first: pd.Timestamp, last: pd.Timestamp, freq: str) -> str:
    """Return the expression of the value traded: $amount if all have it, else volume × price.

    In Qlib's convention the volume is divided by the adjustment factor that the price is multiplied by, and their
    product needs no factor. Some stores hold plain share counts instead, to be known by whole numbers in the bars from
    `first` to `last`; there the price is divided by its factor.
    """
    features = store_folder(freq) / "features"
    if all((features / name.lower() / f"amount.{freq}.bin").is_file() for name in instruments):
        return "$amount"
    if not any(features.glob(f"*/factor.{freq}.bin")):
        return "($volume*$close)"
    bars = D.features(list(instruments), ["$volume", "$factor"], start_time=first, end_time=last, freq=freq)
    volume = bars.loc[bars["$volume"].between(1, _RESOLVED) & ((bars["$factor"] - 1).abs() > 0.01), "$volume"]
    counts = len(volume) > 0 and (volume % 1 == 0).mean() > 0.9
    return "($volume*$close/$factor)" if counts else "($volume*$close)"


def residuals(values: NDArray[np.float64], against: NDArray[np.float64]) -> NDArray[np.float64]:
    """Fit values [n] by least squares on a constant and columns [n, k], and return the residuals [n], of mean 0."""
    values, against = values - values.mean(), against - against.mean(0)
    return values - against @ np.linalg.lstsq(against, values, rcond=None)[0]
