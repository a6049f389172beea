"""What the commands of `kronos-qlib` share."""

import argparse
import sys
from typing import TypeAlias

from kronos_qlib.text import printable

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def fail(command: str, error: Exception, status: int = 2) -> int:
    """Print an error of a command in one line on stderr and return its exit status."""
    print(f"kronos-qlib {command}: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
    return status
