"""The command `kronos-qlib`: what stands before and after Qlib's own `qrun workflows/X.yaml`."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import dedent

_EPILOG = """\
    A first round, on simulated bars:
      kronos-qlib demo-data runs/demo/market
      qrun workflows/lightgbm_demo.yaml
      qrun workflows/kronos_demo.yaml
      kronos-qlib compare kronos_demo lightgbm_demo --out runs/demo
"""

_DEMO_DATA = """\
    Write a synthetic Qlib store of daily bars, to try a pipeline on or to test it: the strength of what can be
    predicted is known.

    DIR gets calendars/, instruments/ and features/ in Qlib's binary format, and SYNTHETIC.txt, by which kronos-qlib
    says wherever results are shown that the data are simulated. Universe: demo, whose members come and go. Benchmark:
    DEMOINDEX. There are suspensions, splits, price limits of 10 % and volatility clusters. The same options give the
    same store. A former demo market in DIR is replaced; anything else there is left alone, with an error.
"""

_DEMO_DATA_EXAMPLES = """\
    examples:
      kronos-qlib demo-data runs/demo/market                 60 instruments, 900 days, in about a second
      kronos-qlib demo-data /tmp/noise --signal 0 --seed 3   nothing to find: a model that finds something cheats
      kronos-qlib demo-data /tmp/large --instruments 300 --days 2000
"""

_FINETUNE = """\
    Run the two stages of fine-tuning of a workflow file, and nothing else of it: the tokenizer learns to reconstruct
    bars, then the model to continue their codes. The weights are left in output_dir/tokenizer/best and
    output_dir/predictor/best, in hub format; a workflow with `finetune: null` and these folders as its `tokenizer` and
    `model` uses them. Started again, a training that was stopped or killed goes on from its last checkpoint.

    finetune.processes says how many processes of this machine train together. For several machines, start the same
    command on each with torchrun; output_dir must lie on a file system that they share. Metrics and figures go to the
    recorder, experiment NAME_finetune.
"""

_FINETUNE_EXAMPLES = """\
    examples:
      kronos-qlib finetune workflows/kronos_csi300_nano.yaml --dry-run    sizes, steps, memory; trains nothing
      kronos-qlib finetune workflows/kronos_csi300_nano.yaml
      torchrun --nproc-per-node 8 -m kronos_qlib.train workflows/kronos_csi300.yaml
      torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint first-machine:29400 \\
          -m kronos_qlib.train workflows/kronos_csi300.yaml               the same line on both machines
"""

_COMPARE = """\
    Compare finished runs: the newest of each experiment named, or the very run whose recorder id is given. Only dates
    and instruments that all runs score count; how many that drops is said.

    Printed: IC and rank IC with Newey-West t, 95 % intervals (stationary bootstrap) and p corrected by Holm; deciles,
    hit rate, half-life; what simple factors leave; the backtest with costs and capacity; every two runs against each
    other; verdicts in words. The runs need Qlib's SignalRecord, SigAnaRecord and PortAnaRecord; factors and capacity
    need the Qlib store they ran on.

    With --out, DIR gets report.html (one page that needs no network: verdicts, tables, figures, forecasts over the
    bars that came, settings), comparison.csv and pairs.csv (the same figures with all their digits, returns as
    ratios: 0.05 is 5 %) and excess_return.png, rolling_ic.png and deciles.png.
