"""Runs side by side on the rows that all of them score: signal, significance, backtest, pairs, factors, trials."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kronos_qlib.analysis.exposure import exposures, residual_scores
from kronos_qlib.analysis.market import HORIZONS, MarketError, read_market
from kronos_qlib.analysis.notes import reservations, step_name
from kronos_qlib.analysis.overfitting import (
    Overfitting,
    deflated_mean,
    deflated_sharpe,
    minimum_track_record,
    probability_of_overfitting,
    spread_of_trials,
)
from kronos_qlib.analysis.portfolio import (
    annualise,
    capacity,
    cost_a_year,
    drawdowns,
    excess_returns,
    is_annualised_by_qlib,
    mean_turnover,
    sweep_costs,
)
from kronos_qlib.analysis.results import ResultsError, RunResult
from kronos_qlib.analysis.signals import (
    daily_ic,
    daily_rank_ic,
    decile_labels,
    half_life,
    monotonicity,
    pass_over_ties,
    rank_autocorrelation,
    tied_share,
    wide,
)
from kronos_qlib.analysis.significance import bootstrap_interval, holm, newey_west
from kronos_qlib.data.factors import FACTORS
from kronos_qlib.files import whole_file
from kronos_qlib.text import csv_cell

TABLE_COLUMNS = [
    *("ic", "icir", "rank_ic", "rank_icir", "rank_ic_t", "rank_ic_p", "rank_ic_p_holm", "rank_ic_low", "rank_ic_high"),
    *("decile_spread", "monotonicity", "hit_rate", "signal_half_life"),
    *("residual_rank_ic", "residual_rank_ic_t", "residual_rank_ic_p", "residual_rank_ic_p_holm"),
    *("residual_rank_ic_low", "residual_rank_ic_high"),
    *("turnover", "excess_return", "excess_return_with_cost", "information_ratio", "max_drawdown", "cost", "capacity"),
    *("trials", "deflated_rank_ic", "deflated_sharpe", "track_record_days"),
    *("trials_rank_ic_sd", "probabilistic_sharpe"),
    *("tied_share", "topk", "topk_label", "topk_label_sd"),
]
HORIZON_COLUMNS = ["rank_ic", "t", "low", "high", "days"]
SEED_COLUMNS = ["seeds"] + [
    f"{name}_{part}" for name in ("rank_ic", "rank_icir", "excess_return_with_cost") for part in ("mean", "sd")
]
_SEEDS, _FOLDERS = {"seed", "random_state"}, {"output_dir", "cache_dir", "experiment_name"}
PAIR_COLUMNS = ["rank_ic_difference", "t", "p", "p_holm", "low", "high", "score_correlation", "days"]
ASSUMED_HORIZON = 10


@dataclass(frozen=True)
class Comparison:
    """Runs side by side; `run` is a run's name and `day` a date that all runs score.

    table: one row per run, columns `TABLE_COLUMNS`, see `compare_runs`.
    pairs: index (run, other), columns `PAIR_COLUMNS`.
    dropped: one row per run: rows and days it scores, rows of these without a label, rows and days that do not count
        because another run lacks them or they have no label, rows and days kept.
    ic, rank_ic, decile_spread, residual_rank_ic: day × run. deciles: decile 1 (lowest scores) … 10 × run, mean label.
    autocorrelation: lag in days × run, of the scores' ranks. score_correlation: run × run, mean of the daily rank
        correlation. exposures: run × factor, mean daily rank correlation of the score with each simple factor.
    decile_days: run → day × decile, the labels that `deciles` are the means of.
    horizons: index (run, days), columns `HORIZON_COLUMNS`: rank IC with the return over 1, 5, 10 and 20 bars from
        the next bar's close on, and Newey–West's t with the longer of lag and days. Empty without the runs' stores.
    seeds: one row per group of runs whose settings differ in the seed alone, columns `SEED_COLUMNS`, ratios a year;
        of several runs of one seed the last counts.
    costs: run × what the trades would have earned at other costs, see `portfolio.sweep_costs`.
    drawdowns: index (run, number), the five deepest, see `portfolio.drawdowns`.
    overfitting: probability of backtest overfitting among the runs, by `excess return` after costs and by `rank IC`.
    lag: of Newey–West, bars: the longest horizon recorded. notes: see `analysis.notes`.

    A day here is a score date: of weekly or intraday bars it is a bar, see `step`.
    """

    runs: list[RunResult]
    table: pd.DataFrame
    pairs: pd.DataFrame
    dropped: pd.DataFrame
    ic: pd.DataFrame
    rank_ic: pd.DataFrame
    decile_spread: pd.DataFrame
    deciles: pd.DataFrame
    autocorrelation: pd.DataFrame
    score_correlation: pd.DataFrame
    residual_rank_ic: pd.DataFrame
    exposures: pd.DataFrame
    decile_days: dict[str, pd.DataFrame]
    horizons: pd.DataFrame
    seeds: pd.DataFrame
    costs: pd.DataFrame
    drawdowns: pd.DataFrame
    overfitting: dict[str, Overfitting]
    lag: int
    notes: list[str]

    @property
    def step(self) -> str:
        """What one score date is called: day, week, or bar where there are several a day."""
        return step_name({run.bar_freq for run in self.runs})


def compare_runs(runs: Sequence[RunResult], trials: int | None = None) -> Comparison:
    """Measure every run on the dates and instruments for which all have a finite score and a finite label.

    The columns of `table`: ic, rank_ic: mean of the daily (rank) information coefficient; icir, rank_icir: that mean
    over its standard deviation; rank_ic_t, _p: Newey–West with the longest recorded horizon as lag, _p_holm: corrected
    for the number of runs, _low, _high: 95 %, stationary bootstrap; decile_spread: mean label of the top decile less
    the bottom one's, of a day; monotonicity: Spearman, decile number and mean label; hit_rate: share of days with a
    rank IC above 0; signal_half_life: days until the rank autocorrelation of the scores is a half, infinite if that is
    not seen; residual_rank_ic and on: rank IC of what the simple factors (`data.factors.FACTORS`) leave of the scores,
    per day.
    Of the backtest, whatever its rows: turnover a day; excess_return, excess_return_with_cost (a year, over the
    benchmark), information_ratio (annualised) and max_drawdown with cost, as Qlib stored them, or by the day and the
    market's own year where these differ (`RunResult.year`); cost a year; capacity
    (`portfolio.capacity`), in the market's currency.
    After counting trials: trials, as `trials` says or else as the MLflow store tells; deflated_rank_ic and
    deflated_sharpe, 1 less the p of the figure against the best of so many by chance (see `analysis.overfitting`);
    track_record_days, after which such a Sharpe ratio would be above 0 with 95 % confidence; trials_rank_ic_sd, the
    deviation of the rank ICs that the trials recorded, NaN where that of chance is used; probabilistic_sharpe, the
    deflated one of a single trial. The Sharpe ratios are those of the excess return after costs.
    Of ties: tied_share of the scores; topk, the number held by the run's strategy, or a tenth of the instruments;
    topk_label, the mean label of a day's highest topk scores, over several random orders of equal ones, and its _sd.
    Ratios: 0.05 is 5 %. NaN: cannot be computed.

    Raises ResultsError if the runs have no row in common.
    """
    runs = list(runs)
    scores, labels, dropped = _common_rows(runs)
    lag = max((run.horizon for run in runs if run.horizon), default=ASSUMED_HORIZON)  # one, so that t's compare
    markets, unread = _markets(runs, scores)
    tables = {name: wide(rows) for name, rows in scores.items()}
    returns = {name: wide(rows) for name, rows in labels.items()}
    ic = pd.DataFrame({name: daily_ic(tables[name], returns[name]) for name in tables})
    rank_ic = pd.DataFrame({name: daily_rank_ic(tables[name], returns[name]) for name in tables})
    deciles = {name: decile_labels(tables[name], returns[name]) for name in tables}
    residual = _residual_rank_ic(scores, returns, markets, rank_ic.index)
    spread = pd.DataFrame({name: days[10] - days[1] for name, days in deciles.items()})
    decile_means = pd.DataFrame({name: days.mean() for name, days in deciles.items()})
    autocorrelation = pd.DataFrame({name: rank_autocorrelation(days) for name, days in tables.items()})
    signal = pd.DataFrame(
        {
            "ic": ic.mean(),
            "icir": ic.mean() / ic.std(),
            "decile_spread": spread.mean(),
            "monotonicity": decile_means.apply(monotonicity),
            "hit_rate": (rank_ic > 0).sum() / rank_ic.notna().sum(),
            "signal_half_life": autocorrelation.apply(half_life),
            "rank_icir": rank_ic.mean() / rank_ic.std(),
        }
    ).join([_test_means("rank_ic", rank_ic, lag), _test_means("residual_rank_ic", residual, lag)])
    counted = _count_trials(runs, rank_ic, lag, trials)
    ties = _ties(runs, tables, returns)
    table = signal.join([_backtests(runs, markets), counted, ties]).reindex(columns=TABLE_COLUMNS).rename_axis("run")
    correlation = _score_correlation(tables)
    excess = pd.DataFrame({run.name: excess_returns(run.report) for run in runs if len(run.report)})
    measures = {"excess return": excess, "rank IC": rank_ic}
    overfitting = {measure: probability_of_overfitting(daily) for measure, daily in measures.items()}
    return Comparison(
        runs=runs,
        table=table,
        pairs=_pairs(rank_ic, correlation, lag),
        dropped=dropped,
        ic=ic,
        rank_ic=rank_ic,
        decile_spread=spread,
        deciles=decile_means.rename_axis("decile"),
        autocorrelation=autocorrelation.rename_axis("lag"),
        score_correlation=correlation,
        residual_rank_ic=residual,
        exposures=_exposures(tables, markets),
        decile_days=deciles,
        horizons=_horizons(tables, markets, lag),
        seeds=_seeds(runs, table),
        costs=pd.DataFrame({run.name: sweep_costs(run.report, run.year) for run in runs}).T.rename_axis("run"),
        drawdowns=_drawdowns(runs),
        overfitting=overfitting,
        lag=lag,
        notes=reservations(runs, labels, tables, rank_ic, residual, lag, unread, overfitting),
    )


def _common_rows(runs: Sequence[RunResult]) -> tuple[dict[str, pd.Series], dict[str, pd.Series], pd.DataFrame]:
    scored = {run.name: run.scores[np.isfinite(run.scores)] for run in runs}
    labelled = {run.name: run.labels[np.isfinite(run.labels)] for run in runs}
    common = None
    for name, rows in scored.items():
        usable = rows.index.intersection(labelled[name].index)
        common = usable if common is None else common.intersection(usable)
    if common is None or common.empty:
        spans = "; ".join(f"{name}: {_span(rows)}" for name, rows in scored.items())
        raise ResultsError(f"no date and instrument has a score and a label in all runs ({spans})")
    common = common.sort_values()
    days = common.get_level_values("datetime").nunique()
    dropped = pd.DataFrame(
        {
            name: {
                "scored_rows": len(rows),
                "scored_days": rows.index.get_level_values("datetime").nunique(),
                "unlabelled_rows": len(rows.index.difference(labelled[name].index)),
                "kept_rows": len(common),
                "kept_days": days,
            }
            for name, rows in scored.items()
        }
    ).T.rename_axis("run")
    dropped["dropped_rows"] = dropped["scored_rows"] - dropped["kept_rows"]
    dropped["dropped_days"] = dropped["scored_days"] - dropped["kept_days"]
    return (
        {name: rows.loc[common] for name, rows in scored.items()},
        {name: rows.loc[common] for name, rows in labelled.items()},
        dropped,
    )


def _span(rows: pd.Series) -> str:
    days = rows.index.get_level_values("datetime")
    return f"{len(rows)} scores" + (f", {days.min():%Y-%m-%d} … {days.max():%Y-%m-%d}" if len(rows) else "")


def _markets(
    runs: Sequence[RunResult], scores: dict[str, pd.Series]
) -> tuple[dict[str, pd.DataFrame | None], list[str]]:
    """Read factors and amounts for each run, once per store; and list why a run has none."""
    indices = [rows.index for rows in scores.values()] + [run.trades.index for run in runs if run.trades is not None]
    instruments = sorted(set().union(*(index.unique("instrument") for index in indices)))
    days = pd.DatetimeIndex(sorted(set().union(*(index.unique("datetime") for index in indices))))
    read: dict[tuple[Path, str], pd.DataFrame | None] = {}
    unread = []
    for run in runs:
        if run.store is None:
            unread.append(f"{run.name}: its Qlib store ({run.provider_uri or 'not recorded'}) is not at hand")
        elif (key := (run.store.resolve(), run.bar_freq)) not in read:
            try:
                region = run.config.get("qlib_init", {}).get("region", "cn")
                read[key] = read_market(key[0], instruments, days[0], days[-1], region, run.bar_freq)
            except MarketError as error:
                read[key] = None
                unread.append(f"{run.name}: {error}")
    return {run.name: read.get((run.store.resolve(), run.bar_freq)) if run.store else None for run in runs}, unread


def _residual_rank_ic(
    scores: dict[str, pd.Series],
    returns: dict[str, pd.DataFrame],
    markets: dict[str, pd.DataFrame | None],
    days: pd.Index,
) -> pd.DataFrame:
    daily = pd.DataFrame(np.nan, index=days, columns=list(scores))
    for name, market in markets.items():
        left = scores[name].iloc[:0] if market is None else residual_scores(scores[name], market[[*FACTORS]])
        if len(left):
            table = wide(left)
            daily[name] = daily_rank_ic(table, returns[name].reindex_like(table)).reindex(days)
    return daily


def _exposures(tables: dict[str, pd.DataFrame], markets: dict[str, pd.DataFrame | None]) -> pd.DataFrame:
    rows = {}
    for name, market in markets.items():
        factors = (
            {} if market is None else {factor: wide(market[factor]).reindex_like(tables[name]) for factor in FACTORS}
        )
        rows[name] = exposures(tables[name], factors).reindex([*FACTORS])
    return pd.DataFrame(rows).T.rename_axis("run")


def _test_means(name: str, daily: pd.DataFrame, lag: int) -> pd.DataFrame:
    """Average each column and test the mean: t, p, Holm's p and interval, one row per run."""
    rows = {}
    for run, days in daily.items():
        t, p = newey_west(days, lag)
        low, high = bootstrap_interval(days)
        rows[run] = {name: days.mean(), f"{name}_t": t, f"{name}_p": p, f"{name}_low": low, f"{name}_high": high}
    tested = pd.DataFrame(rows).T
    return tested.assign(**{f"{name}_p_holm": holm(tested[f"{name}_p"])})


