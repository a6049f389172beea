"""The ledger's record as text for a terminal, as JSON, and as a section or a page like those of the comparison."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kronos_qlib.analysis import charts
from kronos_qlib.analysis.report import make_table, write_sections
from kronos_qlib.analysis.sections import Figure, Part, Section, Sentences, Table
from kronos_qlib.analysis.tables import Cell, interval, number, text_list, text_table
from kronos_qlib.live.judgement import FIGURES, PAPER_FIGURES, Judgement
from kronos_qlib.text import printable


def _share(name: str) -> Cell:
    low, high = f"{name}_low", f"{name}_high"

    def cell(row: pd.Series) -> str:
        between = f" ({100 * row[low]:.0f}–{row[high]:.0%})" if math.isfinite(row[low]) else ""
        return f"{row[name]:.1%}{between}" if math.isfinite(row[name]) else "n/a"

    return cell


SIGNAL: dict[str, Cell] = {
    "Dates": number("dates", "{:,.0f}"),
    "Days": number("days", "{:,.0f}"),
    "Rank IC": number("rank_ic", "{:+.4f}"),
    "t": number("t", "{:+.2f}"),
    "95 %": interval(""),
    "promised": number("promised", "{:+.4f}"),
    "p": number("p", "{:.3f}"),
    "power": number("power", "{:.0%}"),
}
BANDS: dict[str, Cell] = {
    "Returns": number("outcomes", "{:,.0f}"),
    "CRPS": number("crps", "{:.3%}"),
    "last value": number("crps_last_value", "{:.3%}"),
    "50 % band": _share("coverage_50"),
    "90 % band": _share("coverage_90"),
}
PAPER: dict[str, Cell] = {
    "Days": number("paper_days", "{:,.0f}"),
    "Return": number("paper_return", "{:+.2%}"),
    "Excess": number("paper_excess", "{:+.2%}"),
    "Costs": number("paper_cost", "{:.2%}"),
    "Turnover": number("paper_turnover", "{:.1%}"),
    "Drawdown": number("paper_drawdown", "{:.2%}"),
}
TITLES = {"Rank IC of a day": SIGNAL, "Forecast returns and what came": BANDS, "Paper portfolio": PAPER}
NOTES = (
    "Live: the last version made before the next session opened; simulated: made later, the last version of a date. "
    "Days: with labels. t: Newey–West; 95 %: stationary block bootstrap.",
    "p: one-sided, that the live rank IC is below the promised one; power: the probability that this test, at this "
    "number of days, finds a true live rank IC of 0 worse.",
    "CRPS: of the return over the horizon; last value: of the forecast that nothing changes. Bands: the share of "
    "returns within them and its 95 % interval; few samples a forecast make narrow bands.",
    "Paper portfolio: Qlib's own backtest of the run's strategy and costs on these scores, over its days, not a year. "
    "Return and Excess (over the benchmark): after costs, summed. Turnover: a day, bought and sold.",
)


def record_text(judgements: Sequence[Judgement]) -> str:
    """Format tables, verdicts and notes for a terminal of 100 columns."""
    table = _table(judgements)
    blocks = [text_table(title, table[rows], columns) for title, columns, rows in _blocks(table)]
    blocks += [text_list("Verdict", _sentences(judgements)), text_list("Notes", NOTES)]
    return printable("\n\n".join(blocks))


def record_json(judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """Return the figures of each judgement, and of the test of its promise, as plain data; None for NaN."""
    return [
        {
            "experiment": judgement.experiment,
            "kind": judgement.kind,
            "first": str(judgement.first),
            "last": str(judgement.last),
            **{name: _finite(judgement.figures.get(name)) for name in [*FIGURES, *PAPER_FIGURES]},
            "test": {name: _finite(value) for name, value in vars(judgement.test).items()} if judgement.test else None,
            "sentences": judgement.sentences,
        }
        for judgement in judgements
    ]


def record_section(judgements: Sequence[Judgement], ledger: str) -> Section:
    """Make a section for the page of a comparison: verdicts, tables, figures; `ledger` is its name."""
    if not judgements:
        return Section("ledger", "Live record", f"The ledger {ledger} has no forecasts of these runs.", [])
    text = f"Forecasts as the ledger {ledger} kept them when they were made, and what came."
    verdicts = [Part(text=f"{sentence}.") for sentence in _sentences(judgements)]
    notes = [Part(text=note) for note in NOTES]
    parts = [*verdicts, Part(tables=_tables(judgements)), *_figures(judgements), *notes]
    return Section("ledger", "Live record", text, parts)


def write_record_page(judgements: Sequence[Judgement], ledger: str, sets: pd.DataFrame, path: Path) -> Path:
    """Write the record as a page of its own to `path`, and return it; sets: the ledger's, listed last."""
    made = pd.DatetimeIndex(sets["made_at"])
    return write_sections(
        path,
        title="Ledger: what was forecast and what came",
        heading="Ledger",
        about=f"{ledger}: {len(sets):,} sets of forecasts, made {made.min():%d %b %Y} to {made.max():%d %b %Y}",
        verdicts=[Sentences("Live, and apart from it simulated", _sentences(judgements))],
        tables=_tables(judgements),
        notes=NOTES,
        sections=[
            Section("figures", "Day by day", "", _figures(judgements)),
            Section("sets", "Sets", "", [Part(tables=[_newest_sets(sets)])]),
        ],
    )


