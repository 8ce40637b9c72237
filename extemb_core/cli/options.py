"""Define what several commands share: options, numbers, and documents from files, folders and stdin."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
import typer.core

from extemb_core.cli.output import ExitCode, print_json, print_note, reported, strip_control_chars
from extemb_core.documents import Document
from extemb_core.errors import DocumentError
from extemb_core.loaders import Skipped, read_documents
from extemb_core.weights.registry import DEFAULT_LLM

if TYPE_CHECKING:
    from extemb_core.lm import ExtensibleLM

STDIN = "-"
SHIPPED = "the one shipped for the LLM"
_MAX_NAMES = 8  # of skipped files, in one line
_NAMES_OF_FILES = ("DIR", "FILE", "PATH", "FILE...")
KEPT_RATIO = "what the embedder keeps: 2, or its finest"

UsageError: Any = typer.BadParameter.__base__  # its module differs between versions of typer

Function = TypeVar("Function", bound=Callable[..., None])


class CommandGroup(typer.Typer):
    """Commands that end with their exit codes, and whose repeatable options take several values at once."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Function], Function]:
        """Register a command as `typer.Typer` does."""

        def register(function: Function) -> Function:
            super(CommandGroup, self).command(name, cls=SeveralValues, **settings)(reported(function))
            return function

        return register


class SeveralValues(typer.core.TyperCommand):
    """A command whose repeatable options also take several values at once: `--documents a.txt b.txt`.

    The values end at the next option or at `--`.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.find_root().obj = "--json" in args and any(param.name == "as_json" for param in self.params)
        repeatable = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        rest = list(super().parse_args(ctx, _repeat(args, repeatable)))
        for param in self.params:
            names = ctx.params.get(param.name)
            names = names if isinstance(names, list | tuple) else [names]
            if param.metavar in _NAMES_OF_FILES and "" in names:  # Path("") is the current folder
                raise typer.BadParameter("an empty name is not a file or folder.", param_hint=f"'{param.opts[0]}'")
        return rest


class RootGroup(typer.core.TyperGroup):
    """The whole command line; usage errors are reported in JSON if --json was given."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.obj = "--json" in args  # until a command says otherwise: some take `--json FILE`
        with _json_errors(ctx):
            return list(super().parse_args(ctx, args))

    def invoke(self, ctx: Any) -> Any:
        with _json_errors(ctx):
            return super().invoke(ctx)


@contextmanager
def _json_errors(root: Any) -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        error.message = strip_control_chars(error.message)
        if not root.obj:
            raise
        print_json({"error": {"type": "UsageError", "message": error.format_message()}})
        raise typer.Exit(ExitCode.USAGE) from error


class DefaultCommand(typer.core.TyperGroup):
    """A group whose command of the same name runs when no subcommand is given."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = bool(args) and args[0] in self.commands
        return list(super().parse_args(ctx, args if named else [str(self.name), *args]))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return (None if name == self.name else name), command, rest


def _repeat(args: Sequence[str], repeatable: set[str]) -> list[str]:
    """Turn `--documents a b` into `--documents a --documents b`."""
    result: list[str] = []
    option_name: str | None = None
    n_values = 0
    for index, arg in enumerate(args):
        if arg == "--":
            return [*result, *args[index:]]
        if arg.startswith("-") and arg != STDIN:
            name, equals, _ = arg.partition("=")
            option_name, n_values = (name if name in repeatable else None), len(equals)
        elif option_name is not None:
            if n_values:
                result.append(option_name)
            n_values += 1
        result.append(arg)
    return result


def option(flag: str, metavar: str | None, text: str, default: bool | str = True, panel: str | None = None) -> Any:
    """Describe an option in an `Annotated` type; `default` describes in words what a default of None means."""
    return typer.Option(flag, metavar=metavar, help=text, show_default=default, rich_help_panel=panel)


# -- options that several commands share ----------------------------------------------------------------------

LlmOption = Annotated[str, option("--llm", "NAME", "The frozen LLM: a known name, a folder or a Hugging Face id.")]
_EMBEDDER = "The embedder: a folder or a Hugging Face id."
EmbedderOption = Annotated[str | None, option("--embedder", "PATH", _EMBEDDER, SHIPPED)]
ResumeOption = Annotated[
    bool, option("--resume/--no-resume", None, "Resume from what an interrupted run left, or start over.")
]
JsonOption = Annotated[bool, option("--json", None, "Print JSON on stdout, errors included.")]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options for an LLM and its embedder.

    Attributes:
        llm: The frozen LLM: a known name, a folder or a Hugging Face id.
        embedder: The embedder: a folder or a Hugging Face id.
        device: auto (CUDA, then CPU), cpu, cuda or cuda:N.
        dtype: Data type of the LLM: auto (bfloat16 on CUDA, float32 elsewhere), float32, bfloat16 or float16.
    """

    llm: str = DEFAULT_LLM
    embedder: str | None = field(default=None, metadata={"default": SHIPPED})
    device: str = "auto"
    dtype: str = "auto"

    def load(self, **settings: Any) -> ExtensibleLM:
        """Load both; `settings` of `ExtensibleLM.from_pretrained` add to these options or override them."""
        from extemb_core.lm import ExtensibleLM

        chosen: dict[str, Any] = {"device": self.device, "dtype": self.dtype} | settings
        return ExtensibleLM.from_pretrained(self.llm, self.embedder, **chosen)


