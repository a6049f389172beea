"""`kronos-qlib demo-data`: write a synthetic Qlib store."""

import argparse
from textwrap import dedent

from kronos_qlib.cli.command import Commands, fail

FREQS = "day", "week", "60min", "30min", "15min", "5min", "1min"  # DemoFreq of kronos_qlib.data.demo_market
MARKETS = "stocks", "crypto", "futures"  # DemoMarket, which imports pandas

_DESCRIPTION = """\
    Write a synthetic Qlib store, to try a pipeline on or to test it: the strength of what can be predicted is known.

    DIR gets calendars/, instruments/ and features/ in Qlib's binary format, and SYNTHETIC.txt, by which kronos-qlib
    marks all results as simulated. Universe: demo, whose members come and go. Benchmark: DEMOINDEX. Stocks have
    suspensions, splits, price limits of 10 % and the hours of Shanghai; coins trade at all hours; futures roll every
    two months. All have volatility clusters. The same options give the same store. A former demo market in DIR is
    replaced if it is as it was written; anything else there is left alone, with an error that names it.
"""

_EXAMPLES = """\
    examples:
      kronos-qlib demo-data runs/demo/market                 60 instruments, 900 days, in about a second
      kronos-qlib demo-data /tmp/noise --signal 0 --seed 3   nothing to find: a model that finds something cheats
      kronos-qlib demo-data /tmp/large --instruments 300 --days 2000
      kronos-qlib demo-data /tmp/minutes --freq 5min         then: kronos-qlib workflow /tmp/minutes --universe demo
      kronos-qlib demo-data /tmp/coins --freq 60min --market crypto --signal 0.1
"""


def add_command(commands: Commands) -> None:
    """Add the command to the parser of `kronos-qlib`."""
    command = commands.add_parser(
        "demo-data",
        help="write a synthetic Qlib store",
        description=dedent(_DESCRIPTION),
        epilog=dedent(_EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("folder", metavar="DIR", help="folder of the store; made if absent")
    command.add_argument(
        "--instruments", type=int, default=60, metavar="N", help="stocks beside the index (default: 60)"
    )
    command.add_argument(
        "--days",
        type=int,
        metavar="N",
        help="days of trade from 2018-01-02 (default: 900; of weeks 3000; intraday as many as have some 2,000 bars)",
    )
    command.add_argument("--freq", choices=FREQS, default="day", help="of the bars (default: day)")
    command.add_argument("--market", choices=MARKETS, default="stocks", help="what is traded (default: stocks)")
    command.add_argument(
        "--signal",
        type=float,
        default=0.05,
        metavar="IC",
        help="information coefficient, about, of the best simple rule (ten-day reversal) against the return from "
        "tomorrow's close to the next; 0 is none at all, 0.5 the most (default: 0.05)",
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random numbers (default: 0)")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    from kronos_qlib.data.demo_market import usual_days, write_demo_market

    days = usual_days(options.freq, options.market) if options.days is None else options.days
    try:
        folder = write_demo_market(
            options.folder,
            instruments=options.instruments,
            days=days,
            signal=options.signal,
            seed=options.seed,
            freq=options.freq,
            market=options.market,
        )
    except (ValueError, OSError) as error:
        return fail("demo-data", error)
    print(
        f"{folder}: synthetic demo market, {options.instruments} instruments × {days} days, "
        f"signal {options.signal:g}, seed {options.seed}\nuniverse: demo   benchmark: DEMOINDEX"
        + (
            f"   bars of {options.freq}, {options.market}"
            if (options.freq, options.market) != ("day", "stocks")
            else ""
        )
    )
    return 0