def _backtests(runs: Sequence[RunResult], markets: dict[str, pd.DataFrame | None]) -> pd.DataFrame:
    kept = ["excess_return", "excess_return_with_cost", "information_ratio", "max_drawdown"]
    rows = {}
    for run in runs:
        market = markets[run.name]
        own = run.metrics if is_annualised_by_qlib(run.freq, run.year) else annualise(run.report, run.year)
        rows[run.name] = {metric: own[metric] for metric in kept} | {
            "turnover": mean_turnover(run.report),
            "cost": cost_a_year(run.report, run.year),
            "capacity": _capacity(run, market),
        }
    return pd.DataFrame(rows).T


def _count_trials(runs: Sequence[RunResult], rank_ic: pd.DataFrame, lag: int, trials: int | None) -> pd.DataFrame:
    rows = {}
    for run in runs:
        count, excess = trials or run.trials, excess_returns(run.report)
        spread = spread_of_trials(run.trial_rank_ics)
        rows[run.name] = {
            "trials": count,
            "deflated_rank_ic": deflated_mean(rank_ic[run.name], lag, count, spread),
            "deflated_sharpe": deflated_sharpe(excess, count),
            "track_record_days": minimum_track_record(excess),
            "trials_rank_ic_sd": np.nan if spread is None else spread,
            "probabilistic_sharpe": deflated_sharpe(excess, 1),
        }
    return pd.DataFrame(rows).T


