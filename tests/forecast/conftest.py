"""A forecast of the small task that the room's tests share, and a cache folder that holds it."""

import shutil

import pytest
from tasks import make_task, run

from kronos_qlib.forecast import run as runs


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(runs, "CHUNK_WINDOWS", 64)


@pytest.fixture(scope="session")
def stored(tmp_path_factory):
    """The folder of a finished forecast, and its columns."""
    folder = tmp_path_factory.mktemp("stored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "CHUNK_WINDOWS", 64)
        columns, resumed = run(make_task(), folder)
    assert resumed == 0
    return folder, columns


@pytest.fixture(scope="session")
def plain(stored):
    """The task's forecast, computed in one go."""
    return stored[1]


@pytest.fixture
def cache_dir(stored, tmp_path):
    """A copy of the folder, for a test of its own."""
    return shutil.copytree(stored[0], tmp_path / "cache")
