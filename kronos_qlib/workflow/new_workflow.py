"""Write workflow files: for a store, cut by its dates and market, or copies of those that come with the package."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from kronos_qlib.data.calendar import WEEKEND_SHARE, is_intraday
from kronos_qlib.data.demo_market import BENCHMARK, is_synthetic
from kronos_qlib.files import whole_file
from kronos_qlib.ingest.store_files import StoreFiles, allowed_prices
from kronos_qlib.ingest.symbols import exchange_of, is_index
from kronos_qlib.nn import zoo
from kronos_qlib.text import printable

EXAMPLES = Path(__file__).parents[1] / "workflows"
TRAIN, VALID = 0.65, 0.15  # of the store's days; the rest is the test segment
_TEMPLATES = Path(__file__).with_name("templates")
_LONGEST_LIST = 500  # instruments whose mean return is the benchmark where the store has no index
_LEAST_DAYS = 30  # of all segments together
# Bars of a forecast's past and future by the minutes of a bar, up to: lookback, horizon.
_WINDOWS = ((1, 240, 30), (15, 240, 48), (240, 120, 24), (math.inf, 90, 10))


@dataclass(frozen=True)
class Market:
    """What a region decides: Qlib's region, the exchange whose sessions follow, days of a year, costs and limits."""

    qlib_region: str
    exchange: str | None
    days_a_year: int
    same_day_sale: bool  # of what was bought: not where the rule is T+1
    costs: tuple[tuple[str, str, str], ...]
    note: str


MARKETS = {
    "cn": Market(
        "cn",
        "XSHG",
        252,
        False,
        (
            ("limit_threshold", "0.095", "a share that moved this far is at its price limit: no trade"),
            ("open_cost", "0.001", "share of the amount bought"),
            ("close_cost", "0.0015", "share of the amount sold, stamp duty included"),
            ("min_cost", "5", "yuan per order"),
        ),
        "trading unit 100 shares, price limits, calendar conventions of mainland China",
    ),
    "us": Market(
        "us",
        None,  # that of the region, unless the store trades on weekends
        252,
        True,
        (
            ("limit_threshold", "null", "no price limits"),
            ("open_cost", "0.0005", "share of the amount bought"),
            ("close_cost", "0.0005", "share of the amount sold"),
            ("min_cost", "1", "per order"),
        ),
        "trading unit one share, no price limits",
    ),
    "tw": Market(
        "tw",
        "XTAI",
        245,
        True,
        (
            ("limit_threshold", "0.095", "a share that moved this far is at its price limit: no trade"),
            ("open_cost", "0.001425", "share of the amount bought: the broker's fee"),
            ("close_cost", "0.004425", "share of the amount sold: the fee and the transaction tax"),
            ("min_cost", "20", "dollars per order"),
        ),
        "trading unit 1,000 shares, price limits of Taiwan",
    ),
    "crypto": Market(
        "us",
        "24/7",
        365,
        True,
        (
            ("limit_threshold", "null", "no price limits"),
            ("trade_unit", "null", "any part of a coin"),
            ("open_cost", "0.001", "share of the amount bought"),
            ("close_cost", "0.001", "share of the amount sold"),
            ("min_cost", "0", "no least fee"),
        ),
        "Qlib knows no crypto: us has no price limits, and the costs below are of an exchange for coins",
    ),
}
# learning rates and epochs by model: gentle, as all start from trained weights; `nano-new` starts from chance.
_STAGES = {
    "nano": (("3", 10_000, 16, "1.0e-3"), ("3", 15_000, 25, "1.0e-3")),
    "mini": (("3", 10_000, 32, "2.0e-4"), ("3", 20_000, 32, "1.0e-4")),
    "small": (("5", 20_000, 50, "2.0e-4"), ("5", 50_000, 50, "4.0e-5")),
    "base": (("5", 20_000, 50, "2.0e-4"), ("5", 50_000, 50, "4.0e-5")),
}
_ABOUT = {
    "nano": "# nano comes with the package: small, trained on days of Chinese shares to 2024-06-30. Minutes on a CPU.",
    "mini": "# mini is fetched from the hub once (4 million parameters, contexts of 2,048 bars). An hour on a CPU.",
    "small": "# small is fetched from the hub once (25 million parameters). Made for a GPU.",
    "base": "# base is fetched from the hub once (102 million parameters). Made for a GPU.",
}


