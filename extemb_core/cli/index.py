"""`extemb index add | refresh | remove | search | stats | verify`: a library of documents in a folder."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from extemb_core.cli.options import (
    DEFAULT_LLM,
    DeviceOption,
    EmbedderOption,
    FinestRatioOption,
    JsonOption,
    LlmDtypeOption,
    LlmOption,
    SeveralValues,
    StoredDtypeOption,
)
from extemb_core.cli.output import library_output, print_json, print_note, reported, strip_control_chars
from extemb_core.cli.store import verify
from extemb_core.cli.tables import show_table
from extemb_core.library import N_PASSAGES, PASSAGE_TOKENS

app = typer.Typer(no_args_is_help=True, help="A library: documents compressed once, found and asked for ever after.")

LibraryArgument = Annotated[str, typer.Argument(metavar="DIR", help="The library's folder.")]
EncoderOption = Annotated[
    str | None,
    typer.Option(
        "--encoder",
        metavar="NAME",
        help="A sentence-transformers model that finds passages.",
        show_default="static vectors from the wordllama wheel",
    ),
]


@app.command(cls=SeveralValues)
@reported
def add(
    library: LibraryArgument,
    documents: Annotated[
        list[str], typer.Option("--documents", metavar="FILE...", help="Files and folders to add or bring up to date.")
    ],
    llm: LlmOption = DEFAULT_LLM,
    embedder: EmbedderOption = None,
    encoder: EncoderOption = None,
    ratio: FinestRatioOption = None,
    passage_tokens: Annotated[
        int, typer.Option("--passage-tokens", metavar="N", help="Tokens of a passage at most.")
    ] = PASSAGE_TOKENS,
    dtype: StoredDtypeOption = "float16",
    device: DeviceOption = "auto",
    llm_dtype: LlmDtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Add documents to a library, which is made if it is not there; what has not changed costs nothing.

    Every few thousand tokens what is done is on disk: after Ctrl-C the same command goes on.
    """
    with library_output():
        from extemb_core.library.library import Library
        from extemb_core.lm import ExtensibleLM

        lm = ExtensibleLM.from_pretrained(llm, embedder, device=device, dtype=llm_dtype)
        settings: dict[str, Any] = {"encoder": encoder, "ratio": ratio, "passage_tokens": passage_tokens}
        with Library(library, lm, **settings, dtype=dtype) as opened:  # type: ignore[arg-type]
            added = opened.add([Path(one) for one in documents])
    if as_json:
        print_json(asdict(added))
        return
    print_note(
        f"{added.added:,} documents added, {added.updated:,} brought up to date, {added.unchanged:,} unchanged; "
        f"{added.n_passages:,} passages, {added.compressed_tokens:,} tokens compressed in {added.seconds:.1f} s"
    )


@app.command()
@reported
def refresh(
    library: LibraryArgument,
    llm: LlmOption = DEFAULT_LLM,
    embedder: EmbedderOption = None,
    ratio: FinestRatioOption = None,
    device: DeviceOption = "auto",
    llm_dtype: LlmDtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Compress anew, from the texts in a library, the documents that another embedder compressed.

    Every few thousand tokens what is done is on disk: after Ctrl-C the same command goes on.
    """
    with library_output():
        from extemb_core.library.library import Library
        from extemb_core.lm import ExtensibleLM
        from extemb_core.store.store import EmbeddingStore

        EmbeddingStore.open(library, "r").close()  # one that is not there is not made
        lm = ExtensibleLM.from_pretrained(llm, embedder, device=device, dtype=llm_dtype)
        with Library(library, lm, ratio=ratio) as opened:
            made = opened.refresh()
    if as_json:
        print_json(asdict(made))
        return
    print_note(
        f"{made.updated:,} documents compressed anew, {made.unchanged:,} were up to date; "
        f"{made.compressed_tokens:,} tokens compressed in {made.seconds:.1f} s"
    )


@app.command()
@reported
def remove(
    library: LibraryArgument,
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="As `extemb index stats` lists them.")],
    as_json: JsonOption = False,
) -> None:
    """Remove documents by their sources."""
    from extemb_core.library.library import Library

    with library_output(), Library(library) as opened:
        gone = opened.remove(sources)
    if as_json:
        print_json({"removed": gone})
    else:
        print_note(f"{gone:,} of {len(sources):,} were there and are gone")


@app.command()
@reported
def search(
    library: LibraryArgument,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What the passages should be about.")],
    k: Annotated[int, typer.Option("--k", metavar="N", help="Passages at most.")] = N_PASSAGES,
    as_json: JsonOption = False,
) -> None:
    """Show the passages nearest to a question, best first."""
    from extemb_core.library.library import Library

    with library_output(), Library(library, mode="r") as opened:
        found = opened.search(question, k)
    if as_json:
        print_json({"passages": [asdict(passage) for passage in found]})
        return
    for passage in found:
        typer.echo(strip_control_chars(f"{passage.source}:{passage.start}-{passage.end}  {passage.score:.4f}"))
        typer.echo(strip_control_chars("  " + " ".join(passage.text.split())[:200]))


@app.command()
@reported
def stats(
    library: LibraryArgument,
    llm: Annotated[
        str | None,
        typer.Option(
            "--llm", metavar="NAME", help="Count the documents that another embedder than this LLM's compressed."
        ),
    ] = None,
    embedder: EmbedderOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the documents of a library, what they take, and which embedders compressed them."""
    from extemb_core.library.library import Library

    if embedder is not None and llm is None:
        raise typer.BadParameter("an embedder belongs to an LLM; pass --llm too", param_hint="'--embedder'")
    with library_output():
        lm = None
        if llm is not None:
            from extemb_core.lm import ExtensibleLM

            lm = ExtensibleLM.from_pretrained(llm, embedder)
        with Library(library, lm, mode="r") as opened:
            documents = list(opened.documents())
            store = opened.store.stats()
            embedders, stale = opened.embedders, opened.n_stale
    if as_json:
        print_json({"documents": documents, "store": asdict(store), "embedders": embedders}
             | ({} if lm is None else {"stale": stale}))  # fmt: skip
        return
    rows = [(record["source"], f"{record['n_chars']:,}", f"{record['n_passages']:,}") for record in documents]
    show_table(("source", "characters", "passages"), rows, numbers=("characters", "passages"))
    print_note(
        f"{len(documents):,} documents, {store.n_documents:,} compressed passages, {store.live_bytes:,} bytes of "
        f"embeddings, {store.file_bytes:,} in all"
    )
    for name, count in sorted(embedders.items()):
        print_note(f"{count:,} documents compressed by the embedder {name}")
    if lm is not None:
        command = ["extemb", "index", "refresh", library, "--llm", str(llm)]
        command += ["--embedder", embedder] if embedder is not None else []
        remedy = f"; compress them anew with: {shlex.join(command)}"
        print_note(f"{stale:,} documents were compressed by another embedder than {llm}'s{remedy if stale else ''}")


app.command()(verify)  # its embeddings are a store
