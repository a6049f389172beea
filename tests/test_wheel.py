"""The wheel alone, without the repository: from a file of bars to a comparison in four commands."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with what the wheel installs; what it depends on comes from this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [
        sys.executable,
        "-c",
        "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])",
    ]
    source = folder / "source"  # a copy, as setuptools leaves build/ beside what it builds
    for name in ("kronos_qlib", "workflows"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*build, str(folder)], cwd=source, check=True, capture_output=True, timeout=300)  # as pip does
    (wheel,) = folder.glob("kronos_qlib-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


SHORTEN = r"""
import re
from pathlib import Path
workflow, text = Path("mine.yaml"), Path("mine.yaml").read_text()
for key, less in (("epochs", 1), ("windows_per_epoch", 25), ("valid_windows", 25), ("sample_count", 1)):
    text, found = re.subn(rf"\b{key}: \d+", f"{key}: {less}", text)
    assert found == (1 if key == "sample_count" else 2), key
workflow.write_text(text)
"""
# As a shell would run them, one after the other, but in one process: each would import the same for seconds. A module
# that none of them should find in the repository is found there by none of them.
RUN = """
import contextlib, io, json, runpy, sys
said = []
for words in json.loads(sys.argv[1]):
    sys.argv[:] = words
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            assert not ended.code, f"{words}: {ended.code}"
    said.append(out.getvalue())
import kronos_qlib
print(json.dumps([kronos_qlib.__file__, said]))
"""


def run_commands(site: Path, folder: Path, *lines: str) -> list[str]:
    """Run modules with their arguments in a folder that sees the wheel, not the repository: what each has printed."""
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    run = [sys.executable, "-c", RUN, json.dumps([line.split() for line in lines])]
    done = subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-3000:]}"
    package, said = json.loads(done.stdout.splitlines()[-1])
    assert Path(package).is_relative_to(site)
    return said


COMMANDS = (
    "kronos_qlib --version",
    "kronos_qlib forecast bars.csv:AAA --samples 8 --horizon 4",
    "kronos_qlib ingest bars.csv store",
    "kronos_qlib workflow store --out mine.yaml",
    "shorten",
    "qlib.cli.run mine.yaml",
    "qlib.cli.run mine_lightgbm.yaml",
    "kronos_qlib compare mine mine_lightgbm --out comparison",
    "kronos_qlib workflow --copy all",
    "kronos_qlib demo-data runs/demo/market",
    "kronos_qlib check workflows/kronos_demo.yaml",
    "readme_lines",
)


@pytest.fixture(scope="module")
def ran(site, database, tmp_path_factory):
    """The folder in which all commands were run, and what each has printed."""
    folder, days = tmp_path_factory.mktemp("ran"), pd.bdate_range("2022-01-03", periods=190)
    tables = []
    for number in range(3):
        random = np.random.default_rng(number)
        close = 50 * np.exp(np.cumsum(random.normal(0, 0.02, len(days))))
        table = pd.DataFrame({"symbol": f"AA{'ABC'[number]}", "date": days, "open": close, "close": close})
        table["high"], table["low"] = close * 1.01, close * 0.99
        tables.append(table.assign(volume=random.lognormal(12, 0.3, len(days)).round()))
    pd.concat(tables).to_csv(folder / "bars.csv", index=False)
    shutil.copy(database, folder)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (folder / "readme_lines.py").write_text(block)
    (folder / "shorten.py").write_text(SHORTEN)
    return folder, dict(zip(COMMANDS, run_commands(site, folder, *COMMANDS), strict=True))


def test_from_a_csv_file_to_a_comparison_in_four_commands(ran):
    folder, (version, forecast, *_, table) = ran[0], list(ran[1].values())[:8]
    assert version.startswith("kronos-qlib ")
    assert "nano, which comes with kronos-qlib, is small" in forecast
    assert (folder / "forecast.html").stat().st_size > 10_000
    assert "Verdict" in table and (folder / "comparison" / "report.html").exists()
    scores = pd.read_csv(folder / "comparison" / "comparison.csv")
    assert scores.iloc[:, 0].tolist() == ["mine", "mine_lightgbm"] and scores["rank_ic"].notna().all()


def test_the_readme_s_workflows_are_in_the_wheel_and_its_demo_could_run(ran):
    folder, said = ran
    assert "0 errors" in said["kronos_qlib check workflows/kronos_demo.yaml"]
    assert "2020-11-02" in said["readme_lines"], "the first session after the bars that are seen"
    copies, own = (
        {path.relative_to(place): path.read_text() for path in place.rglob("*.yaml")}
        for place in (folder / "workflows", ROOT / "workflows")
    )
    assert copies == own and any(path.parent.name == "spaces" for path in own)
