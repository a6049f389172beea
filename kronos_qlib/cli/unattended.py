"""Runs that nobody watches: several commands one after the other, a lock, a line each in a log, word of a failure."""

import argparse
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from kronos_qlib.cli.command import fail, failures

THEN = "--then"
LOCKED = 4
_SECONDS_TO_NOTIFY = 60


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to the parser of `kronos-qlib`."""
    group = parser.add_argument_group(
        "unattended runs",
        f"These stand before the command. COMMAND … {THEN} COMMAND … runs several, in order, up to the first that "
        "fails; its exit status is theirs. docs: A day in production",
    )
    group.add_argument(
        "--lock", type=Path, metavar="FILE", help=f"do nothing, exit status {LOCKED}, while another run holds FILE"
    )
    group.add_argument(
        "--log", type=Path, metavar="FILE", help="append a line a command: when, what, exit status, seconds, error"
    )
    group.add_argument(
        "--notify", metavar="PROGRAM", help="when a command fails, run PROGRAM with its line as the last argument"
    )


def split_commands(argv: Sequence[str]) -> list[list[str]]:
    """Divide the words of a command line at each `--then`."""
    parts: list[list[str]] = [[]]
    for word in argv:
        if word == THEN:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def run_commands(commands: Sequence[argparse.Namespace]) -> int:
    """Run commands under the first one's lock, log and notification, up to the first that fails; return its status."""
    first = commands[0]
    if first.lock is None:
        return _run_in_order(commands)
    lock = FileLock(first.lock, timeout=0)
    try:
        first.lock.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (Timeout, OSError) as error:
        held = isinstance(error, Timeout)
        text = f"another run holds {first.lock}; nothing was done" if held else f"--lock: {error}"
        status = fail(first.command, ValueError(text), LOCKED if held else 2)
        report(first, first.command, status, 0.0)
        return status
    with lock:
        return _run_in_order(commands)


def _run_in_order(commands: Sequence[argparse.Namespace]) -> int:
    for options in commands:
        started, status, failures[:] = time.monotonic(), 1, []
        try:
            with _ending_by_sigterm():
                status = options.run(options)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
            raise
        except BaseException as error:
            failures.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
            raise
        finally:
            report(commands[0], options.command, status, time.monotonic() - started)
        if status:
            return status
    return 0


@contextmanager
def _ending_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block by SystemExit, so that it is reported; a training has a handler of its own."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def report(options: argparse.Namespace, command: str, status: int, seconds: float) -> None:
    """Append a command's line to the log, and notify of a failure; what goes wrong with either changes no status."""
    moment = datetime.now(timezone.utc).isoformat(timespec="seconds")
    said = failures[-1] if failures else "see its output" if status else "done"
    line = f"{moment} {command} status {status} {seconds:.1f} s: {said}"
    try:
        if options.log is not None:
            options.log.parent.mkdir(parents=True, exist_ok=True)
            with options.log.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
    except OSError as error:
        print(f"kronos-qlib: --log: {error}", file=sys.stderr)
    try:
        if options.notify and status:
            program = [*shlex.split(options.notify), line]
            subprocess.run(program, check=True, timeout=_SECONDS_TO_NOTIFY, stdin=subprocess.DEVNULL)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        print(f"kronos-qlib: --notify: {error}", file=sys.stderr)
