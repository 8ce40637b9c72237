"""Verbs of 0.1.0 that have left the package: whoever types one is told in one sentence where it went."""

from __future__ import annotations

import typer

from extemb_core.cli.output import ExitCode, print_note

_TAKES_ANYTHING = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def point_to(group: typer.Typer, verb: str, replacement: str) -> None:
    """Register a hidden verb that names the command which does the same now, and ends as a usage error does.

    Args:
        group: Where the verb was.
        verb: Its name, whatever options followed it.
        replacement: The command line in a clone of the repository.
    """

    @group.command(verb, hidden=True, context_settings=_TAKES_ANYTHING)
    def moved(context: typer.Context) -> None:
        print_note(
            f"error: `{context.command_path}` is not in the package any more; in its repository, run: {replacement}"
        )
        raise typer.Exit(ExitCode.USAGE)
