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
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    source = folder / "source"  # a copy, as setuptools leaves build/ beside what it builds
    for name in ("kronos_qlib", "workflows"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*build, str(source)], check=True, timeout=300)
    (wheel,) = folder.glob("kronos_qlib-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


SHORTEN = """
from pathlib import Path
workflow, text = Path("mine.yaml"), Path("mine.yaml").read_text()
assert text.count("epochs: 3") == 2
workflow.write_text(text.replace("epochs: 3", "epochs: 1"))
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


def test_from_a_csv_file_to_a_comparison_in_four_commands(site, database, tmp_path):
    days = pd.bdate_range("2022-01-03", periods=190)
    tables = []
    for number in range(3):
        random = np.random.default_rng(number)
        close = 50 * np.exp(np.cumsum(random.normal(0, 0.02, len(days))))
        table = pd.DataFrame({"symbol": f"AA{'ABC'[number]}", "date": days, "open": close, "close": close})
        table["high"], table["low"] = close * 1.01, close * 0.99
        tables.append(table.assign(volume=random.lognormal(12, 0.3, len(days)).round()))
    pd.concat(tables).to_csv(tmp_path / "bars.csv", index=False)
    shutil.copy(database, tmp_path)
    (tmp_path / "shorten.py").write_text(SHORTEN)
    version, forecast, *_, table = run_commands(
        site,
        tmp_path,
        "kronos_qlib --version",
        "kronos_qlib forecast bars.csv:AAA --samples 8 --horizon 4",
        "kronos_qlib ingest bars.csv store",
        "kronos_qlib workflow store --out mine.yaml",
        "shorten",
        "qlib.cli.run mine.yaml",
        "qlib.cli.run mine_lightgbm.yaml",
        "kronos_qlib compare mine mine_lightgbm --out comparison",
    )
    assert version.startswith("kronos-qlib ")
    assert "nano, which comes with kronos-qlib, is small" in forecast
    assert (tmp_path / "forecast.html").stat().st_size > 10_000
    assert "Verdict" in table and (tmp_path / "comparison" / "report.html").exists()
    scores = pd.read_csv(tmp_path / "comparison" / "comparison.csv")
    assert scores.iloc[:, 0].tolist() == ["mine", "mine_lightgbm"] and scores["rank_ic"].notna().all()


def test_the_readme_s_workflows_are_in_the_wheel_and_its_demo_could_run(site, tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "readme_lines.py").write_text(block)
    *_, checked, printed = run_commands(
        site,
        tmp_path,
        "kronos_qlib workflow --copy all",
        "kronos_qlib demo-data runs/demo/market",
        "kronos_qlib check workflows/kronos_demo.yaml",
        "readme_lines",
    )
    assert "0 errors" in checked
    assert "2020-11-02" in printed, "the first session after the bars that are seen"
    copies, own = (
        {path.relative_to(folder): path.read_text() for path in folder.rglob("*.yaml")}
        for folder in (tmp_path / "workflows", ROOT / "workflows")
    )
    assert copies == own and any(path.parent.name == "spaces" for path in own)
