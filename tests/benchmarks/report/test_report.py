"""The page's tables are parsed back and compared with the records they were made from."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from pathlib import Path

import pytest
from fake_records import RATIOS, loss_record, needle_record, ppl_record, qa_record, speed_record, write

from benchmarks.ending import run
from benchmarks.report.__main__ import main
from benchmarks.report.report import TITLES, markdown, read_record, write_report
from extemb_core.errors import ConfigError, DocumentError, MissingExtraError
from extemb_core.evaluation import runs

ROOT = Path(__file__).resolve().parents[3]
MAKERS = {"ppl": ppl_record, "qa": qa_record, "speed": speed_record, "needle": needle_record}


def page(record, name="run.json"):
    return markdown([(Path("somewhere") / name, record)], {})


def tables(text):
    """Title (the line above a table) -> rows as dicts by the heads of the columns; cells without code marks."""
    found = {}
    lines = text.splitlines()
    for at, line in enumerate(lines):
        if not line.startswith("| ---"):
            continue
        rows = []
        for row in lines[at - 1 :]:
            if not row.startswith("|"):
                break
            rows.append([cell.strip().replace("`", "") for cell in re.split(r"(?<!\\)\|", row)[1:-1]])
        assert all(len(row) == len(rows[0]) for row in rows)
        found[lines[at - 3]] = [dict(zip(rows[0], row, strict=True)) for row in rows[:1] + rows[2:]][1:]
    return found


def table(text, start):
    (rows,) = [rows for title, rows in tables(text).items() if title.startswith(start)]
    return {next(iter(row.values())): dict(list(row.items())[1:]) for row in rows}


def numbers(cell):
    return [float(number.replace(",", "")) for number in re.findall(r"[-+]?[\d,]*\.?\d+", cell)]


def without_embedder(record):
    record["fingerprint"] = record["config"]["embedder"] = None
    return record


# -- reading --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
def test_a_record_is_read_as_it_stands(kind, tmp_path):
    record = MAKERS[kind]()
    assert read_record(write(tmp_path, "run.json", record)) == record


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 1}, "a record of version 1, and this extemb reads version 2; measure it again"),
        ({"version": "3"}, "a record of version '3', and this extemb reads version 2; measure it again"),
        ({"kind": "calibration"}, "is of kind 'calibration', not one of ppl, qa, speed, needle; leave it out"),
    ],
)
def test_a_record_that_the_page_does_not_show_is_named_with_what_to_do(change, says, tmp_path):
    file = write(tmp_path, "other.json", qa_record() | change)
    with pytest.raises(DocumentError, match=re.escape(says)) as caught:
        read_record(file)
    assert str(file) in str(caught.value)


def test_a_record_of_0_1_0_is_of_version_1(tmp_path):
    record = qa_record()
    del record["version"], record["embedder"]
    with pytest.raises(DocumentError, match="of version 1, and this extemb reads version 2"):
        read_record(write(tmp_path, "old.json", record))


def test_what_is_no_record_at_all_is_refused(tmp_path):
    with pytest.raises(DocumentError, match="missing.json does not exist"):
        read_record(tmp_path / "missing.json")
    summary = qa_record()
    del summary["summary"]
    with pytest.raises(DocumentError, match="no 'summary'"):
        read_record(write(tmp_path, "other.json", summary))
    for content in ("{", "[1]", "3"):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(DocumentError, match="other.json"):
            read_record(tmp_path / "other.json")


# -- numbers --------------------------------------------------------------------------------------------------


def test_perplexity_tables_hold_the_record():
    record = ppl_record()
    text = page(record)
    shown, positions = table(text, "Perplexity, by tokens"), table(text, "Positions that the context")
    differences, shares = table(text, "Difference of the loss"), table(text, "Share of the gap")
    for context, cell in record["summary"].items():
        column = f"{int(context):,} (n 20)"
        for arm, own in cell["arms"].items():
            expected = [own["perplexity"], *map(math.exp, own["interval"])]
            assert numbers(shown[arm][column]) == pytest.approx(expected, abs=0.006)
            assert numbers(positions[arm][column]) == [own["positions"]]
        for ratio, own in cell["ratios"].items():
            for control, scored in own["minus"].items():
                name = f"nearest/{ratio}" if control == "nearest" else control
                got = differences[f"extensible/{ratio} - {name}"][column]
                assert numbers(got) == pytest.approx([scored["mean"], *scored["interval"]], abs=0.0006)
            if "mean" in own["gap_share"]:
                expected = [100 * own["gap_share"]["mean"], *(100 * end for end in own["gap_share"]["interval"])]
                assert numbers(shares[f"extensible/{ratio}"][column]) == pytest.approx(expected, abs=0.06)
            else:
                assert shares[f"extensible/{ratio}"][column] == "refused"
    assert "refused at ratios 8, 16, 32, length 8,192, 16,384, 32,768: no full text fits." in text


def test_question_answering_tables_hold_the_record():
    record = qa_record()
    text, summary = page(record), record["summary"]
    shown, differences, retained = table(text, "Scores"), table(text, "Paired diff"), table(text, "Retained share")
    columns = {"em": "EM", "f1": "F1", "contained": "contained"}
    for arm, own in summary["arms"].items():
        assert numbers(shown[arm]["positions"]) == pytest.approx([own["positions"]], abs=0.06)
        for metric, column in columns.items():
            expected = [100 * number for number in (own[metric]["mean"], *own[metric]["interval"])]
            assert numbers(shown[arm][column]) == pytest.approx(expected, abs=0.06)
    count = 0
    for ratio, controls in summary["minus"].items():
        for control, own in controls.items():
            name = control if control in ("none", "full") else f"{control}/{ratio}"
            for metric, column in columns.items():
                got = differences[f"extensible/{ratio} - {name}"][column]
                expected = [100 * number for number in (own[metric]["mean"], *own[metric]["interval"])]
                assert numbers(got) == pytest.approx(expected, abs=0.06)
                count += 1
    assert count == len(RATIOS) * 6 * 3
    assert numbers(retained["extensible/8"]["retained"]) == pytest.approx([47.7, 41.7, 53.7], abs=0.06)
    assert retained["extensible/32"]["retained"] == "refused: the gain is within noise"
    by_rank = table(text, "F1 by the rank")
    assert list(by_rank["none"]) == ["rank 0 (n 67)", "rank 1 (n 67)", "rank 2 (n 66)"]
    for arm, row in by_rank.items():
        expected = [100 * summary["by_rank"][str(rank)][arm]["f1"] for rank in range(3)]
        assert [numbers(cell)[0] for cell in row.values()] == pytest.approx(expected, abs=0.06)
    assert "4 of 200 texts of `full` were cut to fit the window." in text


def test_tables_of_the_loss_hold_the_record():
    record = loss_record()
    text, summary = page(record), record["summary"]
    assert {title.split(" ")[0] for title in tables(text.partition("### ")[1] + text.partition("### ")[2])} == {
        "###", "Loss", "Difference", "Share", "loss",
    }  # fmt: skip
    losses, differences = table(text, "Loss of the reference"), table(text, "Difference of that loss")
    for arm, own in summary["arms"].items():
        assert numbers(losses[arm]["loss"]) == pytest.approx([own["loss"]["mean"], *own["loss"]["interval"]], abs=6e-4)
    count = 0
    for ratio, controls in summary["minus"].items():
        for control, own in controls.items():
            name = control if control in ("none", "full") else f"{control}/{ratio}"
            expected = [own["loss"]["mean"], *own["loss"]["interval"]]
            cell = differences[f"extensible/{ratio} - {name}"]["loss"]
            assert numbers(cell) == pytest.approx(expected, abs=6e-4)
            count += 1
    assert count == len(RATIOS) * 6
    retained = table(text, "Share of what the full text gains in loss")
    assert numbers(retained["extensible/8"]["retained"]) == pytest.approx([46.2, 41.2, 51.2], abs=0.06)
    assert retained["extensible/32"]["retained"] == "refused: the gain is within noise"
    assert table(text, "loss by the rank")["none"] == {"rank 0 (n 100)": "4.000", "rank 1 (n 100)": "4.100"}
    better = "by loss: better than `none`, `random_states`, `anchors`, `truncated`"
    assert f"- At ratio 4, {better}; worse than `chosen`, `full`." in text
    assert f"- At ratio 8, {better}; not distinguishable from `chosen`; worse than `full`." in text
    kinds = ("random_states", "anchors", "truncated", "chosen", "extensible")
    assert list(losses) == ["none", *(f"{kind}/{ratio}" for kind in kinds for ratio in RATIOS), "full"]


def test_scores_and_the_loss_stand_on_one_page_in_tables_of_their_own():
    record, losses = qa_record(), loss_record()["summary"]
    record["summary"]["metrics"].append("loss")
    for own in record["summary"]["arms"].values():
        own["loss"] = losses["arms"]["full"]["loss"]
    record["summary"]["retained_loss"] = losses["retained_loss"]
    text = page(record)
    assert list(table(text, "Scores")["full"]) == ["positions", "EM", "F1", "contained"]
    assert list(table(text, "Loss of the reference")["full"]) == ["positions", "loss"]
    assert table(text, "Difference of that loss")["extensible/8 - none"] == {"loss": "–"}  # noqa: RUF001
    assert "by F1: better than" in text


def test_what_kind_of_embedder_it_was_stands_above_the_tables():
    (row,) = [row[""] for name, row in table(page(loss_record()), "### ").items() if name == "embedder"]
    assert row.endswith("fingerprint 37db4103, entry layer 8, adaptation none, pooling mean, weights rank")


def test_there_is_no_table_by_rank_without_ranks():
    assert "rank" not in page(qa_record(passages=1))


def test_speed_tables_hold_the_record_with_ratios_to_full():
    record = speed_record()
    text = page(record)
    titles = {
        "first_token_s": "Time to the first",
        "decode_tokens_per_s": "Decoding",
        "peak_mib": "Peak memory",
        "positions": "Positions that the documents",
    }
    for metric, title in titles.items():
        shown = table(text, title)
        for tokens, sides in record["summary"].items():
            column = f"{int(tokens):,}"
            for side, own in sides.items():
                if own[metric] is None:
                    assert shown[side][column] == "–"  # noqa: RUF001
                    continue
                value, *ratio = numbers(shown[side][column])
                assert value == pytest.approx(own[metric], rel=0.006)
                if side == "full" or metric == "positions" or int(tokens) > 8192:
                    assert ratio == []
                elif metric == "first_token_s":
                    assert ratio == pytest.approx([own["first_token_over_full"]], abs=0.006)
                else:
                    assert ratio == pytest.approx([own[metric] / sides["full"][metric]], abs=0.006)
        assert list(shown) == ["full", "online/8", "online/32", "offline/8", "offline/32"]
        assert shown["full"]["131,072"] == "–"  # noqa: RUF001
    assert "Medians of 5 rounds" in text
    compressing = table(text, "Compressing")
    assert list(compressing) == ["online/8", "online/32"]
    assert numbers(compressing["online/8"]["4,096"]) == [2004]
    record["summary"] = {"1024": {"full": record["summary"]["1024"]["full"]}}
    assert "Compressing" not in page(without_embedder(record))


def test_needle_tables_hold_the_record():
    record = needle_record()
    text = page(record)
    overall = table(text, "Share of correct answers, over all")
    for task, column in (("passkey", "passkey"), ("key_value", "key-value")):
        for arm, own in record["summary"]["arms"][task].items():
            expected = [100 * number for number in (own["correct"]["mean"], *own["correct"]["interval"])]
            assert numbers(overall[arm][column]) == pytest.approx(expected, abs=0.06)
        by_length = table(text, f"{column}, share of correct")
        for arm, row in by_length.items():
            for length, cell in row.items():
                place = (task, arm, int(length.replace(",", "")))
                own = [c["correct"] for c in record["summary"]["cells"] if (c["task"], c["arm"], c["tokens"]) == place]
                assert (numbers(cell) if own else cell) == (
                    pytest.approx([100 * sum(own) / len(own)], abs=0.06) if own else "–"  # noqa: RUF001
                )

    differences = table(text, "Paired differences")
    for task, column in (("passkey", "passkey"), ("key_value", "key-value")):
        for ratio, controls in record["summary"]["minus"][task].items():
            for control, own in controls.items():
                name = f"truncated/{ratio}" if control == "truncated" else control
                expected = [100 * number for number in (own["mean"], *own["interval"])]
                got = numbers(differences[f"extensible/{ratio} - {name}"][column])
                assert got == pytest.approx(expected, abs=0.06)
    assert "- At ratio 32, by passkey answers: not distinguishable from `none`; worse than `truncated`, `full`." in text
    plans = {"32": {"chosen": {"mean": 0.5, "interval": [0.25, 0.75], "n": 300}}}
    record["summary"]["focus_minus"] = {"key_value": plans}
    focused = table(
        page(record), "Paired differences, in percentage points (above 0: plans for the question are better)"
    )
    assert focused == {"focus/32 - chosen/32": {"key-value": "**+50.0 [+25.0, +75.0]**", "passkey": "–"}}  # noqa: RUF001


def test_cells_of_a_length_are_weighted_by_their_samples():
    record = needle_record()
    cell = {"task": "passkey", "arm": "full", "tokens": 1024, "depth": 0.0, "n": 1, "correct": 1.0}
    record["summary"]["cells"] = [cell, cell | {"depth": 1.0, "n": 3, "correct": 0.0}]
    assert table(page(record), "passkey, share")["full"] == {"1,024": "25.0%"}


@pytest.mark.parametrize("kind", ["ppl", "qa"])
def test_differences_are_signed_and_bold_where_their_interval_excludes_0(kind):
    bold, plain = 0, 0
    for row in table(page(MAKERS[kind]()), "Difference" if kind == "ppl" else "Paired").values():
        for cell in (cell for cell in row.values() if cell != "–"):  # noqa: RUF001
            assert re.fullmatch(r"(\*\*)?[-+][\d.]+ \[[-+][\d.]+, [-+][\d.]+\](\*\*)?", cell)
            _, low, high = numbers(cell)
            if low > 0 or high < 0:
                assert cell.startswith("**")
                assert cell.endswith("**")
                bold += 1
            elif low < 0 < high:
                assert "*" not in cell
                plain += 1
    assert bold > 3
    assert plain > 3


def test_a_difference_that_rounds_to_nothing_has_no_minus():
    record = qa_record()
    record["summary"]["minus"]["8"]["none"]["f1"] = {"mean": -0.0001, "interval": [-0.02, 0.02], "n": 9}
    assert table(page(record), "Paired")["extensible/8 - none"]["F1"] == "+0.0 [-2.0, +2.0]"


def test_arms_come_in_one_order_everywhere():
    expected = ["none", *(f"{k}/{r}" for k in ("random", "wrong", "truncated", "lingua", "extensible") for r in RATIOS)]
    text = page(qa_record())
    assert list(table(text, "Scores")) == list(table(text, "F1 by the rank")) == [*expected, "full"]
    nearest, ours = ([f"{kind}/{ratio}" for ratio in RATIOS] for kind in ("nearest", "extensible"))
    assert list(table(page(ppl_record()), "Perplexity,")) == ["none", *nearest, "streaming", *ours, "full"]


def test_arms_that_were_not_measured_are_absent_or_a_dash():
    text = page(ppl_record())
    perplexity = table(text, "Perplexity, by")
    assert perplexity["full"]["4,096 (n 20)"] != "–"  # noqa: RUF001
    assert perplexity["full"]["8,192 (n 20)"] == perplexity["extensible/4"]["32,768 (n 20)"] == "–"  # noqa: RUF001
    assert table(text, "Difference")["extensible/4 - full"]["8,192 (n 20)"] == "–"  # noqa: RUF001

    record = without_embedder(qa_record())
    summary = record["summary"]
    summary["arms"] = {arm: own for arm, own in summary["arms"].items() if not arm.startswith("extensible")}
    summary |= {"minus": {}, "retained": {}, "by_rank": {}}
    text = page(record)
    assert "Paired differences" not in text
    assert "Retained" not in text
    assert table(text, "### ")["embedder"] == {"": "none: controls only"}

    record = without_embedder(ppl_record())
    for cell in record["summary"].values():
        cell["ratios"] = {}
    assert "Difference" not in page(record).partition("### ")[2]


def test_a_missing_interval_leaves_the_number_alone():
    record = qa_record()
    record["summary"]["arms"]["none"]["f1"]["interval"] = None
    record["summary"]["minus"]["8"]["none"]["f1"]["interval"] = None
    text = page(record)
    assert table(text, "Scores")["none"]["F1"] == "8.0%"
    assert table(text, "Paired")["extensible/8 - none"]["F1"] == "+21.0"
    assert "At ratio 8, by F1: better than `random`, `wrong`; not dist" in text
    assert "worse than `full`; without an interval against `none`." in text


# -- remarks --------------------------------------------------------------------------------------------------


def test_remarks_say_what_the_intervals_say():
    text = page(ppl_record())
    assert [line for line in text.splitlines() if "against `nearest`" in line] == [
        "- At ratio 4 against `nearest`, by loss: worse at every length measured.",
        "- At ratio 8 against `nearest`, by loss: not distinguishable at every length measured.",
        "- At ratios 16, 32 against `nearest`, by loss: better at every length measured.",
    ]
    text = page(qa_record())
    assert (
        "- At ratios 4, 8, 16, 32, by F1: better than `none`, `random`, `wrong`; "
        "not distinguishable from `truncated`, `lingua`; worse than `full`." in text
    )


def test_remarks_name_the_lengths_where_they_differ():
    record = ppl_record()
    for context, interval in (("1024", [-0.2, -0.1]), ("2048", [-0.1, 0.1]), ("4096", [0.0, 0.1]), ("8192", None)):
        record["summary"][context]["ratios"]["8"]["minus"]["nearest"]["interval"] = interval
    record["summary"]["16384"]["ratios"]["8"]["minus"]["nearest"]["interval"] = [0.1, 0.2]
    assert (
        "- At ratio 8 against `nearest`, by loss: better at 1,024; not distinguishable at 2,048, 4,096, 32,768; "
        "worse at 16,384; without an interval at 8,192." in page(record)
    )


# -- the page -------------------------------------------------------------------------------------------------


def test_what_was_run_stands_above_its_tables():
    record = ppl_record()
    record["provenance"]["git"]["dirty"] = True
    run = {name: row[""] for name, row in table(page(record, "ppl_135m.json"), "### ").items()}
    assert run == {
        "LLM": "smollm2-135m-instruct",
        "embedder": "smollm2-135m-instruct, fingerprint 37db4103",
        "data": "dev_books.jsonl.zst",
        "n, seed": "20, 3",
        "hardware": "AMD EPYC, 2 cores, 2 threads, 23.5 GiB of memory, no accelerator, Linux x86_64, "
        "load 0.1 before the run",
        "date, revision": "2026-11-24, 469f4685 with uncommitted changes",
        "command": record["provenance"]["command"],
        "record": "ppl_135m.json",
    }
    assert "remeasured" not in record
    later = record["provenance"] | {"date": "2026-11-28", "git": {"revision": None, "dirty": None}, "command": "again"}
    record["remeasured"] = {"focus": later}
    run = table(page(record), "### ")
    assert run["focus measured anew"][""] == "2026-11-28, unknown revision, again"
    assert run["date, revision"][""].startswith("2026-11-24")
    record["provenance"]["hardware"] = {"cpu": "A", "accelerator": "NVIDIA H200"}
    record["provenance"]["git"] = {"revision": None, "dirty": None}
    record["data"] = [{"file": "/home/me/a.jsonl"}, {"file": "b.jsonl"}]
    run = table(page(record), "### ")
    assert run["hardware"][""] == "A, NVIDIA H200"
    assert run["date, revision"][""] == "2026-11-24, unknown revision"
    assert run["data"][""] == "a.jsonl, b.jsonl"


def test_names_cannot_break_the_page():
    record = qa_record()
    record["config"]["llm"] = "odd|name `x` *bold*"
    record["data"][0]["file"] = "a|b.jsonl"
    record["provenance"]["command"] = "extemb eval qa --llm 'odd|name `x`'\n--json a.json"
    record["provenance"]["hardware"]["cpu"] = "<b>CPU</b> | [x](y) _z_"
    record["summary"]["retained"]["32"] = {"refused": "a | b\n# c"}
    arms = record["summary"]["arms"]
    arms["odd|arm/8"] = copy.deepcopy(arms["none"])
    text = page(record)
    run = table(text, "### ")
    assert run["command"][""] == r"extemb eval qa --llm 'odd\|name x' --json a.json"
    assert "| LLM | ``odd\\|name `x` *bold*`` |" in text
    assert "### ``odd|name `x` *bold*``, `a|b.jsonl` (run)" in text
    assert run["hardware"][""].startswith(r"\<b\>CPU\</b\> \| \[x\](y) \_z\_, 2 cores")
    assert table(text, "Retained")["extensible/32"]["retained"] == r"refused: a \| b \# c"
    assert r"odd\|arm/8" in table(text, "Scores")


def test_sections_come_by_kind_and_runs_by_name():
    other = ppl_record()
    other["config"]["llm"] = "a-model"
    records = [(Path(f"{kind}.json"), MAKERS[kind]()) for kind in ("needle", "speed", "qa", "ppl")]
    records.append((Path("z.json"), other))
    text = markdown(records, {})
    assert re.findall("^## (.*)", text, re.MULTILINE) == [TITLES[kind] for kind in ("ppl", "qa", "speed", "needle")]
    assert re.findall(r"^### .*\((.*)\)", text, re.MULTILINE) == ["z", "ppl", "qa", "speed", "needle"]
    assert markdown(records[::-1], {}) == text
    assert markdown([(Path("qa.json"), qa_record())], {}).count("\n## ") == 1


def test_the_report_is_written_with_its_plots(tmp_path):
    records = {kind: make() for kind, make in MAKERS.items()}
    records["needle"]["summary"]["cells"] = records["needle"]["summary"]["cells"][::20]  # fewer panels, less time
    files = [write(tmp_path, f"{kind} 1.json", record) for kind, record in records.items()]
    out = tmp_path / "docs" / "results.md"
    written = write_report(files, out)
    text = out.read_text(encoding="utf-8")
    links = re.findall(r"!\[.*\]\((.*)\)", text)
    assert links == [
        "results/ppl%201_perplexity.png",
        "results/qa%201_quality.png",
        "results/speed%201_speed.png",
        "results/needle%201_key_value.png",
        "results/needle%201_passkey.png",
    ]
    assert written[0] == out
    assert {file.relative_to(out.parent).as_posix() for file in written[1:]} == {
        link.replace("%20", " ") for link in links
    }
    assert str(tmp_path) not in text
    page, *drawn = write_report(files[1::-1], tmp_path / "results.md")
    for file in drawn:
        assert file.read_bytes() == (out.parent / "results" / file.name).read_bytes()
    before = page.read_bytes()
    write_report(files[:2], page)
    assert page.read_bytes() == before


def test_the_command_names_what_it_wrote_and_ends_with_one_line_when_it_cannot(tmp_path, capsys):
    file, page = write(tmp_path, "good.json", qa_record()), tmp_path / "page.md"
    main(["--records", str(file), "--output", str(page)])
    assert capsys.readouterr().out.splitlines() == [str(page), str(tmp_path / "page" / "good_quality.png")]
    with pytest.raises(SystemExit) as caught:
        run(lambda: main(["--records", str(tmp_path / "none.json"), "--output", str(page)]))
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "none.json does not exist" in line


def test_the_page_of_this_repository_is_that_of_its_records():
    """Without plots and their links, which `make results` draws: a record that was not put onto the page fails here."""
    patterns = re.findall(r"benchmarks/results/\S*\*\.json", (ROOT / "Makefile").read_text())
    assert len(patterns) == 4
    files = [file for pattern in patterns for file in ROOT.glob(pattern)]
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    expected = markdown([(file, read_record(file)) for file in files], {})

    def text(markdown):
        return [line for line in markdown.splitlines() if line and not line.startswith("![")]

    assert text(page) == text(expected)
    plots = {path.name for path in (ROOT / "docs" / "results").iterdir()}
    assert plots == set(re.findall(r"\]\(results/(.*)\)", page))


def test_every_record_of_a_run_in_this_repository_is_of_todays_version():
    files = (ROOT / "benchmarks" / "results").glob("*.json")
    # The other scripts have shapes of their own.
    records = [file for file in files if {"kind", "samples"} <= json.loads(file.read_bytes()).keys()]
    assert records
    for file in records:
        assert runs.read_record(file)["version"] == runs.RECORD_VERSION


def test_nothing_is_written_when_a_record_is_broken(tmp_path):
    good = write(tmp_path, "good.json", qa_record())
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(qa_record() | {"kind": "other"}))
    with pytest.raises(DocumentError, match="bad.json"):
        write_report([good, bad], tmp_path / "results.md")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bad.json", "good.json"]


def test_a_report_needs_records_with_names_of_their_own_and_a_markdown_file(tmp_path):
    good = write(tmp_path, "good.json", qa_record())
    with pytest.raises(ConfigError, match="ends in .md"):
        write_report([good], tmp_path / "results")
    with pytest.raises(ConfigError, match="two records are named 'good'"):
        write_report([good, tmp_path / "other" / "good.json"], tmp_path / "results.md")
    with pytest.raises(ConfigError, match="no record"):
        write_report([], tmp_path / "results.md")


def test_without_matplotlib_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("matplotlib.")] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'extemb[eval]'")):
        write_report([write(tmp_path, "good.json", qa_record())], tmp_path / "results.md")
