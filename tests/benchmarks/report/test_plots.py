"""What is drawn, by the data of lines, bands and cells; pixels are looked at by people."""

from __future__ import annotations

import itertools
import re
import sys

import numpy as np
import pytest
from fake_records import RATIOS, loss_record, needle_record, ppl_record, qa_record, speed_record
from matplotlib.colors import to_rgb

from benchmarks.report import plots
from extemb_core.errors import MissingExtraError


def lines_of(axes):
    """Label -> (x, y) of the lines that are in the legend."""
    handles, labels = axes.get_legend_handles_labels()
    lines = [getattr(handle, "lines", [handle])[0] for handle in handles]  # error bars hold their line
    return {label: (line.get_xdata(), line.get_ydata()) for label, line in zip(labels, lines, strict=True)}


def legend_of(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_quality_has_a_line_per_kind_with_the_record_s_points():
    record = qa_record()
    figure = plots.quality(record)
    (axes,) = figure.axes
    lines, arms = lines_of(axes), record["summary"]["arms"]
    assert legend_of(figure) == ["none", "random", "wrong", "truncated", "lingua", "extensible", "full"]
    for kind in ("random", "wrong", "truncated", "lingua", "extensible"):
        x, y = lines[kind]
        assert list(x) == [arms[f"{kind}/{ratio}"]["positions"] for ratio in RATIOS]
        assert list(y) == [arms[f"{kind}/{ratio}"]["f1"]["mean"] for ratio in RATIOS]
    for kind in ("none", "full"):
        assert list(lines[kind][1]) == [arms[kind]["f1"]["mean"]] * 2
    bands = [(patch.get_y(), patch.get_y() + patch.get_height()) for patch in axes.patches]
    assert bands == [pytest.approx(arms[kind]["f1"]["interval"]) for kind in ("none", "full")]
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel().startswith("mean positions")
    assert axes.get_ylabel() == "F1 (mean, 95% interval)"
    assert axes.get_ylim()[0] == 0
    assert [label.get_text() for label in axes.get_xticklabels()][:2] == ["180\nratio 4", "90\nratio 8"]
    assert figure.get_suptitle().endswith("\nsmollm2-135m-instruct, dev_squad.jsonl.zst, n = 200")


def test_error_bars_are_the_intervals():
    record = qa_record()
    own = record["summary"]["arms"]["extensible/8"]["f1"]
    own["interval"] = None
    record["summary"]["arms"]["none"]["f1"]["interval"] = None
    (axes,) = plots.quality(record).axes
    (bars,) = [c for c in axes.containers if c.get_label() == "extensible"]
    ends = [segment[:, 1] for segment in bars[2][0].get_segments()]
    expected = [record["summary"]["arms"][f"extensible/{ratio}"]["f1"] for ratio in RATIOS]
    for (low, high), score in zip(ends, expected, strict=True):
        assert [low, high] == pytest.approx(score["interval"] or [score["mean"]] * 2)
    assert len(axes.patches) == 1  # no band for "none"


def test_quality_takes_another_metric_and_falls_back_to_the_first():
    record = qa_record()
    (axes,) = plots.quality(record, "contained").axes
    assert lines_of(axes)["full"][1][0] == record["summary"]["arms"]["full"]["contained"]["mean"]
    assert axes.get_ylabel().startswith("contained")
    record["summary"]["metrics"] = ["em"]
    (axes,) = plots.quality(record).axes
    assert axes.get_ylabel().startswith("EM")


def test_the_loss_has_a_plot_of_its_own_in_nats():
    record = loss_record()
    figures = plots.figures(record)
    assert list(figures) == ["loss"]
    (axes,) = figures["loss"].axes
    kinds = ["none", "random_states", "anchors", "truncated", "chosen", "extensible", "full"]
    assert legend_of(figures["loss"]) == kinds
    lines = lines_of(axes)
    for kind in kinds[1:-1]:
        expected = [record["summary"]["arms"][f"{kind}/{ratio}"]["loss"]["mean"] for ratio in RATIOS]
        assert list(lines[kind][1]) == expected
    assert "nats per token" in axes.get_ylabel()
    assert "%" not in "".join(label.get_text() for label in axes.get_yticklabels())
    assert list(plots.figures(qa_record())) == ["quality"]
    record = qa_record()
    record["summary"]["metrics"].append("loss")
    for own in record["summary"]["arms"].values():
        own["loss"] = own["f1"]
    assert list(plots.figures(record)) == ["quality", "loss"]


def test_perplexity_has_a_line_per_arm_where_it_was_measured():
    record = ppl_record()
    figure = plots.perplexity(record)
    (axes,) = figure.axes
    nearest, ours = ([f"{kind}/{ratio}" for ratio in RATIOS] for kind in ("nearest", "extensible"))
    assert legend_of(figure) == ["none", *nearest, "streaming", *ours, "full"]
    for arm, (x, y) in lines_of(axes).items():
        cells = {int(c): own["arms"][arm] for c, own in record["summary"].items() if arm in own["arms"]}
        assert list(x) == list(cells)
        assert list(y) == [own["perplexity"] for own in cells.values()]
    assert list(lines_of(axes)["full"][0]) == [1024, 2048, 4096]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1K", "2K", "4K", "8K", "16K", "32K"]
    assert "tokens of context" in axes.get_xlabel()
    assert "perplexity" in axes.get_ylabel()
    assert "n = 20" in figure.get_suptitle()


def test_perplexity_of_one_length_stands_against_positions():
    record = ppl_record()
    record["summary"] = {"1024": record["summary"]["1024"]}
    figure = plots.perplexity(record)
    (axes,) = figure.axes
    arms = record["summary"]["1024"]["arms"]
    assert legend_of(figure) == ["none", "nearest", "extensible", "full"]
    for container in axes.containers:
        kind = container.get_label()
        x, y = container.lines[0].get_data()
        own = [arms[f"{kind}/{ratio}"] for ratio in RATIOS]
        assert list(x) == [point["positions"] for point in own]
        assert list(y) == [point["perplexity"] for point in own]
    assert "1,024 tokens of context" in figure.get_suptitle()
    del arms["full"]  # does not fit: the window's worth of text is another arm then
    assert legend_of(plots.perplexity(record)) == ["none", "nearest", "streaming", "extensible"]


def test_coarser_ratios_are_lighter_shades_of_one_colour():
    (axes,) = plots.perplexity(ppl_record()).axes
    colours = {line.get_label(): to_rgb(line.get_color()) for line in axes.lines}
    shades = [sum(colours[f"extensible/{ratio}"]) for ratio in RATIOS]
    assert shades == sorted(shades)
    assert len(set(colours.values())) == len(colours)


def test_perplexities_far_apart_get_a_log_axis():
    record = ppl_record()
    record["summary"]["32768"]["arms"]["streaming"]["perplexity"] = 4000.0
    (axes,) = plots.perplexity(record).axes
    assert axes.get_yscale() == "log"


@pytest.mark.parametrize("task", ["passkey", "key_value"])
def test_needle_panels_hold_the_cells(task):
    record = needle_record()
    figure = plots.needle(record, task)
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    ours, raw = ([f"{kind}/{ratio}" for ratio in RATIOS] for kind in ("extensible", "truncated"))
    assert list(panels) == ["none", "full", *raw, *ours]
    lengths, depths = (1024, 2048, 4096, 8192, 32768, 131072), (0.0, 0.25, 0.5, 0.75, 1.0)
    for arm, axes in panels.items():
        (mesh,) = axes.collections
        shares = np.ma.filled(mesh.get_array().reshape(5, 6).astype(float), np.nan)
        cells = {
            (cell["depth"], cell["tokens"]): cell["correct"]
            for cell in record["summary"]["cells"]
            if (cell["task"], cell["arm"]) == (task, arm)
        }
        for (row, depth), (column, length) in itertools.product(enumerate(depths), enumerate(lengths)):
            expected = cells.get((depth, length), np.nan)
            assert shares[row, column] == pytest.approx(expected, nan_ok=True)
        assert mesh.get_clim() == (0, 1)
        assert axes.patch.get_hatch()  # shows where there is no cell
        assert axes.get_ylim() == (4.5, -0.5)  # the start of the text is at the top
    corner = panels["extensible/4"]
    assert [label.get_text() for label in corner.get_xticklabels()] == ["1K", "2K", "4K", "8K", "32K", "128K"]
    assert [label.get_text() for label in corner.get_yticklabels()] == ["0%", "25%", "50%", "75%", "100%"]
    assert "tokens" in figure.get_supxlabel()
    assert "depth" in figure.get_supylabel()
    assert figure.get_suptitle().startswith(task.replace("_", "-"))


def test_speed_has_both_panels_and_stops_where_nothing_was_measured():
    record = speed_record()
    figure = plots.speed(record)
    assert legend_of(figure) == ["full", "online/8", "online/32", "offline/8", "offline/32"]
    for axes, key, unit in zip(figure.axes, ("first_token_s", "peak_mib"), (", s ", ", MiB"), strict=True):
        assert unit in axes.get_ylabel()
        assert "tokens" in axes.get_xlabel()
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        for side, (x, y) in lines_of(axes).items():
            expected = {
                int(tokens): sides[side][key]
                for tokens, sides in record["summary"].items()
                if side in sides and sides[side][key] is not None
            }
            assert dict(zip(x, y, strict=True)) == expected
        assert list(lines_of(axes)["full"][0]) == [1024, 2048, 4096, 8192]


def test_every_kind_has_its_figures_and_they_are_900_pixels_wide(tmp_path):
    made = {
        name: f
        for make in (ppl_record, qa_record, needle_record, speed_record)
        for name, f in plots.figures(make()).items()
    }
    assert list(made) == ["perplexity", "quality", "key_value", "passkey", "speed"]
    for figure in made.values():
        assert figure.get_figwidth() * figure.dpi == 900
    plots.save(made["quality"], tmp_path / "a.png")
    plots.save(plots.quality(qa_record()), tmp_path / "b.png")
    content = (tmp_path / "a.png").read_bytes()
    assert content == (tmp_path / "b.png").read_bytes()
    assert b"Software" not in content
    assert b"matplotlib" not in content.lower()


def test_a_name_is_shown_as_it_is():
    record = qa_record()
    record["config"]["llm"] = "odd $x$ {name"
    record["data"] = [{"file": "a"}, {"file": "b"}]
    figure = plots.quality(record)
    figure.canvas.draw()  # would stop at an unknown formula
    assert figure.get_suptitle().endswith("\nodd $x$ {name, 2 files, n = 200")


def test_records_with_little_in_them_are_drawn_too():
    record = ppl_record()
    record["summary"] = {"1000": record["summary"]["1024"]}
    plots.perplexity(record).canvas.draw()
    record = qa_record()
    record["summary"]["arms"] = {arm: record["summary"]["arms"][arm] for arm in ("none", "full")}
    plots.quality(record).canvas.draw()
    record = needle_record()
    record["summary"]["cells"] = [cell for cell in record["summary"]["cells"] if cell["arm"] == "full"][:1]
    plots.needle(record, "passkey").canvas.draw()
    record = speed_record()
    for sides in record["summary"].values():
        for own in sides.values():
            own["peak_mib"] = None
    figure = plots.speed(record)
    figure.canvas.draw()
    assert [text.get_text() for text in figure.axes[1].texts] == ["not measured"]


def test_arms_at_one_ratio_are_one_row_of_panels():
    record = needle_record()
    record["summary"]["cells"] = [c for c in record["summary"]["cells"] if "/" not in c["arm"] or "/8" in c["arm"]]
    panels = [axes for axes in plots.needle(record, "passkey").axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["none", "truncated/8", "extensible/8", "full"]
    assert {axes.get_subplotspec().rowspan.start for axes in panels} == {0}


def test_arms_are_ordered_by_kind_then_by_ratio():
    arms = ["full", "extensible/16", "extensible/8", "unheard/4", "lingua/8", "nearest/8", "streaming", "none"]
    ordered = ["none", "nearest/8", "streaming", "lingua/8", "unheard/4", "extensible/8", "extensible/16", "full"]
    assert sorted(arms, key=plots.arm_key) == ordered


@pytest.mark.parametrize("make", [ppl_record, qa_record, needle_record, speed_record])
def test_without_matplotlib_one_sentence_says_what_to_install(make, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("matplotlib.")] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'extemb[eval]'")):
        plots.figures(make())
