"""Run notebooks from fresh kernels and keep their outputs: python notebooks/execute.py [NOTEBOOK.ipynb …].

All of them by default. After a change, run it and commit what it writes: the test suite refuses outputs that belong to
other sources.
"""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).parent
NOTEBOOKS = sorted(HERE.glob("*.ipynb"))
_KEPT_METADATA = ("kernelspec", "language_info")


def executed(path: Path, folder: Path, timeout: int = 600) -> NotebookNode:
    """The notebook with the outputs of a fresh kernel that works in `folder`; the file is left as it is.

    timeout: seconds a cell may take. Raises nbclient's CellExecutionError for a cell that fails.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count, cell.metadata = [], None, {}
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,  # how a stream is cut depends on the clock
        resources={"metadata": {"path": folder}},
    )
    client.execute()
    kept = {name: notebook.metadata[name] for name in _KEPT_METADATA if name in notebook.metadata}
    kept["language_info"] = {"name": "python"}  # not the version of the Python that ran it
    notebook.metadata = {**kept, "executed_sources": sources_digest(notebook)}
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The cells of a notebook that hold code, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def sources_digest(notebook: NotebookNode) -> str:
    """SHA-256 of the code of all cells; kept beside outputs, it tells whether they belong to it."""
    return hashlib.sha256("\0".join(cell.source for cell in code_cells(notebook)).encode()).hexdigest()


def main(names: Sequence[str]) -> None:
    """Execute the notebooks named, in place."""
    for path in map(Path, names) if names else NOTEBOOKS:
        with TemporaryDirectory() as folder:
            nbformat.write(executed(path, Path(folder)), path)
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main(sys.argv[1:])
