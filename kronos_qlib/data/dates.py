"""Dates as workflow files write them."""

import datetime
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import BeforeValidator


def _parse_date(value: Any) -> pd.Timestamp | None:
    """Parse a date; pydantic makes the ValueError an error of the setting."""
    if value is None or isinstance(value, pd.Timestamp):
        return value
    if isinstance(value, (str, datetime.date, np.datetime64)):  # a datetime is a date too; YAML gives dates
        try:
            return pd.Timestamp(value)
        except ValueError:
            pass
    raise ValueError("should be a date such as 2015-01-01")


Date = Annotated[pd.Timestamp | None, BeforeValidator(_parse_date)]
"""A date as workflow files write it: a string, a YAML date, a Timestamp, or null for no bound."""
