"""`kronos-qlib ingest`: write users' files of bars as a Qlib store."""

import argparse
from pathlib import Path
from textwrap import dedent

from kronos_qlib.cli.command import ORDERS, Commands, fail, parse_class, parse_pairs
from kronos_qlib.text import printable

_DESCRIPTION = """\
    Read files or folders of bars and write them as a Qlib store: CSV of any delimiter and encoding, Parquet, Feather,
    zip and gz of them; one file an instrument, or many instruments in a file; columns and symbols under the names that
    usual sources give them. Units, adjustment, frequency and what a bar's time is (its start or its end; the store has
    the start, as Qlib's have) are found from the figures, and each finding is printed with the figure behind it. Rows
    that are no bars go to rejected.csv in the store, with file, line and reason.

    The store is written aside and moved into place: there is a whole one or none. An existing one is never changed
    but by --append, which adds bars and refuses a history that differs.

    Then: kronos-qlib check STORE, kronos-qlib workflow STORE.
"""

_EXAMPLES = """\
    examples:
      kronos-qlib ingest downloads/ ~/.qlib/qlib_data/mine
      kronos-qlib ingest prices.csv store --map close=Last --map time=When
      kronos-qlib ingest today.csv store --append
      kronos-qlib ingest candles/ store --reader examples/json_reader.py:JsonLines
      kronos-qlib ingest bars/ store --universe csi300=members.txt --benchmark index.csv --tz Asia/Shanghai
"""
SHOWN = 40  # findings


def add_command(commands: Commands) -> None:
    """Add the command to the parser of `kronos-qlib`."""
    command = commands.add_parser(
        "ingest",
        help="write your files of bars as a Qlib store",
        description=dedent(_DESCRIPTION),
        epilog=dedent(_EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("sources", metavar="SOURCE", nargs="+", type=Path, help="files or folders of bars")
    command.add_argument("store", metavar="STORE", type=Path, help="folder of the store; made if absent")
    command.add_argument("--append", action="store_true", help="add bars to the store that is there")
    command.add_argument("--map", action="append", default=[], metavar="COLUMN=NAME", help="a foreign column's name")
    command.add_argument(
        "--reader", metavar="FILE.py:CLASS", help="read files of another kind by a class of your own (docs: Extending)"
    )
    command.add_argument(
        "--prices",
        help="positive, the default, or any, which keeps prices of zero or less, as of futures joined by differences",
    )
    command.add_argument("--unit", default="auto", help="shares, lots, lots,thousands or thousands (default: auto)")
    command.add_argument("--adjust", default="auto", help="none, adjusted_close or factor (default: auto)")
    command.add_argument("--freq", default="auto", help="day, 1week, or minutes such as 5min (default: auto)")
    command.add_argument("--label", default="auto", help="what a bar's time is: start or end (default: auto)")
    command.add_argument(
        "--tz", metavar="ZONE", help="time zone of the store's clock, for sources whose times have one"
    )
    command.add_argument("--dates", choices=ORDERS, help="what is first in 03/01/2024 (default: as the dates tell)")
    command.add_argument(
        "--symbols",
        action="append",
        default=[],
        metavar="SYMBOL=NAME",
        help="the name of a symbol's instrument, where its spelling does not tell: 000300=SH000300",
    )
    command.add_argument(
        "--universe",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="members: symbol, first and last date (none: still a member), by tabs or commas",
    )
    command.add_argument(
        "--benchmark", metavar="FILE|NAME", help="an index: a file of its bars, or one of the instruments; not in all"
    )
    command.add_argument(
        "--rebase", action="store_true", help="with --append: bring new bars to the base of the store's adjusted prices"
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    from kronos_qlib.ingest.store import ABOUT, ingest

    try:
        columns = parse_pairs("--map", options.map)
        universes = parse_pairs("--universe", options.universe)
        symbols = parse_pairs("--symbols", options.symbols)
        summary = ingest(
            options.sources,
            options.store,
            columns=columns,
            symbols=symbols,
            unit=options.unit,
            adjust=options.adjust,
            freq=options.freq,
            label=options.label,
            tz=options.tz,
            dates=options.dates,
            prices=options.prices,
            reader=parse_class("--reader", options.reader) if options.reader else None,
            universes={name: Path(path) for name, path in universes.items()},
            benchmark=options.benchmark,
            append=options.append,
            rebase=options.rebase,
            progress=True,
        )
    except (ValueError, OSError) as error:
        return fail("ingest", error)
    for finding in summary.findings[:SHOWN]:
        print(printable(finding))
    if len(summary.findings) > SHOWN:
        print(f"… and {len(summary.findings) - SHOWN:,} findings more, in {summary.store / ABOUT}")
    print(
        f"\n{summary.store}: {summary.instruments:,} instruments, {summary.bars:,} bars of {summary.freq}, "
        f"{summary.first} … {summary.last}, from {summary.files:,} files; {summary.rejected:,} rows rejected"
        f"{' (rejected.csv)' if summary.rejected else ''}"
    )
    return 0
