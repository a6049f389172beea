"""A figure of one's own: the worst days of each run."""

from collections.abc import Sequence

import plotly.graph_objects as go

from kronos_qlib.analysis.results import RunResult


class WorstDays:
    """The ten worst days of each run, excess return after costs.

    kronos-qlib compare kronos_demo lightgbm_demo --out runs/demo --figure examples/worst_days_figure.py:WorstDays
    """

    def __call__(self, runs: Sequence[RunResult]) -> go.Figure:
        """Draw the runs' reports: a row per day with return, bench and cost, ratios."""
        figure = go.Figure()
        for run in runs:
            excess = (run.report["return"] - run.report["bench"] - run.report["cost"]).nsmallest(10)
            figure.add_bar(
                name=run.name, x=list(range(1, len(excess) + 1)), y=excess, hovertext=excess.index.astype(str)
            )
        return figure.update_layout(xaxis_title="place", yaxis_title="excess return", yaxis_tickformat=".1%")
