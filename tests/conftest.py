"""Fixtures that every room's tests share: the golden checkpoints and vectors."""

import dataclasses
import gc
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from filelock import FileLock

from kronos_qlib import Kronos, KronosTokenizer
from kronos_qlib.files import whole_file

if TYPE_CHECKING:
    from finished_runs import Place

GOLDEN = Path(__file__).parent / "golden"
LONG = {"test_wheel", "test_intraday", "test_ray_cluster", "test_no_signal", "test_qrun", "test_notebooks"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no worker is left alone with one of them at the end.

    Those are the files whose few tests take longest, and then those that have most slow tests.
    """
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (item.path.stem not in LONG, -slow[item.path]))
    if "KRONOS_SLOW" not in os.environ:
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip("takes most of a minute or more; make test-long, or set KRONOS_SLOW"))


def pytest_collection_finish() -> None:
    """Keep what is loaded by now from being searched for garbage again and again: half a second each time."""
    gc.freeze()


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An mlflow.db without runs, to copy: MLflow takes seconds to make one, so the processes of a run share it."""
    from mlflow import MlflowClient

    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "empty" / "mlflow.db"
    path.parent.mkdir(exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            with whole_file(path) as draft:
                MlflowClient(f"sqlite:///{draft}").search_experiments()
    return path


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, database: Path) -> "Place":
    """Finished runs of a KronosModel and of LightGBM on a small market."""
    from finished_runs import make_runs

    folder = tmp_path_factory.mktemp("runs")
    shutil.copy(database, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return make_runs(folder)


@pytest.fixture
def place(runs: "Place", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Place":
    """The finished runs, with a copy of their store that a test may change, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs.store, tmp_path / "store")
    return dataclasses.replace(runs, store=tmp_path / "store")


@dataclass(frozen=True)
class Golden:
    """One case of reference vectors with its loaded networks."""

    folder: Path
    tokenizer: KronosTokenizer
    model: Kronos
    vectors: dict[str, np.ndarray]

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.vectors[name])

    def close(self, value: torch.Tensor | float, name: str) -> None:
        """Assert agreement with a vector to the tolerance of the vectors' README."""
        value = value.detach().numpy() if isinstance(value, torch.Tensor) else value
        np.testing.assert_allclose(value, self.vectors[name], rtol=1e-4, atol=1e-4)


def load_golden(case: str) -> Golden:
    folder = GOLDEN / case
    tokenizer = KronosTokenizer.from_pretrained(folder / "tokenizer")
    model = Kronos.from_pretrained(folder / "model")
    return Golden(folder, tokenizer, model, dict(np.load(folder / "vectors.npz")))


@pytest.fixture(params=["small-bits", "zoo-like", "fixed-time"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param)


@pytest.fixture
def small(request: pytest.FixtureRequest) -> Golden:
    """The smallest case, for tests of behaviour rather than of numbers."""
    return load_golden("small-bits")
