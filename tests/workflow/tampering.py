"""Markets that differ in what comes after a day, which no score up to that day may see."""

import shutil
from pathlib import Path

import numpy as np

LAST_DAY = "2018-07-10"  # nothing after it may be seen; in the middle of the test segment
PRICES = ("open", "high", "low", "close")


def day_number(market: Path) -> int:
    return (market / "calendars" / "day.txt").read_text().split().index(LAST_DAY)


def tampered(market: Path, folder: Path, how: str) -> Path:
    """A copy of a market that differs in all bars, or in the membership, after LAST_DAY."""
    shutil.copytree(market, folder)
    if how == "membership":
        path = folder / "instruments" / "demo.txt"
        spans = [line.split("\t") for line in path.read_text().splitlines()]
        left = [(name, begin, min(end, LAST_DAY)) for name, begin, end in spans if begin <= LAST_DAY]
        joined = [("DEMO0006", "2018-07-11", "2018-08-13")]  # and the index of members is another
        path.write_text("".join("\t".join(span) + "\n" for span in [*left, *joined]))
        return folder
    rng = np.random.default_rng(0)
    for path in (folder / "features").glob("*/*.day.bin"):
        content = np.fromfile(path, "<f4")
        after = slice(1 + day_number(market) + 1 - int(content[0]), None)  # the first number is the first bar's row
        field = path.name.split(".")[0]
        if how == "prices" and field in PRICES:
            content[after] *= 3
        elif how == "prices" and field == "volume":
            content[after] *= rng.uniform(0.1, 10, len(content[after]))
        elif how == "no volume" and field == "volume":
            content[after] = 0
        elif how == "holes":
            content[after] = np.nan
        content.tofile(path)
    return folder
