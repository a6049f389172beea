"""The demo market: writes a synthetic Qlib store of known predictability, on which a pipeline can be tried and tested.

Simple returns are drawn as

    own[i, t+1] = sigma[i, t+1] * (signal * f[i, t] + sqrt(1 - signal**2) * z[i, t+1])
    r[i, t+1] = clip(beta[i] * m[t+1] + own[i, t+1], -10 %, +10 %)

with a driftless market m, volatilities that cluster (GARCH(1, 1) for the market and for each instrument) and
heavy-tailed symmetric noise z (Student t, 5 degrees of freedom). f is the planted predictor: the cross-sectional
rank, centred and scaled to unit variance, of the reversal of the last ten bars, `PLANTED_PREDICTOR`. It is ten bars
because such a predictor holds for days (the usual label starts a day after the score) and can be seen both in a column
of Alpha158 (ROC10) and in the shape of a K-line window. The label weakens it (by a day's delay, the market's share and
price limits), the unequal volatilities strengthen it by as much, so that `signal` is the information coefficient that
can be reached: on 300 × 2000 bars the best rule, the reversal of nine bars, has rank IC 0.052 for signal 0.05 and 0.104
for 0.1, `PLANTED_PREDICTOR` 0.049 and 0.094; for 0, over 40 seeds of 60 × 900 bars, the reversal, momentum, volatility,
gap and volume of past bars all have mean ICs within 0.002 of 0 (standard error 0.001).

With signal 0, given everything up to t, the whole cross-section of t+1 is as likely as its mirror image, so no
function of past bars has an expected information coefficient, plain or rank, other than zero. Listing, membership,
suspensions and splits are drawn without regard to prices, and a suspended instrument resumes with one ordinary day's
return: the returns that it missed are not made up for, which would be predictable.

Bars of other frequencies are drawn by the same rules, ten of theirs for ten days, with volatilities in proportion to
the root of a bar's length. Coins trade all day on every day, without limits or suspensions; futures have no suspensions
either, and roll to the next contract every two months, by a ratio.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kronos_qlib.files import digest_of_file

UNIVERSE = "demo"
BENCHMARK = "DEMOINDEX"
PLANTED_PREDICTOR = "Ref($close, 10)/$close"  # a Qlib expression: high after a fall

_MARK, _FILES = "SYNTHETIC.txt", "files.json"
_MARK_BEGINS = "SYNTHETIC DATA. These bars were simulated by kronos-qlib demo-data"
_FIRST_DAY = "2018-01-02"
_REVERSAL_BARS = 10
_PRICE_LIMIT = 0.10
_BURN_IN = 100  # days simulated and thrown away, after which volatilities have spread
_GARCH_SHOCK, _GARCH_MEMORY = 0.08, 0.90
_NOISE_DEGREES = 5
_ROLL_DAYS = 42  # business days between two rolls of the futures: two months

DemoFreq = Literal["day", "week", "60min", "30min", "15min", "5min", "1min"]
DemoMarket = Literal["stocks", "crypto", "futures"]
# Hours of trade, in minutes of the day: first and last.
_SESSIONS = {"stocks": [(570, 690), (780, 900)], "crypto": [(0, 1440)], "futures": [(540, 690), (810, 900)]}

Value = TypeVar("Value", bound=np.generic)


@dataclass(frozen=True)
class _Kind:
    """What bars a market has.

    freq: as Qlib names it in files. starts: minutes of the day at which its bars begin; one for days and weeks.
    days_a_bar: 5 for weeks. scale: of a bar's volatility, relative to a day of stocks. limit: of a bar's return.
    """

    market: DemoMarket
    freq: str
    starts: tuple[int, ...]
    days_a_bar: int
    scale: float
    limit: float

    @property
    def intraday(self) -> bool:
        return self.freq.endswith("min")

    def dates(self, days: int) -> pd.DatetimeIndex:
        """Return the times of the bars of so many days: the start of a bar, the date of a day, a week's Friday."""
        if self.days_a_bar > 1:
            return pd.date_range(_FIRST_DAY, periods=days // self.days_a_bar, freq="W-FRI")
        dates = (pd.date_range if self.market == "crypto" else pd.bdate_range)(_FIRST_DAY, periods=days)
        minutes = pd.to_timedelta(self.starts, unit="min")
        return pd.DatetimeIndex((dates.to_numpy()[:, None] + minutes.to_numpy()).ravel())

    def spread(self, by_day: NDArray[Value], bars: int) -> NDArray[Value]:
        """Give every bar what its day has: [bars, …] of [days, …]."""
        return by_day[:: self.days_a_bar][:bars] if self.days_a_bar > 1 else np.repeat(by_day, len(self.starts), axis=0)


def _kind(freq: DemoFreq, market: DemoMarket) -> _Kind:
    for name, value, known in (("freq", freq, DemoFreq), ("market", market, DemoMarket)):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(get_args(known))}; it is {value!r}")
    scale, limit = (
        (2.0, 0.5) if market == "crypto" else (0.6, _PRICE_LIMIT) if market == "futures" else (1.0, _PRICE_LIMIT)
    )
    if freq in ("day", "week"):
        weeks = freq == "week"
        kind = _Kind(market, "1week" if weeks else "day", (0,), 5 if weeks else 1, scale, 3 * limit if weeks else limit)
    else:
        step = int(freq.removesuffix("min"))
        starts = tuple(minute for first, last in _SESSIONS[market] for minute in range(first, last, step))
        kind = _Kind(market, freq, starts, 1, scale, limit)
    return replace(kind, scale=scale * (kind.days_a_bar / len(kind.starts)) ** 0.5)


