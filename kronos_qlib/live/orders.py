"""The orders that a run's own strategy would place on a date's signals: Qlib's strategy on Qlib's exchange."""

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from qlib.backtest import Account, get_exchange
from qlib.backtest.decision import BaseTradeDecision, Order
from qlib.backtest.exchange import Exchange
from qlib.backtest.utils import CommonInfrastructure, LevelInfrastructure, TradeCalendarManager
from qlib.config import C
from qlib.data import D
from qlib.strategy.base import BaseStrategy
from qlib.utils import init_instance_by_config

from kronos_qlib.live.run import LiveRun
from kronos_qlib.live.signal_set import SignalSet
from kronos_qlib.live.signals import shown

logger = logging.getLogger("qlib.signals")
CASH = "CASH"  # the row of a holdings file that has the cash
PRICE_DAYS = 60  # sessions back in which a holding that does not trade has its last close
HELD_FOR_LONG = 1_000_000  # trading steps
COLUMNS = ("date", "instrument", "side", "shares", "reference_price", "value", "expected_cost", "rank", "why")


@dataclass(frozen=True)
class Holdings:
    """What an account holds.

    cash: in the market's currency. shares: by instrument, as the broker counts them, not adjusted.
    bars_held: trading steps that an instrument was held, 1 for what was bought today; what is not in it counts as held
        for long.
    """

    cash: float
    shares: dict[str, float]
    bars_held: dict[str, int]


class _Evening(TradeCalendarManager):
    """Qlib's trade calendar of one step, on the last session of a store too, after which Qlib looks for the next."""

    def reset(self, freq: str, start_time: Any = None, end_time: Any = None) -> None:
        self._calendar: np.ndarray
        super().reset(freq, start_time, end_time)
        if self.end_index + 1 >= len(self._calendar):
            self._calendar = np.append(self._calendar, self._calendar[-1] + pd.Timedelta(days=1))


def read_holdings(path: Path) -> Holdings:
    """Read a CSV file of instrument, shares and, if known, bars_held; the row CASH has the cash as its shares.

    Raises:
        ValueError: a column or the cash is missing, a number is none or negative, an instrument is there twice; one
            line that names the file and the row. OSError: the file cannot be read.
    """
    try:
        table = pd.read_csv(path, dtype={"instrument": str}, skipinitialspace=True)
    except (ValueError, pd.errors.ParserError) as error:
        raise ValueError(f"{path}: no CSV file of holdings: {' '.join(str(error).split())}") from None
    table.columns = [str(name).strip().lower() for name in table.columns]
    repeated = pd.Index(table.columns)[pd.Index(table.columns).duplicated()]
    if len(repeated):
        raise ValueError(f"{path}: has the column {repeated[0]} twice")
    lacking = [name for name in ("instrument", "shares") if name not in table]
    if lacking:
        raise ValueError(f"{path}: has no column {lacking[0]}; it needs instrument and shares, and may have bars_held")
    table["instrument"] = table["instrument"].astype(str).str.strip().str.upper()
    for column in ("shares", "bars_held"):
        if column not in table:
            continue
        numbers = pd.to_numeric(table[column], errors="coerce")
        known = table[column].notna() if column == "bars_held" else pd.Series(True, table.index)
        wrong = np.flatnonzero(known & ~(np.isfinite(numbers) & (numbers >= 0)))
        if len(wrong):
            raise ValueError(
                f"{path}: line {wrong[0] + 2}: {column} of {table['instrument'].iloc[wrong[0]]} is "
                f"{table[column].iloc[wrong[0]]!r}; it should be a number from 0"
            )
        table[column] = numbers
    twice = table["instrument"][table["instrument"].duplicated()]
    if len(twice):
        raise ValueError(f"{path}: {twice.iloc[0]} is there twice")
    rows = table.set_index("instrument")
    if CASH not in rows.index:
        raise ValueError(f"{path}: has no row {CASH}, whose shares are the account's cash: CASH,1000000")
    held = rows.drop(index=CASH)
    held = held[held["shares"] > 0]
    bars_held = held["bars_held"].dropna().astype(int) if "bars_held" in held else pd.Series(dtype=int)
    return Holdings(float(rows.loc[CASH, "shares"]), held["shares"].astype(float).to_dict(), bars_held.to_dict())