def _sentences(judgements: Sequence[Judgement]) -> list[str]:
    return [sentence for judgement in judgements for sentence in judgement.sentences]


def _table(judgements: Sequence[Judgement]) -> pd.DataFrame:
    rows = [judgement.figures | (vars(judgement.test) if judgement.test else {}) for judgement in judgements]
    columns = [*FIGURES, *PAPER_FIGURES, "promised", "p", "power"]
    return pd.DataFrame(rows, [judgement.name for judgement in judgements]).reindex(columns=columns).astype(float)


def _blocks(table: pd.DataFrame) -> list[tuple[str, dict[str, Cell], pd.Series]]:
    """List the tables that have a row: title, columns, which rows."""
    rows = {"Rank IC of a day": table["dates"] > 0, "Forecast returns and what came": table["outcomes"] > 0}
    rows["Paper portfolio"] = table["paper_days"] > 0
    return [(title, columns, rows[title]) for title, columns in TITLES.items() if rows[title].any()]


def _tables(judgements: Sequence[Judgement]) -> list[Table]:
    table = _table(judgements)
    return [make_table(title, table[rows], columns) for title, columns, rows in _blocks(table)]


def _figures(judgements: Sequence[Judgement]) -> list[Part]:
    rank_ics = {each.name: each.rank_ics for each in judgements if len(each.rank_ics)}
    covered = {each.name: each.coverage for each in judgements if len(each.coverage)}
    reports = {each.name: each.report for each in judgements if each.report is not None}
    excess = {name: report["return"] - report["bench"] - report["cost"] for name, report in reports.items()}
    figures = [
        Figure(charts.summed(rank_ics, ".2f"), "Rank IC, summed over the days") if rank_ics else None,
        Figure(charts.coverage_so_far(covered), "Share of returns within the bands so far") if covered else None,
        Figure(charts.summed(excess, ".1%"), "Paper portfolio: excess return after costs, summed") if excess else None,
    ]
    return [Part([figure for figure in figures if figure is not None], columns=2)]


def _newest_sets(sets: pd.DataFrame, most: int = 100) -> Table:
    newest = sets.sort_values(["date", "version"], ascending=False).head(most)
    columns = ["made (UTC)", "live", "version", "experiment", "recorder", "instruments", "weights", "data"]
    rows = [
        [
            str(row.date).removesuffix(" 00:00:00"),
            f"{row.made_at:%Y-%m-%d %H:%M}",
            "live" if row.live else "simulated",
            str(row.version),
            row.experiment,
            row.recorder[:8],
            f"{row.instruments:,}",
            row.weights_digest[:8],
            row.data_digest[:8],
        ]
        for row in newest.itertuples()
    ]
    which = f"The last {most} of {len(sets):,}" if len(sets) > most else "All"
    return Table(f"{which}, by date", ["", *columns], rows)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