def write_workflow(
    folder: Path,
    out: Path,
    *,
    universe: str = "all",
    model: str = "nano",
    region: str = "auto",
    freq: str | None = None,
    benchmark: str | None = None,
) -> tuple[list[Path], list[str]]:
    """Write a workflow for a store, its twins of LightGBM and of a rule, and the base that they share.

    Args:
        folder: the store. out: the workflow's file; the others lie beside it.
        model: nano, mini, small or base.
        region: cn, us, tw, crypto, or auto: by the names of the instruments and the days of the week.
        benchmark: an instrument; by default the store's index, or the mean of its instruments.

    Returns:
        The files, and what was decided, in words.

    Raises:
        ValueError, SourceError: no such store, universe or name; too few days. FileExistsError: a file is there.
    """
    if model not in _STAGES:
        raise ValueError(f"--model {model!r} is unknown; use {', '.join(_STAGES)}")
    if region not in ("auto", *MARKETS):
        raise ValueError(f"--region {region!r} is unknown; use auto, {', '.join(MARKETS)}")
    stem = out.stem
    if not re.fullmatch(r"[\w-]+", stem) or out.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--out {out}: should be NAME.yaml, with letters, digits, _ and - in its name")
    parts = ("lightgbm", "reversal", "base")
    files = [out, *(out.with_name(f"{stem}_{part}{out.suffix}") for part in parts)]
    there = next((path for path in files if path.exists()), None)
    if there:
        raise FileExistsError(f"{there} is there already; name another by --out")
    settings, notes = _settings(folder, universe, model, region, freq, benchmark)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # YAML, no page; names and paths in it are quoted  # nosec B701
    )
    environment.filters["pad"] = lambda text, width: str(text).ljust(width)
    for path, name in zip(files, ("kronos", *parts)):
        text = environment.get_template(f"{name}.yaml.jinja").render(settings, stem=stem)
        with whole_file(path) as draft:
            draft.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    return files, notes


def copy_examples(names: Sequence[str], folder: Path) -> list[Path]:
    """Copy workflows that come with the package, and the bases that they name, into a folder; `all` stands for all.

    Raises:
        ValueError: an unknown name; the known ones are named. FileExistsError: another file of that name is there.
    """
    known = example_names()
    wanted = known if "all" in names else list(dict.fromkeys(names))
    unknown = next((name for name in wanted if name not in known), None)
    if unknown:
        raise ValueError(f"--copy {unknown!r} is unknown; use all, or some of {', '.join(known)}")
    bases = [re.search(r"^BASE_CONFIG_PATH: (\S+)\.yaml", _example(name), re.MULTILINE) for name in wanted]
    every = dict.fromkeys([*wanted, *(base[1] for base in bases if base)])
    paths = {name: folder / f"{name}.yaml" for name in every}
    for name, path in paths.items():
        if path.exists() and path.read_text(encoding="utf-8") != _example(name):
            raise FileExistsError(f"{path} is there already, and is another; name another folder by --out")
    for name, path in paths.items():
        with whole_file(path) as draft:
            draft.write_text(_example(name), encoding="utf-8")
    return list(paths.values())


def example_names() -> list[str]:
    """List the workflows that come with the package, without their bases, and the search spaces for `tune`."""
    paths = [path.relative_to(EXAMPLES) for path in EXAMPLES.rglob("*.yaml") if not path.stem.startswith("base_")]
    return sorted(path.with_suffix("").as_posix() for path in paths)