def usual_days(freq: DemoFreq, market: DemoMarket = "stocks") -> int:
    """Return how many days make a market of usual size: 900, 3,000 of weeks, or those of some 2,000 intraday bars."""
    bars_a_day = len(_kind(freq, market).starts)
    return {"day": 900, "week": 3_000}.get(freq, max(40, -(-2_000 // bars_a_day)))


def write_demo_market(
    folder: str | Path,
    *,
    instruments: int = 60,
    days: int = 900,
    signal: float = 0.05,
    seed: int = 0,
    freq: DemoFreq = "day",
    market: DemoMarket = "stocks",
) -> Path:
    """Write a synthetic Qlib store of bars and return its absolute path.

    The store holds `instruments` stocks DEMO0000, DEMO0001, … and the index DEMOINDEX (the equally weighted members;
    in `all`, not in the universe) with adjusted open, high, low, close, volume, the adjustment factor (adjusted price
    = raw price × factor, adjusted volume = raw volume / factor) and change (close-to-close return, a ratio), over
    `days` business days from 2018-01-02. In the universe `demo` some members leave, some rejoin, some are listed
    late. A suspended day repeats the last close with zero volume; in some suspensions volume and change are NaN. The
    same arguments give the same bytes.

    signal: the information coefficient, approximately, of `PLANTED_PREDICTOR` against Ref($close, -2)/Ref($close, -1)
    - 1, in bars of the market's; 0 is no predictability at all.
    freq: of the bars; intraday ones have the times of their starts, weeks the dates of their Fridays. A store of weeks
    names them 1week, as Qlib reads them.
    Intraday markets and weeks have bars of day beside theirs: Qlib's backtests ask for the benchmark's days first.
    market: stocks with suspensions, splits, price limits of 10 % and the hours of Shanghai; crypto, on all days and
    hours; futures with rolls, which are in their factor.

    The folder is written whole or not at all. A demo market that is already there is replaced if every file in it is
    as it was written: files.json lists them.

    Raises ValueError for an argument out of range, naming it, and FileExistsError if `folder` holds anything but an
    unchanged demo market.
    """
    _check_integer("instruments", instruments, 4, 9_999)
    kind = _kind(freq, market)
    _check_integer("days", days, 300 if freq == "week" else 20 if kind.intraday else 60, 10_000)
    _check_integer("seed", seed, 0, 2**63 - 1)
    if isinstance(signal, bool) or not isinstance(signal, (int, float)) or not 0 <= signal <= 0.5:
        raise ValueError(f"signal must be a number from 0 (none) to 0.5, an information coefficient; it is {signal!r}")

    folder = _resolve(folder)
    _check_replaceable(folder)
    simulated = _simulate(instruments, days, float(signal), np.random.default_rng(seed), kind)
    settings = {"instruments": instruments, "days": days, "signal": float(signal), "seed": seed}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent) as scratch:
        draft = Path(scratch) / "market"
        try:
            _write_store(draft, simulated, kind.freq)
            if kind.freq != "day":
                _write_store(draft, _days(simulated, len(kind.starts)), "day", only_bars=True)
            _write_mark(draft, settings | {"freq": freq, "market": market})
        except OSError as error:
            raise OSError(f"{folder}: the demo market cannot be written ({error})") from error
        _move_into_place(draft, folder, Path(scratch) / "former")
    return folder


def is_synthetic(provider_uri: str | Path | Mapping[str, str | Path]) -> bool:
    """Return whether a Qlib store (a folder, or a mapping from frequency to folder) has the mark of a demo market."""
    folders = provider_uri.values() if isinstance(provider_uri, Mapping) else [provider_uri]
    return any(_is_marked(Path(folder).expanduser() / _MARK) for folder in folders)


def _is_marked(path: Path) -> bool:
    try:
        return path.read_text(errors="replace").startswith(_MARK_BEGINS)
    except OSError:
        return False


@dataclass(frozen=True)
class _Market:
    """Bars [days, instruments] of a simulated market; `index` holds the benchmark's bars, [days] each."""

    dates: pd.DatetimeIndex
    first_bar: NDArray[np.int64]  # [instruments], the row of the listing day
    member: NDArray[np.bool_]
    bars: dict[str, NDArray[np.float64]]
    index: dict[str, NDArray[np.float64]]


def _simulate(instruments: int, days: int, signal: float, rng: np.random.Generator, kind: _Kind) -> _Market:
    dates = kind.dates(days)
    first_day, member_days = _membership(instruments, days, rng)
    suspended_days = _suspensions(first_day, days, rng)
    start = np.exp(rng.normal(np.log(20.0), 0.6, instruments))  # raw price of the first day
    factor = kind.spread(_factors(instruments, days, rng), len(dates))
    first_bar = first_day * len(kind.starts) // kind.days_a_bar
    member, suspended = (kind.spread(by_day, len(dates)) for by_day in (member_days, suspended_days))
    if kind.market != "stocks":
        suspended = np.zeros_like(suspended)
        factor = (
            np.ones_like(factor) if kind.market == "crypto" else kind.spread(_rolls(instruments, days, rng), len(dates))
        )
    close, sigma = _closes(start * factor[0], first_bar, suspended, signal, rng, kind)
    bars = _bars(close, sigma, suspended, rng, kind) | {"factor": factor}
    member = member & (np.arange(len(dates))[:, None] >= first_bar)
    return _Market(dates, first_bar, member, bars, _index(bars, member))


def _membership(instruments: int, days: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Draw first rows [instruments] and membership [days, instruments]: an eighth each leaves, rejoins, lists late."""
    first_bar = np.zeros(instruments, dtype=np.int64)
    member = np.ones((days, instruments), dtype=bool)
    eighth = max(1, round(instruments / 8))
    leaving, rejoining, late, _ = np.split(rng.permutation(instruments), [eighth, 2 * eighth, 3 * eighth])
    for i in leaving:
        member[int(days * rng.uniform(0.30, 0.95)) :, i] = False
    for i in rejoining:
        gone = rng.uniform(0.15, 0.70)
        member[int(days * gone) : int(days * (gone + rng.uniform(0.10, 0.25))), i] = False
    for i in late:
        first_bar[i] = int(days * rng.uniform(0.10, 0.50))
        member[: first_bar[i] + int(days * rng.uniform(0.02, 0.10)), i] = False
    return first_bar, member


def _suspensions(first_bar: NDArray[np.int64], days: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Draw suspended days [days, instruments]: a spell in 450 days on average, five days long on average."""
    suspended = np.zeros((days, len(first_bar)), dtype=bool)
    spells = rng.poisson(days / 450, len(first_bar))
    spells[0] = max(1, spells[0])  # the smallest market has one too
    for i, count in enumerate(spells):
        for begin in rng.integers(first_bar[i] + 1, days - 5, count):
            suspended[begin : begin + min(rng.geometric(1 / 5), 30), i] = True
    return suspended


def _factors(instruments: int, days: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw adjustment factors [days, instruments]: a dividend of 1 to 3 % a year, a split in 600 days on average."""
    steps = np.ones((days, instruments))
    splits = rng.poisson(days / 600, instruments)
    splits[0] = max(1, splits[0])
    for i in range(instruments):
        ex_dividend = np.arange(rng.integers(1, 250), days, 250)
        steps[ex_dividend, i] *= 1 + rng.uniform(0.01, 0.03, len(ex_dividend))
        steps[rng.integers(1, days, splits[i]), i] *= rng.choice([1.2, 1.3, 1.5, 2.0], splits[i])
    return rng.uniform(1, 6, instruments) * steps.cumprod(axis=0)


def _rolls(instruments: int, days: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw the factors of contracts that roll [days, instruments]: the next one costs up to 3 % more or less."""
    steps = np.ones((days, instruments))
    for i in range(instruments):
        rolls = np.arange(rng.integers(1, _ROLL_DAYS), days, _ROLL_DAYS)
        steps[rolls, i] = 1 + rng.uniform(-0.03, 0.03, len(rolls))
    return steps.cumprod(axis=0)


def _closes(
    start: NDArray[np.float64],
    first_bar: NDArray[np.int64],
    suspended: NDArray[np.bool_],
    signal: float,
    rng: np.random.Generator,
    kind: _Kind,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw adjusted closes [1 + days, instruments], from the eve on, and volatilities [days, instruments]."""
    days, instruments = suspended.shape
    total = _BURN_IN + days
    trading = np.vstack([np.ones((_BURN_IN, instruments), bool), ~suspended])
    # The store has no bars before the first: what cannot be seen must not predict.
    first_ranked = _BURN_IN + first_bar + _REVERSAL_BARS + 1

    beta = rng.normal(1.0, 0.25, instruments)
    market_sigma, market = _market_returns(total, rng, kind.scale)
    typical = np.exp(rng.normal(np.log(0.018), 0.3, instruments)) * kind.scale
    noise = rng.standard_t(_NOISE_DEGREES, (total, instruments)) * np.sqrt((_NOISE_DEGREES - 2) / _NOISE_DEGREES)

    close = np.empty((total + 1, instruments))
    sigma = np.empty((total, instruments))
    close[0] = start
    variance = typical**2
    for t in range(total):
        sigma[t] = np.sqrt(variance)
        planted = np.zeros(instruments)
        seen = first_ranked <= t
        if signal > 0 and seen.sum() > 1:
            planted[seen] = _standard_ranks(close[t - _REVERSAL_BARS, seen] / close[t, seen])
        own = sigma[t] * (signal * planted + np.sqrt(1 - signal**2) * noise[t])
        returns = np.clip(beta * market[t] + own, -kind.limit, kind.limit)
        close[t + 1] = close[t] * np.where(trading[t], 1 + returns, 1)
        variance = _next_variance(variance, own, typical)
    volatility = np.hypot(sigma, beta * market_sigma[:, None])
    return close[_BURN_IN:], volatility[_BURN_IN:]


def _market_returns(
    total: int, rng: np.random.Generator, scale: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw the market's volatility and return, [total] each, without drift, by which beta would predict returns."""
    noise = rng.standard_t(_NOISE_DEGREES, total) * np.sqrt((_NOISE_DEGREES - 2) / _NOISE_DEGREES)
    sigma = np.empty(total)
    typical = np.array(0.009 * scale)
    variance = typical**2
    for t in range(total):
        sigma[t] = np.sqrt(variance)
        variance = _next_variance(variance, sigma[t] * noise[t], typical)
    return sigma, sigma * noise


def _next_variance(
    variance: NDArray[np.float64], shock: NDArray[np.float64], typical: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Step GARCH(1, 1), up to (3 × typical)²: with heavy tails a single shock could otherwise make it diverge."""
    constant = 1 - _GARCH_SHOCK - _GARCH_MEMORY
    following = constant * typical**2 + _GARCH_SHOCK * shock**2 + _GARCH_MEMORY * variance
    return np.minimum(following, (3 * typical) ** 2)


def _standard_ranks(x: NDArray[np.float64]) -> NDArray[np.float64]:
    ranks = x.argsort().argsort()
    return (ranks - ranks.mean()) / ranks.std()


def _bars(
    close: NDArray[np.float64],
    sigma: NDArray[np.float64],
    suspended: NDArray[np.bool_],
    rng: np.random.Generator,
    kind: _Kind,
) -> dict[str, NDArray[np.float64]]:
    """Draw open, high, low, close, volume, change [days, instruments] for given closes [1 + days, instruments]."""
    before, close = close[:-1], close[1:]
    change = close / before - 1
    overnight = 0.35 * change + 0.3 * sigma * rng.standard_normal(close.shape)
    if kind.intraday:  # within a session the next bar opens about where the last one closed
        overnight *= np.where(np.arange(len(close)) % len(kind.starts) == 0, 1.0, 0.1)[:, None]
    opened = before * (1 + np.clip(overnight, -kind.limit, kind.limit))
    # The extremes of a Brownian bridge from the open to the close, exactly (Karatzas & Shreve 1991, 4.3.40).
    reach = -2 * (0.8 * sigma) ** 2 * np.log(1 - rng.random((2, *close.shape)))
    move = np.log(close / opened)
    half_way = np.sqrt(opened * close)
    high = np.minimum(half_way * np.exp(np.sqrt(move**2 + reach[0]) / 2), before * (1 + kind.limit))
    low = np.maximum(half_way * np.exp(-np.sqrt(move**2 + reach[1]) / 2), before * (1 - kind.limit))
    bars = {
        "open": opened,
        "high": np.maximum(high, np.maximum(opened, close)),  # rounding in exp may fall short of the higher end
        "low": np.minimum(low, np.minimum(opened, close)),
        "close": close,
    }
    bars = {field: np.where(suspended, close, price) for field, price in bars.items()}

    typical = 2e8 * kind.days_a_bar / len(kind.starts)  # traded amount of a bar
    amount = np.exp(rng.normal(np.log(typical), 0.8, close.shape[1]))
    mood = _autoregression(rng.standard_normal(close.shape), memory=0.7) * 0.3
    excitement = 0.35 * np.minimum(np.abs(change) / sigma, 4) + 0.8 * np.log(sigma / (0.02 * kind.scale))
    volume = amount / before[0] * np.exp(mood + excitement)
    # As in real stores, a suspended day has no volume, and sometimes a hole instead.
    missing = suspended & _hole_spells(suspended, rng)
    bars["volume"] = np.where(missing, np.nan, np.where(suspended, 0.0, volume))
    bars["change"] = np.where(missing, np.nan, change)
    return bars


def _hole_spells(suspended: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Draw a third of the spells: True from their first day to that of the next spell, [days, instruments]."""
    begins = suspended & ~np.vstack([np.zeros_like(suspended[:1]), suspended[:-1]])
    draw = rng.random(suspended.shape) < 1 / 3
    latest_begin = np.maximum.accumulate(np.where(begins, np.arange(len(suspended))[:, None], 0), axis=0)
    return np.take_along_axis(draw, latest_begin, axis=0)


def _autoregression(noise: NDArray[np.float64], memory: float) -> NDArray[np.float64]:
    """Turn noise into a stationary AR(1) of unit variance along the days."""
    series = np.empty_like(noise)
    series[0] = noise[0]
    for t in range(1, len(noise)):
        series[t] = memory * series[t - 1] + np.sqrt(1 - memory**2) * noise[t]
    return series


def _index(bars: dict[str, NDArray[np.float64]], member: NDArray[np.bool_]) -> dict[str, NDArray[np.float64]]:
    """Average the members' bars, relative to their closes of the day before, to the benchmark's bars, [days] each."""
    before = np.vstack([bars["open"][:1], bars["close"][:-1]])
    mean = {field: (bars[field] / before).mean(axis=1, where=member) for field in ("open", "high", "low", "close")}
    level = 1000 * mean["close"].cumprod()
    index = {field: ratio * level / mean["close"] for field, ratio in mean.items()}
    return index | {
        "close": level,
        "volume": np.nansum(np.where(member, bars["volume"], 0), axis=1),
        "change": mean["close"] - 1,
        "factor": np.ones(len(level)),
    }


def _days(market: _Market, bars_a_day: int) -> _Market:
    """Join the bars of each day; weeks are left as they are."""

    def joined(field: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
        by_day = values.reshape(-1, bars_a_day, *values.shape[1:])
        if field in ("open", "factor"):
            return by_day[:, 0]
        if field in ("high", "low"):
            return by_day.max(axis=1) if field == "high" else by_day.min(axis=1)
        if field == "change":
            return (1 + by_day).prod(axis=1) - 1
        return by_day.sum(axis=1) if field == "volume" else by_day[:, -1]

    return _Market(
        dates=market.dates[::bars_a_day].normalize(),
        first_bar=market.first_bar // bars_a_day,
        member=market.member[::bars_a_day],
        bars={field: joined(field, values) for field, values in market.bars.items()},
        index={field: joined(field, values) for field, values in market.index.items()},
    )


def _write_store(folder: Path, market: _Market, freq: str, only_bars: bool = False) -> None:
    times = market.dates.strftime("%Y-%m-%d %H:%M:%S" if freq.endswith("min") else "%Y-%m-%d").to_list()
    names = [f"DEMO{i:04d}" for i in range(len(market.first_bar))]
    for i, (name, first) in enumerate(zip(names, market.first_bar.tolist(), strict=True)):
        _write_bars(folder, name, first, {field: values[first:, i] for field, values in market.bars.items()}, freq)
    _write_bars(folder, BENCHMARK, 0, market.index, freq)

    _write_lines(folder / "calendars" / f"{freq}.txt", times)
    if only_bars:
        return
    listed = [(name, times[first], times[-1]) for name, first in zip(names, market.first_bar, strict=True)]
    spans = [
        (name, times[begin], times[end]) for i, name in enumerate(names) for begin, end in _spans(market.member[:, i])
    ]
    _write_lines(
        folder / "instruments" / "all.txt", ["\t".join(row) for row in [*listed, (BENCHMARK, times[0], times[-1])]]
    )
    _write_lines(folder / "instruments" / f"{UNIVERSE}.txt", ["\t".join(row) for row in spans])


def _write_bars(folder: Path, name: str, first: int, bars: dict[str, NDArray[np.float64]], freq: str) -> None:
    """Write Qlib's binary format: float32, little endian, the first bar's row in the calendar, then the bars."""
    home = folder / "features" / name.lower()
    home.mkdir(parents=True, exist_ok=True)
    for field, values in bars.items():
        np.concatenate([[first], values]).astype("<f4").tofile(home / f"{field}.{freq}.bin")


def _spans(member: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return first and last row, both included, of every run of True in [days]."""
    edges = np.diff(np.concatenate([[False], member, [False]]).astype(np.int8))
    return list(zip(np.flatnonzero(edges == 1).tolist(), (np.flatnonzero(edges == -1) - 1).tolist(), strict=True))


def _write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def _write_mark(folder: Path, settings: dict[str, int | float | str]) -> None:
    (folder / _MARK).write_text(
        f"{_MARK_BEGINS}; no such instruments exist,\n"
        f"and results on them say nothing about a real market.\n\nsettings: {json.dumps(settings)}\n"
        f"planted predictor: {PLANTED_PREDICTOR}\n"
    )
    (folder / _FILES).write_text(json.dumps(_digests(folder), indent=0) + "\n")


def _digests(folder: Path) -> dict[str, str]:
    """Digest every file below a folder, by its path in it; files.json, which holds these, is left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {
        path.relative_to(folder).as_posix(): "a link" if path.is_symlink() else digest_of_file(path)
        for path in paths
        if path != folder / _FILES
    }


def _check_integer(name: str, value: int, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}; it is {value!r}")


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; give a folder for the demo market")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not is_synthetic(folder):
        raise FileExistsError(f"{folder} is not empty and not a demo market, so it is left alone; give another folder")
    try:
        written = json.loads((folder / _FILES).read_text())
    except (OSError, ValueError):
        written = None
    if not isinstance(written, dict):
        raise FileExistsError(
            f"{folder} is a demo market without {_FILES}, the list of what was written there, so it is left alone; "
            "remove it, or give another folder"
        )
    found = _digests(folder)
    foreign = [name for name, digest in found.items() if written.get(name) != digest]
    if foreign:
        raise FileExistsError(
            f"{folder / foreign[0]} is not as a demo market was written there ({len(foreign)} such files in all), so "
            f"{folder} is left alone; move what is yours, or give another folder"
        )


def _resolve(folder: str | Path) -> Path:
    """Return the absolute path of the folder to write. Raises ValueError for none and for a path of no folder."""
    if not str(folder).strip():
        raise ValueError("folder is empty; name the folder that the demo market is to be written to")
    try:
        return Path(folder).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself, a NUL
        raise ValueError(f"folder {str(folder)!r} cannot be used: {error}") from None


def _move_into_place(draft: Path, folder: Path, former: Path) -> None:
    """Move the finished store to `folder`, which is absent, empty or an earlier demo market; that goes to `former`."""
    if folder.exists():
        folder.rename(former)
    try:
        draft.rename(folder)
    except OSError:
        if former.exists():
            former.rename(folder)
        raise
