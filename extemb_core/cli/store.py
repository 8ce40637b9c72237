"""`extemb store stats | verify | gc | export | import`: maintain a store of embeddings."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from extemb_core.cli.options import CommandGroup, JsonOption, option
from extemb_core.cli.output import ExitCode, library_output, print_json, print_line, print_result, print_table

if TYPE_CHECKING:
    from extemb_core.store.maintenance import Verified

app = CommandGroup(no_args_is_help=True, help="A store of embeddings: what is in it, checking it, moving it.")

StoreArgument = Annotated[str, typer.Argument(metavar="DIR", help="The store's folder.")]


@app.command()
def stats(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Show what is in a store, and its size."""
    from extemb_core.store.store import EmbeddingStore

    with EmbeddingStore.open(store, "r") as opened:
        totals = opened.stats()
    if as_json:
        print_json(totals)
        return
    rows = [
        ("documents", totals.n_documents),
        ("tokens", totals.n_tokens),
        ("embeddings", totals.n_embeddings),
        ("bytes of embeddings", totals.live_bytes),
        ("bytes that gc would free", totals.block_bytes - totals.live_bytes),
        ("bytes of the file", totals.file_bytes),
        *((f"documents of embedder {name}", count) for name, count in sorted(totals.by_fingerprint.items())),
    ]
    print_table(("what", "how much"), rows)


def require_store(store: str) -> None:
    """Raise `StoreNotFoundError` if a store does not exist: opening it for changes would make it."""
    from extemb_core.store.store import EmbeddingStore

    EmbeddingStore.open(store, "r").close()


@app.command()
def verify(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Read every document of a store and compare it with its checksum."""
    from extemb_core.store.store import EmbeddingStore

    with EmbeddingStore.open(store, "r") as opened:
        print_verified(opened.verify(), as_json=as_json)


def print_verified(result: Verified, *, as_json: bool) -> None:
    """Print what is damaged, and end with a failure if anything is."""
    if not as_json:
        for ref, _, reason in result.damaged:
            print_line(f"damaged: {ref}: {reason}")
        for problem in result.problems:
            print_line(f"problem: {problem}")
    message = f"{result.n_documents:,} compressed texts are what was written, {len(result.damaged):,} are not"
    message += f"; {len(result.problems):,} problems" if result.problems else ""
    print_result(asdict(result) | {"clean": result.clean}, message, as_json=as_json)
    if not result.clean:
        raise typer.Exit(ExitCode.FAILURE)


@app.command()
def gc(
    store: StoreArgument,
    keep: Annotated[
        list[str] | None, option("--keep", "FINGERPRINT", "Remove the documents of all other embedders first.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Free what nothing refers to; the file does not shrink, its space is used again."""
    from extemb_core.store.store import EmbeddingStore

    require_store(store)
    with EmbeddingStore.open(store) as opened:
        n_bytes = opened.gc(keep=keep)
    print_result({"freed_bytes": n_bytes}, f"{n_bytes:,} bytes are free for new documents", as_json=as_json)


@app.command("export")
def export_(
    store: StoreArgument,
    output: Annotated[str, option("--output", "DIR", "Folder for the shards; a new or empty one.")],
    as_json: JsonOption = False,
) -> None:
    """Write a store into safetensors shards with a manifest."""
    from extemb_core.store.store import EmbeddingStore
    from extemb_core.store.transfer import export_store

    with library_output(), EmbeddingStore.open(store, "r") as opened:
        shards = export_store(opened, output)
    count = sum(shard.n_documents for shard in shards)
    value = {"n_documents": count, "shards": [asdict(shard) for shard in shards]}
    print_result(value, f"{count:,} documents in {len(shards):,} shards in {output}", as_json=as_json)


@app.command("import")
def import_(
    store: StoreArgument,
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="A folder of shards with its manifest, or its URL.")],
    as_json: JsonOption = False,
) -> None:
    """Put the documents of a folder of shards into a store, which is made if it does not exist."""
    from extemb_core.store.shards import read_manifest
    from extemb_core.store.store import EmbeddingStore
    from extemb_core.store.transfer import import_shards

    read_manifest(shards, verify=False)  # before a store is made in vain
    with library_output(), EmbeddingStore.open(store) as opened:
        count = import_shards(opened, shards)
    print_result({"n_documents": count}, f"{count:,} documents from {shards}", as_json=as_json)
