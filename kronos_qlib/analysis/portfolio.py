"""Turnover, costs, drawdowns and capacity of a backtest."""

import numpy as np
import pandas as pd
from qlib.utils.time import Freq

QLIB_DAYS_A_YEAR = 238  # those of `risk_analysis`, which are of this region:
QLIB_YEARS_REGION = "cn"
_LONGER = {Freq.NORM_FREQ_WEEK: 50, Freq.NORM_FREQ_MONTH: 12}  # its weeks and months
_PERIODS = {Freq.NORM_FREQ_WEEK: "W", Freq.NORM_FREQ_MONTH: "M"}
_LEAST_DAYS = 28  # of a calendar that says how many sessions a year has
COST_MULTIPLES = 0.0, 0.5, 1.0, 2.0, 3.0  # of the costs recorded
_SHARE = 0.01
_QUANTILE = 0.05


def mean_turnover(report: pd.DataFrame) -> float:
    """Average the turnover of a day, as Qlib reports it: bought plus sold over the account's value, a ratio."""
    return float(report["turnover"].groupby(report.index.normalize()).sum().mean())


def steps_a_year(freq: str, sessions: pd.DatetimeIndex | None = None) -> float:
    """Return how many days a year has, or weeks or months where a backtest's frequency is so long.

    Without `sessions`, a market's own of a month at least, they are Qlib's for every market: 238, 50, 12.
    """
    count, base = Freq.parse(freq) if freq else (1, Freq.NORM_FREQ_DAY)
    if sessions is None or not len(sessions) or (sessions[-1] - sessions[0]).days < _LEAST_DAYS:
        return _LONGER[base] / count if base in _LONGER else QLIB_DAYS_A_YEAR
    steps = sessions.to_period(_PERIODS.get(base, "D")).unique()
    years = (steps[-1].start_time - steps[0].start_time).days / 365.25
    return (len(steps) - 1) / years / (count if base in _LONGER else 1)


def is_annualised_by_qlib(freq: str, year: float) -> bool:
    """Say whether Qlib's risk analysis of a backtest has the figures of a year of `year` steps, and of whole days."""
    return (Freq.parse(freq)[1] if freq else "") != Freq.NORM_FREQ_MINUTE and year == steps_a_year(freq)


def annualise(report: pd.DataFrame, year: float) -> dict[str, float]:
    """Compute what Qlib's risk analysis computes, of the sums of each day and for a year of `year` steps.

    Returns:
        excess_return, excess_return_with_cost (a year, over the benchmark, summed), information_ratio, max_drawdown
        (both after costs).
    """
    before, after = excess_returns(report, 0.0), excess_returns(report)
    total = after.cumsum()
    return {
        "excess_return": float(before.mean() * year),
        "excess_return_with_cost": float(after.mean() * year),
        "information_ratio": float(after.mean() / after.std() * np.sqrt(year)) if after.std() > 0 else np.nan,
        "max_drawdown": float((total - total.cummax()).min()),
    }


def cost_a_year(report: pd.DataFrame, year: float = QLIB_DAYS_A_YEAR) -> float:
    """Annualise the costs over the account's value, a ratio for a year of `year` steps, summed as in Qlib."""
    return float(report["cost"].groupby(report.index.normalize()).sum().mean() * year)


def excess_returns(report: pd.DataFrame, cost_multiple: float = 1.0) -> pd.Series:
    """Return the returns over the benchmark after costs, of each day, at a multiple of the costs recorded."""
    excess = report["return"] - report["bench"] - cost_multiple * report["cost"]
    return excess.groupby(report.index.normalize()).sum()


def sweep_costs(report: pd.DataFrame, year: float = QLIB_DAYS_A_YEAR) -> dict[str, float]:
    """Compute what the same trades would have earned at other costs, in a year of `year` steps.

    Returns:
        `excess_return_0.5x` and so on for `COST_MULTIPLES`: over the benchmark, a year;
        `information_ratio_0.5x` and so on, of days; `break_even`: the multiple of the costs at which nothing is left,
        infinite without costs, below 0 where there is nothing before costs. All NaN without a backtest.
    """
    found = {}
    for multiple in COST_MULTIPLES:
        excess = excess_returns(report, multiple)
        ratio = excess.mean() / excess.std() if len(excess) > 1 and excess.std() > 0 else np.nan
        found[f"excess_return_{multiple:g}x"] = float(excess.mean() * year)
        found[f"information_ratio_{multiple:g}x"] = float(ratio * np.sqrt(year))
    gain, cost = (report["return"] - report["bench"]).mean(), report["cost"].mean()
    return found | {"break_even": float(gain / cost) if cost > 0 else np.nan if np.isnan(cost) else np.inf}


def drawdowns(report: pd.DataFrame, count: int = 5) -> pd.DataFrame:
    """List the deepest drawdowns of the summed excess return after costs, by the day; the first is Qlib's maximum.

    Returns:
        A row each, the deepest first: start (the day of the high before it; as in Qlib, the first day is the first
        high), trough, end (the first day that is back at the high, NaT if none is), depth (a ratio, below 0), days (of
        trade from start to end, or to the last day).
    """
    total = excess_returns(report).cumsum()
    under = total - total.cummax()
    spells = (under == 0).cumsum()  # a spell begins with the day of its high
    rows = []
    for _, spell in under.groupby(spells.to_numpy()):
        if len(spell) > 1:
            place = total.index.get_loc(spell.index[-1]) + 1
            end = total.index[place] if place < len(total) else pd.NaT
            days = len(spell) - (place == len(total))
            rows.append((spell.index[0], spell.idxmin(), end, spell.min(), days))
    table = pd.DataFrame(rows, columns=["start", "trough", "end", "depth", "days"])
    return table.sort_values("depth").head(count).reset_index(drop=True)


def capacity(trades: pd.Series, amounts: pd.Series, report: pd.DataFrame) -> float:
    """Compute the account, in the market's currency, at which 95 % of the trades are at most 1 % of the traded amount.

    Trades grow with the account: one of `trade` on a day when the account was worth `account` and `amount` of the
    instrument changed hands reaches 1 % with an account of 0.01 × account × amount / trade. The capacity is the 5th
    percentile of that over all trades. It leaves out how such trades move the price.

    trades: value of each trade, index (datetime, instrument); amounts: value traded in the market, the same index,
    trades without a known amount left out; report: Qlib's, for the account's value. NaN without any trade.
    """
    amounts = amounts.reindex(trades.index)
    account = report["account"].reindex(trades.index.get_level_values("datetime")).to_numpy()
    largest = _SHARE * account * amounts / trades
    return float(largest[(trades > 0) & (amounts > 0)].quantile(_QUANTILE))
