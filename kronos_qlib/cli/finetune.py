"""`kronos-qlib finetune`: run the fine-tuning of a workflow file, alone or under torchrun."""

import argparse
import os
from pathlib import Path
from textwrap import dedent

from kronos_qlib.cli.command import Commands, fail

_DESCRIPTION = """\
    Run the two stages of fine-tuning of a workflow file, and nothing else of it: the tokenizer learns to reconstruct
    bars, then the model to continue their codes. The weights are left in output_dir/tokenizer/best and
    output_dir/predictor/best, in hub format; a workflow with `finetune: null` and these folders as its `tokenizer` and
    `model` uses them. Started again, a training that was stopped or killed goes on from its last checkpoint.

    finetune.processes is the number of processes that train together on this machine. For several machines, start the
    same command on each with torchrun; output_dir must lie on a file system that they share. Metrics and figures go to
    the recorder, experiment NAME_finetune.
"""

_EXAMPLES = """\
    examples:
      kronos-qlib finetune workflows/kronos_csi300_nano.yaml --dry-run    sizes, steps, memory; trains nothing
      kronos-qlib finetune workflows/kronos_csi300_nano.yaml
      torchrun --nproc-per-node 8 -m kronos_qlib finetune workflows/kronos_csi300.yaml
      torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint first-machine:29400 \\
          -m kronos_qlib finetune workflows/kronos_csi300.yaml               the same line on both machines
"""


def add_command(commands: Commands) -> None:
    """Add the command to the parser of `kronos-qlib`."""
    command = commands.add_parser(
        "finetune",
        help="run a workflow's fine-tuning alone, or preview it",
        description=dedent(_DESCRIPTION),
        epilog=dedent(_EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("workflow", metavar="WORKFLOW.yaml", type=Path, help="a file for qrun with a KronosModel")
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="load the data, print sizes, windows, steps, memory and the first batch; train nothing, write nothing",
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    from kronos_qlib.train.distributed import is_launched
    from kronos_qlib.train.worker import run_under_torchrun

    if is_launched() and options.dry_run:
        return fail("finetune", ValueError("--dry-run needs no torchrun; run it alone"))
    if is_launched() and os.environ["RANK"] != "0":
        return run_under_torchrun()[0]  # the first process prints the message

    from kronos_qlib.workflow.finetune import Finetuning

    try:
        if is_launched():
            prepared: list[Finetuning] = []

            def prepare() -> Path:
                prepared.append(Finetuning(options.workflow))
                return prepared[0].prepare()

            try:
                status, message = run_under_torchrun(prepare, lambda: prepared[0].conclude())
            except BaseException:  # for example another machine is gone: torchrun starts all again
                if prepared:
                    prepared[0].record_failure()
                raise
            if status and prepared:
                prepared[0].record_failure()
            return fail("finetune", ValueError(message), status) if status else 0
        finetuning = Finetuning(options.workflow)
        if options.dry_run:
            print(finetuning.preview())
        else:
            finetuning.run()
    except (ValueError, FloatingPointError, ImportError, OSError, RuntimeError) as error:
        return fail("finetune", error)
    return 0
