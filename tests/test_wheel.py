"""The wheel alone, without the repository: from a file of bars to a comparison in four commands."""

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


def command(site: Path, folder: Path, *words: str) -> str:
    """Run a command in a folder of its own that sees the wheel, not the repository."""
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    run = [sys.executable, "-m", *words]
    done = subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout


def test_from_a_csv_file_to_a_comparison_in_four_commands(site, tmp_path):
    days = pd.bdate_range("2022-01-03", periods=190)
    tables = []
    for number in range(3):
        random = np.random.default_rng(number)
        close = 50 * np.exp(np.cumsum(random.normal(0, 0.02, len(days))))
        table = pd.DataFrame({"symbol": f"AA{'ABC'[number]}", "date": days, "open": close, "close": close})
        table["high"], table["low"] = close * 1.01, close * 0.99
        tables.append(table.assign(volume=random.lognormal(12, 0.3, len(days)).round()))
    pd.concat(tables).to_csv(tmp_path / "bars.csv", index=False)
    where = command(site, tmp_path, "kronos_qlib", "--version")
    assert where.startswith("kronos-qlib ")
    said = command(site, tmp_path, "kronos_qlib", "forecast", "bars.csv:AAA", "--samples", "8", "--horizon", "4")
    assert (
        "nano, which comes with kronos-qlib, is small" in said and (tmp_path / "forecast.html").stat().st_size > 10_000
    )
    command(site, tmp_path, "kronos_qlib", "ingest", "bars.csv", "store")
    command(site, tmp_path, "kronos_qlib", "workflow", "store", "--out", "mine.yaml")
    for file in ("mine.yaml", "mine_lightgbm.yaml"):
        command(site, tmp_path, "qlib.cli.run", file)
    table = command(site, tmp_path, "kronos_qlib", "compare", "mine", "mine_lightgbm", "--out", "comparison")
    assert "Verdict" in table and (tmp_path / "comparison" / "report.html").exists()
    scores = pd.read_csv(tmp_path / "comparison" / "comparison.csv")
    assert scores.iloc[:, 0].tolist() == ["mine", "mine_lightgbm"] and scores["rank_ic"].notna().all()


def test_the_readme_s_workflows_are_in_the_wheel_and_its_demo_could_run(site, tmp_path):
    command(site, tmp_path, "kronos_qlib", "workflow", "--copy", "all")
    command(site, tmp_path, "kronos_qlib", "demo-data", "runs/demo/market")
    assert "0 errors" in command(site, tmp_path, "kronos_qlib", "check", "workflows/kronos_demo.yaml")
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "readme_lines.py").write_text(block)
    assert "2020-11-02" in command(site, tmp_path, "readme_lines"), "the first session after the bars that are seen"
    copies, own = (
        {path.relative_to(folder): path.read_text() for path in folder.rglob("*.yaml")}
        for folder in (tmp_path / "workflows", ROOT / "workflows")
    )
    assert copies == own and any(path.parent.name == "spaces" for path in own)
