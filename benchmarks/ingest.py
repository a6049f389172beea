"""How long `kronos-qlib ingest` takes, and how much memory, beside Qlib's own converter on the same files.

    python benchmarks/ingest.py                              # 5,000 instruments × 2,500 days: half an hour to make
    python benchmarks/ingest.py --instruments 500 --dump-bin /path/to/qlib/scripts/dump_bin.py

Makes one CSV file an instrument, as Qlib's converter wants them, of simulated bars, in a temporary folder. The sides
take turns, each in a process of its own. Memory is what the process and its workers have for themselves (USS), looked
at five times a second. dump_bin.py is a script of Qlib's repository, left out of its wheel. Both stores are compared.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil

START = "2014-01-02"


def make_files(folder: Path, instruments: int, days: int) -> None:
    """Write the files of a market of random walks."""
    folder.mkdir(parents=True)
    dates = pd.bdate_range(START, periods=days).strftime("%Y-%m-%d")
    for number in range(instruments):
        random = np.random.default_rng(number)
        close = 10 * np.exp(np.cumsum(random.normal(0, 0.02, days)))
        opened = close * np.exp(random.normal(0, 0.005, days))
        high, low = np.maximum(opened, close) * 1.01, np.minimum(opened, close) * 0.99
        volume = random.lognormal(14, 0.5, days).round()
        table = pd.DataFrame(
            {"date": dates, "open": opened, "high": high, "low": low, "close": close, "volume": volume}
        )
        table["amount"] = close * volume
        table.round(4).to_csv(folder / f"SH{600000 + number}.csv", index=False)


def measure(command: list[str]) -> tuple[float, float, float]:
    """Run a command: seconds, CPU seconds of it and its children, most GiB at a time."""
    before, start, most = os.times(), time.perf_counter(), 0.0
    # a file, as a pipe that nobody reads is full after a while of progress bars
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, text=True) as process,
    ):
        parent = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                family = [parent, *parent.children(recursive=True)]
                most = max(most, sum(member.memory_full_info().uss for member in family))
            except psutil.Error:
                pass
            time.sleep(0.2)
        wall = time.perf_counter() - start
        said.seek(0)
        error = said.read()
    if process.returncode:
        sys.exit(f"{command[0]} ended with {process.returncode}: {error[-500:]}")
    after = os.times()
    return (
        wall,
        after.children_user + after.children_system - before.children_user - before.children_system,
        most / 2**30,
    )


def differing(first: Path, second: Path) -> tuple[int, int]:
    """Count files of numbers that both stores have, and those that differ."""
    names = [
        path.relative_to(first)
        for path in first.glob("features/*/*.day.bin")
        if (second / path.relative_to(first)).exists()
    ]
    return len(names), sum((first / name).read_bytes() != (second / name).read_bytes() for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instruments", type=int, default=5000)
    parser.add_argument("--days", type=int, default=2500)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dump-bin", type=Path, help="Qlib's scripts/dump_bin.py")
    parser.add_argument("--folder", type=Path, help="keep files and stores there (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        if not (folder / "csv").exists():
            make_files(folder / "csv", options.instruments, options.days)
        sides = {"ingest": [sys.executable, "-m", "kronos_qlib", "ingest", str(folder / "csv"), str(folder / "ours")]}
        if options.dump_bin:
            code = (
                f"import sys; sys.path.insert(0, {str(options.dump_bin.parent)!r}); from dump_bin import DumpDataAll\n"
                f"DumpDataAll(data_path={str(folder / 'csv')!r}, qlib_dir={str(folder / 'theirs')!r}, max_workers=2, "
                "exclude_fields='date,symbol', date_field_name='date').dump()"
            )
            script = folder / "dump.py"
            script.write_text("if __name__ == '__main__':\n    " + code.replace("\n", "\n    "))
            sides["dump_bin"] = [sys.executable, str(script)]
        print("| side | round | seconds | CPU seconds | GiB |\n|---|---|---|---|---|")
        for turn in range(options.rounds):
            for side, command in sides.items():
                shutil.rmtree(folder / {"ingest": "ours", "dump_bin": "theirs"}[side], ignore_errors=True)
                wall, cpu, memory = measure(command)
                print(f"| {side} | {turn + 1} | {wall:.1f} | {cpu:.1f} | {memory:.2f} |", flush=True)
        if options.dump_bin:
            both, other = differing(folder / "ours", folder / "theirs")
            print(f"\n{both:,} files of numbers in both stores, {other:,} differ")


if __name__ == "__main__":
    assert importlib.util.find_spec("kronos_qlib")
    main()
