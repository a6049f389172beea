"""What a benchmark ran on, in words and in products per second."""

import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

MATRIX = 2048


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(*packages: str) -> str:
    """Lines that name processor, memory, load and the versions of Python, torch, numpy and further packages."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", *packages))
    lines = [
        f"machine   {_processor()}, {cores()} cores, {torch.backends.cpu.get_cpu_capability()}{_memory()}",
        f"software  Python {platform.python_version()}, {versions}, {platform.system()} {platform.release()}",
    ]
    if hasattr(os, "getloadavg"):
        load = os.getloadavg()[0]
        busy = "; others are at work here, do not quote these figures" if load > 0.3 else ""
        lines.append(f"load      {load:.1f} before the start{busy}")
    return "\n".join(lines)


def peak_memory(whose: int) -> float:
    """The largest resident size so far, in MiB, of RUSAGE_SELF or of the largest of RUSAGE_CHILDREN."""
    import resource  # POSIX only

    peak = resource.getrusage(whose).ru_maxrss  # KiB, on macOS bytes
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def matrix_rate(dtype: torch.dtype, seconds: float = 1.0, device: torch.device | str = "cpu") -> float:
    """GFLOP/s of products of two 2048² matrices: the best within about so many seconds."""
    a, b = torch.randn(2, MATRIX, MATRIX, device=device).to(dtype)
    count = 100 if a.is_cuda else 1  # one is over before a GPU's host looks at its clock

    def multiply() -> None:
        for _ in range(count):
            product = a @ b
        if product.is_cuda:
            torch.cuda.synchronize(product.device)

    multiply()
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until or best == float("inf"):
        best = min(best, timed(multiply))
    return count * 2 * MATRIX**3 / best / 1e9


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields:  # virtual machines often hide the rest of the name
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name


def _memory() -> str:
    try:
        return f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (ValueError, OSError, AttributeError):
        return ""
