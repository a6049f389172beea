"""What a ledger's record is worth: live forecasts, and apart from them simulated ones; and whether live is worse.

A date's forecast counts once in each. Of live ones the last version counts that was made before the next session
opened: what would have been traded. Versions made later are simulated, however honest their data; of them the last one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm
from scipy.stats import t as t_distribution

from kronos_qlib.analysis.comparison import ASSUMED_HORIZON
from kronos_qlib.analysis.portfolio import excess_returns, mean_turnover
from kronos_qlib.analysis.signals import daily_rank_ic, wide
from kronos_qlib.analysis.significance import bootstrap_interval, finite, newey_west
from kronos_qlib.data.demo_market import is_synthetic
from kronos_qlib.evaluation.measures import BANDS, crps_of_quantiles, inside, interval
from kronos_qlib.live.ledger import QUANTILE_COLUMNS

KINDS = ("live", "simulated")
LEVEL, POWER = 0.05, 0.8  # of the test whether live is worse, and the power at which a test says something
FIGURES = ["dates", "days", "rank_ic", "t", "low", "high", "outcomes", "crps", "crps_last_value"] + [
    f"{band}{end}" for band in BANDS for end in ("", "_low", "_high")
]
PAPER_FIGURES = ["paper_days", "paper_return", "paper_excess", "paper_cost", "paper_turnover", "paper_drawdown"]


class PaperError(Exception):
    """There is no paper portfolio; the message says why."""


Paper = Callable[[pd.Series, pd.Series], pd.DataFrame]
"""Makes Qlib's report of a paper portfolio, of a set (a row of the ledger's sets) and scores; raises PaperError."""


@dataclass(frozen=True)
class PromiseTest:
    """Whether the mean of live daily rank ICs is below what the backtest promised, one-sided.

    promised: its mean. difference: live less promised. p: of Student's t, Newey–West's error of the live mean and the
    promise's own error; NaN for too few days. power: the probability that this test, at this number of days, finds a
    live rank IC of 0 worse. days_needed: for a power of 80 %; infinite where the promise itself is not sure enough.
    """

    promised: float
    difference: float
    p: float
    power: float
    days_needed: float


@dataclass(frozen=True)
class Judgement:
    """What the record of one experiment shows, of one of `KINDS`.

    figures: by name, `FIGURES` and `PAPER_FIGURES`. dates: forecast; days: with a rank IC; rank_ic: its mean a day,
    with Newey–West's t and the 95 % interval (low, high) of the stationary bootstrap; outcomes: forecasts with
    quantiles whose `horizon` bars have come; crps: their mean, in ratios to the last close, beside that of the last
    value; coverage_50, coverage_90: the share within these bands, with 95 % intervals (days and overlaps depend).
    paper_*: of Qlib's backtest on these scores, over its days, not a year: return after costs, excess (over the
    benchmark, after costs), cost, turnover a day, drawdown of the excess. What cannot be computed is NaN or missing.
    rank_ics: day by day. coverage: day × coverage_50, coverage_90. report: Qlib's, of the paper portfolio.
    test: of live ones with a promise. sentences: what may be concluded.
    """

    experiment: str
    kind: str
    first: pd.Timestamp
    last: pd.Timestamp
    figures: dict[str, float]
    rank_ics: pd.Series
    coverage: pd.DataFrame
    report: pd.DataFrame | None
    test: PromiseTest | None
    sentences: list[str]

    @property
    def name(self) -> str:
        """The experiment and the kind."""
        return f"{self.experiment} {self.kind}"


def judge(sets: pd.DataFrame, rows: pd.DataFrame, paper: Paper | None = None) -> list[Judgement]:
    """Judge every experiment's live and simulated record, as far as there is one, live first.

    Args:
        sets, rows: as `Ledger.read` gives them.
        paper: makes the paper portfolio; None for none.
    """
    found = []
    for experiment, own in sets.groupby("experiment"):
        for kind in KINDS:
            counted = counted_sets(own[own["live"] == (kind == "live")])
            if len(counted):
                found.append(_judge(str(experiment), kind, counted, rows, paper))
    return found


def counted_sets(sets: pd.DataFrame) -> pd.DataFrame:
    """Select the last made set of each date, in the order of dates.

    Of the page's it is the first, of each instrument that was asked for alone: who asks again with other seeds until he
    likes an answer does not choose the record.
    """
    ordered = sets.sort_values(["date", "made_at", "version"], kind="stable")
    asked = pd.Series([settings.get("question") for settings in ordered["settings"]], ordered.index, dtype=object)
    ordered = ordered.assign(instrument=[(question or {}).get("instrument") for question in asked])
    again = {keep: ordered.duplicated(["date", "instrument"], keep=keep) for keep in ("first", "last")}
    return ordered[~again["last"].where(asked.isna(), again["first"])].drop(columns="instrument")


def compare_with_promise(rank_ics: pd.Series, promised: dict[str, Any], lag: int) -> PromiseTest:
    """Test whether the mean of daily rank ICs is below a promise: rank_ic, its mean; sd, of a day; days.

    The error of the difference is √(Newey–West's of the live mean up to `lag` days, squared, + sd² / days). With fewer
    than 4 × `lag` days there is no p. Power and the days needed, those at which a difference of the promised size is
    1.64 + 0.84 errors, are of the larger of two deviations of a live day: that which Newey–West's error implies, which
    is too small as often as not, and the promise's.
    """
    values, mean = finite(rank_ics), float(promised["rank_ic"])
    days, deviation = len(values), float(promised["sd"])
    of_promise = deviation / np.sqrt(promised["days"])
    t, _ = newey_west(rank_ics - values.mean() + 1, lag) if days else (np.nan, np.nan)  # of a mean of 1: 1 / error
    deviation = max(deviation, np.sqrt(days) / t) if np.isfinite(t) else deviation
    error = np.hypot(deviation / np.sqrt(days), of_promise) if days else np.inf
    critical = t_distribution.ppf(1 - LEVEL, days - 1) if days > 1 else np.inf
    left = (mean / (norm.ppf(1 - LEVEL) + norm.ppf(POWER))) ** 2 - of_promise**2
    return PromiseTest(
        promised=mean,
        difference=float(values.mean() - mean) if days else np.nan,
        p=float(t_distribution.cdf((values.mean() - mean) / np.hypot(1 / t, of_promise), days - 1)) if days else np.nan,
        power=float(norm.cdf(mean / error - critical)),
        days_needed=float(np.ceil(deviation**2 / left)) if left > 0 and mean > 0 else np.inf,
    )


def promise_sentence(test: PromiseTest) -> str:
    """Say what a test of a promise shows: worse, no evidence of it, or too few days to tell."""
    if test.promised <= 0:
        return "the backtest promised nothing above 0"
    if test.p < LEVEL:
        return f"worse than the backtest promised (p {max(test.p, 0.001):.3f})"
    power = f"a true rank IC of 0 would be found worse with a probability of {_percent(test.power)}"
    if test.power >= POWER and np.isfinite(test.p):
        return f"no evidence that it is worse (p {test.p:.2f}; {power})"
    days = f"{_percent(POWER)} need {test.days_needed:,.0f} days"
    needed = days if np.isfinite(test.days_needed) else "the promise itself is too unsure"
    return f"too few days to tell: {power}; {needed}"


def _judge(experiment: str, kind: str, sets: pd.DataFrame, rows: pd.DataFrame, paper: Paper | None) -> Judgement:
    newest = sets.iloc[-1]
    lag = ASSUMED_HORIZON if pd.isna(newest["horizon"]) else int(newest["horizon"])
    own = rows[rows.index.get_level_values("id").isin(sets.index)].reset_index()
    own["datetime"] = own["id"].map(sets["date"])
    own = own.set_index(["datetime", "instrument"]).sort_index()
    rank_ics = daily_rank_ic(wide(own["score"]), wide(own["label"])).dropna()
    low, high = bootstrap_interval(rank_ics)
    figures = {
        "dates": float(sets["date"].nunique()),
        "days": float(len(rank_ics)),
        "rank_ic": float(rank_ics.mean()) if len(rank_ics) else np.nan,
        "t": newey_west(rank_ics, lag)[0] if len(rank_ics) else np.nan,
        "low": low,
        "high": high,
    }
    measured, coverage = _measure_quantiles(own, lag)
    report, why = None, ""
    if paper is not None and "question" not in newest["settings"]:  # a forecast of the page has no strategy
        try:
            report = paper(newest, own["score"].dropna())
        except PaperError as error:
            why = f"{experiment} {kind}: no paper portfolio: {error}"
    test = compare_with_promise(rank_ics, newest["promised"], lag) if kind == "live" and _kept(newest) else None
    synthetic = f"{experiment} {kind}: synthetic bars, not a real result" if is_synthetic(Path(newest["store"])) else ""
    figures |= measured | _measure_portfolio(report)
    subject = f"{experiment} {kind}"
    said = [
        _sentence(subject, figures, test) if newest["label"] else _sentence_of_bands(subject, figures),
        why,
        synthetic,
    ]
    first, last = sets["date"].iloc[0], sets["date"].iloc[-1]
    said = [sentence for sentence in said if sentence]
    return Judgement(experiment, kind, first, last, figures, rank_ics, coverage, report, test, said)


def _kept(newest: pd.Series) -> bool:
    """Return whether a set has a promise with all its numbers."""
    promise = newest["promised"]
    return isinstance(promise, dict) and all(promise.get(name) is not None for name in ("rank_ic", "sd", "days"))


def _sentence(subject: str, figures: dict[str, float], test: PromiseTest | None) -> str:
    if not figures["days"]:
        return (
            f"{subject}: no rank IC yet: of {figures['dates']:.0f} dates no label has come, or the scores do not vary"
        )
    begins = f"{subject} rank IC: {_signed(figures['rank_ic'])} over {figures['days']:.0f} days"
    if test is not None:
        return f"{begins}, promised {_signed(test.promised)}: {promise_sentence(test)}"
    if not np.isfinite(figures["low"]):
        return f"{begins}: too few days to say how sure that is"
    between = f"95 % {_signed(figures['low'])}…{_signed(figures['high'])}"
    sure = "evidence of a signal" if figures["low"] > 0 else "no evidence of a signal"
    return f"{begins}, {between}: {sure}"


def _sentence_of_bands(subject: str, figures: dict[str, float]) -> str:
    """Say what came of forecasts that are not ranked against each other."""
    if not figures["outcomes"]:
        return f"{subject}: nothing has come yet of the forecasts of {figures['dates']:.0f} dates"
    held = " and ".join(f"{100 * figures[band]:.0f} % in that of {band.split('_')[1]} %" for band in BANDS)
    return f"{subject}: returns that have come: {figures['outcomes']:.0f}; in their bands {held}"


def _measure_quantiles(own: pd.DataFrame, horizon: int) -> tuple[dict[str, float], pd.DataFrame]:
    known = own[own[[*QUANTILE_COLUMNS, "came"]].notna().all(axis=1)]
    dates = known.index.get_level_values("datetime")
    came, quantiles = known["came"].to_numpy(float), known[QUANTILE_COLUMNS].to_numpy(float)
    covered = pd.DataFrame({band: inside(came, quantiles, ends) for band, ends in BANDS.items()}, known.index)
    if not len(known):
        return {"outcomes": 0.0}, covered.groupby(level="datetime").mean()
    figures = {
        "outcomes": float(len(known)),
        "crps": float(crps_of_quantiles(came, quantiles).mean()),
        "crps_last_value": float(crps_of_quantiles(came, np.zeros_like(quantiles)).mean()),
    }
    for band in BANDS:
        low, high = interval(covered[band].to_numpy(), dates.to_numpy(), horizon)
        figures |= {band: float(covered[band].mean()), f"{band}_low": low, f"{band}_high": high}
    return figures, covered.groupby(level="datetime").mean()


def _measure_portfolio(report: pd.DataFrame | None) -> dict[str, float]:
    if report is None or report.empty:
        return {}
    excess = excess_returns(report)
    total = excess.cumsum()
    return {
        "paper_days": float(len(excess)),
        "paper_return": float((report["return"] - report["cost"]).sum()),
        "paper_excess": float(excess.sum()),
        "paper_cost": float(report["cost"].sum()),
        "paper_turnover": mean_turnover(report),
        "paper_drawdown": float((total - total.cummax()).min()),
    }


def _percent(share: float) -> str:
    return ">99 %" if share > 0.99 else f"{100 * share:.0f} %"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
