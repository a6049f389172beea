"""`kronos-qlib workflow`: write a workflow for a store, or copy those that come with the package."""

import argparse
from pathlib import Path
from textwrap import dedent

from kronos_qlib.cli.command import Commands, fail
from kronos_qlib.text import printable

_DESCRIPTION = """\
    Write a commented workflow for a store: OUT.yaml for Kronos, OUT_lightgbm.yaml and OUT_reversal.yaml as its
    yardsticks, and OUT_base.yaml with what they share. Segments are cut by the store's dates, lookback and horizon by
    its frequency, benchmark, costs, price limits and T+1 by its market. Read them, change them: they are yours. Nothing
    runs yet.
"""

_EXAMPLES = """\
    examples, from a file of bars to a comparison in four commands:
      kronos-qlib ingest bars.csv store
      kronos-qlib workflow store --out mine.yaml
      qrun mine.yaml && qrun mine_lightgbm.yaml
      kronos-qlib compare mine mine_lightgbm

    those that come with the package:
      kronos-qlib workflow --copy kronos_csi300_nano      into workflows/, with its base
      kronos-qlib workflow --copy all

    one file of plain YAML, for Qlib's Rolling and other readers that know neither a base nor templates:
      kronos-qlib workflow --flat workflows/lightgbm_csi300.yaml --out flat.yaml
      python -m qlib.contrib.rolling base --conf_path=flat.yaml --horizon=1 --step=60 run
"""


def add_command(commands: Commands) -> None:
    """Add the command to the parser of `kronos-qlib`."""
    command = commands.add_parser(
        "workflow",
        help="write a workflow for a store",
        description=dedent(_DESCRIPTION),
        epilog=dedent(_EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("store", metavar="STORE", nargs="?", type=Path, help="a Qlib store")
    command.add_argument("--universe", default="all", metavar="NAME", help="a universe of the store (default: all)")
    command.add_argument("--model", default="nano", help="nano, mini, small or base (default: nano)")
    command.add_argument("--region", default="auto", help="cn, us, tw or crypto (default: auto, by names and days)")
    command.add_argument("--freq", help="which bars of the store, such as 5min (default: the finest there are)")
    command.add_argument("--benchmark", metavar="NAME", help="an instrument (default: the index, or the mean of all)")
    command.add_argument("--copy", nargs="+", metavar="NAME", help="copy workflows of the package instead, or all")
    command.add_argument("--flat", metavar="WORKFLOW.yaml", type=Path, help="write this one without base and templates")
    command.add_argument(
        "--out", type=Path, help="the workflow's file (default: the store's name); with --copy a folder: workflows/"
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    from kronos_qlib.workflow.new_workflow import copy_examples, example_names, write_workflow
    from kronos_qlib.workflow.workflow_file import write_flat_workflow

    notes: list[str] = []
    try:
        if options.flat:
            if options.store or options.copy:
                raise ValueError("--flat takes a workflow; leave the store and --copy out")
            files = [write_flat_workflow(options.flat, options.out or Path(f"{options.flat.stem}_flat.yaml"))]
        elif options.copy:
            if options.store:
                raise ValueError("--copy takes workflows of the package; leave the store out")
            files = copy_examples(options.copy, options.out or Path("workflows"))
        elif options.store is None:
            raise ValueError(f"name a store, or --copy one of {', '.join(example_names())}")
        else:
            out = options.out or Path(f"{options.store.expanduser().resolve().name}.yaml")
            files, notes = write_workflow(
                options.store,
                out,
                universe=options.universe,
                model=options.model,
                region=options.region,
                freq=options.freq,
                benchmark=options.benchmark,
            )
    except (ValueError, OSError) as error:
        return fail("workflow", error)
    for note in notes:
        print(printable(note))
    print(f"written: {', '.join(map(str, files))}")
    if notes:
        *runs, _ = files  # the last is the base
        print(f"next: kronos-qlib check {runs[0]}; {'; '.join(f'qrun {run}' for run in runs)}")
        print(f"then: kronos-qlib compare {' '.join(run.stem for run in runs)}")
    return 0
