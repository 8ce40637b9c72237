"""Make the site of the files as a repository shows them: the README, docs/, the notebooks, and what these link to.

MkDocs takes the pages of one folder. Here each goes by its path from the root, so that a relative link leads to the
same file on the site as in the repository, and one that leads nowhere fails `make docs`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/**/*.md",
    "demos/README.md",
    "demos/*.ipynb",
    "benchmarks/README.md",
    "extemb_core/pretrained/*/README.md",
)
ASSETS = ("docs/site.css",)
_LINK = re.compile(r"\]\(([^)#:\s]+)")
_HOMES = {"README.md": "index.md", "docs/": "", "demos/": "notebooks/"}


class SiteFile(File):
    """A file by its path in the repository; a notebook is a page too."""

    def is_documentation_page(self) -> bool:
        return self.src_uri.endswith((".md", ".ipynb"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of docs/ by the pages, and by what they link to."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    pages = [page for pattern in PAGES for page in sorted(ROOT.glob(pattern))]
    linked = {target for page in pages for target in _linked_files(page)}
    for path in dict.fromkeys([*pages, *(ROOT / asset for asset in ASSETS), *sorted(linked)]):
        files.append(_site_file(path.relative_to(ROOT).as_posix(), config))
    return files


def on_page_read_source(page: Page, config: MkDocsConfig) -> str | None:
    """Read a notebook as Markdown; MkDocs reads the other pages itself."""
    path = ROOT / page.file.src_uri
    return notebook_to_markdown(path.read_text(encoding="utf-8")) if path.suffix == ".ipynb" else None


def notebook_to_markdown(notebook: str) -> str:
    """Return a notebook's cells with their outputs."""
    cells = json.loads(notebook)["cells"]
    return "\n\n".join(part for cell in cells for part in _parts(cell)) + "\n"


def _parts(cell: dict[str, Any]) -> Iterator[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    yield f"````python\n{source}\n````"
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            yield f"![Plot of the cell above](data:image/png;base64,{''.join(data['image/png']).strip()})"
        elif "text/html" in data:  # a blank line would end it
            yield "<div>" + re.sub(r"\n\s*\n", "\n", "".join(data["text/html"])) + "</div>"
        else:
            text = "".join(output["text"] if "text" in output else data["text/plain"])
            yield f"````text\n{text.rstrip()}\n````"


def _linked_files(page: Path) -> Iterator[Path]:
    for target in _LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve()
        if path.is_file() and ROOT in path.parents:
            yield path


def _site_file(path: str, config: MkDocsConfig) -> File:
    address = path
    for prefix, home in _HOMES.items():
        if path.startswith(prefix):
            address = home + path.removeprefix(prefix)
    file = SiteFile(path, str(ROOT), config.site_dir, config.use_directory_urls)
    if file.is_documentation_page():
        folder = re.sub(r"(\b(README|index))?\.(md|ipynb)$", "", address).rstrip("/")
        address = f"{folder}/index.html".lstrip("/")
    file.dest_uri = address
    return file
