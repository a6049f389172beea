"""`kronos-qlib tune`: choose settings of a workflow on folds within its train and valid segments."""

import argparse
from pathlib import Path
from textwrap import dedent

from kronos_qlib.cli.command import Commands, fail
from kronos_qlib.text import printable

_DESCRIPTION = """\
    Try settings of a workflow, of any Qlib model, and choose those with the best mean daily rank IC on the validation
    blocks of walk-forward folds. The folds lie within the train and valid segments: each is trained on what comes
    before its block, with an embargo of the label's reach, and the dataset's horizon, between the two. The test segment
    is not read: nothing after the end of valid is.

    SPACE.yaml maps dotted keys of the workflow to ranges:

      task.model.kwargs.learning_rate: {float: [0.01, 0.3], log: true}
      task.model.kwargs.num_leaves: {int: [16, 256], log: true}
      task.dataset.kwargs.lookback: {choice: [20, 60, 90]}

    Trial 0 is the workflow as it is; the others are drawn by Optuna's TPE. Settings that the model refuses are a trial
    too, without a value. Every trial is a run of the experiment NAME_trials in the workflow's MLflow store, with the
    tag kronos_qlib.trial. A tuning that was stopped goes on with the same command, and finds the same.

    Printed: each trial as it ends, and the ten best with their folds and the standard error of the mean of all days.
    Written: the workflow with the best settings, for qrun. To be fair, give both sides of a comparison as many trials.
"""

_EXAMPLES = """\
    examples:
      kronos-qlib tune workflows/lightgbm_demo.yaml --space workflows/spaces/lightgbm.yaml --trials 20 --dry-run
      kronos-qlib tune workflows/lightgbm_demo.yaml --space workflows/spaces/lightgbm.yaml --trials 20
      kronos-qlib tune workflows/ranker_demo.yaml --space workflows/spaces/ranker.yaml --trials 20 --folds 2
      qrun lightgbm_demo_tuned.yaml
"""


def add_command(commands: Commands) -> None:
    """Add the command to the parser of `kronos-qlib`."""
    command = commands.add_parser(
        "tune",
        help="choose settings of a workflow on folds within train and valid",
        description=dedent(_DESCRIPTION),
        epilog=dedent(_EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("workflow", metavar="WORKFLOW.yaml", type=Path, help="a file for qrun")
    command.add_argument("--space", metavar="SPACE.yaml", type=Path, required=True, help="what is tried")
    command.add_argument(
        "--trials", metavar="N", type=int, required=True, help="in all, with trial 0 and those of before a stop"
    )
    command.add_argument("--folds", metavar="K", type=int, default=3, help="default: 3; 1: train and valid as they are")
    command.add_argument(
        "--valid-sessions", metavar="N", type=int, help="of each validation block (default: as many as valid has)"
    )
    command.add_argument(
        "--train-sessions", metavar="N", type=int, help="train on the last N at most (default: all before the block)"
    )
    command.add_argument("--seed", metavar="N", type=int, default=0, help="of the sampler (default: 0)")
    command.add_argument(
        "--storage", metavar="FILE.db", type=Path, help="Optuna's SQLite file (default: optuna.db beside mlflow.db)"
    )
    command.add_argument("--out", metavar="FILE.yaml", type=Path, help="the workflow chosen (default: NAME_tuned.yaml)")
    command.add_argument("--dry-run", action="store_true", help="say folds, rows, space and budget; fit nothing")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        line = "install it with pip install -c constraints.txt -e '.[tune]'"
        return fail(
            "tune", ModuleNotFoundError(f"needs the package optuna, which cannot be imported ({error}); {line}")
        )
    from kronos_qlib.workflow.tuning import Tuning, results_text

    try:
        tuning = Tuning(
            options.workflow,
            options.space,
            options.trials,
            options.folds,
            options.valid_sessions,
            options.train_sessions,
            options.seed,
            options.storage,
            options.out,
        )
        if options.dry_run:
            print(printable(tuning.preview()))
            return 0
        trials = []
        for trial in tuning.run():
            trials.append(trial)
            best = max((each for each in trials if each.rank_ic is not None), key=lambda each: each.rank_ic or 0.0)
            if trial.rank_ic is None:
                said = f"not possible: {trial.reason}"
            else:
                spread = "" if trial.standard_error is None else f" ± {trial.standard_error:.4f}"
                folds = " ".join(f"{value:+.4f}" for value in trial.folds)
                said = f"rank IC {trial.rank_ic:+.4f}{spread} ({folds})"
            line = f"{trial.number + 1}/{options.trials}  trial {trial.number}: {said}  {trial.seconds:.0f} s"
            print(printable(f"{line}  best {best.rank_ic:+.4f} (trial {best.number})"), flush=True)
        path = tuning.write_best(trials)
    except (ValueError, OSError) as error:
        return fail("tune", error)
    failed = sum(each.rank_ic is None for each in trials)
    print(f"\n{printable(results_text(trials))}\n")
    print(f"{len(trials)} trials, {failed} of them not possible; runs: {tuning.experiment}; written: {path}")
    return 0
