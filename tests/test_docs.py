"""The documents: the settings page is the models', the site builds without a warning, the README is short."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_settings_page_is_what_the_models_say():
    page = runpy.run_path(str(ROOT / "docs" / "make_settings.py"))["page"]()
    assert (ROOT / "docs" / "settings.md").read_text() == page, "run python docs/make_settings.py"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_no_network_for_anything(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stdout + built.stderr
    pages = list(tmp_path.glob("*.html"))
    assert {"index.html", "api.html", "settings.html"} <= {page.name for page in pages}
    for page in pages:
        text = page.read_text()
        assert 'src="http' not in text and "fonts.g" not in text, page.name
