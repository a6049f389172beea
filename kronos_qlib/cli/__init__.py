"""The command `kronos-qlib`, before and after Qlib's own `qrun workflows/X.yaml`. One file a command."""

import argparse
import gc
import os
import signal
import sys
from collections.abc import Sequence
from textwrap import dedent
from typing import NoReturn

from kronos_qlib.cli import (
    check,
    compare,
    demo_data,
    factors,
    finetune,
    forecast,
    ingest,
    ledger,
    mcp,
    roll,
    serve,
    signals,
    tune,
    workflow,
)
from kronos_qlib.cli.unattended import THEN, add_options, report, run_commands, split_commands
from kronos_qlib.versions import package_version

_EPILOG = """\
    With your own bars:
      kronos-qlib forecast bars.csv                          the bars to come, at once, as a table and a page
      kronos-qlib ingest bars.csv store                      a Qlib store of them
      kronos-qlib workflow store --out mine.yaml             a workflow for it, and LightGBM's beside it
      qrun mine.yaml && qrun mine_lightgbm.yaml
      kronos-qlib compare mine mine_lightgbm
      kronos-qlib signals mine.yaml                          of the latest bar, every evening

    A first round, on simulated bars:
      kronos-qlib demo-data runs/demo/market
      kronos-qlib check workflows/kronos_demo.yaml
      qrun workflows/lightgbm_demo.yaml
      qrun workflows/kronos_demo.yaml
      kronos-qlib compare kronos_demo lightgbm_demo --out runs/demo
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand, or several divided by --then, and return the exit status.

    0: done. 2: an error of the caller, printed in one line. 3: a store lacks the bars asked for. 4: another run holds
    the lock. A training that a signal ended: 128 + the signal's number.
    """
    parser, commands = _parser(), []
    for part in split_commands(sys.argv[1:] if argv is None else argv):
        try:
            commands.append(parser.parse_args(part))
        except SystemExit as end:
            if commands and end.code:
                report(commands[0], part[0] if part else THEN, int(end.code), 0.0)
            raise
    return run_commands(commands)


def run_and_exit() -> NoReturn:
    """Run the command and end the process: what the shell calls.

    An interruption, and a pipe whose reader has gone (`… | head`), end it without a traceback. What was imported is not
    collected before: for torch that alone takes a second.
    """
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left unsaid goes nowhere
        status = 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 1
    gc.freeze()
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kronos-qlib",
        description="Kronos, the foundation model for K-lines, in Qlib: the commands before and after a `qrun`.",
        epilog=dedent(_EPILOG),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {package_version('kronos-qlib') or '(not installed)'}"
    )
    add_options(parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    every = (
        forecast,
        ingest,
        demo_data,
        workflow,
        check,
        tune,
        finetune,
        roll,
        factors,
        compare,
        signals,
        ledger,
        serve,
        mcp,
    )
    for command in every:
        command.add_command(commands)
    return parser
