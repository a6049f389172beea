"""`kronos-qlib check`: say what is wrong with a workflow before it runs."""

import argparse
import sys
from pathlib import Path
from textwrap import dedent

from kronos_qlib.cli.command import Commands
from kronos_qlib.text import printable

_DESCRIPTION = """\
    Read what `qrun` would read, build what can be built without work, and print one line for each thing looked at:
    the file, the recorder's store, the data and the windows of each segment, the networks, device and folders, every
    record, the strategy, the dates of the backtest against the calendar, its benchmark. Nothing is trained, forecast
    or recorded.

    Exit status 0: it can run, perhaps with warnings. 2: there are errors, marked by a cross.
"""

_EXAMPLES = """\
    examples:
      kronos-qlib check workflows/kronos_csi300.yaml
      kronos-qlib check my.yaml && qrun my.yaml
"""
_MARKS = {"ok": "✓", "warning": "!", "error": "✗"}


def add_command(commands: Commands) -> None:
    """Add the command to the parser of `kronos-qlib`."""
    command = commands.add_parser(
        "check",
        help="say what is wrong with a workflow before it runs",
        description=dedent(_DESCRIPTION),
        epilog=dedent(_EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("workflow", metavar="WORKFLOW.yaml", type=Path, help="a file for qrun")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    from kronos_qlib.workflow.check import WorkflowCheck

    counts = dict.fromkeys(_MARKS, 0)
    for finding in WorkflowCheck(options.workflow).findings():
        counts[finding.level] += 1
        line = printable(f"{_MARKS[finding.level]} {finding.subject:<22} {' '.join(finding.text.split())}")
        print(line, file=sys.stderr if finding.level == "error" else sys.stdout, flush=True)
    print(f"{counts['error']} errors, {counts['warning']} warnings", flush=True)
    return 2 if counts["error"] else 0
