"""`python -m kronos_qlib …`: the command `kronos-qlib`, in a form that torchrun can start."""

import sys

from kronos_qlib.cli import main

if __name__ == "__main__":
    sys.exit(main())
