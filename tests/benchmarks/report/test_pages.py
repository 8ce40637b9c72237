"""Tables in pages are made from records, between comments that say which."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_records import RATIOS, measured, qa_record, write

from benchmarks.report.pages import filled, main
from extemb_core.errors import ConfigError

ROOT = Path(__file__).parents[3]
PAGES = ("README.md", "extemb_core/pretrained/smollm2-135m-joint/README.md")
ONE = "<!-- table of qa_a.json at 4 8 -->\n{}<!-- end of table -->\n"
SEVERAL = "<!-- glance at 4 of qa_*.json -->\n{}<!-- end of table -->\n"


@pytest.fixture
def records(tmp_path):
    for name in ("qa_a", "qa_b"):
        write(tmp_path, f"{name}.json", with_losses())
    return tmp_path


def with_losses():
    record = qa_record()
    for arm in record["summary"]["arms"].values():
        arm["loss"] = measured(4 - 5 * arm["f1"]["mean"], 0.1)
    return record


def test_a_table_has_the_numbers_of_its_record_and_the_rest_of_the_page_stays(records):
    page = filled(f"Before.\n{ONE.format('old')}After.\n", records)
    assert page.startswith("Before.\n<!-- table of qa_a.json at 4 8 -->\n| the text as | ratio 4, ")
    assert page.endswith("<!-- end of table -->\nAfter.\n")
    assert "old" not in page
    arms = with_losses()["summary"]["arms"]
    for ratio in (4, 8):
        arm = arms[f"extensible/{ratio}"]
        low, high = arm["f1"]["interval"]
        mean = arm["f1"]["mean"]
        assert f"{100 * mean:.1f} ({100 * low:.1f} to {100 * high:.1f}); {arm['loss']['mean']:.2f}" in page
    assert filled(page, records) == page


def test_a_glance_has_a_row_for_each_record_with_the_best_way_marked(records):
    rows = filled(SEVERAL.format(""), records).splitlines()[3:-1]
    assert [row.split("|")[1].split()[0] for row in rows] == ["a", "b"]
    arms = with_losses()["summary"]["arms"]
    ways = [f"{way}/4" for way in ("extensible", "truncated", "lingua")]
    best = max(ways, key=lambda way: arms[way]["f1"]["mean"])
    marked = f"**{100 * arms[best]['f1']['mean']:.1f}; {arms[best]['loss']['mean']:.2f}**"
    assert all(marked in row and row.count("**") % 2 == 0 for row in rows)


def test_a_glance_says_which_records_are_of_which_training_of_an_embedder(records):
    assert "trained" not in filled(SEVERAL.format(""), records)
    other = with_losses() | {"fingerprint": "0123456789abcdef"}
    other["config"]["dtype"] = "bfloat16"
    write(records, "qa_b.json", other)
    *_, line, end = filled(SEVERAL.format(""), records).splitlines()
    name, first = qa_record()["config"]["embedder"], qa_record()["fingerprint"][:8]
    assert end == "<!-- end of table -->"
    said = f"`{name}` has several fingerprints in these records (its weights or their dtype differ): "
    assert line == f"{said}`{first}` in `float32`: a; `01234567` in `bfloat16`: b."


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (ONE.replace("qa_a", "qa_c").format(""), "qa_c"),
        (ONE.replace("4 8", f"{max(RATIOS) * 2}").format(""), "nothing at ratio"),
        (SEVERAL.replace("qa_*", "qb_*").format(""), "no record is qb_"),
    ],
)
def test_what_was_not_measured_is_said_and_the_page_stays(records, page, message):
    file = records / "page.md"
    file.write_text(page)
    with pytest.raises((ConfigError, OSError), match=message):
        filled(page, records)
    assert file.read_text() == page


@pytest.mark.parametrize("page", PAGES)
def test_pages_of_the_project_have_the_numbers_of_their_records(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = Path(page).read_text(encoding="utf-8")
    assert filled(text) == text
    assert "<!-- end of table -->" in text


def test_the_command_fills_the_pages_that_are_named(records, monkeypatch, capsys):
    monkeypatch.chdir(records)
    Path("page.md").write_text(ONE.format(""))
    main(["page.md"])
    assert capsys.readouterr().out == "page.md\n"
    assert "| nothing |" in Path("page.md").read_text()
