"""Answers that a command gives, in a process of its own: Qlib knows one store and one recorder at a time."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kronos_qlib.web.jobs import Report
from kronos_qlib.web.problems import Problem

_MOST_SECONDS = 900
_STEP = 0.2  # seconds between two looks at a process: a job that is cancelled ends it


def run_command(
    arguments: list[str], report: Report, hidden: Mapping[str, str], environment: Mapping[str, str] | None = None
) -> Any:
    """Run `kronos-qlib` with these arguments, and return the JSON that it prints.

    Args:
        hidden: folders that no message should show, and what stands there instead.
        environment: variables beside those of this process.

    Raises:
        Problem: it failed; its own message. Cancelled: nobody waits any more, and the process was ended.
    """
    command = [sys.executable, "-m", "kronos_qlib", *arguments]
    variables = os.environ | {"TQDM_DISABLE": "1"} | dict(environment or {})
    end = time.monotonic() + _MOST_SECONDS
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as said:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=said, env=variables, start_new_session=True
        ) as process:
            try:
                while process.poll() is None:
                    if time.monotonic() > end:
                        raise Problem(504, f"kronos-qlib {arguments[0]} took more than {_MOST_SECONDS:,} s.")
                    report(0.0)
                    try:
                        process.wait(_STEP)
                    except subprocess.TimeoutExpired:
                        continue
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # and the processes that it started
        out.seek(0)
        said.seek(0)
        if process.returncode == 0:
            return json.load(out)
        _, found, text = said.read().rpartition(f"kronos-qlib {arguments[0]}")
    text = text.partition("error: ")[2].strip() if found else ""
    for address in sorted(hidden, key=len, reverse=True):
        text = text.replace(address, hidden[address])
    raise Problem(422 if text else 500, text or f"kronos-qlib {arguments[0]} failed; start it by hand to see why.")


def hidden_folders(*addresses: str | None) -> dict[str, str]:
    """Return databases' addresses, which may hold a password, and their folders, and what stands instead of each."""
    whole = {address: "the database" for address in addresses if address and "://" in address}
    paths = [Path(address.partition("///")[2] or address).parent for address in addresses if address]
    folders = {str(folder) for path in paths for folder in (path, path.resolve())}
    return whole | {f"{folder}/": "" for folder in folders if len(folder) > 1}
