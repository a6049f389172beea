"""Verdicts: the comparison in sentences, uncertainty first."""

import numpy as np
import pandas as pd

from kronos_qlib.analysis.comparison import Comparison
from kronos_qlib.analysis.significance import LEVEL

_EVIDENCE = 0.05


def verdicts(comparison: Comparison) -> list[str]:
    """List all verdicts: pairs, then runs, then runs after simple factors."""
    names = list(comparison.table.index)
    return [
        *(pair_verdict(comparison, one, other) for one, other in comparison.pairs.index),
        *(run_verdict(comparison, name) for name in names),
        *trials_verdicts(comparison),
        *(residual_verdict(comparison, name) for name in names if comparison.residual_rank_ic[name].notna().any()),
    ]


def pair_verdict(comparison: Comparison, run: str, other: str) -> str:
    """State whether two runs' rank ICs differ; `run` and `other` in the order of `comparison.pairs`."""
    row = comparison.pairs.loc[(run, other)]
    better, worse = (run, other) if row["rank_ic_difference"] > 0 else (other, run)
    return _sentence(
        f"{run} − {other} rank IC",
        (row["rank_ic_difference"], row["low"], row["high"], row["p_holm"]),
        found=f"{better} is better than {worse}",
        nothing="no evidence of a difference",
        tried=_counted(comparison.pairs["p_holm"], "pair"),
        days=comparison.rank_ic[run] - comparison.rank_ic[other],
    )


def run_verdict(comparison: Comparison, run: str) -> str:
    """State whether a run's scores carry a signal."""
    row = comparison.table.loc[run]
    return _sentence(
        f"{run} rank IC",
        tuple(row[["rank_ic", "rank_ic_low", "rank_ic_high", "rank_ic_p_holm"]]),
        found="evidence of a signal" if row["rank_ic"] > 0 else "evidence of a signal of the wrong sign",
        nothing="no evidence of a signal",
        tried=_counted(comparison.table["rank_ic_p_holm"], "run"),
        days=comparison.rank_ic[run],
    )


def trials_verdicts(comparison: Comparison) -> list[str]:
    """State where evidence stands, or not, once a run's trials are counted; and how sure the choice of a run is."""
    said = []
    for run, row in comparison.table.iterrows():
        signal = row["rank_ic_low"] > 0 and row["rank_ic_p_holm"] < _EVIDENCE
        gain = row["probabilistic_sharpe"] >= LEVEL
        for name, column, found in (("rank IC", "deflated_rank_ic", signal), ("Sharpe ratio", "deflated_sharpe", gain)):
            if found and row["trials"] > 1:
                word = "it stands" if row[column] >= LEVEL else f"no evidence that stands, which needs {LEVEL:g}"
                subject = f"{run} {name} after counting {row['trials']:.0f} trials"
                said.append(f"{subject}: deflated {np.floor(1000 * row[column]) / 1000:.3f}: {word}")
    return [*said, *_overfitting_verdict(comparison)]


def _overfitting_verdict(comparison: Comparison) -> list[str]:
    parts = [
        f"{found.share:.0%} by {measure} ({found.runs} runs, {found.days:,} dates, {found.blocks} blocks)"
        for measure, found in comparison.overfitting.items()
        if np.isfinite(found.share)
    ]
    if not parts:
        return []
    return [
        "Overfitting: the best run of one half of the dates is below the median in the other half in "
        f"{', '.join(parts)}; a half is chance"
    ]


def residual_verdict(comparison: Comparison, run: str) -> str:
    """State whether a run's scores carry a signal that simple factors do not."""
    row = comparison.table.loc[run]
    name = "residual_rank_ic"
    return _sentence(
        f"{run} rank IC after simple factors",
        tuple(row[[name, f"{name}_low", f"{name}_high", f"{name}_p_holm"]]),
        found="evidence of something they lack" if row[name] > 0 else "evidence of the wrong sign",
        nothing="no evidence that anything is left",
        tried=_counted(comparison.table[f"{name}_p_holm"], "run"),
        days=comparison.residual_rank_ic[run],
    )


def _counted(p_values: pd.Series, what: str) -> str:
    """Count the p-values that were corrected for one another."""
    count = int(p_values.notna().sum())
    return f"{count} {what}{'' if count == 1 else 's'}"


def _sentence(
    subject: str, figures: tuple[float, float, float, float], found: str, nothing: str, tried: str, days: pd.Series
) -> str:
    """Write one verdict. Evidence needs both: an interval without zero, and a p that stands after Holm's correction."""
    mean, low, high, p = figures
    if not np.isfinite(mean):
        return f"{subject}: n/a: the scores of a date do not vary, or nothing is left of them"
    if (days.dropna() == 0).all():
        return f"{subject}: 0 on every date: the two order the instruments alike"
    if not np.isfinite([low, high, p]).all():
        return f"{subject}: {_signed(mean)}: too few dates to say how sure that is"
    verdict = nothing
    if p < _EVIDENCE and (low > 0 or high < 0):
        verdict = found
    elif low > 0 or high < 0:
        verdict = f"{nothing} that stands after correction for {tried} (Holm p {p:.2f})"
    return f"{subject}: {_signed(mean)}, 95 % {_signed(low)}…{_signed(high)}: {verdict}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
