"""The command line `extemb`. Each verb has a file beside this one; nothing heavy is imported before one runs."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from io import TextIOWrapper
from typing import Annotated

import typer

from extemb_core import __version__
from extemb_core.cli import ask, calibrate, compress, doctor, export, index, output, scale, serve, store, train, weights
from extemb_core.cli import eval as evaluate
from extemb_core.cli.options import CommandGroup, RootGroup
from extemb_core.cli.output import ExitCode

app = CommandGroup(
    name="extemb",
    cls=RootGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes:\n\n" + "\n\n".join(f"{code.value} {meaning}" for code, meaning in output.EXIT_CODES.items()),
)
for command in (ask.ask, ask.chat, serve.serve, compress.compress, calibrate.calibrate, export.export):
    app.command()(command)
for group in (train, evaluate, index, store, scale, weights):
    app.add_typer(group.app, name=group.__name__.rpartition(".")[2])
app.command()(doctor.doctor)


def _point_to(replacement: str, group: typer.Typer, verb: str) -> None:
    """Register a hidden verb for one of 0.1.0 that is gone: it names its replacement and ends as a usage error."""
    anything = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

    @group.command(verb, hidden=True, context_settings=anything)
    def moved(context: typer.Context) -> None:
        output.print_note(
            f"error: `{context.command_path}` is not in the package any more; in its repository, run: {replacement}"
        )
        raise typer.Exit(ExitCode.USAGE)


_point_to("python -m benchmarks.report --records FILE... --output FILE.md", evaluate.app, "report")
for verb in ("pack", "run", "unpack"):
    _point_to(f"python -m benchmarks.offline_training {verb} --help", train.app, verb)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"extemb {__version__}")
        raise typer.Exit


@app.callback()
def extemb(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and all that libraries say.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Ask an LLM about documents that do not fit its window, through extensible embeddings."""
    if debug:
        os.environ["EXTEMB_DEBUG"] = "1"  # read in this process and in those that a command starts


def main() -> None:
    """Run `extemb` as a process, with logging and warnings set up."""
    _open_closed_streams()
    _set_up_logging("--debug" in sys.argv[1:] or output.debugging())
    if isinstance(sys.stdout, TextIOWrapper) and not output.writes_unicode():
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr writes characters outside its encoding
    try:
        app(prog_name="extemb")
    except KeyboardInterrupt:
        typer.echo("error: interrupted", err=True)
        sys.exit(ExitCode.INTERRUPTED)
    except SystemExit as ended:  # click exits with 1 if the reader of its own output, such as help, has gone
        sys.exit(ExitCode.CLOSED_PIPE if isinstance(ended.__context__, BrokenPipeError) else ended.code)
    except OSError as error:  # stdout itself failed, so an error in JSON cannot be written either
        output.discard_stdout()
        output.print_error(error, as_json=False)
        sys.exit(ExitCode.FAILURE)


def _open_closed_streams() -> None:
    """Replace streams that the shell has closed (`extemb ... >&-`), which are None in Python, by the null device."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115


def _set_up_logging(debug: bool) -> None:
    """Show this library's own messages; those of others only when debugging."""
    handler = logging.StreamHandler()
    handler.setFormatter(_LevelFirst())
    logger = logging.getLogger("extemb_core")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)
    logger.propagate = False
    if debug:
        logging.basicConfig(level=logging.INFO)
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.getLogger("pypdf").addHandler(logging.NullHandler())
    logging.getLogger("pypdf").propagate = False  # `loaders` reports what matters
    warnings.filterwarnings("ignore")


class _LevelFirst(logging.Formatter):
    """Formats a message with its level first, as compilers do: `warning: ...`, and without a file's name."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        return output.one_line(f"{record.levelname.lower()}: {super().formatMessage(record)}")

    def format(self, record: logging.LogRecord) -> str:
        return output.strip_control_chars(super().format(record))


if __name__ == "__main__":
    main()
