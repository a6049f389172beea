"""The small market that the tests of handler and dataset share."""

from pathlib import Path

import pytest
from stores import use_store, write_market


@pytest.fixture
def market(tmp_path: Path) -> Path:
    folder = write_market(tmp_path / "market")
    use_store(folder)
    return folder
