"""Fixtures that every room's tests share: the golden checkpoints and vectors."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from kronos_qlib import Kronos, KronosTokenizer

GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have most slow tests, so that no worker is left alone with one of them at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


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
