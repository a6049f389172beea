"""The comparison as plain text for a terminal of 100 columns."""

from collections.abc import Callable, Sequence
from textwrap import fill

import numpy as np
import pandas as pd

from kronos_qlib.analysis.comparison import Comparison
from kronos_qlib.analysis.market import HORIZONS
from kronos_qlib.analysis.portfolio import COST_MULTIPLES
from kronos_qlib.analysis.signals import LONGEST_LAG
from kronos_qlib.analysis.verdicts import verdicts
from kronos_qlib.text import printable

WIDTH = 100
_LONGEST_NAME = 26

Cell = Callable[[pd.Series], str]


def terminal_text(comparison: Comparison) -> str:
    """Format tables of the signal, the backtest, the pairs and the dropped rows, then verdicts and notes."""
    blocks = [
        text_table("Scores against returns", comparison.table, SIGNAL),
        text_table("Shape of the signal", comparison.table, SHAPE),
        text_table("After simple factors (reversal, momentum, volatility, volume, size)", comparison.table, RESIDUAL),
        text_table(horizons_title(comparison), by_horizon(comparison), horizon_columns(comparison.step))
        if len(comparison.horizons)
        else "",
        text_table("Backtest", comparison.table, BACKTEST),
        text_table("Backtest at other costs, excess a year", comparison.costs, COSTS),
        text_table(TRIALS_TITLE, comparison.table, TRIALS),
        text_table(TIES_TITLE, tied(comparison), TIES) if len(tied(comparison)) else "",
        text_table("Seeds: mean ± standard deviation", comparison.seeds, SEEDS) if len(comparison.seeds) else "",
        text_table("Pairs: first less second", comparison.pairs, PAIRS) if len(comparison.pairs) else "",
        text_table(
            "Rows that count: scored and labelled in all runs", comparison.dropped, dropped_columns(comparison.step)
        ),
        text_list("Verdict", verdicts(comparison)),
        text_list("Notes", [*legend(comparison.step), *comparison.notes]),
    ]
    return printable("\n\n".join(block for block in blocks if block))


def number(column: str, layout: str) -> Cell:
    """Make the cell of a column by a format; n/a where it is not finite."""
    return lambda row: layout.format(row[column]) if np.isfinite(row[column]) else "n/a"


def _p(column: str) -> Cell:
    return lambda row: "n/a" if np.isnan(row[column]) else "<0.01" if row[column] < 0.005 else f"{row[column]:.2f}"


def interval(name: str) -> Cell:
    """Make the cell of the columns `<name>_low` and `<name>_high`, or of low and high."""
    low, high = (f"{name}_low", f"{name}_high") if name else ("low", "high")
    return lambda row: f"{row[low]:+.4f} … {row[high]:+.4f}" if np.isfinite(row[low]) else "n/a"


def _half_life(row: pd.Series) -> str:
    bars = row["signal_half_life"]
    return "long" if np.isinf(bars) else "n/a" if np.isnan(bars) else f"{bars:.1f}"


def _capacity(row: pd.Series) -> str:
    return f"{row['capacity'] / 1e6:,.1f} m" if np.isfinite(row["capacity"]) else "n/a"


SIGNAL: dict[str, Cell] = {
    "IC": number("ic", "{:+.4f}"),
    "ICIR": number("icir", "{:+.3f}"),
    "Rank IC": number("rank_ic", "{:+.4f}"),
    "Rank ICIR": number("rank_icir", "{:+.3f}"),
    "t": number("rank_ic_t", "{:+.2f}"),
    "p (Holm)": _p("rank_ic_p_holm"),
    "95 %": interval("rank_ic"),
}
SHAPE: dict[str, Cell] = {
    "Decile spread": number("decile_spread", "{:+.3%}"),
    "Monotonicity": number("monotonicity", "{:+.2f}"),
    "Hit rate": number("hit_rate", "{:.1%}"),
    "Half-life": _half_life,
}
RESIDUAL: dict[str, Cell] = {
    "Rank IC": number("residual_rank_ic", "{:+.4f}"),
    "t": number("residual_rank_ic_t", "{:+.2f}"),
    "p (Holm)": _p("residual_rank_ic_p_holm"),
    "95 %": interval("residual_rank_ic"),
}
BACKTEST: dict[str, Cell] = {
    "Excess/yr": number("excess_return", "{:+.1%}"),
    "after cost": number("excess_return_with_cost", "{:+.1%}"),
    "Inf. ratio": number("information_ratio", "{:+.2f}"),
    "Drawdown": number("max_drawdown", "{:.1%}"),
    "Turnover": number("turnover", "{:.1%}"),
    "Cost/yr": number("cost", "{:.1%}"),
    "Capacity": _capacity,
}
PAIRS: dict[str, Cell] = {
    "Rank IC": number("rank_ic_difference", "{:+.4f}"),
    "t": number("t", "{:+.2f}"),
    "Holm": _p("p_holm"),
    "95 %": interval(""),
    "Corr.": number("score_correlation", "{:+.2f}"),
}


