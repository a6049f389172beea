"""What the commands of `kronos-qlib` share."""

import argparse
import sys
from collections.abc import Sequence
from typing import TypeAlias

from kronos_qlib.text import printable

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
ORDERS = ("day", "month")  # of kronos_qlib.data.dates, which imports pandas
failures: list[str] = []  # what `fail` has printed, for the log of an unattended run


def fail(command: str, error: Exception, status: int = 2) -> int:
    """Print an error of a command in one line on stderr and return its exit status."""
    failures.append(printable(" ".join(str(error).split())))
    print(f"kronos-qlib {command}: error: {failures[-1]}", file=sys.stderr)
    return status


def parse_class(option: str, text: str) -> dict[str, str]:
    """Divide the MODULE:CLASS text of an option. Raises ValueError, which names it, for another text."""
    place, _, name = text.rpartition(":")
    if not (place and name.isidentifier()):
        raise ValueError(f"{option} {text!r} should be FILE.py:CLASS, or the dotted name of a module and a class")
    return {"class": name, "module_path": place}


def parse_pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    """Divide the NAME=VALUE texts of an option. Raises ValueError, which names it, for another text."""
    pairs = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not (name and value):
            raise ValueError(f"{option} {text!r} should be NAME=VALUE, such as close=Last")
        pairs[name] = value
    return pairs
