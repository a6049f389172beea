"""A file is there whole or not at all."""

import shutil
import subprocess
import sys

import pytest

from kronos_qlib.files import is_draft, scratch_folder, whole_file

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
    (draft,) = tmp_path.iterdir()
    assert is_draft(draft)


def test_a_draft_has_a_name_that_nobody_can_guess(tmp_path):
    names = set()
    for _ in range(3):
        with whole_file(tmp_path / "a.csv") as draft:
            names.add(draft.name)
            draft.write_text("x")
    assert len(names) == 3


@pytest.mark.parametrize("name", ["notes.tmp", ".notes.tmp", "a.csv.1.tmp", ".a.csv.tmp", ".a.csv.12-0a1b2c3d.txt"])
def test_what_only_looks_like_a_draft_is_none(tmp_path, name):
    (tmp_path / name).write_text("mine")
    assert not is_draft(tmp_path / name)


@pytest.mark.parametrize("what", ["a lock", "a mark of another folder", "a link", "an own mark"])
def test_a_scratch_folder_that_was_not_made_here_is_left_alone(tmp_path, what):
    """Whatever it is called: only a folder with the mark of its own name was made by `scratch_folder`."""
    with scratch_folder(tmp_path, "kronos-") as made:
        mark = next(made.glob("*.txt")).read_text()
        name = next(made.glob("*.txt")).name
    mine = tmp_path / "kronos-papers"
    target = tmp_path / "papers" if what == "a link" else mine
    target.mkdir()
    (target / "lock").touch()
    (target / "thesis.tex").write_text("years of work")
    if what != "a lock":
        (target / name).write_text(mark if what != "an own mark" else "papers: a scratch folder")
    if what == "a link":
        mine.symlink_to(target)
    with scratch_folder(tmp_path, "kronos-"):
        pass
    assert (mine / "thesis.tex").read_text() == "years of work"


def test_a_scratch_folder_whose_process_is_gone_is_removed(tmp_path):
    with scratch_folder(tmp_path, "kronos-") as made:
        left = shutil.copytree(made, tmp_path / "copy", dirs_exist_ok=True)
        name = made.name
    left.rename(tmp_path / name)
    with scratch_folder(tmp_path, "kronos-"):
        assert not (tmp_path / name).exists()