def _by_horizon(bars: int) -> Cell:
    t = number(f"t_{bars}", "{:+.1f}")
    return lambda row: f"{row[f'rank_ic_{bars}']:+.4f} ({t(row)})" if np.isfinite(row[f"rank_ic_{bars}"]) else "n/a"


def _spread(name: str, layout: str) -> Cell:
    mean, deviation = f"{name}_mean", f"{name}_sd"
    return lambda row: f"{layout} ± {layout.replace('+', '')}".format(row[mean], row[deviation])


def _spread_of_trials(row: pd.Series) -> str:
    deviation = row["trials_rank_ic_sd"]
    return "–" if row["trials"] == 1 else "by chance" if np.isnan(deviation) else f"± {deviation:.4f}"


def _evidence(column: str) -> Cell:
    """Format 1 − p, so that it is not rounded to 1 nor up to the level of evidence."""
    return lambda row: (
        "n/a"
        if np.isnan(row[column])
        else ">0.99"
        if row[column] > 0.99
        else f"{np.floor(100 * row[column]) / 100:.2f}"
    )


def _break_even(row: pd.Series) -> str:
    multiple = row["break_even"]
    return "n/a" if np.isnan(multiple) else "none" if multiple <= 0 else f"{multiple:.2f} ×"


def _track_record(row: pd.Series) -> str:
    days = row["track_record_days"]
    return "n/a" if np.isnan(days) else "never" if np.isinf(days) else f"{days:,.0f} d"


def _topk_label(row: pd.Series) -> str:
    if not np.isfinite(row["topk_label"]):
        return "n/a"
    return f"{row['topk_label']:+.3%} ± {row['topk_label_sd']:.3%}"


def tied(comparison: Comparison) -> pd.DataFrame:
    """Return the rows of the runs that have equal scores on a day, for `TIES`."""
    return comparison.table[comparison.table["tied_share"] > 0]


def horizons_title(comparison: Comparison) -> str:
    """Name what `by_horizon` and its figure show."""
    return f"Rank IC by {comparison.step}s to come"


def by_horizon(comparison: Comparison) -> pd.DataFrame:
    """Lay `horizons` out by run, for `horizon_columns`."""
    wide = comparison.horizons[["rank_ic", "t"]].unstack("days")
    return wide.set_axis([f"{name}_{days}" for name, days in wide.columns], axis=1).loc[
        [run.name for run in comparison.runs if run.name in wide.index]
    ]


def horizon_columns(step: str) -> dict[str, Cell]:
    """Make the columns of `by_horizon`."""
    return {f"{bars} {step}{'s' if bars > 1 else ''} (t)": _by_horizon(bars) for bars in HORIZONS}


