"""Make a Markdown page of tables and plots from records that `extemb eval` wrote.

    python -m benchmarks.report --records benchmarks/results/qa_squad.json --output page.md

Run it from the root of the repository. The same records give the same bytes; `make results` makes docs/results.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ending import run
from benchmarks.report.report import write_report


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--records", nargs="+", type=Path, required=True, metavar="FILE", help="JSON files of runs")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE.md", help="the page; its plots go to a folder beside it"
    )
    parser.add_argument("--times", type=Path, metavar="FILE", help="of benchmarks/first_token.py, to draw beside them")
    options = parser.parse_args(argv)
    for file in write_report(options.records, options.output, options.times):
        print(file)


if __name__ == "__main__":
    run(main)
