"""`extemb index add | refresh | remove | search | stats | verify`: a library of documents in a folder."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from extemb_core.cli import options, output
from extemb_core.cli.config_options import options_from
from extemb_core.cli.options import CommandGroup, JsonOption, option
from extemb_core.cli.store import print_verified, require_store
from extemb_core.library import N_PASSAGES, PASSAGE_TOKENS
from extemb_core.loaders import HTML_SUFFIXES, SUPPORTED_SUFFIXES
from extemb_core.utils.validation import path_of, whole_number

app = CommandGroup(no_args_is_help=True, help="A library: documents compressed once, found and asked for ever after.")

LibraryArgument = Annotated[str, typer.Argument(metavar="DIR", help="The library's folder.")]


@dataclass(frozen=True, kw_only=True)
class AddOptions(options.StoringOptions):
    """Options of `extemb index add`.

    Attributes:
        documents: Files and folders to add or bring up to date.
        encoder: A sentence-transformers model that finds passages.
        passage_tokens: Maximum tokens of a passage; unchanged documents keep their passages.
        prune: Remove the documents whose files are gone from these folders.
    """

    documents: tuple[str, ...]
    encoder: str | None = field(default=None, metadata={"default": "static vectors from the wordllama wheel"})
    passage_tokens: int = PASSAGE_TOKENS
    prune: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number(self.passage_tokens, "passage_tokens", remedy=f"e.g. {PASSAGE_TOKENS}")


@app.command()
@options_from(AddOptions)
def add(library: LibraryArgument, as_json: JsonOption = False, **settings: Any) -> None:
    """Add documents to a library, which is made if it does not exist; unchanged documents cost nothing.

    Finished work is on disk every few thousand tokens: after Ctrl-C the same command goes on.
    """
    given = AddOptions(**settings)
    paths = [path_of(name) for name in given.documents]
    with options.skipping() as skipped:
        with output.library_output():
            from extemb_core.library.library import Library, as_documents

            near = path_of(library).resolve().parent
            documents = list(as_documents(paths, near, skipped))  # before a library is made in vain
            lm, names = given.load(dtype=given.llm_dtype), ("encoder", "ratio", "passage_tokens", "dtype")
            with Library(library, lm, **{name: getattr(given, name) for name in names}) as opened:
                added = opened.add(documents)
                sources = (record["source"] for record in opened.documents() if _was_read(record))
                gone = _gone_from(paths, sources, near)
                if given.prune:
                    opened.remove(gone)
        options.print_skipped(skipped)
        if gone:
            done = "removed" if given.prune else "still in the library; --prune removes them"
            output.print_note(f"note: {len(gone):,} files are gone, and {done}: {options.list_names(gone)}")
        message = (
            f"{added.added:,} documents added, {added.updated:,} brought up to date, {added.unchanged:,} unchanged; "
            f"{added.n_passages:,} passages, {added.compressed_tokens:,} tokens compressed in {added.seconds:.1f} s"
        )
        value = asdict(added) | {"gone": gone, "not_read": [str(error) for error in skipped.unreadable]}
        output.print_result(value, message, as_json=as_json)


def _was_read(record: Mapping[str, Any]) -> bool:
    """Return whether a document has the source and title that files give; others came from Python or a client."""
    if "source" not in record["metadata"] or record["title"] is None:
        return False
    file = Path(record["source"])
    return bool(record["title"] == file.name or file.suffix.lower() in HTML_SUFFIXES)


def _gone_from(paths: Iterable[Path], sources: Iterable[str], near: Path) -> list[str]:
    """List the sources, relative to `near`, that name a file in these folders that no longer exists."""
    folders = [path.resolve() for path in paths if path.is_dir()]
    return [
        source
        for source in sources
        if (file := near / source).suffix.lower() in SUPPORTED_SUFFIXES  # otherwise it did not come from a folder
        and "://" not in source  # a web page, added by Python
        and _is_gone(file)
        and any(file.resolve().is_relative_to(folder) for folder in folders)
        and not re.search(r"\\x[0-9a-f]{2}", source)  # a name that was not UTF-8, and is stored escaped
    ]


def _is_gone(file: Path) -> bool:
    """Return whether a file is gone; one that cannot be looked at (no permission, no disk) may be there."""
    try:
        os.lstat(file)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        pass
    return False


@app.command()
@options_from(options.StoringOptions, "llm", "embedder", "ratio", "device", "llm_dtype")
def refresh(library: LibraryArgument, as_json: JsonOption = False, **settings: Any) -> None:
    """Compress again, from the texts in a library, the documents that another embedder compressed.

    So are those whose embeddings are lost or damaged. Finished work is on disk every few thousand tokens: after Ctrl-C
    the same command goes on.
    """
    given = options.StoringOptions(**settings)
    with output.library_output():
        from extemb_core.library.library import Library

        require_store(library)
        with Library(library, given.load(dtype=given.llm_dtype), ratio=given.ratio) as opened:
            refreshed = opened.refresh()
    message = (
        f"{refreshed.updated:,} documents compressed anew, {refreshed.unchanged:,} were up to date; "
        f"{refreshed.compressed_tokens:,} tokens compressed in {refreshed.seconds:.1f} s"
    )
    output.print_result(refreshed, message, as_json=as_json)


@app.command()
def remove(
    library: LibraryArgument,
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="As `extemb index stats` lists them.")],
    as_json: JsonOption = False,
) -> None:
    """Remove documents by their sources. Unknown sources are named, and make the exit code 3.

    The others are removed all the same.
    """
    from extemb_core.library.library import Library

    require_store(library)
    with output.library_output(), Library(library) as opened:
        sources = list(dict.fromkeys(sources))
        missing = [source for source in sources if not opened.remove(source)]
    n_removed = len(sources) - len(missing)
    value = {"removed": n_removed} | ({"missing": missing} if missing else {})
    output.print_result(value, f"{n_removed:,} of {len(sources):,} were there and are gone", as_json=as_json)
    if missing:
        output.print_note(
            f"warning: not in the library: {options.list_names(missing)}; `extemb index stats {shlex.quote(library)}` "
            "lists what is"
        )
        raise typer.Exit(output.ExitCode.INPUT)


@app.command()
def search(
    library: LibraryArgument,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What the passages should be about.")],
    k: Annotated[int, option("--k", "N", "Maximum number of passages.")] = N_PASSAGES,
    as_json: JsonOption = False,
) -> None:
    """Show the passages nearest to a question, best first."""
    from extemb_core.library.library import Library

    with output.library_output(), Library(library, mode="r") as opened:
        passages = opened.search(question, k)
    if as_json:
        output.print_json({"passages": [asdict(passage) for passage in passages]})
        return
    for passage in passages:
        output.print_line(f"{passage.source}:{passage.start}-{passage.end}  {passage.score:.4f}")
        output.print_line("  " + " ".join(passage.text.split())[:200])


@app.command()
def stats(
    library: LibraryArgument,
    llm: Annotated[
        str | None, option("--llm", "NAME", "Count the documents that another embedder than this LLM's compressed.")
    ] = None,
    embedder: options.EmbedderOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the documents of a library, their sizes, and which embedders compressed them."""
    from extemb_core.library.library import Library

    if embedder is not None and llm is None:
        raise typer.BadParameter("an embedder belongs to an LLM; pass --llm too", param_hint="'--embedder'")
    with output.library_output():
        lm = options.ModelOptions(llm=llm, embedder=embedder).load() if llm is not None else None
        with Library(library, lm, mode="r") as opened:
            documents = list(opened.documents())
            store = opened.store.stats()
            embedders, n_stale = opened.embedders, opened.n_stale
    if as_json:
        value = {"documents": documents, "store": asdict(store), "embedders": embedders}
        output.print_json(value if lm is None else value | {"stale": n_stale})
        return
    rows = [(record["source"], record["n_chars"], record["n_passages"]) for record in documents]
    output.print_table(("source", "characters", "passages"), rows)
    output.print_note(
        f"{len(documents):,} documents, {store.n_documents:,} compressed passages, {store.live_bytes:,} bytes of "
        f"embeddings, {store.file_bytes:,} in all"
    )
    for name, count in sorted(embedders.items()):
        output.print_note(f"{count:,} documents compressed by the embedder {name}")
    if lm is not None:
        command = ["extemb", "index", "refresh", library, "--llm", str(llm)]
        command += ["--embedder", embedder] if embedder is not None else []
        remedy = f"; compress them anew with: {shlex.join(command)}" if n_stale else ""
        output.print_note(f"{n_stale:,} documents were compressed by another embedder than {llm}'s{remedy}")


@app.command()
def verify(library: LibraryArgument, as_json: JsonOption = False) -> None:
    """Read every document of a library, its passages and their embeddings, and compare them with their checksums."""
    from extemb_core.library.library import Library

    with Library(library, mode="r") as opened:
        print_verified(opened.verify(), as_json=as_json)
