"""`kronos-qlib ingest`: write users' files of bars as a Qlib store."""

import argparse
from pathlib import Path
from textwrap import dedent

from kronos_qlib.cli.command import Commands, fail, parse_pairs
from kronos_qlib.text import printable

_DESCRIPTION = """\
    Read files or folders of bars and write them as a Qlib store: CSV of any delimiter and encoding, Parquet, Feather,
    zip and gz of them; one file an instrument, or many instruments in a file; columns and symbols under the names that
    usual sources give them. Units, adjustment and frequency are found from the figures, and each finding is printed
    with the figure behind it. Rows that are no bars go to rejected.csv in the store, with file, line and reason.

    The store is written aside and moved into place: there is a whole one or none. An existing one is never changed
    but by --append, which adds bars and refuses a history that differs.
"""

_EXAMPLES = """\
    examples:
      kronos-qlib ingest downloads/ ~/.qlib/qlib_data/mine
      kronos-qlib ingest prices.csv store --map close=Last --map time=When
      kronos-qlib ingest today.csv store --append
      kronos-qlib ingest bars/ store --universe csi300=members.txt --tz Asia/Shanghai
"""


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
    command.add_argument("--unit", default="auto", help="shares, lots, lots,thousands or thousands (default: auto)")
    command.add_argument("--adjust", default="auto", help="none, adjusted_close or factor (default: auto)")
    command.add_argument("--freq", default="auto", help="day, or minutes such as 5min (default: auto)")
    command.add_argument("--tz", help="time zone of the store's clock, for sources whose times have one")
    command.add_argument(
        "--universe",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="members: name, first and last date, by tabs",
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    from kronos_qlib.ingest.store import ingest

    try:
        columns = parse_pairs("--map", options.map)
        universes = parse_pairs("--universe", options.universe)
        summary = ingest(
            options.sources,
            options.store,
            columns=columns,
            unit=options.unit,
            adjust=options.adjust,
            freq=options.freq,
            tz=options.tz,
            universes={name: Path(path) for name, path in universes.items()},
            append=options.append,
        )
    except (ValueError, OSError) as error:
        return fail("ingest", error)
    for finding in summary.findings[:40]:
        print(printable(finding))
    print(
        f"\n{summary.store}: {summary.instruments:,} instruments, {summary.bars:,} bars of {summary.freq}, "
        f"{summary.first} … {summary.last}, from {summary.files:,} files; {summary.rejected:,} rows rejected"
        f"{' (rejected.csv)' if summary.rejected else ''}"
    )
    return 0
