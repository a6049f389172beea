"""`python -m kronos_qlib …`: the command `kronos-qlib`, in a form that torchrun can start."""

from kronos_qlib.cli import run_and_exit

if __name__ == "__main__":
    run_and_exit()
