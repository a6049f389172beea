"""`kronos-qlib compare`: put finished runs side by side."""

import argparse
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING

from kronos_qlib.analysis import DEFAULT_URI
from kronos_qlib.cli.command import Commands, fail, parse_class

if TYPE_CHECKING:
    from kronos_qlib.analysis.results import RunResult
    from kronos_qlib.analysis.sections import Section

_DESCRIPTION = """\
    Compare finished runs: the newest of each experiment named, or the very run whose recorder id is given. Only dates
    and instruments that all runs score count; how many rows that drops is printed.

    Printed: IC and rank IC with Newey-West t, 95 % intervals (stationary bootstrap) and p corrected by Holm; deciles,
    hit rate, half-life; rank IC by days to come; what simple factors leave; the backtest with costs and capacity, and
    at other costs; what is left after counting how many settings were tried (deflated rank IC and Sharpe ratio, track
    record); what ties leave to chance; every two runs against each other; verdicts in words. The runs need Qlib's
    SignalRecord, SigAnaRecord and PortAnaRecord; factors, days to come and capacity need the Qlib store they ran on.

    With --out, DIR gets report.html (one page that needs no network: verdicts, tables, figures, forecasts over the
    actual bars, settings), comparison.csv, pairs.csv, horizons.csv, costs.csv, drawdowns.csv and, of several seeds,
    seeds.csv (the same figures with all their digits, returns as ratios: 0.05 is 5 %) and excess_return.png,
    rolling_ic.png and deciles.png.

    Trials are the finished runs of an experiment, and of the one with _trials after its name, where kronos-qlib tune
    leaves them. Runs whose settings differ in the seed alone are also shown as mean ± standard deviation; NAME:all
    stands for all finished runs of an experiment.
"""

_EXAMPLES = """\
    examples:
      kronos-qlib compare kronos_demo lightgbm_demo --out runs/demo
      kronos-qlib compare kronos_csi300 173aafb213a24eb4a9d063053aec4045 --uri sqlite:////data/mlflow.db
      kronos-qlib compare ranker_csi300:all lightgbm_csi300 --trials 40     several seeds; 40 settings were looked at
      kronos-qlib compare kronos_demo --ledger sqlite:///ledger.db --out runs/demo     and how it does live
"""


def add_command(commands: Commands) -> None:
    """Add the command to the parser of `kronos-qlib`."""
    command = commands.add_parser(
        "compare",
        help="put finished runs side by side",
        description=dedent(_DESCRIPTION),
        epilog=dedent(_EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "names", metavar="NAME", nargs="+", help="experiment name (the workflow's file stem), NAME:all, or recorder id"
    )
    command.add_argument(
        "--trials", type=_count, metavar="N", help="settings tried up to each run (default: as the MLflow store counts)"
    )
    command.add_argument(
        "--uri",
        default=DEFAULT_URI,
        help=f"MLflow store of the runs (default: {DEFAULT_URI}, in this folder)",
    )
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="also write report.html, tables as .csv and figures as .png to DIR"
    )
    command.add_argument(
        "--figure",
        action="append",
        default=[],
        metavar="FILE.py:CLASS",
        help="with --out, add a figure of your own to report.html (docs: Extending); may stand several times",
    )
    command.add_argument(
        "--ledger", metavar="URL", help="also judge the live record of these runs in a ledger (kronos-qlib ledger)"
    )
    command.set_defaults(run=run)


def _live_record(url: str, runs: "list[RunResult]") -> "tuple[str, Section]":
    """Judge what a ledger has of the runs: as text, and as a section of the page."""
    from kronos_qlib.cli.ledger import paper_maker
    from kronos_qlib.live.judgement import judge
    from kronos_qlib.live.ledger import Ledger
    from kronos_qlib.live.ledger_page import record_section, record_text

    ledger = Ledger(url, must_exist=True)
    sets, rows = ledger.read()
    own = sets["experiment"].isin([run.name for run in runs]) | sets["recorder"].isin([run.run_id for run in runs])
    judgements = judge(sets[own], rows, paper_maker(None))
    section = record_section(judgements, ledger.name)
    return (record_text(judgements) if judgements else section.text), section


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be a whole number from 1, not {text!r}")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    from kronos_qlib.analysis.comparison import compare_runs, write_tables
    from kronos_qlib.analysis.own_figures import load_figures
    from kronos_qlib.analysis.results import ResultsError, load_runs
    from kronos_qlib.analysis.tables import terminal_text
    from kronos_qlib.live.ledger import LedgerError

    try:
        figures = load_figures([parse_class("--figure", text) for text in options.figure])
        if figures and options.out is None:
            raise ValueError("--figure goes with --out, where report.html is written")
        comparison = compare_runs(load_runs(options.names, options.uri), options.trials)
        print(terminal_text(comparison))
        sections = []
        if options.ledger is not None:
            text, section = _live_record(options.ledger, comparison.runs)
            print(f"\nLive record\n\n{text}")
            sections.append(section)
        if options.out is not None:
            from kronos_qlib.analysis.figures import plot_comparison
            from kronos_qlib.analysis.report import write_page

            written = [*write_tables(comparison, options.out), *plot_comparison(comparison, options.out)]
            written.append(write_page(comparison, options.out / "report.html", figures, sections))
            print(f"\nwritten: {', '.join(map(str, written))}")
    except (ResultsError, LedgerError, ValueError, OSError) as error:
        return fail("compare", error)
    return 0
