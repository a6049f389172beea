"""`kronos-qlib check`: say what is wrong with a workflow before it runs, or what is odd in a store of bars."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

from kronos_qlib.cli.command import Commands, fail
from kronos_qlib.text import printable

_DESCRIPTION = """\
    Of a workflow: read what `qrun` would read, build what can be built without work, and print one line for each thing
    looked at: the file, the recorder's store, the data and the windows of each segment, the networks, device and
    folders, every record, the strategy, the dates of the backtest against the calendar, its benchmark. Nothing is
    trained, forecast or recorded.

    Of a store: read every bar and print what is odd, with the worst instruments and dates: missing sessions, bars
    without volume, moves that $change or $factor contradict, stale and impossible prices, units that change within a
    series, gaps of the index, members of a universe without bars.

    Exit status 0: nothing worse than warnings. 2: there are errors, marked by a cross.
"""

_EXAMPLES = """\
    examples:
      kronos-qlib check workflows/kronos_csi300.yaml
      kronos-qlib check my.yaml && qrun my.yaml
      kronos-qlib check ~/.qlib/qlib_data/cn_data --html store.html
      kronos-qlib check store --freq 5min --json > store.json
      kronos-qlib check store --recent 5                      every evening: what arrived lately must be sane
"""
_MARKS = {"ok": "✓", "warning": "!", "error": "✗"}


def add_command(commands: Commands) -> None:
    """Add the command to the parser of `kronos-qlib`."""
    command = commands.add_parser(
        "check",
        help="say what is wrong with a workflow before it runs, or what is odd in a store",
        description=dedent(_DESCRIPTION),
        epilog=dedent(_EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("source", metavar="WORKFLOW.yaml|STORE", type=Path, help="a file for qrun, or a Qlib store")
    command.add_argument("--freq", help="of a store: which bars (default: the finest there are)")
    command.add_argument(
        "--recent",
        type=int,
        default=0,
        metavar="N",
        help="of a store: jumps, stale prices and steps of a unit in the last N sessions are errors",
    )
    command.add_argument("--json", action="store_true", help="of a store: print JSON, with a row for each instrument")
    command.add_argument("--html", type=Path, metavar="PAGE", help="of a store: write a page, too")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    return _check_store(options) if options.source.is_dir() else _check_workflow(options)


def _check_store(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from kronos_qlib.ingest.store_check import check_store

    def progress(names: list[str]) -> Iterator[str]:
        return iter(tqdm(names, "checking", unit="instrument", disable=None, leave=False))

    try:
        if options.recent < 0:
            raise ValueError(f"--recent is {options.recent}; it should be 0 or more")
        report = check_store(options.source, options.freq, progress, options.recent)
        if options.html:
            from kronos_qlib.analysis.pages import write_store_page

            write_store_page(report, options.html)
    except (ValueError, OSError) as error:
        return fail("check", error)
    if options.json:
        print(report.to_json(), end="")
        return 2 if report.errors else 0
    for finding in report.findings:
        print(printable(f"{_MARKS[finding.level]} {finding.subject:<16} {finding.text}"))
        for example in finding.examples:
            print(printable(f"{'':<19}{example}"))
    warnings = sum(finding.level == "warning" for finding in report.findings)
    print(f"{report.errors} errors, {warnings} warnings{f'; page: {options.html}' if options.html else ''}")
    return 2 if report.errors else 0


def _check_workflow(options: argparse.Namespace) -> int:
    if options.freq or options.json or options.html or options.recent:
        of_stores = "--freq, --recent, --json and --html are of a store, which is a folder"
        return fail("check", ValueError(f"{options.source}: {of_stores}"))
    from kronos_qlib.workflow.check import WorkflowCheck

    counts = dict.fromkeys(_MARKS, 0)
    for finding in WorkflowCheck(options.source).findings():
        counts[finding.level] += 1
        line = printable(f"{_MARKS[finding.level]} {finding.subject:<22} {' '.join(finding.text.split())}")
        print(line, file=sys.stderr if finding.level == "error" else sys.stdout, flush=True)
    print(f"{counts['error']} errors, {counts['warning']} warnings", flush=True)
    return 2 if counts["error"] else 0
