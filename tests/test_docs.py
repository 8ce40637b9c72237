"""docs/cli.md and docs/settings.md are made from the code, and what is written there by hand is kept."""

from __future__ import annotations

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
