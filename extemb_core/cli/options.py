"""What commands take: options shared by several of them, and documents from files, folders and stdin."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from extemb_core.documents import Document
from extemb_core.errors import DocumentError
from extemb_core.loaders import read_documents

STDIN = "-"
DEFAULT_LLM = "smollm2-135m-joint"  # lm.DEFAULT_LLM, whose module is too heavy to import for --help
DEFAULT_MAX_NEW_TOKENS = 256


class SeveralValues(typer.core.TyperCommand):
    """A command whose repeatable options also take several values at once: `--documents a.txt b.txt`.

    The values end at the next option or at `--`.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeatable = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        return list(super().parse_args(ctx, _repeat(args, repeatable)))


class OwnCommand(typer.core.TyperGroup):
    """A group that is a command too: the one of its own name, which is run where no other is named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = bool(args) and args[0] in self.commands
        return list(super().parse_args(ctx, args if named else [str(self.name), *args]))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return (None if name == self.name else name), command, rest


def _repeat(args: Sequence[str], repeatable: set[str]) -> list[str]:
    """`--documents a b` as `--documents a --documents b`."""
    result: list[str] = []
    option: str | None = None
    taken = 0
    for place, arg in enumerate(args):
        if arg == "--":
            return [*result, *args[place:]]
        if arg in repeatable:
            option, taken = arg, 0
        elif arg.startswith("-") and arg != STDIN:
            option = next((name for name in repeatable if arg.startswith(f"{name}=")), None)
            taken = 1
        elif option is not None:
            if taken:
                result.append(option)
            taken += 1
        result.append(arg)
    return result


def parse_ratio(value: str) -> str | int:
    """`auto`, `raw` or a whole number."""
    if value in ("auto", "raw"):
        return value
    try:
        return int(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is not auto, raw or a whole number.", param_hint="'--ratio'") from None


LlmOption = Annotated[
    str, typer.Option("--llm", metavar="NAME", help="The frozen LLM: a known name, a folder or a Hugging Face id.")
]
EmbedderOption = Annotated[
    str | None,
    typer.Option(
        "--embedder",
        metavar="PATH",
        help="The embedder: a folder or a Hugging Face id.",
        show_default="the one shipped for the LLM",
    ),
]
FinestRatioOption = Annotated[
    int | None,
    typer.Option(
        "--ratio",
        metavar="N",
        help="The finest ratio that will be asked for.",
        show_default="what the embedder keeps: 2, or its finest",
    ),
]
StoredDtypeOption = Annotated[
    str, typer.Option("--dtype", metavar="NAME", help="Of embeddings on disk: float16, int8 or float32.")
]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="DIR",
        help="Keep compressed documents in this folder, and take them from there the next time.",
        show_default="in memory",
    ),
]
DocumentsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--documents",
        metavar="FILE...",
        help="Files and folders to read, best first: text, Markdown, HTML, PDF; - is text from stdin.",
    ),
]
RatioOption = Annotated[
    str,
    typer.Option(
        "--ratio",
        metavar="auto|raw|N",
        help="Tokens per extensible embedding: one ratio for all documents, raw text, or the finest that fits.",
    ),
]
BudgetOption = Annotated[
    int | None,
    typer.Option(
        "--budget",
        metavar="N",
        help="Positions of the LLM's window that the documents may take.",
        show_default="all that is free",
    ),
]
SessionBudgetOption = Annotated[
    int | None,
    typer.Option(
        "--budget",
        metavar="N",
        help="Positions of the LLM's window that the documents may take.",
        show_default="half of the window",
    ),
]
MaxNewTokensOption = Annotated[int, typer.Option("--max-new-tokens", metavar="N", help="Longest answer, in tokens.")]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", metavar="X", help="0 is greedy and repeatable; above, tokens are drawn.")
]
SeedOption = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", help="Draw the same tokens again.", show_default="another each time"),
]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="NAME", help="auto (CUDA, then CPU), cpu, cuda or cuda:N.")
]
_LLM_DTYPE = "Of the LLM: auto (bfloat16 on CUDA, float32 elsewhere), float32, bfloat16 or float16."
DtypeOption = Annotated[str, typer.Option("--dtype", metavar="NAME", help=_LLM_DTYPE)]
LlmDtypeOption = Annotated[str, typer.Option("--llm-dtype", metavar="NAME", help=_LLM_DTYPE)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, errors included.")]


def load_documents(paths: Sequence[str], *, stdin: bool = True) -> list[Document]:
    """Read files, folders, and `-` as text from stdin, in the order given."""
    if paths.count(STDIN) > (1 if stdin else 0):
        why = "stdin can be read once." if stdin else "stdin is where the messages come from; name a file."
        raise typer.BadParameter(why)
    if "" in paths:  # which Path would take for the current folder
        raise typer.BadParameter("an empty name is not a file.")
    documents: list[Document] = []
    for path in paths:
        documents += [_read_stdin()] if path == STDIN else read_documents(Path(path))
    return documents


def _read_stdin() -> Document:
    data = sys.stdin.buffer.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"stdin is not valid UTF-8 at byte {error.start}; re-encode it as UTF-8 "
            "(for instance: iconv -f WINDOWS-1252 -t UTF-8)"
        ) from error
    if "\0" in text:
        raise DocumentError("stdin holds binary data (a NUL byte), not text; name PDF and HTML files instead")
    return Document(text.replace("\r\n", "\n").replace("\r", "\n"), title="stdin", metadata={"source": "stdin"})
