"""Hook of mkdocs: adds the repository's own pages to the site and rewrites their links, which also work on a forge."""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Page of the repository → page of the site; links are written for the repository, where they work too.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}
PICTURES = {"benchmarks/growth.png": "images/growth.png"}
LINK = re.compile(r"(\]\()(?!https?:|#|data:)([^)#\s]+)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/, and the pictures that they show."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text()))
    for source, target in PICTURES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the relative links of a page from its place in the repository to its place in the site."""
    target = page.file.src_uri
    source = next((name for name, made in PAGES.items() if made == target), f"docs/{target}")
    return LINK.sub(lambda link: link[1] + _site_link(link[2], source, target, files), markdown)


def _site_link(link: str, source: str, target: str, files: Files) -> str:
    path = normpath(PurePosixPath(source).parent / link)
    inside = PAGES.get(path, path.removeprefix("docs/"))
    inside = PICTURES.get(inside, inside)
    return relpath(inside, PurePosixPath(target).parent) if inside in files.src_uris else link  # mkdocs reports it
