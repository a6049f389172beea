"""The notebooks run from a fresh kernel, and the outputs committed with them are theirs."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from kronos_qlib.data.demo_market import write_demo_market

if TYPE_CHECKING:
    from nbformat import NotebookNode

HERE = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(HERE.glob("*.ipynb"))
LARGEST = 400 * 1024
SHORT = "4_your_own_data"  # the others take half a minute each, and their calls are those of other tests
LESS = {  # work for the tests: what is in a notebook, and what to put in its place
    r'(windows_per_epoch\\": )\d+': r"\g<1>32",
    r'(sample_count\\": )\d+': r"\g<1>1",
    "DEMO00(20|25)": "DEMO0013",
    r"2019-10-31(\\\"\],)|2019-12-20": r"2019-08-15\1",
}
THIS_MACHINE = re.compile(r"/(home|root|tmp|work|Users|var|opt)/|/(tmp|root)\b|[A-Z]:\\|0x[0-9a-f]{8,}")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@cache
def execute() -> ModuleType:
    """notebooks/execute.py, loaded when a test first needs it: nbformat takes seconds, and every worker collects."""
    spec = importlib.util.spec_from_file_location("execute", HERE / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smaller than the 40 instruments that the notebooks make for themselves, which takes them longer."""
    return write_demo_market(tmp_path_factory.mktemp("notebooks") / "market", instruments=16, days=520, signal=0.1)


def read(path: Path) -> NotebookNode:
    return execute().nbformat.read(path, as_version=4)


def kinds(notebook: NotebookNode) -> list[list[str]]:
    """What each code cell shows: streams by name, other outputs by their media types."""
    return [
        [output.name if output.output_type == "stream" else " ".join(sorted(output.data)) for output in cell.outputs]
        for cell in execute().code_cells(notebook)
    ]


def text_of(notebook: NotebookNode) -> str:
    """All of a notebook that is read: sources and outputs, pictures left out."""
    notebook = execute().nbformat.from_dict(json.loads(json.dumps(notebook)))
    for cell in execute().code_cells(notebook):
        for output in cell.outputs:
            output.get("data", {}).pop("image/png", None)
    return json.dumps(notebook.cells, ensure_ascii=False)


def test_these_are_all_the_notebooks():
    assert [path.stem for path in NOTEBOOKS] == [
        "1_forecast_one_instrument",
        "2_kronos_against_lightgbm",
        "3_reading_a_backtest",
        "4_your_own_data",
        "5_from_csv_to_fine_tuned_forecast",
        "6_signals_and_ledger",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.stem == SHORT else [pytest.mark.long]) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_a_notebook_runs_and_shows_what_its_committed_outputs_show(path, market, tmp_path, monkeypatch):
    """With trainings of a few steps and a sample: what a notebook shows hangs on no number in it."""
    monkeypatch.setenv("DEMO_MARKET", str(market))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # other tests run beside it
    monkeypatch.delenv("PYTEST_CURRENT_TEST", raising=False)  # ipykernel looks at it and then misses some output
    short, folder = tmp_path / "short.ipynb", tmp_path / "folder"
    source = path.read_text()
    for pattern, value in LESS.items():
        source = re.sub(pattern, value, source)
    short.write_text(source)
    folder.mkdir()
    fresh = execute().executed(short, folder, timeout=600)  # a failing cell raises
    assert kinds(fresh) == kinds(read(path))
    assert list(folder.iterdir()) == [], "a notebook writes into its own folder only"


@every_notebook
def test_what_a_notebook_imports_of_the_package_is_there(path):
    cells = execute().code_cells(read(path))
    lines = [line for cell in cells for line in cell.source.splitlines() if line.startswith("from kronos_qlib")]
    assert lines
    exec("\n".join(lines), {})


@every_notebook
def test_committed_outputs_belong_to_the_committed_sources(path):
    notebook = read(path)
    cells = execute().code_cells(notebook)
    assert notebook.metadata["executed_sources"] == execute().sources_digest(notebook), "run notebooks/execute.py"
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


@every_notebook
def test_committed_outputs_hold_neither_errors_nor_traces_of_a_machine(path):
    notebook = read(path)
    shown = {kind for cell in kinds(notebook) for kind in cell}
    assert "image/png text/plain" in shown
    assert "stderr" not in shown
    assert not [
        output for cell in execute().code_cells(notebook) for output in cell.outputs if output.output_type == "error"
    ]
    assert not THIS_MACHINE.search(text_of(notebook))
    assert path.stat().st_size < LARGEST


@every_notebook
def test_a_notebook_says_that_its_market_is_synthetic(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown" and "synthetic" in first.source
