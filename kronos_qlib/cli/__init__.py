"""The command `kronos-qlib`, before and after Qlib's own `qrun workflows/X.yaml`. One file a command."""

import argparse
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from textwrap import dedent

from kronos_qlib.cli import check, compare, demo_data, finetune, forecast, ingest

_EPILOG = """\
    A first round, on simulated bars:
      kronos-qlib demo-data runs/demo/market
      kronos-qlib check workflows/kronos_demo.yaml
      qrun workflows/lightgbm_demo.yaml
      qrun workflows/kronos_demo.yaml
      kronos-qlib compare kronos_demo lightgbm_demo --out runs/demo
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit status.

    0: done. 2: an error of the caller, printed in one line. A training that a signal ended: 128 + the signal's number.
    """
    options = _parser().parse_args(argv)
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kronos-qlib",
        description="Kronos, the foundation model for K-lines, in Qlib: the commands before and after a `qrun`.",
        epilog=dedent(_EPILOG),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (forecast, ingest, demo_data, check, finetune, compare):
        command.add_command(commands)
    return parser


def _version() -> str:
    try:
        return version("kronos-qlib")
    except PackageNotFoundError:
        return "(not installed)"