def make_orders(run: LiveRun, signals: SignalSet, holdings: Holdings) -> pd.DataFrame:
    """Have the run's strategy decide on the signals, as on the evening of their date.

    The strategy of the run's PortAnaRecord sees the signals, the holdings, and Qlib's exchange at the date's bar: its
    price limits and suspensions, the region's lots, its close as the price. What the next bar will be is not known.

    Returns:
        A row for each order, sells first, and for each instrument that the strategy would trade but for a limit or a
        suspension, with side none: the columns `COLUMNS`. Shares as a broker counts them, prices and costs in the
        market's currency, not adjusted.

    Raises:
        ValueError: the run has no PortAnaRecord, its strategy does not trade on signals or cannot decide, a holding has
            no price, or some instruments have no factor, by which shares are counted.
    """
    config = run.portfolio
    if config is None or not config.get("strategy"):
        raise ValueError(f"{signals.experiment}: the run has no PortAnaRecord, so no strategy says what to trade")
    executor = (config.get("executor") or {}).get("kwargs") or {}
    step = str(executor.get("time_per_step", "day"))
    date = signals.date if step == signals.freq else signals.date.normalize()
    with _without_word_of_a_calendar():
        evening = _Evening(step, date, date)
    if evening.start_index < 1:
        raise ValueError(f"{shown(date)} is the store's first session: no strategy acts on it")
    names, backtest = sorted({*signals.table.index, *holdings.shares}), config.get("backtest") or {}
    exchange = _exchange(backtest, names, signals)
    positions = _positions(holdings, exchange, signals.date, signals.freq)
    account = Account(holdings.cash, positions, step, port_metr_enabled=False)
    for name in holdings.shares:
        account.current_position.update_stock_count(name, step, holdings.bars_held.get(name, HELD_FOR_LONG))
    orders = _decide(config["strategy"], signals, account, exchange, evening)
    rows = _describe(orders, account, exchange, signals)
    without_limits = _exchange(backtest | {"exchange_kwargs": _without_limits(backtest)}, names, signals)
    wanted = _decide(config["strategy"], signals, account, without_limits, evening)
    placed = {order.stock_id for order in orders}
    for order in wanted:
        if order.stock_id not in placed:
            side = "sold" if order.direction == Order.SELL else "bought"
            limit = "up" if exchange.check_stock_limit(order.stock_id, *evening.get_step_time(), Order.BUY) else "down"
            rows.append(_not_traded(order.stock_id, signals, f"not {side}: limit {limit} on {shown(date)}"))
    for name in holdings.shares:
        if exchange.check_stock_suspended(name, *evening.get_step_time()):
            rows.append(_not_traded(name, signals, f"held, suspended on {shown(date)}"))
    return pd.DataFrame([{"date": signals.date, **row} for row in rows], columns=list(COLUMNS))


