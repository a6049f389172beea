"""A signal set: what one finished run says of one date."""

from dataclasses import dataclass
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class SignalSet:
    """The signals of one score date by one run.

    date: the score date, a bar of the store's calendar, without a time zone.
    table: a row for each instrument, sorted by it: score, and rank, 1 for the highest score. Of a KronosModel also
        last_close, in the store's units, prob_up, and q05, q10, q25, q50, q75, q90, q95: quantiles of the return from
        the date's close to that of `horizon` bars later, as ratios.
    experiment, recorder: the run, its experiment's name and its recorder id.
    store: the folder of the Qlib store. freq: of its bars: day, 1week, 5min. exchange: whose hours these keep, a name
        of exchange_calendars; None: the region's.
    label: the Qlib expression of the run's label, None if it is not known.
    horizon: bars forecast, None of another model than KronosModel.
    settings: of model and dataset, and of the portfolio: the run's PortAnaRecord, under the key portfolio; plain data.
    weights_digest, data_digest: of the model's pickle, and of the bars that the scores are made of.
    versions: of the packages.
    promised: what the run's own test period showed: rank_ic, its mean a day; sd, of a day; days; first and last date.
        None if the run has no scores with labels.
    """

    date: pd.Timestamp
    table: pd.DataFrame
    experiment: str
    recorder: str
    store: str
    freq: str
    label: str | None
    horizon: int | None
    settings: dict[str, Any]
    weights_digest: str
    data_digest: str
    versions: dict[str, str | None]
    promised: dict[str, Any] | None = None
    exchange: str | None = None
