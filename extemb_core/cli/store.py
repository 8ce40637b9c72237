"""`extemb store stats | verify | gc | export | import`: looking after a store of embeddings."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from extemb_core.cli.options import JsonOption
from extemb_core.cli.output import ExitCode, library_output, print_json, print_note, reported
from extemb_core.cli.tables import show_table

app = typer.Typer(no_args_is_help=True, help="A store of embeddings: what is in it, checking it, moving it.")

StoreArgument = Annotated[str, typer.Argument(metavar="DIR", help="The store's folder.")]


@app.command()
@reported
def stats(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Show what is in a store, and what it takes."""
    from extemb_core.store.store import EmbeddingStore

    with EmbeddingStore.open(store, "r") as opened:
        found = opened.stats()
    if as_json:
        print_json(asdict(found))
        return
    rows = [
        ("documents", f"{found.n_documents:,}"),
        ("tokens", f"{found.n_tokens:,}"),
        ("embeddings", f"{found.n_embeddings:,}"),
        ("bytes of embeddings", f"{found.live_bytes:,}"),
        ("bytes that gc would free", f"{found.block_bytes - found.live_bytes:,}"),
        ("bytes of the file", f"{found.file_bytes:,}"),
        *((f"documents of embedder {name}", f"{count:,}") for name, count in sorted(found.by_fingerprint.items())),
    ]
    show_table(("what", "how much"), rows, numbers=("how much",))


@app.command()
@reported
def verify(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Read every document of a store and compare it with its checksum."""
    from extemb_core.store.store import EmbeddingStore

    with EmbeddingStore.open(store, "r") as opened:
        found = opened.verify()
    if as_json:
        print_json(asdict(found) | {"clean": found.clean})
    else:
        for ref, _, reason in found.damaged:
            typer.echo(f"damaged: {ref}: {reason}")
        for problem in found.problems:
            typer.echo(f"problem: {problem}")
        print_note(f"{found.n_documents:,} documents are what was written, {len(found.damaged):,} are not")
    if not found.clean:
        raise typer.Exit(ExitCode.FAILURE)


@app.command()
@reported
def gc(
    store: StoreArgument,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", metavar="FINGERPRINT", help="Remove the documents of all other embedders first."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Free what nothing refers to; the file does not shrink, its space is used again."""
    from extemb_core.store.store import EmbeddingStore

    with EmbeddingStore.open(store) as opened:
        freed = opened.gc(keep=keep)
    if as_json:
        print_json({"freed_bytes": freed})
    else:
        print_note(f"{freed:,} bytes are free for new documents")


@app.command("export")
@reported
def export_(
    store: StoreArgument,
    output: Annotated[str, typer.Option("--output", metavar="DIR", help="Folder for the shards; a new or empty one.")],
    as_json: JsonOption = False,
) -> None:
    """Write a store into safetensors shards with a manifest."""
    from extemb_core.store.store import EmbeddingStore
    from extemb_core.store.transfer import export_store

    with library_output(), EmbeddingStore.open(store, "r") as opened:
        shards = export_store(opened, output)
    count = sum(shard.n_documents for shard in shards)
    if as_json:
        print_json({"n_documents": count, "shards": [asdict(shard) for shard in shards]})
    else:
        print_note(f"{count:,} documents in {len(shards):,} shards in {output}")


@app.command("import")
@reported
def import_(
    store: StoreArgument,
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="A folder of shards with its manifest, or its URL.")],
    as_json: JsonOption = False,
) -> None:
    """Put the documents of a folder of shards into a store, which is made if it is not there."""
    from extemb_core.store.shards import read_manifest
    from extemb_core.store.store import EmbeddingStore
    from extemb_core.store.transfer import import_shards

    read_manifest(shards, verify=False)  # before a store is made for nothing
    with library_output(), EmbeddingStore.open(store) as opened:
        count = import_shards(opened, shards)
    if as_json:
        print_json({"n_documents": count})
    else:
        print_note(f"{count:,} documents from {shards}")
