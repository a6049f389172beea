"""Turnover, costs and capacity of a backtest."""

import pandas as pd

# Qlib's trading days a year (`risk_analysis`, daily frequency), so that cost is the difference of its two returns.
DAYS_A_YEAR = 238
_SHARE = 0.01
_QUANTILE = 0.05


def mean_turnover(report: pd.DataFrame) -> float:
    """Average the turnover of a day, as Qlib reports it: bought plus sold over the account's value, a ratio."""
    return float(report["turnover"].groupby(report.index.normalize()).sum().mean())


def cost_a_year(report: pd.DataFrame) -> float:
    """Annualise the costs over the account's value, a ratio a year of 238 days, summed as in Qlib's risk analysis."""
    return float(report["cost"].groupby(report.index.normalize()).sum().mean() * DAYS_A_YEAR)


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
