"""A sampler of one's own: Qlib's Reweighter, by which a training draws some windows more often than others."""

import pandas as pd
from qlib.data.dataset.weight import Reweighter


class MoreOfTheLiquid(Reweighter):
    """Draw windows by the traded amount of their score date, to some power; 0 draws all alike.

    In a workflow, under task, with finetune's windows_per_epoch below the number of windows:

        reweighter: {class: MoreOfTheLiquid, module_path: examples/liquid_reweighter.py, kwargs: {power: 0.5}}
    """

    def __init__(self, power: float = 0.5) -> None:
        self.power = power

    def reweight(self, data: pd.DataFrame) -> pd.Series:
        """Weigh windows: the bars of their score dates, columns open … amount, by (datetime, instrument); above 0."""
        ranks = data["amount"].groupby(level="datetime").rank(pct=True)  # within the day: no later bar is looked at
        return ranks.pow(self.power)
