"""`extemb doctor`: what `extemb_core.doctor` finds, as a table or JSON."""

from __future__ import annotations

from dataclasses import asdict

import typer

from extemb_core.cli.options import JsonOption
from extemb_core.cli.output import ExitCode, library_output, print_json, print_note, reported
from extemb_core.cli.tables import show_table


@reported
def doctor(as_json: JsonOption = False) -> None:
    """Examine this machine: versions, device, what dtype is safe, weights, extras, and a one-second self-test."""
    from extemb_core.doctor import can_work, examine

    with library_output():
        checks = list(examine())
    works = can_work(checks)
    if as_json:
        print_json({"ok": works, "checks": [asdict(check) for check in checks]})
    else:
        rows = [(check.state, check.name, check.value, check.remedy) for check in checks]
        show_table(("", "what", "found", "to do"), rows)
        print_note("extemb can work here" if works else "extemb cannot work here; see the problems above")
    if not works:
        raise typer.Exit(ExitCode.FAILURE)
