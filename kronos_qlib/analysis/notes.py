"""Notes and cautions on a comparison: what its figures depend on."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd

from kronos_qlib.analysis.overfitting import FEWEST_BLOCKS, FEWEST_DAYS_A_BLOCK, FEWEST_RUNS, Overfitting
from kronos_qlib.analysis.portfolio import is_annualised_by_qlib
from kronos_qlib.analysis.results import RunResult

SYNTHETIC = "SYNTHETIC demo market"
_DISTINCT = 0.5  # of a day's scores: with fewer, ties decide what is bought


def reservations(
    runs: Sequence[RunResult],
    labels: dict[str, pd.Series],
    scores: dict[str, pd.DataFrame],
    rank_ic: pd.DataFrame,
    residual: pd.DataFrame,
    lag: int,
    unread: Sequence[str],
    overfitting: Mapping[str, Overfitting],
) -> list[str]:
    """Write a sentence for each reservation.

    labels, scores, rank_ic, residual, lag: of the comparison, by run. unread: why the Qlib store of a
        run could not be read. overfitting: by the measure that the runs are chosen by.
    """
    return [
        *_backtest_notes(runs),
        *_label_notes(labels),
        *_year_notes(runs),
        _lag_note(runs, lag),
        *_sample_notes(runs, next(iter(labels.values())).index[0][0]),
        *[f"n/a after simple factors and for capacity: {reason}." for reason in unread],
        *[f"CAUTION: {run.name}: {run.overlap}." for run in runs if run.overlap],
        *_market_notes(runs),
        *_score_notes(scores),
        *_residual_notes(residual, rank_ic, unread),
        *_overfitting_notes(overfitting),
    ]


def _backtest_notes(runs: Sequence[RunResult]) -> list[str]:
    without = [run.name for run in runs if run.report.empty]
    missing = [f"n/a for turnover, returns and capacity: no backtest is recorded of {', '.join(without)}."] * bool(
        without
    )
    runs = [run for run in runs if not run.report.empty]
    if not runs:
        return missing
    periods = {run.name: backtest_period(run) for run in runs}
    rules = _backtest_rules(runs)
    differ = sorted(key for key in set().union(*rules.values()) if len({held.get(key) for held in rules.values()}) > 1)
    settings = [f"CAUTION: the backtests differ in {', '.join(differ)}: their rows do not compare."] if differ else []
    if len({run.freq for run in runs}) > 1:
        freqs = "; ".join(f"{run.name}: {run.freq}" for run in runs)
        settings.append(f"CAUTION: the backtests are of different frequencies: {freqs}.")
    if len(set(periods.values())) == 1:
        period = next(iter(periods.values()))
        return [*missing, *settings, f"Backtest {period}; it holds what each run scored, common to all or not."]
    return [
        *missing,
        *settings,
        "CAUTION: the backtests cover different dates, so their rows do not compare: "
        + "; ".join(f"{name}: {period}" for name, period in periods.items())
        + ".",
    ]


def _backtest_rules(runs: Sequence[RunResult]) -> dict[str, dict[str, str]]:
    """Collect strategy and exchange settings of each run's backtest, as far as recorded; the report has its dates."""
    rules = {}
    for run in runs:
        records = run.config.get("task", {}).get("record")
        for record in records if isinstance(records, list) else []:
            config = record.get("kwargs", {}).get("config") if isinstance(record, dict) else None
            if isinstance(config, dict):
                strategy, backtest = config.get("strategy", {}), config.get("backtest", {})
                parts = {"strategy": strategy.get("class"), **strategy.get("kwargs", {}), **backtest}
                parts |= parts.pop("exchange_kwargs", None) or {}
                skipped = ("signal", "start_time", "end_time")
                rules[run.name] = {key: str(value) for key, value in parts.items() if key not in skipped}
    return rules


def _label_notes(labels: dict[str, pd.Series]) -> list[str]:
    first, *others = labels.items()
    differ = [name for name, rows in others if not np.allclose(rows, first[1], rtol=1e-4, atol=1e-6)]
    return [f"CAUTION: labels differ from those of {first[0]}: {', '.join(differ)}."] if differ else []


def _lag_note(runs: Sequence[RunResult], lag: int) -> str:
    recorded = [run.name for run in runs if run.horizon == lag]
    why = f"the longest horizon recorded ({', '.join(recorded)})" if recorded else "assumed, no run records a horizon"
    return f"Newey–West lag of all rows: {lag} {step_name({run.bar_freq for run in runs})}s, {why}."


