"""`torchrun … -m kronos_qlib.train WORKFLOW.yaml`: `kronos-qlib finetune` in a form that torchrun can start."""

import sys

from kronos_qlib.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
