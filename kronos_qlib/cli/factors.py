"""`kronos-qlib factors`: write the factors that Kronos makes of a workflow's windows as a Parquet file."""

import argparse
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING

from kronos_qlib.cli.command import Commands, fail
from kronos_qlib.text import printable

if TYPE_CHECKING:
    from kronos_qlib.workflow.factor_table import FactorTable

_DESCRIPTION = """\
    Compute Kronos' factors of a workflow whose handler has a KronosFactors, such as Alpha158Kronos, and write them as
    one Parquet file: datetime, instrument, a float32 column for each factor. Tools that search factors, and pandas,
    polars or DuckDB, read it. Nothing is trained and no run is recorded.

    What the factors are made of (settings, digests of the weights, data, versions) lies in the file's metadata under
    the key kronos_qlib.factors, as JSON. What is in the workflow's cache_dir is not computed again, and after a kill
    the same command goes on.

    A date's factors depend on no later bar, but for the PCA's directions, which are fitted on the dates of pca.fit. A
    network that was trained on some of the dates has seen them: how many there are is printed.
"""

_EXAMPLES = """\
    examples:
      kronos-qlib factors workflows/lightgbm_kronos_demo.yaml --dry-run      windows, rough time, what the cache has
      kronos-qlib factors workflows/lightgbm_kronos_demo.yaml --out factors.parquet
      kronos-qlib factors mine.yaml --start 2020-01-01 --end 2020-12-31 --out factors_2020.parquet

    in Python:
      pandas.read_parquet("factors.parquet")                                 its index is (datetime, instrument)
      pyarrow.parquet.read_schema("factors.parquet").metadata[b"kronos_qlib.factors"]
"""


def add_command(commands: Commands) -> None:
    """Add the command to the parser of `kronos-qlib`."""
    command = commands.add_parser(
        "factors",
        help="write Kronos' factors of a workflow as a Parquet file",
        description=dedent(_DESCRIPTION),
        epilog=dedent(_EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("workflow", metavar="WORKFLOW.yaml", type=Path, help="a file for qrun with KronosFactors")
    command.add_argument("--out", type=Path, metavar="FILE", help="the Parquet file; replaced whole if it is there")
    command.add_argument("--start", metavar="DATE", help="first date (default: the handler's)")
    command.add_argument("--end", metavar="DATE", help="last date (default: the handler's)")
    command.add_argument(
        "--dry-run", action="store_true", help="say how many windows there are, what the cache has, and a rough time"
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    if options.out is None and not options.dry_run:
        return fail("factors", ValueError("give --out FILE, or --dry-run"))
    from kronos_qlib.workflow.factor_table import FactorTable

    try:
        table = FactorTable(options.workflow, options.start, options.end)
        if options.dry_run:
            return _preview(table)
        written = table.write(options.out)
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        return fail("factors", error)
    print(f"written: {options.out}, {written.num_rows:,} rows, {written.num_columns - 2} factors")
    return 0


def _preview(table: "FactorTable") -> int:
    print(f"{table.name}: dry run, nothing is written")
    errors = 0
    for finding in table.findings():
        errors += finding.level == "error"
        mark = "" if finding.level == "ok" else f"{finding.level}: "
        print(printable(f"{finding.subject:<20} {mark}{finding.text}"), flush=True)
    return 2 if errors else 0
