"""All sets at a glance: the numbers of the records, the best way marked, and a panel for each set."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from fake_records import RATIOS, interval, loss_record, measured, qa_record, write

from benchmarks.report import overview, plots
from benchmarks.report.report import markdown, write_report
from extemb_core.errors import DocumentError


def with_focus(record, gain=0.1, data="dev_squad.jsonl.zst"):
    """Add plans for the question that are better than every other way by `gain`, but level with cutting at ratio 4."""
    record = copy.deepcopy(record)
    record["data"][0]["file"] = data
    summary = record["summary"]
    summary["focus_minus"] = {}
    for ratio in RATIOS:
        ours = copy.deepcopy(summary["arms"][f"extensible/{ratio}"])
        for metric in summary["metrics"]:
            ours[metric]["mean"] += -gain if metric == "loss" else gain
        summary["arms"][f"focus/{ratio}"] = ours
        summary["focus_minus"][str(ratio)] = {
            "truncated": {metric: measured(gain, 2 * gain if ratio == 4 else gain / 2) for metric in summary["metrics"]}
        }
    return record


def rows_after(text, title):
    lines = text.splitlines()
    rows = lines[lines.index(title) + 2 :]
    rows = rows[: next(at for at, line in enumerate(rows) if not line.startswith("|"))]
    heads, _, *rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return [dict(zip(heads, row, strict=True)) for row in rows]


def test_each_set_has_a_row_for_each_ratio_with_the_best_way_marked():
    record = with_focus(qa_record())
    page = markdown([(Path("qa.json"), record)], {})
    rows = rows_after(page, "Scores:")
    arms = record["summary"]["arms"]
    assert [row["positions"] for row in rows] == [f"{180.4 * 4 / ratio:.1f} (ratio {ratio})" for ratio in RATIOS]
    for ratio, row in zip(RATIOS, rows, strict=True):
        assert row["set"] == "dev_squad, F1 (n 200)"
        assert row["`focus`"] == f"**{100 * arms[f'focus/{ratio}']['f1']['mean']:.1f}%**"
        for way in ("truncated", "lingua", "extensible"):
            assert row[f"`{way}`"] == f"{100 * arms[f'{way}/{ratio}']['f1']['mean']:.1f}%"
        assert (row["`none`"], row["`full`"], row["`chosen`"]) == ("8.0%", "52.0% (4 of 200 cut)", "–")  # noqa: RUF001


def test_records_of_several_trainings_of_an_embedder_are_told_apart():
    records = [(Path(f"{name}.json"), with_focus(qa_record(), data=f"{name}.jsonl")) for name in ("a", "b")]
    assert "several fingerprints" not in markdown(records, {})
    first, records[1][1]["fingerprint"] = records[0][1]["fingerprint"], "0123456789abcdef"
    parts = (f"`{fingerprint[:8]}` in `float32`: {name}" for fingerprint, name in ((first, "a"), ("01234567", "b")))
    assert f"(its weights or their dtype differ): {'; '.join(parts)}." in markdown(records, {})
    records[1][1]["provenance"]["hardware"]["accelerator"] = "NVIDIA H200"
    assert "`01234567` in `auto`: b." in markdown(records, {})


def test_differences_are_paired_and_bold_where_their_interval_excludes_0():
    page = markdown([(Path("qa.json"), with_focus(qa_record()))], {})
    rows = rows_after(page, overview._DIFFERENCES.strip())
    assert [row["less `truncated`"] for row in rows] == ["+10.0 [-10.0, +30.0]", *["**+10.0 [+5.0, +15.0]**"] * 3]
    assert {row["less `chosen`"] for row in rows} == {"–"}  # noqa: RUF001


def test_of_losses_the_lowest_is_best():
    record = with_focus(loss_record(), 0.2)
    page = markdown([(Path("qa.json"), record)], {})
    rows = rows_after(page, "Loss of the reference answer, in nats per token:")
    assert all(row["`focus`"].startswith("**") and not row["`extensible`"].startswith("**") for row in rows)
    assert "Scores:" not in page.split("## Question answering")[0]


def test_equal_ways_are_both_best():
    record = with_focus(qa_record(), 0)
    rows = rows_after(markdown([(Path("qa.json"), record)], {}), "Scores:")
    (row,) = [row for row in rows if "ratio 4" in row["positions"]]
    assert not row["`focus`"].startswith("**")  # LLMLingua's criterion is better there
    record["summary"]["arms"]["focus/4"]["f1"]["mean"] = record["summary"]["arms"]["lingua/4"]["f1"]["mean"]
    (row,) = [
        row for row in rows_after(markdown([(Path("q.json"), record)], {}), "Scores:") if "o 4)" in row["positions"]
    ]
    assert row["`focus`"] == row["`lingua`"] == "**38.0%**"


def test_records_of_one_set_are_told_apart_and_those_without_plans_or_training_left_out():
    records = [(Path(f"{name}.json"), with_focus(qa_record())) for name in ("b", "a")]
    records += [(Path("c.json"), with_focus(qa_record(), data="dev_other.jsonl.zst")), (Path("d.json"), qa_record())]
    untrained = with_focus(qa_record())
    untrained["config"]["embedder"] = "untrained"
    records.append((Path("e.json"), untrained))
    assert list(overview.compared(records)) == ["dev_other", "dev_squad (a)", "dev_squad (b)"]


def test_without_plans_there_is_no_glance(tmp_path):
    assert "At a glance" not in markdown([(Path("qa.json"), qa_record())], {})


def test_a_panel_for_each_set_holds_a_line_for_each_way():
    sets = {name: with_focus(qa_record(), 0.1 * at) for at, name in enumerate(("a", "b", "c", "d"))}
    figure = plots.overview(sets)
    panels = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in panels] == ["a, F1", "b, F1", "c, F1", "d, F1"]
    for axes, record in zip(panels, sets.values(), strict=True):
        lines = {line.get_label(): line for line in axes.get_lines()}
        arms = record["summary"]["arms"]
        for way in ("truncated", "extensible", "focus"):
            assert list(lines[way].get_ydata()) == [arms[f"{way}/{ratio}"]["f1"]["mean"] for ratio in RATIOS]
            assert list(lines[way].get_xdata()) == [arms[f"{way}/{ratio}"]["positions"] for ratio in RATIOS]
        assert set(lines["full"].get_ydata()) == {0.52}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()][-3:] == ["extensible", "focus", "full"]


def test_the_page_shows_both_plots_before_the_sets(tmp_path):
    record = with_focus(qa_record())
    summary = record["summary"]
    summary["metrics"].append("loss")
    for at, arm in enumerate(summary["arms"].values()):
        arm["loss"] = {"mean": 1 + at / 10, "interval": interval(1 + at / 10, 0.1)}
    for of_ratio in [*summary["minus"].values(), *summary["focus_minus"].values()]:
        for difference in of_ratio.values():
            difference["loss"] = measured(-0.1, 0.05)
    summary["retained_loss"] = {}
    written = write_report([write(tmp_path, "run.json", record)], tmp_path / "page.md")
    assert {"overview_quality.png", "overview_loss.png"} <= {file.name for file in written}
    page = (tmp_path / "page.md").read_text()
    assert page.index("overview_quality.png") < page.index("overview_loss.png") < page.index("## Question answering")


def timed(ways):
    rows = {
        way: {"median_seconds": 8 * share, "over_full": share, "median_positions": 9} for way, share in ways.items()
    }
    return {"n": 8, "ways": rows, "samples": []}


def test_quality_stands_against_the_share_of_the_full_texts_time():
    sets = {"a": with_focus(qa_record()), "b": with_focus(qa_record())}
    times = {"b": timed({"full": 1.0, "focus/4": 0.8, "focus/8": 0.5, "extensible/4": 0.6, "extensible/8": 0.2})}
    figure = plots.quality_by_time(sets, times)
    (panel,) = [axes for axes in figure.axes if axes.axison]  # of the set that was timed
    assert panel.get_title() == "b (full 8.0 s), F1"
    lines = {line.get_label(): line for line in panel.get_lines()}
    arms = sets["b"]["summary"]["arms"]
    assert set(lines) == {"none", "full", "focus", "extensible"}  # no others were timed
    assert list(lines["focus"].get_xdata()) == [0.8, 0.5]
    assert list(lines["focus"].get_ydata()) == [arms[f"focus/{ratio}"]["f1"]["mean"] for ratio in (4, 8)]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["1/4", "1/2", "1"]


def test_the_page_shows_quality_against_time_where_it_was_timed(tmp_path):
    records = [write(tmp_path, "run.json", with_focus(qa_record()))]
    times = tmp_path / "first_token.json"
    times.write_text(json.dumps({"sets": {"dev_squad": timed({"full": 1.0, "focus/4": 0.5}), "dev_other": {}}}))
    assert "overview_time.png" in {file.name for file in write_report(records, tmp_path / "page.md", times)}
    assert "overview_time.png" in (tmp_path / "page.md").read_text()
    times.write_text(json.dumps({"sets": {"dev_other": {}}}))
    assert "overview_time.png" not in {file.name for file in write_report(records, tmp_path / "page.md", times)}


@pytest.mark.parametrize("content", ["", "{}", "[]"])
def test_a_file_without_times_is_an_error_that_says_so(tmp_path, content):
    times = tmp_path / "other.json"
    times.write_text(content)
    with pytest.raises(DocumentError, match=r"other\.json is not what benchmarks/first_token\.py writes"):
        write_report([write(tmp_path, "run.json", with_focus(qa_record()))], tmp_path / "page.md", times)