def _ties(runs: Sequence[RunResult], tables: dict[str, pd.DataFrame], returns: dict[str, pd.DataFrame]) -> pd.DataFrame:
    rows = {}
    for run in runs:
        scores = tables[run.name]
        topk = _held(run.config) or max(1, round(scores.notna().sum(axis=1).mean() / 10))
        passes = pass_over_ties(scores, returns[run.name], topk)
        rows[run.name] = {
            "tied_share": tied_share(scores),
            "topk": topk,
            "topk_label": passes.mean(),
            "topk_label_sd": passes.std(ddof=1),
        }
    return pd.DataFrame(rows).T


def _held(config: Mapping[str, Any]) -> int | None:
    """Return how many instruments the strategy of a run's backtest holds, if its configuration says."""
    records = config.get("task", {}).get("record")
    for record in records if isinstance(records, list) else []:
        options = record.get("kwargs", {}).get("config") if isinstance(record, dict) else None
        topk = options.get("strategy", {}).get("kwargs", {}).get("topk") if isinstance(options, dict) else None
        if isinstance(topk, int) and topk > 0:
            return topk
    return None


def _horizons(tables: dict[str, pd.DataFrame], markets: dict[str, pd.DataFrame | None], lag: int) -> pd.DataFrame:
    rows = {}
    for name, market in markets.items():
        if market is None:
            continue
        for days in HORIZONS:
            later = wide(market[f"return_{days}"]).reindex_like(tables[name])
            daily = daily_rank_ic(tables[name], later).dropna()
            t, _ = newey_west(daily, max(lag, days))
            low, high = bootstrap_interval(daily)
            rows[(name, days)] = [daily.mean() if len(daily) else np.nan, t, low, high, len(daily)]
    index = pd.MultiIndex.from_tuples(list(rows), names=["run", "days"])
    return pd.DataFrame(list(rows.values()), index, HORIZON_COLUMNS, dtype=float)