def _year_notes(runs: Sequence[RunResult]) -> list[str]:
    """Say where a year is the market's own, and not Qlib's."""
    own = {run.name: run.year for run in runs if len(run.report) and not is_annualised_by_qlib(run.freq, run.year)}
    if not own:
        return []
    years = "; ".join(f"{name}: {year:.0f}" for name, year in own.items())
    return [
        f"Figures a year are of whole days or weeks, as many as the market has: {years}. Qlib's records take 238 days "
        "or 50 weeks of any market, and minutes one by one, so theirs differ."
    ]


def _sample_notes(runs: Sequence[RunResult], first: pd.Timestamp) -> list[str]:
    """Name the runs whose train or valid segment reaches the days that are compared."""
    notes = []
    for run in runs:
        ends = {name: end for name, end in _segment_ends(run).items() if end >= first}
        notes += [
            f"CAUTION: {run.name}: its {name} segment ends on {end:%Y-%m-%d} and scores are compared from "
            f"{first:%Y-%m-%d} on: up to then they are not out of sample."
            for name, end in ends.items()
        ]
    return notes


def _segment_ends(run: RunResult) -> dict[str, pd.Timestamp]:
    """Find the last days of the segments train and valid, as far as they are recorded."""
    dataset = run.config.get("task", {}).get("dataset")
    kwargs = dataset.get("kwargs", {}) if isinstance(dataset, dict) else {}
    segments = run.kronos_run.get("data", {}).get("segments") or kwargs.get("segments")
    spans = segments if isinstance(segments, dict) else {}
    ends = {}
    for name in ("train", "valid"):
        span = spans.get(name)
        if isinstance(span, (list, tuple)) and len(span) == 2 and span[1] is not None:
            ends[name] = pd.Timestamp(str(span[1]))
    return ends


def _score_notes(tables: dict[str, pd.DataFrame]) -> list[str]:
    notes = []
    for name, scores in tables.items():
        distinct = scores.nunique(axis=1).mean()
        share = distinct / scores.notna().sum(axis=1).mean()
        if distinct == 1:
            notes.append(f"CAUTION: {name}: all scores of a day are equal, so its backtest is one arbitrary draw.")
        elif share < _DISTINCT:
            notes.append(
                f"{name}: {distinct:.0f} distinct scores a day for {distinct / share:.0f} instruments: which of equal "
                "ones the backtest buys is arbitrary."
            )
    return notes


def _residual_notes(residual: pd.DataFrame, rank_ic: pd.DataFrame, unread: Sequence[str]) -> list[str]:
    days = residual.notna().sum()
    fewer = [
        f"{name}: {days[name]} of {scored}"
        for name, scored in rank_ic.notna().sum().items()
        if days[name] < scored and not any(reason.startswith(f"{name}:") for reason in unread)
    ]
    return [f"Days with something left after simple factors: {'; '.join(fewer)}."] if fewer else []


def _overfitting_notes(overfitting: Mapping[str, Overfitting]) -> list[str]:
    lacking = [
        f"by {measure} there are {found.runs} and {found.days:,}"
        for measure, found in overfitting.items()
        if np.isnan(found.share)
    ]
    takes = f"it takes {FEWEST_RUNS} runs that vary and {FEWEST_BLOCKS * FEWEST_DAYS_A_BLOCK} days in common"
    return [f"n/a for overfitting: {takes}; {', '.join(lacking)}."] if lacking else []


def _market_notes(runs: Sequence[RunResult]) -> list[str]:
    notes = [f"{synthetic_note(runs)}: simulated bars, no evidence about real markets."] if synthetic_note(runs) else []
    if not all(run.synthetic for run in runs):
        notes.append(
            "Survivorship: if the store lacks delisted instruments, absolute returns are flattered. Compare runs; do "
            "not quote levels."
        )
    return notes


def step_name(freqs: Collection[str]) -> str:
    """Name a score date of bars of these frequencies: day, week, or bar."""
    return {"day": "day", "1week": "week"}.get(next(iter(freqs)), "bar") if len(freqs) == 1 else "bar"


def backtest_period(run: RunResult) -> str:
    """Format first and last day and number of days, or of steps of another frequency, of the backtest."""
    if run.report.empty:
        return "none recorded"
    first, last = run.report.index[0], run.report.index[-1]
    steps = "days" if run.freq == "1day" else f"steps of {run.freq}"
    return f"{first:%Y-%m-%d} … {last:%Y-%m-%d}, {len(run.report)} {steps}"


def synthetic_note(runs: Sequence[RunResult]) -> str:
    """Name the runs on a demo market; empty if there is none."""
    names = [run.name for run in runs if run.synthetic]
    return SYNTHETIC + (f" ({', '.join(names)})" if len(names) < len(runs) else "") if names else ""
