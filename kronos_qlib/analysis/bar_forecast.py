"""The forecast of one series of bars for people: a table, a CSV file, and one page with candles, fan and paths."""

import html
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kronos_qlib.analysis.pages import chart_page
from kronos_qlib.data.windows import CLOSE, COLUMNS
from kronos_qlib.evaluation.palette import DARK_SERIES, SERIES
from kronos_qlib.files import whole_file
from kronos_qlib.text import csv_cell, printable

QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
SHOWN_BARS, SHOWN_PATHS = 120, 20
_RISE, _FALL = "#009E73", "#D55E00"


@dataclass(frozen=True)
class BarForecast:
    """Sample paths of the bars that follow a series.

    bars: those that the network saw, index time. times: of the bars forecast. paths: [S, P, 6], price units, possible
    bars. came: the bars that came at these times, as far as known; index time. notes: what a reader should know.
    bands: quantiles of the close [7, P], at `QUANTILES`, where they are not just those of the paths: of a calibration.
    """

    instrument: str
    bars: pd.DataFrame
    times: pd.DatetimeIndex
    paths: np.ndarray
    came: pd.DataFrame
    notes: list[str] = field(default_factory=list)
    bands: np.ndarray | None = None

    @property
    def close_quantiles(self) -> np.ndarray:
        """Quantiles of the close [7, P], at `QUANTILES`."""
        return np.quantile(self.paths[..., CLOSE], QUANTILES, axis=0) if self.bands is None else self.bands

    def table(self) -> pd.DataFrame:
        """Tabulate each step: quantiles of the close, the share of paths above the last close, median low and high."""
        close = self.paths[..., CLOSE]
        last = float(self.bars["close"].iloc[-1])
        columns = {f"q{round(100 * level):02d}": row for level, row in zip(QUANTILES, self.close_quantiles)}
        columns["prob_up"] = (close > last).mean(axis=0)
        columns["low"], columns["high"] = (np.median(self.paths[..., place], axis=0) for place in (2, 1))
        table = pd.DataFrame(columns, self.times.rename("time"))
        return table.join(self.came["close"].rename("came")) if len(self.came) else table


def terminal_text(forecast: BarForecast) -> str:
    """Format the table for a terminal."""
    table, last = forecast.table(), float(forecast.bars["close"].iloc[-1])
    digits = max(2, 4 - int(np.floor(np.log10(last))) if last > 0 else 2)
    number = f"{{:,.{digits}f}}".format
    daily = (forecast.times == forecast.times.normalize()).all()
    rows = [["", "median", "50 %", "90 %", "up", "low", "high", *(["came"] if "came" in table else [])]]
    for time, row in table.iterrows():
        rows.append(
            [
                f"{time:%Y-%m-%d}" if daily else f"{time:%Y-%m-%d %H:%M}",
                number(row["q50"]),
                f"{number(row['q25'])} … {number(row['q75'])}",
                f"{number(row['q05'])} … {number(row['q95'])}",
                f"{row['prob_up']:.0%}",
                number(row["low"]),
                number(row["high"]),
                *([number(row["came"]) if pd.notna(row["came"]) else "–"] if "came" in table else []),
            ]
        )
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    head = f"{forecast.instrument}: {len(forecast.bars)} bars to {forecast.bars.index[-1]}, last close {number(last)}"
    head += "" if forecast.bands is None else ", calibrated"
    return printable("\n".join([head, "", *lines, "", *(f"- {note}" for note in forecast.notes)]))


def write_csv(forecast: BarForecast, path: Path) -> Path:
    """Write a row for each step, with the quantiles of the close."""
    table = forecast.table()
    table.insert(0, "instrument", csv_cell(forecast.instrument))
    with whole_file(path) as draft:
        table.to_csv(draft)
    return path


def write_page(forecast: BarForecast, path: Path) -> Path:
    """Write one page that needs no network: candles and volume, fan, paths, table, notes."""
    table, last = forecast.table(), forecast.bars.index[-1]
    daily = (forecast.times == forecast.times.normalize()).all()
    heads = "".join(f'<th scope="col">{name}</th>' for name in ["", *table.columns])
    body = "".join(
        f'<tr><th scope="row">{time.date() if daily else time}</th>'
        f"{''.join(_cell(name, value) for name, value in row.items())}</tr>"
        for time, row in table.iterrows()
    )
    notes = "".join(f"<li>{html.escape(printable(note))}</li>" for note in forecast.notes)
    paths, steps, seen = len(forecast.paths), len(forecast.times), len(forecast.bars)
    after = last.date() if daily else last
    lead = f"{paths} sample paths of {steps} bars after {after}, drawn from {seen} bars by Kronos"
    lead += "" if forecast.bands is None else ", and calibrated"
    title = f"{forecast.instrument}: {'forecast' if forecast.bands is None else 'calibrated forecast'}"
    content = f"""<h2>Each bar</h2>
<div class="scroll" tabindex="0"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>
<h2>Notes</h2><ul class="notes">{notes}</ul>"""
    page = chart_page(title, lead, _figure(forecast), content)
    with whole_file(path) as draft:
        draft.write_text(page, encoding="utf-8")
    return path


