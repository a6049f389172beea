"""A training process imports neither pandas nor Qlib, and its windows are those on disk, no copy."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from forks import environment
from jobs import job

from kronos_qlib.data.windows import Bars, Windows

pytestmark = pytest.mark.slow

INSTRUMENTS, DAYS = 600, 2500
WORKER = """
import json, mmap, sys
from pathlib import Path
import kronos_qlib.train.worker
from kronos_qlib.train import Job

def own():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

def root(array):
    while getattr(array, "base", None) is not None:
        array = array.base
    return array

job = Job.load(Path(sys.argv[1]))
before = own()
job.run()
arrays = [job.train.ends, job.valid.ends, *(getattr(job.train.bars, name) for name in ("values", "stamp", "dates"))]
print(json.dumps({
    "modules": [name for name in ("pandas", "qlib", "mlflow", "matplotlib") if name in sys.modules],
    "mapped": [isinstance(root(array), mmap.mmap) for array in arrays],
    "own": own() - before,
}))
"""


@pytest.fixture(scope="module")
def market():
    rng = np.random.default_rng(0)
    close = 20 * np.exp(rng.normal(0, 0.02, (INSTRUMENTS, DAYS)).cumsum(1))
    values = np.stack([close, close, close, close, np.full_like(close, 1e6), close * 1e6], -1).astype(np.float32)
    bars = Bars(
        values=values.reshape(-1, 6),
        stamp=np.tile(np.array([0, 0, 2, 15, 6], np.int8), (INSTRUMENTS * DAYS, 1)),
        dates=np.tile(np.datetime64("2015-01-01", "ns") + np.arange(DAYS) * np.timedelta64(1, "D"), INSTRUMENTS),
        offsets=np.arange(INSTRUMENTS + 1) * DAYS,
        instruments=tuple(f"SH{number:06d}" for number in range(INSTRUMENTS)),
    )
    starts = np.arange(INSTRUMENTS)[:, None] * DAYS
    train, valid = (starts + np.arange(*span) for span in ((90, DAYS - 300), (DAYS - 200, DAYS - 20)))
    return Windows(bars, train.ravel(), 90, 10), Windows(bars, valid.ravel(), 90, 10)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_process_has_the_windows_mapped_and_little_of_its_own(market, tmp_path):
    short = {"epochs": 1, "windows_per_epoch": 16}
    job(tmp_path / "out", short, None, market).save(tmp_path / "job")
    done = subprocess.run(
        [sys.executable, "-c", WORKER, tmp_path / "job"], env=environment(), capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    seen = json.loads(done.stdout)
    assert seen["modules"] == []
    assert all(seen["mapped"])
    assert seen["own"] < 300 * 2**20
