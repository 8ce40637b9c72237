"""Shared parts of the scripts: sections, a JSON report with its provenance, and a one-line error at the end."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from extemb_core.errors import ExtembError
from extemb_core.evaluation.provenance import provenance
from extemb_core.weights.registry import DEFAULT_LLM


def parser(description: str | None, sections: Sequence[str]) -> argparse.ArgumentParser:
    """Make the parser of options that every script with sections has; each adds its own."""
    made = model_parser(description, llm="smollm2-135m-instruct")
    made.add_argument("--only", nargs="+", choices=sections, help="some sections")
    return made


def model_parser(description: str | None, llm: str = DEFAULT_LLM) -> argparse.ArgumentParser:
    """Make the parser of options that every script has that measures an LLM with its embedder."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--llm", default=llm, help="known name, folder or hub id")
    made.add_argument("--embedder", help="folder or hub id; the shipped one when not given")
    made.add_argument("--quick", action="store_true", help="see that it runs; the numbers mean nothing")
    made.add_argument("--json", type=Path, help="where to write the report")
    return made


def verdicts(rows: Sequence[tuple[str, str, str, bool]]) -> list[str]:
    """Format, line by line, what was measured, its value, its target, and whether that was met."""
    return [f"{what:<58}{value:>12}  {target:<14} {'met' if met else 'MISSED'}" for what, value, target, met in rows]


def report(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> None:
    """Measure what the command line asks for; print the table, and write the report with its provenance to --json."""
    options = parser.parse_args(argv)
    where = provenance(["python", *(sys.argv if argv is None else [sys.argv[0], *argv])])
    found = {**where, **measure(options)}
    print(table(found))
    if options.json:
        write_json(found, options.json)


def measured(sections: Mapping[str, Callable[[], dict[str, Any]]], only: Sequence[str] | None) -> dict[str, Any]:
    """Run some sections, or all, one after another, with a note after each, and return their results."""
    found = {}
    for name in only or sections:
        start = time.perf_counter()
        found[name] = sections[name]()
        note(f"{name}: {time.perf_counter() - start:.0f} s")
    return found


def write_json(report: dict[str, Any], file: Path) -> None:
    """Write a report, making its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def note(message: str) -> None:
    """Print a message on stderr."""
    print(message, file=sys.stderr, flush=True)


def run(main: Callable[[], None]) -> None:
    """Run a script; an error of this library becomes one line on stderr and exit status 2."""
    try:
        main()
    except ExtembError as error:
        note(f"error: {error}")
        sys.exit(2)
