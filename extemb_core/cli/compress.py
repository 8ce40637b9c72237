"""`extemb compress`: documents in, one safetensors file of extensible embeddings per document out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from extemb_core.cli.options import (
    DEFAULT_LLM,
    DeviceOption,
    DtypeOption,
    EmbedderOption,
    JsonOption,
    LlmOption,
    load_documents,
)
from extemb_core.cli.output import library_output, print_json, print_note, reported
from extemb_core.cli.tables import show_table
from extemb_core.documents import Document

SUFFIX = ".safetensors"


@reported
def compress(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files and folders; - is text from stdin.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", metavar="PATH", help=f"A name ending in {SUFFIX} for one document, a folder for several."
        ),
    ],
    ratio: Annotated[
        int | None,
        typer.Option(
            "--ratio",
            metavar="N",
            help="Tokens per extensible embedding.",
            show_default="what the embedder keeps: 2, or its finest",
        ),
    ] = None,
    llm: LlmOption = DEFAULT_LLM,
    embedder: EmbedderOption = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", metavar="N", help="Chunks per forward pass.", show_default="by the device"),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compress documents into safetensors files, which `Compressed.load` reads.

    A file is written whole or not at all. Empty documents are reported and leave no file.
    """
    documents = load_documents(files)
    targets = _targets(documents, output)
    if not force:
        _refuse_overwriting(targets)
    with library_output():
        from extemb_core.lm import ExtensibleLM

        loaded = ExtensibleLM.from_pretrained(llm, embedder, device=device, dtype=dtype).embedder
        finest = loaded.config.finest(ratio)
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    try:
        for document, target in zip(documents, targets, strict=True):
            with library_output():
                compressed = loaded.compress(document.text, ratio=finest, batch_size=batch_size)
            if len(compressed):
                target.parent.mkdir(parents=True, exist_ok=True)
                compressed.save(target, metadata={"source": document.source, "title": document.title or ""})
            rows.append(
                {
                    "source": document.source,
                    "output": str(target) if len(compressed) else None,
                    "ref": document.ref,
                    "n_tokens": compressed.n_tokens,
                    "positions": len(compressed),
                }
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; {sum(row['output'] is not None for row in rows)} of {len(documents)} documents are written"
        ) from None
    _summary(rows, finest, loaded.fingerprint, time.perf_counter() - start, as_json=as_json)


def _targets(documents: Sequence[Document], output: Path) -> list[Path]:
    """One file per document; those of one name are told apart by their refs, or by their place."""
    if output.suffix == SUFFIX and not output.is_dir():
        if len(documents) > 1:
            raise typer.BadParameter(
                f"{output} is one file and there are {len(documents)} documents; pass a folder.",
                param_hint="'--output'",
            )
        return [output]
    if output.exists() and not output.is_dir():
        raise typer.BadParameter(
            f"{output} is a file; pass a folder, or a name ending in {SUFFIX}.", param_hint="'--output'"
        )
    stems = [Path(document.source).stem or "document" for document in documents]
    targets: list[Path] = []
    for document, stem in zip(documents, stems, strict=True):
        names = (stem, f"{stem}-{document.ref[4:12]}") if stems.count(stem) == 1 else (f"{stem}-{document.ref[4:12]}",)
        numbered = (f"{names[-1]}-{number}" for number in range(2, len(documents) + 2))
        targets.append(
            next(path for name in (*names, *numbered) if (path := output / f"{name}{SUFFIX}") not in targets)
        )
    return targets


def _refuse_overwriting(targets: Sequence[Path]) -> None:
    there = [target for target in targets if target.exists()]
    if there:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise typer.BadParameter(
            f"{there[0]}{more} is there already; pass --force to overwrite.", param_hint="'--output'"
        )


def _summary(rows: Sequence[dict[str, Any]], ratio: int, fingerprint: str, seconds: float, *, as_json: bool) -> None:
    tokens = sum(row["n_tokens"] for row in rows)
    speed = tokens / seconds if seconds > 0 else 0.0
    if as_json:
        print_json(
            {
                "documents": list(rows),
                "ratio": ratio,
                "fingerprint": fingerprint,
                "n_tokens": tokens,
                "seconds": round(seconds, 3),
                "tokens_per_second": round(speed, 1),
            }
        )
        return
    cells = [
        (row["source"], f"{row['n_tokens']:,}", f"{row['positions']:,}", row["output"] or "nothing: it is empty")
        for row in rows
    ]
    show_table(("source", "tokens", "positions", "output"), cells, numbers=("tokens", "positions"))
    print_note(f"{tokens:,} tokens at ratio {ratio} in {seconds:.1f} s ({speed:,.0f} tokens/s)")