def _cell(name: str, value: float) -> str:
    text = "–" if pd.isna(value) else f"{value:.0%}" if name == "prob_up" else f"{value:,.6g}"
    return f"<td>{text}</td>"


def _figure(forecast: BarForecast) -> dict[str, Any]:
    """Draw against the bar's number, 0 the last one seen: nights and weekends take no room."""
    bars, steps = forecast.bars.iloc[-SHOWN_BARS:], len(forecast.times)
    past = list(range(1 - len(bars), 1))
    future = list(range(steps + 1))
    last = float(bars["close"].iloc[-1])
    close = forecast.paths[..., CLOSE]
    fan = {level: [last, *row] for level, row in zip(QUANTILES, forecast.close_quantiles.tolist())}
    labels = [str(time) for time in [*bars.index, *forecast.times]]
    shown = dict(zip([*past, *future[1:]], labels))
    kronos, dark = SERIES[0], DARK_SERIES[0]
    data: list[dict[str, Any]] = [
        _candles(bars, past, [shown[place] for place in past], "bars", 1.0),
        _volume(bars, past, forecast),
    ]
    for low, high, alpha in ((0.05, 0.95, 0.16), (0.25, 0.75, 0.3)):
        name = f"{high - low:.0%} " + ("of the paths" if forecast.bands is None else "band")
        data.append(
            {
                "type": "scatter",
                "x": future,
                "y": fan[low],
                "mode": "lines",
                "line": {"width": 0},
                "hoverinfo": "skip",
                "showlegend": False,
            }
        )
        data.append(
            {
                "type": "scatter",
                "x": future,
                "y": fan[high],
                "mode": "lines",
                "line": {"width": 0},
                "fill": "tonexty",
                "fillcolor": f"rgba(0, 114, 178, {alpha})",
                "name": name,
                "hoverinfo": "skip",
            }
        )
    for number, path in enumerate(close[:SHOWN_PATHS].tolist()):
        data.append(
            {
                "type": "scatter",
                "x": future,
                "y": [last, *path],
                "mode": "lines",
                "line": {"width": 0.7, "color": kronos},
                "opacity": 0.35,
                "legendgroup": "paths",
                "name": "paths",
                "showlegend": number == 0,
                "hoverinfo": "skip",
                "meta": ["line", {"color": dark}],
            }
        )
    data.append(
        {
            "type": "scatter",
            "x": future,
            "y": fan[0.5],
            "mode": "lines",
            "line": {"width": 2.5, "color": kronos},
            "name": "median",
            "text": [shown[place] for place in future],
            "hovertemplate": "%{text}<br>median %{y:.6g}<extra></extra>",
            "meta": ["line", {"color": dark}],
        }
    )
    if len(forecast.came):
        places = [forecast.times.get_loc(time) + 1 for time in forecast.came.index]
        data.append(_candles(forecast.came, places, [shown[place] for place in places], "what came", 0.6))
    ticks = sorted(shown)[:: max(1, len(shown) // 8)]
    layout = {
        "height": 620,
        "margin": {"l": 60, "r": 16, "t": 16, "b": 40},
        "hovermode": "closest",
        "legend": {"orientation": "h", "y": -0.1, "yanchor": "top", "x": 0},
        "xaxis": {
            "tickvals": ticks,
            "ticktext": [shown[tick][:16].removesuffix(" 00:00") for tick in ticks],
            "rangeslider": {"visible": False},
            "showgrid": False,
            "anchor": "y2",
        },
        "yaxis": {"domain": [0.26, 1], "title": {"text": "price"}},
        "yaxis2": {"domain": [0, 0.2], "title": {"text": "volume"}},
        "shapes": [
            {
                "type": "line",
                "x0": 0.5,
                "x1": 0.5,
                "y0": 0,
                "y1": 1,
                "yref": "paper",
                "line": {"dash": "dot", "width": 1, "color": "#888888"},
            }
        ],
    }
    return {"data": data, "layout": layout}


def _candles(bars: pd.DataFrame, places: list[int], labels: list[str], name: str, opacity: float) -> dict[str, Any]:
    prices = {column: bars[column].tolist() for column in COLUMNS[:4]}
    colours = {"increasing": {"line": {"color": _RISE}}, "decreasing": {"line": {"color": _FALL}}}
    return {"type": "candlestick", "x": places, **prices, **colours, "text": labels, "name": name, "opacity": opacity}


def _volume(bars: pd.DataFrame, places: list[int], forecast: BarForecast) -> dict[str, Any]:
    ahead = np.median(forecast.paths[..., COLUMNS.index("volume")], axis=0).tolist()
    values = [*(bars["volume"] if "volume" in bars else [0] * len(bars)), *ahead]
    colours = ["#888888"] * len(bars) + [SERIES[0]] * len(ahead)
    return {
        "type": "bar",
        "x": [*places, *range(1, len(ahead) + 1)],
        "y": values,
        "yaxis": "y2",
        "name": "volume, median ahead",
        "marker": {"color": colours},
        "showlegend": False,
        "hovertemplate": "%{y:.4g}<extra>volume</extra>",
    }
