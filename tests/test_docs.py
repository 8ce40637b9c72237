"""docs/cli.md and docs/settings.md are made from the code, and pages of the site from what the repository shows."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
GENERATE = runpy.run_path(str(DOCS / "generate.py"))
render = GENERATE["render_cli"]
PAGE = (DOCS / "cli.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["cli", "settings"])
def test_a_page_is_up_to_date(name: str) -> None:
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    assert GENERATE[f"render_{name}"](page) == page, "run: make docs"


def test_every_setting_says_what_it_means() -> None:
    page = (DOCS / "settings.md").read_text(encoding="utf-8")
    assert "| `budget` | Positions of the LLM's window that the documents may take at most" in page
    assert not re.findall(r"^\| `[^|]*` \|\s+\|", page, flags=re.MULTILINE)


def test_text_by_hand_is_kept_and_the_rest_is_made_anew() -> None:
    outdated = PAGE.replace("| `--k N` |", "| `--old N` |").replace("## `extemb doctor`", "## `extemb gone`")
    outdated = outdated.replace("# The command line\n", "# The command line\n\nBy hand.\n", 1)
    outdated = outdated.replace("A message that fails is reported", "By hand too: a message that fails is reported")
    page = render(outdated)
    assert "--old" not in page
    assert "extemb gone" not in page
    assert "## `extemb doctor`\n\nExamine this machine" in page
    assert "\n\nBy hand.\n" in page
    assert "By hand too: a message" in page
    assert render(page) == page


def test_a_row_of_the_table() -> None:
    assert "| `--ratio auto\\|raw\\|N` | Tokens per extensible embedding: one ratio for all documents" in PAGE
    assert "| `--resume` or `--no-resume` |" in PAGE


def test_every_test_that_keeps_a_promise_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (DOCS / "promises.md").read_text(encoding="utf-8"))
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (DOCS.parent / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_a_notebook_is_a_page_with_its_outputs() -> None:
    pytest.importorskip("mkdocs")
    printed = {"output_type": "stream", "name": "stdout", "text": ["```\n", "2\n"]}
    table = {
        "output_type": "execute_result",
        "data": {"text/html": ["<p>a</p>\n", "\n", "<p>b</p>"], "text/plain": ["?"]},
    }
    plot = {"output_type": "display_data", "data": {"image/png": "iVBO\n", "text/plain": ["<Figure>"]}}
    cells = [
        {"cell_type": "markdown", "source": ["# Two\n", "See [it](../docs/library.md)."]},
        {"cell_type": "code", "source": ["print(1 + 1)"], "outputs": [printed, table, plot]},
    ]
    page = runpy.run_path(str(DOCS / "hooks.py"))["notebook_to_markdown"](json.dumps({"cells": cells}))
    assert page == (
        "# Two\nSee [it](../docs/library.md).\n\n````python\nprint(1 + 1)\n````\n\n````text\n```\n2\n````\n\n"
        "<div><p>a</p>\n<p>b</p></div>\n\n![Plot of the cell above](data:image/png;base64,iVBO)\n"
    )


@pytest.mark.parametrize(
    ("file", "address"),
    [
        ("README.md", "index.html"),
        ("docs/llamaindex.md", "llamaindex/index.html"),
        ("docs/api/README.md", "api/index.html"),
        ("demos/README.md", "notebooks/index.html"),
        ("demos/library.ipynb", "notebooks/library/index.html"),
        ("CONTRIBUTING.md", "CONTRIBUTING/index.html"),
        ("docs/results/ppl_long.png", "results/ppl_long.png"),
        ("benchmarks/results/speed.json", "benchmarks/results/speed.json"),
    ],
)
def test_where_a_file_is_on_the_site(file: str, address: str) -> None:
    config = pytest.importorskip("mkdocs.config.defaults").MkDocsConfig()
    config.site_dir, config.use_directory_urls = "site", True
    assert runpy.run_path(str(DOCS / "hooks.py"))["_site_file"](file, config).dest_uri == address