def _drawdowns(runs: Sequence[RunResult]) -> pd.DataFrame:
    tables = {run.name: drawdowns(run.report) for run in runs}
    kept = {name: table for name, table in tables.items() if len(table)} or tables
    return pd.concat(kept, names=["run", "number"])


def _seeds(runs: Sequence[RunResult], table: pd.DataFrame) -> pd.DataFrame:
    """Group the runs whose settings differ in the seed, and besides in where they keep their files at most."""
    groups: dict[str, dict[str, str]] = {}
    for run in runs:
        if run.config.get("task"):
            named, settings = (
                json.dumps(_without(run.config["task"], left_out), sort_keys=True, default=str)
                for left_out in (_FOLDERS, _FOLDERS | _SEEDS)
            )
            groups.setdefault(settings, {})[named] = run.name  # one of each seed
    rows = {}
    for group in groups.values():
        if len(group) > 1:
            names = list(group.values())
            figures = table.loc[names, ["rank_ic", "rank_icir", "excess_return_with_cost"]]
            measured = {f"{column}_mean": figures[column].mean() for column in figures}
            measured |= {f"{column}_sd": figures[column].std(ddof=1) for column in figures}
            rows[", ".join(names)] = {"seeds": len(names)} | measured
    return pd.DataFrame.from_dict(rows, orient="index", columns=SEED_COLUMNS, dtype=float).rename_axis("runs")