def _example(name: str) -> str:
    return (EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8")


def _settings(
    folder: Path, universe: str, model: str, region: str, freq: str | None, benchmark: str | None
) -> tuple[dict[str, Any], list[str]]:
    """Return what the templates need, and what was decided, in words."""
    store = StoreFiles(folder)
    freq = freq or store.freqs[0]
    if freq not in store.freqs:
        raise ValueError(f"{folder}: no bars of {freq}; it has {', '.join(store.freqs)}")
    if allowed_prices(folder) == "any":
        raise ValueError(
            f"{folder}: its prices may be zero or less, and label, LightGBM's features and Qlib's backtest are ratios "
            "of them; write a workflow by hand: docs/frequencies.md, Negative prices"
        )
    calendar = store.calendar(freq)
    members = sorted(set(store.universe(universe)["instrument"].str.upper()))
    known = [name for name in members if store.has(name, "close", freq)]
    if not known:
        raise ValueError(f"{folder}: universe {universe} has no instrument with bars of {freq}")
    days = pd.DatetimeIndex(np.unique(calendar.normalize()))
    guess, figure = _region(known, days)
    region = guess if region == "auto" else region
    market = MARKETS[region]
    minutes = _minutes(freq)
    lookback, horizon = next((back, ahead) for most, back, ahead in _WINDOWS if minutes <= most)
    trained = zoo.MODELS[model].max_context or lookback + horizon
    if lookback + horizon > trained:  # nano's: shorter windows
        lookback, horizon = trained - trained // 4, trained // 4
    weeks = freq == "1week"
    bars_a_day = len(calendar) / len(days)
    segments = _segments(days, math.ceil(lookback / bars_a_day), math.ceil(horizon / bars_a_day), folder)
    cut = {name: (span[0], _last_session(calendar, span[1], freq)) for name, span in segments.items()}
    index, index_note = _benchmark(store, freq, benchmark, known)
    shares = [name for name in known if not is_index(name)] or known
    # With days, what is bought at an open cannot be sold before the next one.
    hold_thresh = 5 if freq == "day" and region == "cn" else 1
    if is_intraday(freq) and not market.same_day_sale:
        hold_thresh = math.ceil(bars_a_day)
    topk = max(1, min(50, len(shares) // 5))
    n_drop = max(1, topk // 10)
    traded = any(store.read(name, freq, ["volume"])[1].gt(0).any().any() for name in known[:20])
    tokenizer_stage, predictor_stage = (_stage(*stage) for stage in _STAGES[model])
    absolute = json.dumps(str(folder.expanduser().resolve()), ensure_ascii=False)
    settings = {
        "store": printable(str(folder)),
        "provider_uri": _provider_uri(absolute, freq, store.freqs),
        "qlib_region": market.qlib_region,
        "region_note": f"                       # {market.note}",
        "universe": universe,
        "universe_note": f"   # a universe of the store: {', '.join(store.universes)}",
        "freq": freq,
        "segments": cut,
        "start": str(days[0].date()),
        "end": _last_session(calendar, str(days[-1].date()), freq),
        "shares": f"{TRAIN:.0%}, {VALID:.0%}, {1 - TRAIN - VALID:.0%}",
        "bars_a_year": 52 if weeks else round(market.days_a_year * bars_a_day),
        "topk": topk,
        "members": len(shares),
        "n_drop": n_drop,
        "hold_thresh": hold_thresh,
        "hold_note": ""
        if market.same_day_sale or not is_intraday(freq)
        else ": T+1, no sale on the day of the purchase",
        "benchmark": index,
        "benchmark_note": index_note,
        "costs": market.costs,
        "model": model,
        "tokenizer": {"nano": "nano", "mini": "tokenizer-2k"}.get(model, "tokenizer-base"),
        "max_context": max(trained, 512),
        "about": _ABOUT[model],
        "stages": {"tokenizer": tokenizer_stage, "predictor": predictor_stage},
        "samples": 5,
        "lookback": lookback,
        "horizon": horizon,
        "exchange": market.exchange,
        "volume": "required" if traded else "optional",
        "lightgbm": _lightgbm(len(known) * len(calendar)),
    }
    notes = [
        f"{len(known):,} instruments of {universe}, {len(calendar):,} sessions of {freq}, region {region} ({figure})",
        f"train {segments['train'][0]} … {segments['train'][1]}, valid to {segments['valid'][1]}, test to "
        f"{segments['test'][1]}; lookback {lookback}, horizon {horizon}",
        f"benchmark: {index if len(index) < 60 else f'the mean of {index.count(chr(44)) + 1} instruments'}",
    ]
    if not traded:
        notes.append("no volume in the store: volume is optional")
    return settings, notes


def _provider_uri(folder: str, freq: str, freqs: Sequence[str]) -> str:
    """Name the store once, or for its own bars and for days, of which Qlib's backtests read the benchmark."""
    if freq == "day":
        return folder
    return f"{{{freq}: {folder}, day: {folder}}}" if "day" in freqs else f"{{{freq}: {folder}}}"


def _minutes(freq: str) -> float:
    match = re.fullmatch(r"(\d+)min", freq)
    return float(match[1]) if match else math.inf


def _region(names: Sequence[str], days: pd.DatetimeIndex) -> tuple[str, str]:
    """Guess the region of a store, and say by what."""
    weekend = float((days.dayofweek >= 5).mean())
    coins, chinese = (
        sum(exchange_of(name) == exchange for name in names) / len(names) for exchange in ("24/7", "XSHG")
    )
    if weekend > WEEKEND_SHARE or coins > 0.5:
        return "crypto", f"{weekend:.0%} of its days are Saturdays and Sundays, {coins:.0%} of the names are of coins"
    if chinese > 0.5:
        return "cn", f"{chinese:.0%} of the names are of mainland China"
    return "us", f"{chinese:.0%} of the names are of mainland China, {weekend:.0%} of the days Saturdays and Sundays"


def _last_session(calendar: pd.DatetimeIndex, date: str, freq: str) -> str:
    """Write the end of a range: of bars within a day with its time, as Qlib takes a date alone for its midnight."""
    if not is_intraday(freq):
        return date
    return str(calendar[calendar.searchsorted(pd.Timestamp(date) + pd.Timedelta(days=1)) - 1])


def _segments(days: pd.DatetimeIndex, lookback: int, horizon: int, folder: Path) -> dict[str, tuple[str, str]]:
    """Cut the days into train, valid and test: days with a window behind them and, for labels and backtest, after."""
    first, last = lookback, len(days) - 1 - horizon - 2
    if last - first + 1 < _LEAST_DAYS:
        raise ValueError(
            f"{folder}: {len(days)} days leave {max(0, last - first + 1)} to train and test on, after {lookback} days "
            f"of lookback and before {horizon + 2} of horizon and label; {_LEAST_DAYS} are needed"
        )
    count = last - first + 1
    valid, test = first + round(TRAIN * count), first + round((TRAIN + VALID) * count)
    date = [str(day.date()) for day in days]
    return {
        "train": (date[first], date[valid - 1]),
        "valid": (date[valid], date[test - 1]),
        "test": (date[test], date[last]),
    }


def _benchmark(store: StoreFiles, freq: str, given: str | None, members: Sequence[str]) -> tuple[str, str]:
    """Choose the benchmark: the one given, ingest's, an index of the store, or the mean of its instruments."""
    about = store.folder / "ingest.json"
    named = given or (json.loads(about.read_text(encoding="utf-8")).get("benchmark") if about.is_file() else None)
    every = store.instruments()
    if named:
        if named.upper() not in every or not store.has(named, "close", freq):
            raise ValueError(f"--benchmark {named}: {store.folder} has no bars of it of {freq}")
        return json.dumps(named.upper()), ""
    if is_synthetic(store.folder) and store.has(BENCHMARK, "close", freq):
        return BENCHMARK, ""
    indices = [name for name in every if is_index(name) and store.has(name, "close", freq)]
    if indices:
        return json.dumps("SH000300" if "SH000300" in indices else indices[0]), ""
    if len(members) > _LONGEST_LIST:
        members = [members[place] for place in np.linspace(0, len(members) - 1, _LONGEST_LIST).round().astype(int)]
    return f"[{', '.join(json.dumps(name) for name in members)}]", "   # no index in the store: the mean of these"


def _stage(epochs: str, windows: int, batch_size: int, learning_rate: str) -> str:
    size = f"epochs: {epochs}, windows_per_epoch: {windows}, batch_size: {batch_size}, learning_rate: {learning_rate}"
    return f"{{{size}, valid_windows: 1000}}"


def _lightgbm(rows: int) -> list[str]:
    """Qlib's published settings for Alpha158 on CSI 300, and lighter ones for fewer rows."""
    if rows > 400_000:
        numbers = {"learning_rate": 0.2, "num_leaves": 210, "max_depth": 8, "colsample_bytree": 0.8879}
        numbers |= {"lambda_l1": 205.6999, "lambda_l2": 580.9768}
    else:
        numbers = {"learning_rate": 0.05, "num_leaves": 31, "max_depth": 6, "colsample_bytree": 0.8879}
        numbers |= {"lambda_l1": 10, "lambda_l2": 30}
    return ["loss: mse", *(f"{key}: {value}" for key, value in numbers.items())]
