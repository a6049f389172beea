"""The rows that the benchmarks print."""

import statistics
from collections.abc import Mapping


def spread(ratios: list[float], digits: int = 1) -> str:
    """Median, least and largest of the rounds' ratios."""
    return f"{statistics.median(ratios):.{digits}f}× ({min(ratios):.{digits}f} … {max(ratios):.{digits}f})"


def print_row(row: Mapping[str, float | str], with_heading: bool) -> None:
    """A row of a Markdown table, written out at once: later rows take minutes."""
    if with_heading:
        print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
    print(f"| {' | '.join(map(str, row.values()))} |", flush=True)