def _without(value: Any, keys: set[str]) -> Any:
    """Copy settings without some keys, wherever they stand."""
    if isinstance(value, Mapping):
        return {str(key): _without(part, keys) for key, part in value.items() if key not in keys}
    return [_without(part, keys) for part in value] if isinstance(value, (list, tuple)) else value


def _capacity(run: RunResult, market: pd.DataFrame | None) -> float:
    if run.trades is None or run.trades.empty or market is None:
        return np.nan
    return capacity(run.trades, market["amount"], run.report)


def _score_correlation(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Average the daily rank correlation of the scores of every two runs."""
    names = list(tables)
    correlation = pd.DataFrame(np.nan, index=pd.Index(names, name="run"), columns=names)
    for one in names:
        correlation.loc[one, one] = 1.0 if (tables[one].nunique(axis=1) > 1).any() else np.nan
    for one, other in combinations(names, 2):
        mean = daily_rank_ic(tables[one], tables[other]).mean()
        correlation.loc[one, other] = correlation.loc[other, one] = mean
    return correlation


def _pairs(rank_ic: pd.DataFrame, correlation: pd.DataFrame, lag: int) -> pd.DataFrame:
    """Test the difference of the daily rank IC of every two runs, on days where both have one."""
    rows = []
    for one, other in combinations(rank_ic.columns, 2):
        difference = rank_ic[one] - rank_ic[other]
        t, p = newey_west(difference, lag)
        low, high = bootstrap_interval(difference)
        score_correlation, days = correlation.loc[one, other], difference.notna().sum()
        rows.append((one, other, difference.mean(), t, p, np.nan, low, high, score_correlation, days))
    pairs = pd.DataFrame(rows, columns=["run", "other", *PAIR_COLUMNS]).set_index(["run", "other"])
    return pairs.assign(p_holm=holm(pairs["p"]))


def write_tables(comparison: Comparison, folder: Path) -> list[Path]:
    """Write the tables with full precision, and return their paths.

    comparison.csv has beside `TABLE_COLUMNS` those of `Comparison.dropped`, `lag`, `synthetic` (True for a demo
    market), and the probabilities of overfitting. pairs.csv, horizons.csv, costs.csv, drawdowns.csv and seeds.csv are
    those of `Comparison`; the last is there if runs differ in their seed alone.
    """
    runs = comparison.table.join(comparison.dropped).assign(
        lag=comparison.lag,
        synthetic=[run.synthetic for run in comparison.runs],
        overfitting_excess_return=comparison.overfitting["excess return"].share,
        overfitting_rank_ic=comparison.overfitting["rank IC"].share,
    )
    written = {folder / "comparison.csv": runs, folder / "pairs.csv": comparison.pairs}
    others = {"horizons": comparison.horizons, "costs": comparison.costs, "drawdowns": comparison.drawdowns}
    written |= {folder / f"{name}.csv": table for name, table in others.items()}
    if len(comparison.seeds):
        written[folder / "seeds.csv"] = comparison.seeds
    for path, table in written.items():
        names = table.index.to_frame().map(lambda name: csv_cell(name) if isinstance(name, str) else name)
        with whole_file(path) as draft:
            table.set_index([names[name] for name in names]).to_csv(draft)
    return list(written)
