"""Write tables from records into pages, between comments that name the records.

    python -m benchmarks.report.pages README.md

    <!-- table of benchmarks/results/qa_squad_focus.json at 2 4 8 -->
    <!-- end of table -->

is filled with the results of each way of using as many positions on the questions of that record, and

    <!-- glance at 4 of benchmarks/results/qa_*_focus.json -->
    <!-- end of table -->

with a row for each of several records, at one ratio. Run it from the root of the repository; `make results` does.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.ending import run
from benchmarks.report import cells
from benchmarks.report.plots import main_score
from benchmarks.report.report import read_record
from benchmarks.report.sections import metric_name
from extemb_core.errors import ConfigError
from extemb_core.utils.files import atomic_write_text

_WAYS = {
    "focus": "a plan for the question (the default)",
    "extensible": "its embeddings, at one ratio",
    "chosen": "the sentences nearest to the question (BM25)",
    "truncated": "its first tokens",
    "lingua": "its most informative tokens (LLMLingua's criterion)",
}
_SHORT = ("plan", "embeddings", "chosen sentences", "first tokens", "informative tokens", "all", "nothing")
_TABLE = re.compile(
    r"(?P<begin><!-- "
    r"(?:table of (?P<file>\S+) at (?P<ratios>[\d ]+)|glance at (?P<ratio>\d+) of (?P<pattern>\S+))"
    r" -->\n).*?(?P<end><!-- end of table -->)",
    re.DOTALL,
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report.pages",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pages", nargs="+", type=Path, metavar="FILE.md", help="pages whose tables are made anew")
    for page in parser.parse_args(argv).pages:
        atomic_write_text(page, filled(page.read_text(encoding="utf-8")))
        print(page)


def filled(page: str, root: Path = Path()) -> str:
    """Return a page with its tables made anew from the records under `root`.

    Raises:
        ConfigError: A record is missing, of another kind, or lacks these measurements.
    """

    def made(match: re.Match[str]) -> str:
        if match["file"]:
            table = _of_one(root / match["file"], match["ratios"].split())
        elif files := sorted(root.glob(match["pattern"])):
            table = _of_several(files, match["ratio"])
        else:
            raise ConfigError(f"no record is {match['pattern']}; measure some, or fix the comment")
        return match["begin"] + table + match["end"]

    return _TABLE.sub(made, page)


def _of_one(file: Path, ratios: Sequence[str]) -> str:
    """Write a row for each way of reading, a column for each ratio: the score with its interval, and the loss."""
    record, score = _answers(file, ratios)
    arms = record["summary"]["arms"]
    heads = [f"ratio {ratio}, {cells.positions(arms[f'extensible/{ratio}'])} positions" for ratio in ratios]
    rows = [
        [name, *(_cell(arms[f"{way}/{ratio}"], score) for ratio in ratios)]
        for way, name in _WAYS.items()
        if f"{way}/{ratios[0]}" in arms
    ]
    rest = [""] * (len(ratios) - 1)
    whole = f"all of it, {cells.positions(arms['full'])} positions{cells.cut(arms['full'])}"
    rows.append([whole, _cell(arms["full"], score), *rest])
    rows.append(["nothing", _cell(arms["none"], score), *rest])
    return cells.table(["the text as", *heads], rows, right=False)


def _of_several(files: Sequence[Path], ratio: str) -> str:
    """Write a row for each set of questions, a column for each way of reading: the score and the loss; best in bold."""
    rows, records = [], {}
    for file in files:
        record, score = _answers(file, [ratio])
        arms = record["summary"]["arms"]
        ways = {way: arms[f"{way}/{ratio}"] for way in _WAYS if f"{way}/{ratio}" in arms}
        shown = {way: _means(arm, score) for way, arm in ways.items()}
        marked = cells.best_marked(shown, {way: arm[score]["mean"] for way, arm in ways.items()})
        name = file.stem.removeprefix("qa_").removesuffix("_focus")
        records[name] = record
        rows.append(
            [
                f"{name} ({metric_name(score)}, n {arms['full']['n']})",
                f"{cells.positions(arms['full'])} in {cells.positions(arms[f'extensible/{ratio}'])}",
                *(marked.get(way, cells.ABSENT) for way in _WAYS),
                _means(arms["full"], score) + cells.cut(arms["full"]),
                _means(arms["none"], score),
            ]
        )
    return cells.table(["questions", "positions", *_SHORT], rows) + cells.trainings(records)


def _answers(file: Path, ratios: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Read a record of answers at these ratios, and name its main score."""
    record = read_record(file)
    if record["kind"] != "qa" or (score := main_score(record["summary"])) is None:
        raise ConfigError(f"{file} has no scores of answers; name a record of extemb eval qa")
    for ratio in ratios:
        if f"extensible/{ratio}" not in record["summary"]["arms"]:
            raise ConfigError(f"{file} has nothing at ratio {ratio}; name another ratio or record")
    return record, score


def _cell(arm: dict[str, Any], score: str) -> str:
    low, high = arm[score]["interval"]
    return f"{100 * arm[score]['mean']:.1f} ({100 * low:.1f} to {100 * high:.1f}); {arm['loss']['mean']:.2f}"


def _means(arm: dict[str, Any], score: str) -> str:
    return f"{100 * arm[score]['mean']:.1f}; {arm['loss']['mean']:.2f}"


if __name__ == "__main__":
    run(main)
