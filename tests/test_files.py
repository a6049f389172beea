"""A file is there whole or not at all."""

import subprocess
import sys

import pytest

from kronos_qlib.files import whole_file

KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from kronos_qlib.files import whole_file
with whole_file(Path(sys.argv[1])) as draft:
    draft.write_text("half of")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_written_file_appears_under_its_name(tmp_path):
    with whole_file(tmp_path / "new" / "table.csv") as draft:
        draft.write_text("a,b\n")
        assert not (tmp_path / "new" / "table.csv").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["table.csv"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_file(path) as draft:
        draft.write_text("half of")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_a_kill_while_writing_leaves_no_half_file_under_any_name_of_its_kind(tmp_path):
    path = tmp_path / "weights.safetensors"
    result = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(path)])
    assert result.returncode == -9
    assert not list(tmp_path.rglob("*.safetensors"))
