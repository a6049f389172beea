"""What other processes do to a ledger in the tests; each imports this module and little else."""

import resource
import sys
from pathlib import Path

from ledgers import signal_set, signal_table

from kronos_qlib.live.ledger import Ledger, LedgerError

DATES = ["2024-06-03", "2024-06-04", "2024-06-05", "2024-06-06", "2024-06-07"]


def write_versions(url: str, writer: int, gate: str, count: int) -> int:
    """Record, of each date, sets of this writer's own and one that all writers have, as soon as the gate is there."""
    while not Path(gate).exists():
        pass
    ledger = Ledger(url)
    for date in DATES:
        for number in range(count):
            ledger.record(signal_set(date, seed=1000 * writer + number), region="cn")
        ledger.record(signal_set(date, seed=99), region="cn")
    return 0


def write_in_order(url: str, started: str, count: int) -> int:
    """Record sets of many rows one after the other."""
    ledger = Ledger(url)
    for number in range(count):
        ledger.record(signal_set(table=signal_table(number, 300)), region="cn")
        Path(started).touch()
    return 0


def write_on_a_full_disk(url: str) -> int:
    """Record a large set where files can grow by little more, and print what is said."""
    ledger = Ledger(url)
    largest = max(file.stat().st_size for file in Path(url.removeprefix("sqlite:///")).parent.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest + 30_000, resource.RLIM_INFINITY))
    try:
        ledger.record(signal_set("2024-06-04", table=signal_table(5, 20_000)), region="cn")
    except LedgerError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
