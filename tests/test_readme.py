"""The README's example is real: its block is run, and prints what the README says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.real_model
def test_the_example_prints_what_the_readme_shows(monkeypatch):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- example -->\n```python\n(.*?)```\n```text\n(.*?)```", readme, re.DOTALL)
    assert found, "the README's example block has moved"
    assert readme[: found.end()].count("\n") <= 40
    assert found[1].strip().count("\n") < 8
    monkeypatch.chdir(ROOT)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(found[1], "README.md", "exec"), {})
    assert printed.getvalue() == found[2]


@pytest.mark.real_model
@pytest.mark.usefixtures("real_weights_once", "shorter_guide")
@pytest.mark.parametrize(
    ("name", "needs", "words"),
    [("langchain", "langchain_core", "Python"), ("llamaindex", "llama_index.core", "elements of")],
)
def test_the_first_lines_of_a_guide_run(name, needs, words, capsys):
    pytest.importorskip(needs)
    guide = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- example -->\n```python\n(.*?)```", guide, re.DOTALL)
    exec(compile(found[1], f"{name}.md", "exec"), {})
    answer, positions = capsys.readouterr().out.strip().splitlines()
    assert words in answer
    assert 100 < int(positions.split()[0]) < 400


def test_links_in_the_documentation_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
