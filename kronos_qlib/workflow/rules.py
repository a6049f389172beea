"""FactorScore: a simple rule as a Qlib model, so that reversal or momentum runs through the same workflow as Kronos."""

from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field
from qlib.data.dataset import DatasetH
from qlib.data.dataset.handler import DataHandlerLP
from qlib.data.dataset.weight import Reweighter
from qlib.log import get_module_logger
from qlib.model.base import Model

from kronos_qlib.settings import Settings, read_settings
from kronos_qlib.workflow.recording import record_metrics, record_tags

logger = get_module_logger("FactorScore")


class RuleSettings(Settings):
    """The keyword arguments of `FactorScore`."""

    feature: str = Field(min_length=1)
    """Name of the feature column."""
    sign: Literal[1, -1] = 1
    """1 if a high value is good, -1 if a low one is."""
    volume: str = Field(default="VOLUME", min_length=1)
    """Name of the feature column of the traded volume."""


class FactorScore(Model):
    """Scores by one feature column of a dataset and learns nothing: the rule is the column's Qlib expression.

    Only a valid bar has a score: the instrument traded that day and the feature is a finite number. A suspended day
    repeats the last close, by which an expression would be a number there too.

    Args:
        feature: the name of the feature column.
        sign: 1 if much of it is good, -1 if little is.
        volume: the name of the feature column that holds the day's traded volume.

    Raises:
        ValueError: an unknown key, a wrong type, an impossible value.
    """

    def __init__(self, feature: str, sign: int = 1, volume: str = "VOLUME", **unknown: Any) -> None:
        values = {"feature": feature, "sign": sign, "volume": volume, **unknown}
        self.settings = read_settings(RuleSettings, "FactorScore", values)

    def fit(self, dataset: DatasetH, reweighter: Reweighter | None = None) -> None:
        """Learn nothing; check that the dataset has the columns.

        Raises:
            ValueError: the dataset is no DatasetH or lacks a column, or a reweighter was given.
        """
        if reweighter is not None:
            raise ValueError("FactorScore: a reweighter was given, but a rule learns nothing")
        self._check(dataset)

    def predict(self, dataset: DatasetH, segment: str | slice = "test") -> pd.Series:
        """Score every valid bar of a segment by the signed feature.

        Logs how many rows have no score and why, and warns (tag `no_rank`) if the scores of every date are all equal.

        Returns:
            Series `score` by (datetime, instrument), sorted, in the feature's own unit.

        Raises:
            ValueError: the dataset is no DatasetH or lacks a column, or no bar of the segment is valid.
        """
        self._check(dataset)
        features = dataset.prepare(segment, col_set="feature", data_key=DataHandlerLP.DK_I).sort_index()
        traded = features[self.settings.volume] > 0
        defined = np.isfinite(features[self.settings.feature])
        counts = {
            "scores": int((traded & defined).sum()),
            "untraded": int((~traded).sum()),
            "undefined": int((traded & ~defined).sum()),
        }
        if not counts["scores"]:
            raise ValueError(
                f"FactorScore: no valid bar has a number in {self.settings.feature!r}; segment {segment!r}"
            )
        logger.info(
            f"FactorScore: {counts['scores']} scores by {self.settings.feature}; none for {counts['untraded']} rows "
            f"without traded volume and {counts['undefined']} where the rule has no number"
        )
        record_metrics({f"rule.{name}": count for name, count in counts.items()}, None)
        score = self.settings.sign * features.loc[traded & defined, self.settings.feature].rename("score")
        self._warn_of_no_rank(score)
        return score

    def _check(self, dataset: DatasetH) -> None:
        if not isinstance(dataset, DatasetH):
            raise ValueError(f"FactorScore: the dataset must be a DatasetH, not a {type(dataset).__name__}")
        columns = list(dataset.handler.get_cols("feature"))
        for key in ("feature", "volume"):
            name = getattr(self.settings, key)
            if columns.count(name) != 1:
                raise ValueError(
                    f"FactorScore: {key} {name!r} is the name of {columns.count(name)} of the dataset's features, "
                    f"it should be that of one; they are {', '.join(map(str, columns[:10]))}"
                    f"{', …' if len(columns) > 10 else ''}"
                )

    def _warn_of_no_rank(self, score: pd.Series) -> None:
        """Warn if no date has two different scores: then there is no order, and what a backtest buys is arbitrary."""
        if (score.groupby("datetime").nunique() > 1).any():
            return
        message = (
            f"all instruments have the same {self.settings.feature} on every date, which ranks nothing: IC and rank IC "
            "are not defined (NaN), and a backtest holds an arbitrary choice among equals"
        )
        logger.warning(f"FactorScore: {message}")
        record_tags({"no_rank": message})
