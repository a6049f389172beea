"""Fixtures that every room's tests share: the golden checkpoints and vectors."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from kronos_qlib import Kronos, KronosTokenizer

GOLDEN = Path(__file__).parent / "golden"
# Files of a minute and more: begun first, so that no worker is left alone with one of them at the end.
LONG = (
    "test_survival.py",
    "test_notebooks.py",
    "test_finetuning.py",
    "test_run.py",
    "test_generate.py",
    "test_no_signal.py",
    "test_qrun.py",
    "test_processes.py",
    "test_ray_cluster.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first, in the order above; the others as they were found."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


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