@dataclass(frozen=True, kw_only=True)
class StoringOptions(ModelOptions):
    """Options for embeddings that are kept on disk.

    Attributes:
        ratio: The finest ratio that will be asked for.
        dtype: Data type of embeddings on disk: float16, int8 or float32.
        llm_dtype: Data type of the LLM: auto (bfloat16 on CUDA, float32 elsewhere), float32, bfloat16 or float16.
    """

    ratio: int | None = field(default=None, metadata={"default": KEPT_RATIO})
    dtype: str = "float16"
    llm_dtype: str = "auto"

    def __post_init__(self) -> None:
        """Check all settings that can be checked without an LLM, which is slow to load."""
        from extemb_core.store.format import check_dtype

        check_dtype(self.dtype)


# -- values ---------------------------------------------------------------------------------------------------


def parse_whole_numbers(flag: str, words: Sequence[str]) -> tuple[int, ...]:
    """Parse `4 8` and `4,8` alike."""
    try:
        return tuple(int(number) for word in words for number in word.split(",") if number.strip())
    except ValueError:
        message = f"{' '.join(words)!r} are not whole numbers."
        raise typer.BadParameter(message, param_hint=f"'{flag}'") from None


@contextmanager
def skipping() -> Iterator[Skipped]:
    """Yield a collector of files in folders that are not read; exit with a code at the end if one should have been."""
    skipped = Skipped()
    yield skipped
    if skipped.unreadable:
        raise typer.Exit(ExitCode.INPUT)


def print_skipped(skipped: Skipped) -> None:
    """Print on stderr which files in folders are not read."""
    for error in skipped.unreadable:
        print_note(f"warning: not read: {error}")
    if skipped.passed_over:
        names = list_names(map(str, skipped.passed_over))
        print_note(f"note: passed over, as no text, Markdown, HTML or PDF files or as links to folders: {names}")


def list_names(names: Iterable[str]) -> str:
    """Format names: the first of many, and how many more there are."""
    first, more = (names := list(names))[:_MAX_NAMES], len(names) - _MAX_NAMES
    return ", ".join(first) + (f" and {more:,} more" if more > 0 else "")


def load_documents(paths: Sequence[str], skipped: Skipped, *, stdin: bool = True) -> list[Document]:
    """Read files, folders, and `-` as text from stdin, in the order given; report files that are not read."""
    if paths.count(STDIN) > (1 if stdin else 0):
        why = "stdin can be read once." if stdin else "stdin is where the messages come from; name a file."
        raise typer.BadParameter(why)
    documents: list[Document] = []
    for path in paths:
        documents += [_read_stdin()] if path == STDIN else read_documents(Path(path), skipped=skipped)
    if skipped.unreadable and not documents:
        first, *others = skipped.unreadable
        raise DocumentError(f"{first} (nor can {len(others):,} others be read)") if others else first
    print_skipped(skipped)
    return documents


def _read_stdin() -> Document:
    text = decode_stdin(sys.stdin.buffer.read(), "stdin")
    if "\0" in text:
        raise DocumentError("stdin holds binary data (a NUL byte), not text; name PDF and HTML files instead")
    return Document(text.replace("\r\n", "\n").replace("\r", "\n"), title="stdin", metadata={"source": "stdin"})


def decode_stdin(data: bytes, name: str, encoding: str = "utf-8-sig") -> str:
    """Decode input from stdin; `name` is what an error calls it."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{name} is not valid UTF-8 at byte {error.start}; re-encode it as UTF-8 "
            "(for instance: iconv -f WINDOWS-1252 -t UTF-8)"
        ) from error
