"""`kronos-qlib forecast`: forecast the bars that follow a file, or an instrument of a store."""

import argparse
import gc
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

from kronos_qlib.cli.command import ORDERS, Commands, fail, parse_pairs

if TYPE_CHECKING:
    from kronos_qlib.analysis.bar_forecast import BarForecast

_DESCRIPTION = """\
    Read bars from a file (CSV of any delimiter and encoding, Parquet, Feather, zip, gz; columns by their usual names)
    or from a Qlib store, draw sample paths of the bars that follow, print a table of the close (median, half and nine
    tenths of the paths, the share that ends above the last close, median low and high) and write a CSV file and a page
    with candles, fan and paths. Nothing has to be set up.

    The times of the bars to come are the sessions of --exchange, of mainland China's or around the clock where the
    symbol tells, or of the pattern of the bars. The bars forecast are possible ones: high and low are moved beyond open
    and close, a volume below zero becomes 0; the close is as drawn.
"""

_EXAMPLES = """\
    examples:
      kronos-qlib forecast BTCUSDT-1h.csv --horizon 48                            with nano: small, offline, at once
      kronos-qlib forecast prices.parquet:AAPL --model small --at 2024-06-28      from that day, and what came
      kronos-qlib forecast runs/demo/market:DEMO0001 --model runs/demo/kronos      with what `make demo` has trained
      kronos-qlib forecast mine.csv --model small --map close=Last --out mine.html
      kronos-qlib forecast prices.csv --calibration runs/mine/calibration.json     with the model it was fitted for
"""


