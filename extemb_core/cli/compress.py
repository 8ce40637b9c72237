"""`extemb compress`: documents in, one safetensors file of extensible embeddings per document out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from extemb_core.cli import options
from extemb_core.cli.options import load_documents, option
from extemb_core.cli.output import library_output, print_json, print_note, print_table
from extemb_core.documents import Document

SUFFIX = ".safetensors"


def compress(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files and folders; - is text from stdin.")],
    output: Annotated[
        Path, option("--output", "PATH", f"A name ending in {SUFFIX} for one document, a folder for several.")
    ],
    ratio: Annotated[int | None, option("--ratio", "N", "Tokens per extensible embedding.", options.KEPT_RATIO)] = None,
    llm: options.LlmOption = options.DEFAULT_LLM,
    embedder: options.EmbedderOption = None,
    batch_size: Annotated[int | None, option("--batch-size", "N", "Chunks per forward pass.", "by the device")] = None,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    force: Annotated[bool, option("--force", None, "Overwrite files that are there.")] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Compress documents into safetensors files, which `Compressed.load` reads.

    A file is written whole or not at all. Empty documents are reported and leave no file.
    """
    documents = load_documents(files)
    targets = _targets(documents, output)
    existing = [target for target in targets if target.exists()]
    if existing and not force:
        more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise _misused(f"{existing[0]}{more} is there already; pass --force to overwrite.")
    with library_output():
        from extemb_core.lm import ExtensibleLM

        model = ExtensibleLM.from_pretrained(llm, embedder, device=device, dtype=dtype).embedder
        finest = model.config.finest(ratio)
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    try:
        for document, target in zip(documents, targets, strict=True):
            with library_output():
                compressed = model.compress(document.text, ratio=finest, batch_size=batch_size)
            if len(compressed):
                target.parent.mkdir(parents=True, exist_ok=True)
                compressed.save(target, metadata={"source": document.source, "title": document.title or ""})
            written = str(target) if len(compressed) else None
            row = {"source": document.source, "output": written, "ref": document.ref}
            rows.append(row | {"n_tokens": compressed.n_tokens, "positions": len(compressed)})
    except KeyboardInterrupt:
        n_written = sum(row["output"] is not None for row in rows)
        raise KeyboardInterrupt(f"interrupted; {n_written} of {len(documents)} documents are written") from None
    seconds = time.perf_counter() - start
    n_tokens = sum(row["n_tokens"] for row in rows)
    speed = n_tokens / seconds if seconds > 0 else 0.0
    if as_json:
        value = {"documents": rows, "ratio": finest, "fingerprint": model.fingerprint, "n_tokens": n_tokens}
        print_json(value | {"seconds": round(seconds, 3), "tokens_per_second": round(speed, 1)})
        return
    cells = [
        (row["source"], row["n_tokens"], row["positions"], row["output"] or "nothing: it is empty") for row in rows
    ]
    print_table(("source", "tokens", "positions", "output"), cells)
    print_note(f"{n_tokens:,} tokens at ratio {finest} in {seconds:.1f} s ({speed:,.0f} tokens/s)")


def _targets(documents: Sequence[Document], output: Path) -> list[Path]:
    """Choose one file per document; those of one name are told apart by their refs, or by a number."""
    if output.suffix == SUFFIX and not output.is_dir():
        if len(documents) > 1:
            raise _misused(f"{output} is one file and there are {len(documents)} documents; pass a folder.")
        return [output]
    if output.exists() and not output.is_dir():
        raise _misused(f"{output} is a file; pass a folder, or a name ending in {SUFFIX}.")
    stems = [Path(document.source).stem or "document" for document in documents]
    targets: list[Path] = []
    for document, stem in zip(documents, stems, strict=True):
        with_ref = f"{stem}-{document.ref[4:12]}"
        names = (stem, with_ref) if stems.count(stem) == 1 else (with_ref,)
        numbered = (f"{with_ref}-{number}" for number in range(2, len(documents) + 2))
        targets.append(
            next(path for name in (*names, *numbered) if (path := output / f"{name}{SUFFIX}") not in targets)
        )
    return targets


def _misused(message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint="'--output'")