COSTS: dict[str, Cell] = {
    **{f"{multiple:g} ×": number(f"excess_return_{multiple:g}x", "{:+.1%}") for multiple in COST_MULTIPLES},
    "break-even": _break_even,
}
RATIOS: dict[str, Cell] = {
    f"{multiple:g} ×": number(f"information_ratio_{multiple:g}x", "{:+.2f}") for multiple in COST_MULTIPLES
}
TRIALS_TITLE = "After counting trials: deflated figures, evidence from 0.95 on"
TRIALS: dict[str, Cell] = {
    "Trials": number("trials", "{:,.0f}"),
    "their rank ICs": _spread_of_trials,
    "Rank IC": _evidence("deflated_rank_ic"),
    "Sharpe": _evidence("deflated_sharpe"),
    "of 1 trial": _evidence("probabilistic_sharpe"),
    "Record": _track_record,
}
TIES_TITLE = "Ties: mean label of the highest scores over random orders of equal ones"
TIES: dict[str, Cell] = {
    "Tied": number("tied_share", "{:.1%}"),
    "Top k": number("topk", "{:.0f}"),
    "label": _topk_label,
}
SEEDS: dict[str, Cell] = {
    "Seeds": number("seeds", "{:.0f}"),
    "Rank IC": _spread("rank_ic", "{:+.4f}"),
    "Rank ICIR": _spread("rank_icir", "{:+.3f}"),
    "Excess/yr after cost": _spread("excess_return_with_cost", "{:+.1%}"),
}


def dropped_columns(step: str) -> dict[str, Cell]:
    """Make the columns of the rows that count and those that do not."""
    return {
        "scored": number("scored_rows", "{:,}"),
        "no label": number("unlabelled_rows", "{:,}"),
        "dropped": number("dropped_rows", "{:,}"),
        "kept": number("kept_rows", "{:,}"),
        f"{step}s dropped": number("dropped_days", "{:,}"),
        f"{step}s kept": number("kept_days", "{:,}"),
    }


def legend(step: str) -> tuple[str, ...]:
    """Explain the columns; `step` is what a score date is called."""
    following = "tomorrow's" if step == "day" else f"the next {step}'s"
    return (
        "t: Newey–West. 95 %: stationary block bootstrap of the mean. p and Holm: two-sided p after Holm's correction "
        "for the rows of its table.",
        f"Decile spread: label of the top tenth less the bottom tenth, a {step}. Half-life: {step}s until the rank "
        f"autocorrelation of the scores is a half; long: not within {LONGEST_LAG} {step}s or half of all. Corr.: mean "
        f"rank correlation of the scores of a {step}.",
        "Excess: over the benchmark. Inf. ratio and Drawdown: after costs. Turnover: a day, bought and sold. "
        "Capacity: the account, in millions, at which 95 % of the trades are at most 1 % of the traded amount.",
        f"By {step}s to come: rank IC with the return from {following} close over so many {step}s. Other costs: the "
        "same trades at multiples of the costs recorded; break-even: the multiple that leaves nothing; none: "
        "there is nothing before costs.",
        "Deflated: 1 less the p of the rank IC, and of the Sharpe ratio of the excess return after costs, against the "
        "expected best of so many trials without skill, whose rank ICs differ as recorded or by chance. Of 1 trial: "
        "the Sharpe ratio against 0. Record: days of the backtest after which such a Sharpe ratio is above 0 with 95 % "
        "confidence.",
        f"Tied: share of the scores that another instrument has that {step}. Label: of the k highest scores of a "
        f"{step}, no backtest, ± its deviation over 20 random orders of equal ones.",
    )


def text_table(title: str, table: pd.DataFrame, columns: dict[str, Cell]) -> str:
    """Format a table for a terminal: a title, headings, a line a row, which begins with its name."""
    cells = [["", *columns]]
    cells += [[_label(name), *(cell(row) for cell in columns.values())] for name, row in table.iterrows()]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in cells
    ]
    ruler = "─" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([title, lines[0], ruler, *lines[1:]])


def _label(name: str | tuple[str, str]) -> str:
    if isinstance(name, str):
        return _short(name, _LONGEST_NAME)
    return " − ".join(_short(part, 22) for part in name)


def _short(name: str, longest: int) -> str:
    """Shorten a long name by its middle: names differ mostly at their ends."""
    if len(name) <= longest:
        return name
    tail = longest // 2
    return f"{name[: longest - tail - 1]}…{name[-tail:]}"


def text_list(title: str, items: Sequence[str]) -> str:
    """Format sentences for a terminal, one an item."""
    wrapped = [fill(item, WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False) for item in items]
    return "\n".join([title, *wrapped])
