"""Pages of one file that need no network: a chart above, text and tables below; and the page of a store's check."""

import html
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from kronos_qlib.evaluation.palette import DARK, DARK_SERIES, LIGHT, SERIES
from kronos_qlib.files import whole_file
from kronos_qlib.text import printable

if TYPE_CHECKING:
    from kronos_qlib.ingest.store_check import StoreReport  # which a forecast does not need

_STYLE = Path(__file__).with_name("report.css")
_MARKS = {"ok": "✓", "warning": "!", "error": "✗"}
_ROWS = 200  # instruments on the page of a store


def chart_page(title: str, lead: str, figure: Mapping[str, Any], content: str) -> str:
    """Write a page: a heading, a plotly figure (data and layout), and HTML below it; light or dark as the reader's.

    A trace's `meta` names an attribute and what it is in the dark.
    """
    spec = find_spec("plotly")  # its folder only: to import it takes a second
    assert spec is not None and spec.submodule_search_locations
    script = (Path(spec.submodule_search_locations[0]) / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    data = json.dumps(figure).replace("<", "\\u003c")
    heading = html.escape(printable(title))
    style = "".join(
        f"{before}:root {{ {' '.join(f'--{name}: {colour};' for name, colour in colours.items())} }}{after}"
        for before, colours, after in (("", LIGHT, ""), ("@media (prefers-color-scheme: dark) {", DARK, "}"))
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{heading}</title><link rel="icon" href="data:,">
<style>{style}{_STYLE.read_text()}</style></head><body>
<header><h1>{heading}</h1><p class="quiet">{html.escape(printable(lead))}</p></header>
<main><div id="chart" style="min-height: {figure["layout"]["height"]}px"></div>
{content}</main>
<script>{script}</script><script type="application/json" id="figure">{data}</script>
<script>
const figure = JSON.parse(document.getElementById("figure").textContent);
const style = getComputedStyle(document.documentElement), colour = name => style.getPropertyValue("--" + name).trim();
const dark = matchMedia("(prefers-color-scheme: dark)").matches;
for (const trace of figure.data)
  if (dark && trace.meta) trace[trace.meta[0]] = Object.assign({{}}, trace[trace.meta[0]], trace.meta[1]);
const axis = {{gridcolor: colour("line"), linecolor: colour("line"), zerolinecolor: colour("line")}};
for (const name of Object.keys(figure.layout).filter(name => /axis/.test(name)))
  Object.assign(figure.layout[name], axis);
const ground = {{paper_bgcolor: colour("ground"), plot_bgcolor: colour("ground")}};
Object.assign(figure.layout, ground, {{font: {{color: colour("ink"), size: 13}}}});
Plotly.newPlot("chart", figure.data, figure.layout, {{responsive: true, displaylogo: false}});
</script></body></html>
"""


def write_store_page(report: "StoreReport", path: Path) -> Path:
    """Write the page of a store's check: instruments by session, findings, and the instruments with most of them."""
    line = {
        "type": "scatter",
        "x": [str(time) for time in report.coverage.index],
        "y": report.coverage.tolist(),
        "mode": "lines",
        "line": {"color": SERIES[0], "width": 1.5, "shape": "hv"},
        "meta": ["line", {"color": DARK_SERIES[0]}],
        "hovertemplate": "%{x}<br>%{y} instruments<extra></extra>",
    }
    layout = {
        "height": 320,
        "margin": {"l": 60, "r": 16, "t": 16, "b": 40},
        "xaxis": {"showgrid": False},
        "yaxis": {"title": {"text": "instruments with a bar"}, "rangemode": "tozero"},
    }
    findings = "".join(
        f'<tr><td>{_MARKS[finding.level]} {finding.level}</td><th scope="row">{html.escape(finding.subject)}</th>'
        f"<td>{html.escape(printable(finding.text))}"
        f"{''.join(f'<br>{html.escape(printable(example))}' for example in finding.examples)}</td></tr>"
        for finding in report.findings
    )
    table = report.per_instrument
    subjects = [column for column in table.columns if column not in ("bars", "first", "last")]
    odd = table[subjects].gt(0).sum(axis=1).sort_values(ascending=False, kind="stable")
    shown = table.loc[odd.index[:_ROWS]]
    heads = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in ["instrument", *table.columns])
    rows = "".join(
        f'<tr><th scope="row">{html.escape(printable(str(name)))}</th>'
        f"{''.join(f'<td>{_shown(value)}</td>' for value in row)}</tr>"
        for name, row in zip(shown.index, shown.itertuples(index=False))
    )
    content = f"""<h2>Findings</h2>
<div class="scroll" tabindex="0"><table class="prose"><tbody>{findings}</tbody></table></div>
<h2>Instruments{f" (the {_ROWS} with most findings of {len(table):,})" if len(table) > _ROWS else ""}</h2>
<div class="scroll" tabindex="0"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"""
    lead = f"{len(table):,} instruments, {len(report.coverage):,} sessions of {report.freq}"
    page = chart_page(f"{report.store}: check", lead, {"data": [line], "layout": layout}, content)
    with whole_file(path) as draft:
        draft.write_text(page, encoding="utf-8")
    return path


def _shown(value: Any) -> str:
    if pd.isna(value):
        return "–"
    return str(value).removesuffix(" 00:00:00") if isinstance(value, pd.Timestamp) else f"{value:,}"
