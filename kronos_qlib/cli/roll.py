"""`kronos-qlib roll`: train a workflow's model anew every so many sessions, and join the predictions as one run."""

import argparse
from pathlib import Path
from textwrap import dedent

from kronos_qlib.cli.command import Commands, fail
from kronos_qlib.text import printable

_DESCRIPTION = """\
    Walk-forward: train the model of a workflow, of any Qlib model, anew every N sessions and let each training score
    the N sessions that follow it. The tasks divide the test segment; train, valid and test move on together. Between
    train and valid, and valid and test, lies an embargo of as many sessions as a label looks ahead or a window has a
    horizon.

    Each task is a run of the experiment NAME_rolling_tasks in the workflow's MLflow store. Their predictions, joined,
    are a run of NAME_rolling with the workflow's records but the forecasts' (IC, backtest), which `kronos-qlib compare`
    takes beside static ones. A roll that was stopped, or killed, goes on with the same command: tasks that have ended
    are not trained again, and a training that was half-way goes on from its last checkpoint.

    --from previous starts each training from the weights of the task before (KronosModel, KronosRanker); with
    --next-epochs it takes a fraction of the time. Its folder, like each task's, is in OUTPUT_DIR_rolling.
"""

_EXAMPLES = """\
    examples:
      kronos-qlib roll workflows/lightgbm_csi300.yaml --step 60 --dry-run
      kronos-qlib roll workflows/lightgbm_csi300.yaml --step 60
      kronos-qlib roll workflows/kronos_csi300_nano.yaml --step 60 --from previous --next-epochs 1
      kronos-qlib compare lightgbm_csi300 lightgbm_csi300_rolling kronos_csi300_nano_rolling
"""


def add_command(commands: Commands) -> None:
    """Add the command to the parser of `kronos-qlib`."""
    command = commands.add_parser(
        "roll",
        help="train a workflow anew every N sessions, and join the predictions",
        description=dedent(_DESCRIPTION),
        epilog=dedent(_EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("workflow", metavar="WORKFLOW.yaml", type=Path, help="a file for qrun")
    command.add_argument("--step", metavar="N", type=int, required=True, help="sessions that each training scores")
    command.add_argument(
        "--window", choices=("expanding", "sliding"), default="expanding", help="of training days (default: expanding)"
    )
    command.add_argument(
        "--from", dest="start", choices=("scratch", "previous"), default="scratch", help="default: scratch"
    )
    command.add_argument("--next-epochs", metavar="N", type=int, help="with --from previous, of all but the first task")
    command.add_argument("--processes", metavar="N", type=int, default=1, help="tasks at a time (default: 1)")
    command.add_argument("--engine", choices=("local", "ray"), default="local", help="default: local")
    command.add_argument(
        "--experiment", metavar="NAME", help="of the joined run (default: the workflow's and _rolling)"
    )
    command.add_argument("--dry-run", action="store_true", help="say tasks, windows and a rough time; train nothing")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    from kronos_qlib.workflow.rolling import WalkForward
    from kronos_qlib.workflow.rolling_task import rank_ic

    try:
        walk = WalkForward(
            options.workflow,
            options.step,
            options.window,
            options.start,
            options.next_epochs,
            options.processes,
            options.engine,
            options.experiment,
        )
        if options.dry_run:
            print(printable(walk.preview()))
            return 0
        runs = []
        for task in walk.run():
            runs.append(task)
            first, last = task.task.segments["test"]
            value = rank_ic(task, walk.task_experiment)
            spent = "finished before" if task.reused else f"{task.seconds:.0f} s"
            line = f"{len(runs)}/{len(walk.tasks)}  task {task.task.number}: {first.date()} … {last.date()}"
            print(printable(f"{line}  rank IC {value:+.4f}  {spent}"), flush=True)
        recorder = walk.join(runs)
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        return fail("roll", error)
    print(f"joined: {walk.experiment}, recorder {recorder.id}; tasks: {walk.task_experiment}")
    return 0
