"""`kronos-qlib mcp`: forecast, rank, compare and ledger as tools of an assistant, over stdin and stdout."""

import argparse
from textwrap import dedent

from kronos_qlib.cli.command import Commands, fail
from kronos_qlib.cli.serve import add_options, settings_of

_DESCRIPTION = """\
    Offer forecasts, rankings, comparisons and the ledger to an assistant by the Model Context Protocol, over stdin and
    stdout: the assistant starts this command. Nothing listens on a network. What may be read is named here, as in
    serve, and the limits are the same.
"""
_EXAMPLES = """\
    examples:
      kronos-qlib mcp --store runs/demo/market
      claude mcp add kronos -- kronos-qlib mcp --store ~/.qlib/qlib_data/cn_data --model small
"""


def add_command(commands: Commands) -> None:
    """Add the command to the parser of `kronos-qlib`."""
    command = commands.add_parser(
        "mcp",
        help="the same for an assistant, by the Model Context Protocol",
        description=dedent(_DESCRIPTION),
        epilog=dedent(_EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(command)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    import warnings

    warnings.filterwarnings("ignore")  # what was found is among the notes
    try:
        from kronos_qlib.web.tools import make_tools
    except ModuleNotFoundError as error:
        return fail("mcp", ValueError(f"needs the package {error.name}: pip install 'kronos-qlib[mcp]'"))
    try:
        server = make_tools(settings_of(options))
    except (ValueError, OSError) as error:
        return fail("mcp", error)
    server.run("stdio")
    return 0