def _decide(
    strategy: Mapping[str, Any], signals: SignalSet, account: Account, exchange: Exchange, evening: "_Evening"
) -> list[Order]:
    """Return the orders of a strategy at a step, which sees the signals as those of the step before."""
    before, scores = evening.get_step_time(shift=1)[0], signals.table["score"]
    index = pd.MultiIndex.from_product([[before], scores.index], names=["datetime", "instrument"])
    configuration = copy.deepcopy(dict(strategy))
    configuration["kwargs"] = dict(configuration.get("kwargs") or {}) | {"signal": pd.Series(scores.to_numpy(), index)}
    common, level = CommonInfrastructure(trade_account=account, trade_exchange=exchange), LevelInfrastructure()
    level.reset_infra(trade_calendar=evening, common_infra=common)
    try:
        trader = init_instance_by_config(configuration, accept_types=BaseStrategy)
        trader.reset(level_infra=level, common_infra=common)
        decision = trader.generate_trade_decision()
    except Exception as error:  # a strategy of the user's, or one that needs more than signals, may raise anything
        raise ValueError(
            f"the strategy {configuration.get('class')} cannot decide on signals ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(decision, BaseTradeDecision):
        raise ValueError(f"{type(trader).__name__} decides within a step: its orders are not known in the evening")
    return list(decision.get_decision())


def _without_limits(backtest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the same exchange without price limits."""
    return dict(backtest.get("exchange_kwargs") or {}) | {"limit_threshold": ("$close < 0", "$close < 0")}


def _exchange(backtest: Mapping[str, Any], names: list[str], signals: SignalSet) -> Exchange:
    """Return Qlib's exchange, with the run's costs and limits, that knows the signals' own bar alone and its close.

    Raises ValueError if some instruments lack a factor: Qlib would trade all of them in adjusted shares then.
    """
    options = dict(backtest.get("exchange_kwargs") or {}) | {"deal_price": "close", "codes": names}
    options |= {"freq": signals.freq, "start_time": signals.date, "end_time": signals.date}
    try:
        exchange = get_exchange(**options)
    except Exception as error:  # an exchange of the user's own may raise anything
        raise ValueError(f"the run's exchange cannot be made ({type(error).__name__}: {error})") from error
    quotes = exchange.quote_df[exchange.quote_df["$close"].notna()]
    lacking = quotes.index[quotes["$factor"].isna()].get_level_values("instrument")
    if len(lacking) and len(lacking) < len(quotes):
        raise ValueError(
            f"{len(lacking)} instruments have no factor on {shown(signals.date)}, {', '.join(lacking[:5])}: shares "
            "cannot be counted; bring their bars up to date"
        )
    if len(lacking):
        logger.warning("the store has no $factor: shares, lots and prices are those of adjusted prices")
    return exchange


@contextmanager
def _without_word_of_a_calendar() -> Iterator[None]:
    """Keep Qlib, which asks for a calendar of the future, from warning twice that there is none: none is needed."""
    level, C["logging_level"] = C["logging_level"], logging.ERROR
    try:
        yield
    finally:
        C["logging_level"] = level


def _positions(holdings: Holdings, exchange: Exchange, date: pd.Timestamp, freq: str) -> dict[str, dict[str, float]]:
    """Return holdings as Qlib's positions: amounts and prices are those of adjusted prices.

    Raises ValueError for an instrument without a bar in the sessions before.
    """
    names = sorted(holdings.shares)
    if not names:
        return {}
    sessions = pd.DatetimeIndex(D.calendar(freq=freq))
    first = sessions[max(0, sessions.searchsorted(date) - PRICE_DAYS)]
    bars = D.features(names, ["$close", "$factor"], first, date, freq=freq).set_axis(["close", "factor"], axis=1)
    last = bars.dropna(subset="close").groupby("instrument").last()
    absent = sorted(set(names) - set(last.index))
    if absent:
        raise ValueError(
            f"holdings: {absent[0]} has no bar in the {PRICE_DAYS} sessions up to {shown(date)} "
            f"({len(absent)} such instruments); sell it by hand, or take it out of the file"
        )
    factors = pd.Series(1.0, last.index) if exchange.trade_w_adj_price else last["factor"].fillna(1.0)
    return {
        name: {"amount": holdings.shares[name] / float(factors[name]), "price": float(last.loc[name, "close"])}
        for name in names
    }


def _describe(orders: list[Order], account: Account, exchange: Exchange, signals: SignalSet) -> list[dict[str, Any]]:
    """Execute the orders on a copy of the account, as Qlib would, and say what each is."""
    position, rows = copy.deepcopy(account.current_position), []
    for order in orders:
        value, cost, price = exchange.deal_order(order, position=position)
        factor = 1.0
        if not exchange.trade_w_adj_price:
            factor = float(exchange.get_factor(order.stock_id, order.start_time, order.end_time) or 1.0)
        if not order.deal_amount:
            rows.append(_not_traded(order.stock_id, signals, "not traded: the cash does not buy a lot"))
            continue
        sells = order.direction == Order.SELL
        rows.append(
            {
                "instrument": order.stock_id,
                "side": "sell" if sells else "buy",
                "shares": float(np.round(order.deal_amount * factor, 6)),
                "reference_price": float(f"{price / factor:.6g}"),  # of float32
                "value": float(value),
                "expected_cost": float(cost),
                "rank": signals.table["rank"].get(order.stock_id),
                "why": f"{_placed(order.stock_id, signals)}, {'held' if sells else 'not held'}",
            }
        )
    return rows


def _not_traded(name: str, signals: SignalSet, why: str) -> dict[str, Any]:
    rank = signals.table["rank"].get(name)
    return {"instrument": name, "side": "none", "shares": 0.0, "rank": rank, "why": f"{_placed(name, signals)}, {why}"}


def _placed(name: str, signals: SignalSet) -> str:
    rank = signals.table["rank"].get(name)
    return "no score" if rank is None else f"rank {rank} of {len(signals.table)}"