"""

_COMPARE_EXAMPLES = """\
    examples:
      kronos-qlib compare kronos_demo lightgbm_demo --out runs/demo
      kronos-qlib compare kronos_csi300 173aafb213a24eb4a9d063053aec4045 --uri sqlite:////data/mlflow.db
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit status.

    0; 2 after an error of the caller's, told in one line; of a training whatever ended it, 128 + a signal's number.
    """
    options = _parser().parse_args(argv)
    return options.run(options)


def _demo_data(options: argparse.Namespace) -> int:
    from kronos_qlib.data.demo import write_demo_market

    try:
        folder = write_demo_market(
            options.folder,
            instruments=options.instruments,
            days=options.days,
            signal=options.signal,
            seed=options.seed,
        )
    except (ValueError, OSError) as error:
        return _fail("demo-data", error)
    print(
        f"{folder}: synthetic demo market, {options.instruments} instruments × {options.days} days, "
        f"signal {options.signal:g}, seed {options.seed}\nuniverse: demo   benchmark: DEMOINDEX"
    )
    return 0


def _finetune(options: argparse.Namespace) -> int:
    from kronos_qlib.train.group import launched
    from kronos_qlib.train.worker import together

    if launched() and options.dry_run:
        return _fail("finetune", ValueError("--dry-run needs no torchrun; run it alone"))
    if launched() and os.environ["RANK"] != "0":
        return together()[0]  # what is to be said, the first process says

    from kronos_qlib.workflow.finetuning import Finetuning

    try:
        if launched():
            ours: list[Finetuning] = []

            def prepare() -> Path:
                ours.append(Finetuning(options.workflow))
                return ours[0].prepare()

            try:
                status, said = together(prepare, lambda: ours[0].conclude())
            except BaseException:  # another machine is gone, say: torchrun starts all again
                if ours:
                    ours[0].give_up()
                raise
            if status and ours:
                ours[0].give_up()
            return _fail("finetune", ValueError(said), status) if status else 0
        finetuning = Finetuning(options.workflow)
        if options.dry_run:
            print(finetuning.foretell())
        else:
            finetuning.run()
    except (ValueError, FloatingPointError, ImportError, OSError, RuntimeError) as error:
        return _fail("finetune", error)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from kronos_qlib.analysis.comparison import compare_runs, write_tables
    from kronos_qlib.analysis.results import ResultsError, load_runs
    from kronos_qlib.analysis.tables import terminal_text

    try:
        comparison = compare_runs(load_runs(options.names, options.uri))
        print(terminal_text(comparison))
        if options.out is not None:
            from kronos_qlib.analysis.figures import plot_comparison
            from kronos_qlib.analysis.report import write_report

            written = [*write_tables(comparison, options.out), *plot_comparison(comparison, options.out)]
            written.append(write_report(comparison, options.out / "report.html"))
            print(f"\nwritten: {', '.join(map(str, written))}")
    except (ResultsError, OSError) as error:
        return _fail("compare", error)
    return 0


def _fail(command: str, error: Exception, status: int = 2) -> int:
    print(f"kronos-qlib {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kronos-qlib",
        description="Kronos, the foundation model for K-lines, in Qlib: what stands before and after a `qrun`.",
        epilog=dedent(_EPILOG),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo_data(commands)
    _add_finetune(commands)
    _add_compare(commands)
    return parser


def _add_demo_data(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "demo-data",
        help="write a synthetic Qlib store",
        description=dedent(_DEMO_DATA),
        epilog=dedent(_DEMO_DATA_EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("folder", metavar="DIR", type=Path, help="folder of the store; made if absent")
    command.add_argument(
        "--instruments", type=int, default=60, metavar="N", help="stocks beside the index (default: 60)"
    )
    command.add_argument(
        "--days", type=int, default=900, metavar="N", help="business days from 2018-01-02 (default: 900)"
    )
    command.add_argument(
        "--signal",
        type=float,
        default=0.05,
        metavar="IC",
        help="information coefficient, about, of the best simple rule (ten-day reversal) against the return from "
        "tomorrow's close to the next; 0 is none at all, 0.5 the most (default: 0.05)",
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random numbers (default: 0)")
    command.set_defaults(run=_demo_data)


def _add_finetune(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "finetune",
        help="run a workflow's fine-tuning alone, or foretell it",
        description=dedent(_FINETUNE),
        epilog=dedent(_FINETUNE_EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("workflow", metavar="WORKFLOW.yaml", type=Path, help="a file for qrun with a KronosModel")
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="load the data, print sizes, windows, steps, memory and the first batch; train nothing, write nothing",
    )
    command.set_defaults(run=_finetune)


def _add_compare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "compare",
        help="put finished runs side by side",
        description=dedent(_COMPARE),
        epilog=dedent(_COMPARE_EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "names", metavar="NAME", nargs="+", help="experiment name (the workflow's file stem) or recorder id"
    )
    command.add_argument(
        "--uri",
        default="sqlite:///mlflow.db",
        help="MLflow store of the runs (default: sqlite:///mlflow.db, in this folder)",
    )
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="also write report.html, tables as .csv and figures as .png to DIR"
    )
    command.set_defaults(run=_compare)


def _version() -> str:
    try:
        return version("kronos-qlib")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
