"""How time and memory of a forecast grow with windows, samples, horizon and lookback: a table and a figure.

    python benchmarks/growth.py                      # half an hour on two cores; writes benchmarks/growth.png
    python benchmarks/growth.py --axes samples horizon

Every point is a process of its own that forecasts random walks with a new Kronos-mini, chunks on disk and all. Seconds
are those of the forecast, without start and imports; memory is the largest resident size of the process.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from machine import describe, peak_memory, timed
from table import print_row


@dataclass(frozen=True)
class Point:
    """A shape of forecast."""

    windows: int = 256
    samples: int = 5
    horizon: int = 10
    lookback: int = 90


AXES = {
    "windows": [1000, 4000, 16000, 60000],
    "samples": [1, 2, 5, 10, 20, 50],
    "horizon": [5, 10, 20, 40, 80],
    "lookback": [30, 60, 90, 180, 360],
}
INSTRUMENTS = 300
FIGURE = Path(__file__).with_name("growth.png")


def measure(model: str, point: Point) -> dict[str, float]:
    """Seconds and peak memory (MiB) of a forecast in this process."""
    from walks import make_task, make_windows

    from kronos_qlib.forecast.run import Execution, forecast

    days = point.lookback + -(-point.windows // INSTRUMENTS)
    task = make_task(
        model, make_windows(INSTRUMENTS, days, point.lookback, point.windows), point.horizon, point.samples
    )
    before = peak_memory(resource.RUSAGE_SELF)
    with tempfile.TemporaryDirectory() as folder:
        seconds = timed(lambda: forecast(task, Execution(Path(folder)), ["mean_return"]))
    return {"seconds": seconds, "memory": peak_memory(resource.RUSAGE_SELF), "before": before}


def in_a_process(model: str, point: Point) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--model", model, "--point", json.dumps(asdict(point))]
    said = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(said.stdout.splitlines()[-1])


def draw(found: dict[str, list[tuple[int, dict[str, float]]]], model: str) -> None:
    """Time and memory against each axis, with a line through the first point that grows in proportion."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(found), figsize=(4 * len(found), 6.5), squeeze=False, layout="constrained")
    for (name, points), (time, memory) in zip(found.items(), axes.T):
        x, seconds = [value for value, _ in points], [cost["seconds"] for _, cost in points]
        time.loglog(x, seconds, "o-", label="measured")
        time.loglog(x, [seconds[0] * value / x[0] for value in x], ":", color="grey", label="in proportion")
        time.set(title=name, ylabel="seconds")
        memory.semilogx(x, [cost["memory"] for _, cost in points], "o-", label="largest")
        memory.semilogx(x, [cost["before"] for _, cost in points], ":", color="grey", label="before the forecast")
        memory.set(xlabel=name, ylabel="MiB", ylim=(0, None))
        for axis in (time, memory):
            axis.set_xticks(x, [f"{value:,}" for value in x])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend()
    base = Point()
    figure.suptitle(
        f"Forecasting with Kronos-{model} on a CPU: {base.windows} windows, {base.samples} samples, {base.lookback} + "
        f"{base.horizon} bars, and one of these changed"
    )
    figure.savefig(FIGURE, dpi=110)
    print(f"\n{FIGURE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="(default: all of them)")
    parser.add_argument("--model", choices=["nano", "mini", "small"], default="mini", help="(default: %(default)s)")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(measure(options.model, Point(**json.loads(options.point)))))
        return
    print(describe() + "\n")
    found: dict[str, list[tuple[int, dict[str, float]]]] = {}
    for axis in options.axes:
        for value in AXES[axis]:
            point = replace(Point(), **{axis: value})
            cost = in_a_process(options.model, point)
            row = asdict(point) | {
                "seconds": f"{cost['seconds']:.1f}",
                "windows/s": f"{point.windows / cost['seconds']:.1f}",
                "largest MiB": f"{cost['memory']:.0f}",
                "before MiB": f"{cost['before']:.0f}",
            }
            print_row(row, with_heading=not found)
            found.setdefault(axis, []).append((value, cost))
    draw(found, options.model)


if __name__ == "__main__":
    main()
