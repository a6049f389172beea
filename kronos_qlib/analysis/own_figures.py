"""Figures of a user's own in the report of a comparison."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import plotly.graph_objects as go

from kronos_qlib.analysis.results import RunResult
from kronos_qlib.extensions import load_extension, reason


class ReportFigure(Protocol):
    """A figure of a user's own, `--figure` of `compare`; the first line of its class's docstring is its caption."""

    def __call__(self, runs: Sequence[RunResult]) -> go.Figure:
        """Draw some finished runs: their scores, labels and the backtest's report, see `RunResult`."""


def load_figures(configurations: Sequence[Mapping[str, Any]]) -> list[ReportFigure]:
    """Make figures of the user's own. Raises ValueError."""
    return [load_extension(each) for each in configurations]


def draw_figure(figure: ReportFigure, runs: Sequence[RunResult]) -> tuple[go.Figure, str]:
    """Draw a figure of the user's own; return it with its caption. Raises ValueError if it fails."""
    name = type(figure).__name__
    try:
        chart = figure(runs)
    except Exception as error:
        raise ValueError(f"--figure {name} fails: {reason(error)}") from error
    if not isinstance(chart, go.Figure):
        raise ValueError(f"--figure {name} should return a plotly Figure, not a {type(chart).__name__}")
    return chart, ((type(figure).__doc__ or name).strip().splitlines() or [name])[0]