def add_command(commands: Commands) -> None:
    """Add the command to the parser of `kronos-qlib`."""
    command = commands.add_parser(
        "forecast",
        help="forecast the bars that follow a file",
        description=dedent(_DESCRIPTION),
        epilog=dedent(_EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("source", metavar="FILE|STORE:INSTRUMENT", help="bars; FILE:INSTRUMENT of a file with several")
    command.add_argument(
        "--horizon", type=int, metavar="N", help="bars to forecast (default: 24, or the calibration's)"
    )
    command.add_argument(
        "--lookback",
        type=int,
        metavar="N",
        help="bars seen at most (default: 400, or fewer if the model was trained on shorter windows, or the "
        "calibration's)",
    )
    command.add_argument(
        "--model",
        default="nano",
        metavar="NAME|DIR",
        help="nano, which comes with this package (default), mini, small or base as published (fetched once), or a "
        "folder: tokenizer/ and model/, or a training",
    )
    command.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="calibration.json of a run: paths and bands are calibrated, see docs/forecasting.md (default: as drawn)",
    )
    command.add_argument("--samples", type=int, default=100, metavar="N", help="sample paths (default: 100)")
    command.add_argument("--at", metavar="DATE", help="forecast from the last bar up to then, and show what came")
    command.add_argument("--exchange", metavar="NAME", help="whose sessions follow, such as XSHG, XNYS, 24/7")
    command.add_argument(
        "--map", action="append", default=[], metavar="COLUMN=NAME", help="a foreign column's name, close=Last"
    )
    command.add_argument("--symbols", action="append", default=[], metavar="SYMBOL=NAME", help="as in ingest")
    command.add_argument("--dates", choices=ORDERS, help="what is first in 03/01/2024 (default: as the dates tell)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random numbers (default: 0)")
    command.add_argument("--device", default="cpu", help="cpu, cuda, auto (default: cpu)")
    command.add_argument(
        "--out",
        type=Path,
        default=Path("forecast.html"),
        metavar="PAGE",
        help="the page; the CSV file lies beside it (default: forecast.html)",
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    import warnings

    warnings.filterwarnings("ignore")  # what was found is among the notes
    collected = gc.isenabled()
    gc.disable()  # half a second of the imports: there is no garbage among them
    try:
        from kronos_qlib.analysis.bar_forecast import terminal_text, write_csv, write_page

        forecast = _forecast(options)
        print(terminal_text(forecast))
        written = [write_csv(forecast, options.out.with_suffix(".csv")), write_page(forecast, options.out)]
    except (ValueError, OSError) as error:
        return fail("forecast", error)
    finally:
        if collected:
            gc.enable()
    print(f"\nwritten: {', '.join(map(str, written))}")
    return 0


def _forecast(options: argparse.Namespace) -> "BarForecast":
    import pandas as pd

    from kronos_qlib.analysis.bar_forecast import BarForecast
    from kronos_qlib.data.calendar import check_exchange, sessions_after_bars
    from kronos_qlib.data.dates import read_until
    from kronos_qlib.forecast.calibration import load_calibration
    from kronos_qlib.ingest.selection import read_instrument
    from kronos_qlib.ingest.symbols import exchange_of
    from kronos_qlib.workflow.named_predictor import load_predictor, most_lookback

    calibration = load_calibration(options.calibration) if options.calibration else None
    if options.horizon is None:
        options.horizon = 24 if calibration is None else calibration.horizon
    if options.lookback is None:
        options.lookback = 400 if calibration is None else calibration.fitted_on.lookback
    for name, least in (("horizon", 1), ("lookback", 2), ("samples", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} is {getattr(options, name)}; it should be at least {least}")
    if options.exchange:
        check_exchange(options.exchange)
    columns, symbols = parse_pairs("--map", options.map), parse_pairs("--symbols", options.symbols)
    at = None
    if options.at:
        try:
            at = read_until(options.at)
        except ValueError as error:
            raise ValueError(f"--at {error}") from None
    found = read_instrument(options.source, columns, symbols, options.dates, at)
    bars = found.bars
    bars, later = (bars[bars.index <= at], bars[bars.index > at]) if at is not None else (bars, bars.iloc[:0])
    if len(bars) < 2:
        raise ValueError(
            f"{options.source}: {len(bars)} bars to forecast from{f' up to {options.at}' if options.at else ''}"
        )
    exchange = options.exchange or exchange_of(found.instrument)
    times = sessions_after_bars(pd.DatetimeIndex(bars.index), options.horizon, exchange)
    try:
        predictor, note = load_predictor(options.model, options.device, calibration)
    except ValueError as error:
        where = "" if calibration is None else f"{options.calibration}: "
        raise ValueError(f"{where}{error}") from None
    room = most_lookback(predictor, options.horizon)
    if min(options.lookback, len(bars)) > room:
        note += f" It sees the last {room} bars, as it was trained on windows of {predictor.max_context}."
    bars = bars.iloc[-min(options.lookback, room) :]
    from kronos_qlib.analysis.bar_forecast import QUANTILES
    from kronos_qlib.data.windows import CLOSE
    from kronos_qlib.forecast.predictor import possible_bars

    draws: dict[str, Any] = {"T": 1.0, "top_k": 0, "top_p": 1.0}
    if calibration is not None:
        fitted = calibration.identity
        draws = {"T": fitted.temperature, "top_k": fitted.top_k, "top_p": fitted.top_p}
    try:
        paths = predictor.predict_paths(
            bars, bars.index, times, len(times), sample_count=options.samples, seed=options.seed, **draws
        )
    except ValueError as error:
        raise ValueError(f"{options.source}: {error}") from None
    paths = possible_bars(paths)
    came = later[later.index.isin(times)]
    sessions = exchange or "the pattern of the bars, without holidays"
    bands = None
    if calibration is not None:
        bands = predictor.close_quantiles(paths[..., CLOSE], bars, QUANTILES)
        note += f" Calibrated: {calibration.describe()}. Its bands are split conformal."
        if len(bars) != calibration.fitted_on.lookback:
            note += f" This forecast sees {len(bars)} bars, not {calibration.fitted_on.lookback}."
    tokens = "all" if draws["top_p"] == 1 and not draws["top_k"] else "the likeliest"
    notes = [
        note,
        f"Sessions ahead: {sessions}. Sampled at temperature {draws['T']:g} from {tokens} tokens, seed {options.seed}.",
        *found.findings,
    ]
    return BarForecast(found.instrument, bars, times, paths, came, notes, bands)
