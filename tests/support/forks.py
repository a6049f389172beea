"""Processes of their own that need not import for seconds: forked from a server that has done nothing else."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["kronos_qlib.train.launch", "kronos_qlib.forecast.run", "kronos_qlib.forecast.forecaster"]
)


def forked(said: Path, function: Callable[..., object], *arguments: Any, **variables: str) -> BaseProcess:
    """A process that calls a function of a module of the tests, with all that it prints in the file `said`.

    It ends with the status that the function returns. variables: of its environment, beside those of the server.
    """
    process = _CONTEXT.Process(target=_call, args=(said, function, arguments, variables))
    process.start()
    return process


def environment() -> dict[str, str]:
    """The environment of a Python that finds the modules of the tests, and the package as they do."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}


def _call(said: Path, function: Callable[..., object], arguments: tuple, variables: dict[str, str]) -> None:
    with said.open("wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    os.environ |= environment() | variables  # for processes that it starts itself, too
    sys.exit(function(*arguments))
