"""A record of one's own: how much of the top of the ranking is new each day, before any backtest."""

from typing import Any

import pandas as pd
from qlib.workflow.record_temp import ACRecordTemp, SignalRecord


class TopTurnoverRecord(ACRecordTemp):
    """Save top_turnover.pkl: per date the share of the `topk` highest scores that were not among them the date before.

    In a workflow, an entry of task.record after SignalRecord:

        - {class: TopTurnoverRecord, module_path: examples/turnover_record.py, kwargs: {topk: 20}}
    """

    artifact_path = "top_turnover"
    depend_cls = SignalRecord

    def __init__(self, recorder: Any, topk: int = 20, skip_existing: bool = False, **kwargs: Any) -> None:
        super().__init__(recorder=recorder, skip_existing=skip_existing)
        self.topk = topk

    def _generate(self, *args: Any, **kwargs: Any) -> dict[str, pd.DataFrame]:
        scores = self.load("pred.pkl")["score"]
        top = {
            date: set(day.nlargest(self.topk).index.get_level_values("instrument"))
            for date, day in scores.groupby(level="datetime")
        }
        dates = sorted(top)
        new = {date: len(top[date] - top[before]) / self.topk for before, date in zip(dates, dates[1:])}
        self.recorder.log_metrics(top_turnover=sum(new.values()) / max(len(new), 1))
        return {"top_turnover.pkl": pd.DataFrame({"new": new})}

    def list(self) -> list[str]:
        """Name the artifacts, as Qlib asks."""
        return ["top_turnover.pkl"]
