"""Figures of the page, by plotly, in light colours; on a dark ground the page replaces them by `DARK_COLOURS`."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale, unlabel_rgb
from plotly.subplots import make_subplots

from kronos_qlib.analysis.comparison import Comparison
from kronos_qlib.analysis.fans import Fan
from kronos_qlib.analysis.portfolio import COST_MULTIPLES
from kronos_qlib.analysis.results import RunResult
from kronos_qlib.analysis.signals import DECILES
from kronos_qlib.analysis.significance import bootstrap_interval
from kronos_qlib.evaluation.palette import DARK, DARK_SERIES, GRID, INK, QUIET, SERIES

ROLLING_DAYS, TURNOVER_DAYS = 60, 20
MOST_POINTS = 600  # of a line: ten years of seven runs would make the page too large
_SYMBOLS = ("circle", "diamond", "square", "cross")
_DASHES = ("solid", "dash", "dot", "dashdot")
_LOW, _MIDDLE, _HIGH = "#C2570C", "#F7F7F7", "#2166AC"
_SHADE = "rgba(0, 114, 178, 0.18)"
_BANDS = {"90 %": ("q05", "q95", _SHADE), "50 %": ("q25", "q75", "rgba(0, 114, 178, 0.35)")}
_GREY = "#9AA0A8"  # between the two, on either ground
_SIGNED = "0>+.2f"  # plotly.js 3, in plotly 6, puts a ~ before "+.2f", which is no format then


def _shades(*colours: str) -> list[str]:
    """Return a colour for each decile, between some."""
    shades = sample_colorscale(list(colours), np.linspace(0, 1, DECILES))
    return ["#{:02X}{:02X}{:02X}".format(*(round(part) for part in unlabel_rgb(shade))) for shade in shades]


_DECILES = _shades(_LOW, _GREY, _HIGH)
DARK_COLOURS = {
    **dict(zip(_DECILES, _shades("#E8834A", _GREY, "#5AA0E6"))),
    **dict(zip(SERIES, DARK_SERIES)),
    **{INK: DARK["ink"], QUIET: DARK["quiet"], GRID: DARK["line"]},
    **{_LOW: "#E8834A", _MIDDLE: "#262A30", _HIGH: "#5AA0E6"},
}


def rank_ic_intervals(comparison: Comparison) -> go.Figure:
    """Draw the mean rank IC of every run, and that of its residual score, with 95 % intervals."""
    table, figure = comparison.table, go.Figure()
    for name, label, colour, offset in (
        ("rank_ic", "rank IC", SERIES[0], -0.13),
        ("residual_rank_ic", "after simple factors", SERIES[1], 0.13),
    ):
        figure.add_trace(_intervals(table, name, (f"{name}_low", f"{name}_high"), label, colour, offset))
    return _rows_of_intervals(figure, list(table.index))


def pair_intervals(comparison: Comparison) -> go.Figure:
    """Draw the difference of the daily rank IC of every two runs with its 95 % interval."""
    pairs = comparison.pairs
    trace = _intervals(pairs, "rank_ic_difference", ("low", "high"), "difference of rank IC", SERIES[0], 0)
    labels = [f"{one}<br>− {other}" for one, other in pairs.index]
    return _rows_of_intervals(go.Figure(trace), labels).update_layout(showlegend=False)


def excess_return(runs: Sequence[RunResult]) -> go.Figure:
    """Draw the excess return after costs (solid) and before (dotted), summed, not compounded; below, its drawdown."""
    figure = _two_rows((0.7, 0.3), "excess return", "drawdown")
    for number, run in enumerate(runs):
        before = run.report["return"] - run.report["bench"]
        total = (before - run.report["cost"]).cumsum()
        line = _line(number)
        thin = {"color": line["color"], "width": 1, "dash": "dot"}
        figure.add_trace(_curve(run.name, total, line), row=1, col=1)
        figure.add_trace(_curve(run.name, before.cumsum(), thin, "before costs", legend=False), row=1, col=1)
        figure.add_trace(_curve(run.name, total - total.cummax(), line | {"width": 1}, legend=False), row=2, col=1)
    return figure.update_layout(height=520).update_yaxes(tickformat=".0%", hoverformat=".2%")


def rolling_ic(comparison: Comparison) -> go.Figure:
    """Draw the mean of the daily rank IC (above) and IC (below) over the last `ROLLING_DAYS` days."""
    figure = _two_rows((0.5, 0.5), "rank IC", "IC")
    for row, daily in ((1, comparison.rank_ic), (2, comparison.ic)):
        for number, name in enumerate(daily):
            mean = daily[name].rolling(ROLLING_DAYS).mean()
            figure.add_trace(_curve(name, mean, _line(number), legend=row == 1), row=row, col=1)
    return figure.update_layout(height=480).update_yaxes(hoverformat=".4f")


def monthly_rank_ic(comparison: Comparison) -> go.Figure:
    """Draw the mean daily rank IC of every month and run."""
    months = comparison.rank_ic.groupby(comparison.rank_ic.index.to_period("M")).mean().T[::-1]
    largest = np.nanmax(np.abs(months.to_numpy()), initial=1e-9)
    trace = go.Heatmap(
        z=months.to_numpy(np.float32),
        x=[f"{month}-01" for month in months.columns],
        y=list(months.index),
        xgap=2,
        ygap=2,
        zmin=-largest,
        zmax=largest,
        colorscale=_colours(),
        colorbar=_colour_bar(".2f"),
        hovertemplate="%{y}<br>%{x|%B %Y}<br>rank IC %{z:+.4f}<extra></extra>",
    )
    figure = _figure(trace).update_layout(height=110 + 34 * len(months), hovermode="closest")
    if len(months.columns) <= 12:  # of few months ticks would be days, and of one parts of a second
        figure.update_xaxes(dtick="M1", tickformat="%b %Y")
    return figure.update_xaxes(showgrid=False, hoverformat="%B %Y").update_yaxes(showgrid=False)


def deciles(comparison: Comparison) -> go.Figure:
    """Draw the mean label of each decile of the score, 1 the lowest."""
    figure = _figure()
    for number, (name, means) in enumerate(comparison.deciles.items()):
        trace = go.Scatter(x=list(means.index), y=means.to_numpy(), name=name, line=_line(number), mode="lines+markers")
        figure.add_trace(trace)
    figure.update_xaxes(title_text="decile of the score, 10 the highest", dtick=1, showgrid=False)
    return figure.update_layout(height=380).update_yaxes(title_text="mean label", tickformat=".2%", hoverformat=".3%")


def decile_returns(days: pd.DataFrame) -> go.Figure:
    """Draw the labels of each decile of the score, summed, above; below, the top one's less the bottom one's.

    days: day × decile of one run. Shaded below: the 95 % interval of the mean spread (stationary bootstrap), from the
    first day on.
    """
    figure = _two_rows((0.6, 0.4), "labels, summed", "top less bottom")
    for decile, colour in zip(days, _DECILES):
        line = {"color": colour, "width": 1.5}
        figure.add_trace(_curve(f"{decile}", days[decile].fillna(0).cumsum(), line), row=1, col=1)
    spread = days.iloc[:, -1] - days.iloc[:, 0]
    ends = np.outer(np.arange(1, len(spread) + 1), bootstrap_interval(spread))
    for number, fill in enumerate(({}, {"fill": "tonexty", "fillcolor": _SHADE})):
        edge = _curve("95 %", pd.Series(ends[:, number], spread.index), {"width": 0, "color": _SHADE}, legend=False)
        figure.add_trace(edge.update(hoverinfo="skip", **fill), row=2, col=1)
    curve = _curve("top less bottom", spread.fillna(0).cumsum(), _line(0), legend=False)
    figure.add_trace(curve, row=2, col=1)
    figure.update_layout(height=460, legend_title_text="decile", legend_entrywidth=34)
    return figure.update_yaxes(tickformat=".0%", hoverformat=".2%")


def rank_ic_by_horizon(comparison: Comparison) -> go.Figure:
    """Draw the rank IC of every run with the return over 1, 5, 10 and 20 bars, with 95 % intervals."""
    figure = _figure()
    for number, run in enumerate(comparison.runs):
        if run.name in comparison.horizons.index and comparison.horizons.loc[run.name, "rank_ic"].notna().any():
            rows = comparison.horizons.loc[run.name]
            line, shift = _line(number), 0.6 * ((number + 0.5) / len(comparison.runs) - 0.5)
            errors = {"array": rows["high"] - rows["rank_ic"], "arrayminus": rows["rank_ic"] - rows["low"]}
            figure.add_trace(
                go.Scatter(
                    x=np.arange(len(rows)) + shift,
                    y=rows["rank_ic"],
                    error_y={"type": "data", "symmetric": False, "color": line["color"], "thickness": 1.2} | errors,
                    name=run.name,
                    mode="markers",
                    marker={
                        "color": line["color"],
                        "size": 8,
                        "symbol": _SYMBOLS[number // len(SERIES) % len(_SYMBOLS)],
                    },
                    text=[f"{bars} {comparison.step}s" for bars in rows.index],
                    hovertemplate="%{text}: %{y:+.4f}<extra></extra>",
                )
            )
    every = comparison.horizons.index.unique("days")
    labels = [f"{bars} {comparison.step}{'s' if bars > 1 else ''}" for bars in every]
    figure.add_hline(0, line={"color": INK, "width": 1})
    figure.update_xaxes(tickvals=list(range(len(labels))), ticktext=labels, showgrid=False)
    return figure.update_layout(height=360, hovermode="closest").update_yaxes(title_text="rank IC", hoverformat=".4f")


def costs(comparison: Comparison) -> go.Figure:
    """Draw the excess return a year against the multiple of the costs recorded."""
    figure = _figure()
    for number, (name, row) in enumerate(comparison.costs.iterrows()):
        values = [row[f"excess_return_{multiple:g}x"] for multiple in COST_MULTIPLES]
        figure.add_trace(
            go.Scatter(x=list(COST_MULTIPLES), y=values, name=name, line=_line(number), mode="lines+markers")
        )
    figure.add_hline(0, line={"color": INK, "width": 1})
    figure.update_xaxes(title_text="costs, as a multiple of those recorded", showgrid=False)
    return figure.update_layout(height=340).update_yaxes(
        title_text="excess return a year", tickformat=".0%", hoverformat=".1%"
    )


def turnover_and_cost(runs: Sequence[RunResult]) -> go.Figure:
    """Draw the mean turnover of a day over `TURNOVER_DAYS` days, and costs summed, as ratios of the account."""
    figure = _two_rows((0.5, 0.5), "turnover a day", "costs, summed")
    for number, run in enumerate(runs):
        turnover = run.report["turnover"].groupby(run.report.index.normalize()).sum().rolling(TURNOVER_DAYS).mean()
        figure.add_trace(_curve(run.name, turnover, _line(number)), row=1, col=1)
        figure.add_trace(_curve(run.name, run.report["cost"].cumsum(), _line(number), legend=False), row=2, col=1)
    return figure.update_layout(height=480).update_yaxes(tickformat=".1%", hoverformat=".2%", rangemode="tozero")


def score_correlation(comparison: Comparison) -> go.Figure:
    """Draw the mean daily rank correlation of the scores of every two runs."""
    table = comparison.score_correlation[::-1]
    numbers = {name: str(number) for number, name in enumerate(table.columns, 1)}
    trace = go.Heatmap(
        z=table.to_numpy(np.float32),
        x=[numbers[name] for name in table.columns],
        y=[f"{name}  {numbers[name]}" for name in table.index],
        xgap=2,
        ygap=2,
        zmin=-1,
        zmax=1,
        colorscale=_colours(),
        showscale=False,
        texttemplate="%{z:.2f}",
        hovertemplate="%{y} and %{x}: %{z:+.3f}<extra></extra>",
    )
    figure = _figure(trace).update_layout(height=60 + 40 * len(table), hovermode="closest")
    return figure.update_xaxes(showgrid=False, type="category").update_yaxes(showgrid=False, type="category")


def coverage(steps: pd.DataFrame, perfect: Mapping[str, float]) -> go.Figure:
    """Draw the share of closes within the 50 % and 90 % bands, per step (index: 1 … horizon).

    Dotted: nominal; dashed: what bands from so few samples of the right forecast would cover (`perfect`).
    """
    figure = _figure()
    for band in ("coverage_50", "coverage_90"):
        first = band == "coverage_90"
        figure.add_hline(int(band[-2:]) / 100, line={"color": INK, "width": 1, "dash": "dot"})
        if band in perfect:
            figure.add_hline(perfect[band], line={"color": INK, "width": 1, "dash": "dash"})
        figure.add_trace(_step_curve(steps, f"{band}_volatility", "historical volatility", 1, first, band[-2:]))
        figure.add_trace(_step_curve(steps, band, "Kronos", 0, first, band[-2:]))
    figure.update_yaxes(range=[0, 1.02], tickformat=".0%", hoverformat=".1%")
    return _style_steps(figure)


def crps(steps: pd.DataFrame) -> go.Figure:
    """Draw the CRPS of the close in ratios to the last close, per step, beside two simple forecasts."""
    figure = _figure()
    for number, (name, label) in enumerate(
        {"crps": "Kronos", "crps_volatility": "historical volatility", "crps_last_value": "last value"}.items()
    ):
        figure.add_trace(_step_curve(steps, name, label, number))
    return _style_steps(figure).update_yaxes(rangemode="tozero", tickformat=".1%", hoverformat=".3%")


def pit(histogram: pd.DataFrame) -> go.Figure:
    """Draw the density of the PIT of all steps; a calibrated forecast has 1 everywhere."""
    table = histogram[histogram["step"].astype(str) == "all"]
    middle, width = (table["low"] + table["high"]) / 2, table["high"] - table["low"]
    figure = _figure(go.Bar(x=middle, y=table["density"], width=width, name="Kronos", marker_color=SERIES[0]))
    line = {"color": SERIES[1], "shape": "hvh"}
    figure.add_trace(go.Scatter(x=middle, y=table["density_volatility"], name="historical volatility", line=line))
    figure.add_hline(1, line={"color": INK, "width": 1, "dash": "dot"})
    figure.update_xaxes(title_text="probability forecast of a lower close", range=[0, 1])
    return figure.update_layout(height=340, bargap=0).update_yaxes(title_text="density", hoverformat=".2f")


def calibrated(calibration: pd.DataFrame) -> go.Figure:
    """Draw the coverage per step before and after calibration."""
    steps = calibration[calibration["step"].astype(str) != "all"]
    figure = _figure()
    for band in ("coverage_50", "coverage_90"):
        table = steps[steps["measure"] == band].assign(step=lambda rows: rows["step"].astype(int)).set_index("step")
        figure.add_hline(int(band[-2:]) / 100, line={"color": INK, "width": 1, "dash": "dot"})
        figure.add_trace(_step_curve(table, "before", "before", 6, band == "coverage_90", band[-2:]))
        figure.add_trace(_step_curve(table, "after", "after", 0, band == "coverage_90", band[-2:]))
    figure.update_yaxes(range=[0, 1.02], tickformat=".0%", hoverformat=".1%")
    return _style_steps(figure)


def reliability(prob_up: pd.DataFrame) -> go.Figure:
    """Draw how often the mean close rose, by the probability forecast; on the dotted line if calibrated."""
    line = {"color": INK, "width": 1, "dash": "dot"}
    figure = _figure(go.Scatter(x=[0, 1], y=[0, 1], mode="lines", line=line, showlegend=False, hoverinfo="skip"))
    for when, number in (("before", 6), ("after", 0)):
        rows = prob_up[prob_up["when"] == when]
        sizes = 6 + 24 * np.sqrt(rows["windows"] / max(rows["windows"].sum(), 1))
        trace = go.Scatter(
            x=rows["forecast"],
            y=rows["share"],
            name=when,
            mode="lines+markers",
            line=_line(number),
            marker={"size": sizes.to_numpy()},
            text=rows["windows"],
            hovertemplate="forecast %{x:.0%}, rose %{y:.1%} of %{text:,}",
        )
        figure.add_trace(trace)
    figure.update_xaxes(title_text="probability forecast", range=[-0.02, 1.02], tickformat=".0%")
    return figure.update_layout(height=340, hovermode="closest").update_yaxes(
        title_text="share that rose", range=[-0.02, 1.02], tickformat=".0%"
    )


def fan(forecast: Fan) -> go.Figure:
    """Draw bands and median of the forecast close over the actual candles; x: bars from the score date."""
    figure = _figure()
    steps = list(range(len(forecast.quantiles) + 1))
    start = pd.DataFrame(forecast.last_close, index=[0], columns=forecast.quantiles.columns)
    quantiles = pd.concat([start, forecast.quantiles])
    for label, (low, high, colour) in _BANDS.items():
        edge = {"mode": "lines", "line": {"width": 0, "color": colour}, "hoverinfo": "skip"}
        figure.add_trace(go.Scatter(x=steps, y=quantiles[low], **edge))
        figure.add_trace(go.Scatter(x=steps, y=quantiles[high], fill="tonexty", fillcolor=colour, name=label, **edge))
    line = {"color": SERIES[0], "width": 2}
    median = go.Scatter(x=steps, y=quantiles["q50"], mode="lines", line=line, name="median")
    figure.add_trace(median.update(hovertemplate="median %{y:.2f}<extra></extra>"))
    bars = forecast.bars
    candles = go.Candlestick(
        x=list(bars.index),
        **{name: bars[name].to_numpy() for name in ("open", "high", "low", "close")},
        increasing={"line": {"color": SERIES[2], "width": 1}},
        decreasing={"line": {"color": SERIES[1], "width": 1}},
        text=[f"{date:%Y-%m-%d}" for date in bars["date"]],
        name="bars",
    )
    figure.add_trace(candles)
    figure.add_vline(0, line={"color": QUIET, "width": 1, "dash": "dot"})
    figure.update_xaxes(rangeslider_visible=False, title_text="bars from the score date", zeroline=False)
    return figure.update_layout(height=260, hovermode="closest", showlegend=False)


def summed(lines: Mapping[str, pd.Series], layout: str) -> go.Figure:
    """Draw daily values, summed from the first day on; `layout` is the format of a value."""
    figure = _figure()
    for number, (name, daily) in enumerate(lines.items()):
        figure.add_trace(_curve(name, daily.cumsum(), _line(number)))
    return figure.update_layout(height=340, showlegend=True).update_yaxes(tickformat=layout, hoverformat=layout)


def coverage_so_far(lines: Mapping[str, pd.DataFrame]) -> go.Figure:
    """Draw the share of closes within the 50 % and 90 % bands (columns) up to each day; dotted: as it should be."""
    figure = _figure()
    for band in ("coverage_90", "coverage_50"):
        figure.add_hline(int(band[-2:]) / 100, line={"color": INK, "width": 1, "dash": "dot"})
        for number, (name, daily) in enumerate(lines.items()):
            share = daily[band].expanding().mean()
            figure.add_trace(_curve(name, share, _line(number), f"{band[-2:]} %", band == "coverage_90"))
    figure.update_layout(height=340, showlegend=True)
    return figure.update_yaxes(range=[0, 1.02], tickformat=".0%", hoverformat=".1%")


def _figure(trace: go.Scatter | go.Bar | go.Heatmap | None = None) -> go.Figure:
    return _style(go.Figure(trace))


def _style(figure: go.Figure) -> go.Figure:
    figure.update_layout(
        template="none",
        font={"color": INK, "size": 13, "family": "system-ui, sans-serif"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 12}},
        hovermode="x unified",
        hoverlabel={"bgcolor": _MIDDLE, "bordercolor": GRID, "font": {"color": INK}, "namelength": -1},
    )
    axis = {"automargin": True, "gridcolor": GRID, "linecolor": GRID, "zerolinecolor": QUIET, "zerolinewidth": 1}
    axis |= {"tickfont": {"color": QUIET, "size": 12}, "title": {"font": {"color": QUIET, "size": 12}, "standoff": 8}}
    return figure.update_xaxes(axis, zeroline=False).update_yaxes(axis)


def _two_rows(heights: tuple[float, float], upper: str, lower: str) -> go.Figure:
    rows = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=list(heights), vertical_spacing=0.06)
    figure = _style(rows).update_xaxes(type="date", hoverformat="%d %b %Y", showgrid=False)
    return figure.update_yaxes(title_text=upper, row=1, col=1).update_yaxes(title_text=lower, row=2, col=1)


def _line(number: int) -> dict[str, object]:
    dash = _DASHES[number // len(SERIES) % len(_DASHES)]
    return {"color": SERIES[number % len(SERIES)], "width": 2, "dash": dash}


def _curve(name: str, daily: pd.Series, line: dict[str, object], variant: str = "", legend: bool = True) -> go.Scatter:
    daily = thin(daily)
    times = pd.DatetimeIndex(daily.index)
    form = "%Y-%m-%d" if (times == times.normalize()).all() else "%Y-%m-%d %H:%M"
    return go.Scatter(
        x=list(times.strftime(form)),
        y=daily.to_numpy(np.float32),
        name=f"{name}, {variant}" if variant else name,
        legendgroup=name,
        showlegend=legend,
        mode="lines",
        line=line,
    )


def thinning(days: int) -> int:
    """Count the days from one point of a line to the next."""
    return -(-days // MOST_POINTS)


def thin(daily: pd.Series) -> pd.Series:
    """Take every n-th day up to the last one, at most `MOST_POINTS`."""
    return daily[::-1][:: thinning(len(daily))][::-1] if len(daily) else daily


def _intervals(
    table: pd.DataFrame, mean: str, ends: tuple[str, str], name: str, colour: str, offset: float
) -> go.Scatter:
    low, high = (table[end].to_numpy(float) for end in ends)
    centre = table[mean].to_numpy(float)
    return go.Scatter(
        x=centre,
        y=np.arange(len(table)) + offset,
        mode="markers",
        name=name,
        marker={"color": colour, "size": 9},
        error_x={"array": high - centre, "arrayminus": centre - low, "color": colour, "thickness": 2, "width": 0},
        customdata=np.stack([low, high], axis=1),
        hovertemplate="%{x:+.4f}, 95 % %{customdata[0]:+.4f} … %{customdata[1]:+.4f}",
    )


def _rows_of_intervals(figure: go.Figure, labels: list[str]) -> go.Figure:
    _style(figure).update_layout(height=90 + 48 * len(labels), hovermode="closest")
    figure.update_yaxes(
        tickvals=list(range(len(labels))),
        ticktext=labels,
        range=[len(labels) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
    )
    return figure.update_xaxes(tickformat=_SIGNED, nticks=6, zeroline=True)


def _colours() -> list[tuple[float, str]]:
    return [(0.0, _LOW), (0.5, _MIDDLE), (1.0, _HIGH)]


def _colour_bar(layout: str) -> dict[str, object]:
    """Place the colour bar above the map, where it takes no width from a phone."""
    place = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "len": 0.6}
    return place | {"thickness": 8, "outlinewidth": 0, "tickformat": layout, "nticks": 5, "tickfont": {"size": 11}}


def _step_curve(
    steps: pd.DataFrame, column: str, label: str, number: int, legend: bool = True, band: str = ""
) -> go.Scatter:
    return go.Scatter(
        x=list(steps.index),
        y=steps[column].to_numpy(float),
        name=f"{label}, {band} %" if band and not legend else label,
        legendgroup=label,
        showlegend=legend,
        line=_line(number) | ({} if number == 0 else {"dash": "dash"}),
        mode="lines+markers" if number == 0 else "lines",
    )


def _style_steps(figure: go.Figure) -> go.Figure:
    spacing = max(1, len(figure.data[0].x) // 10)
    return figure.update_layout(height=340).update_xaxes(
        title_text="bars ahead", showgrid=False, dtick=spacing, tick0=1
    )
