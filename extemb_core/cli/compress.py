"""`extemb compress`: compress documents into safetensors files of extensible embeddings, one per document."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from extemb_core.cli.config_options import options_from
from extemb_core.cli.options import KEPT_RATIO, JsonOption, ModelOptions, load_documents, skipping
from extemb_core.cli.output import explain_interrupt, library_output, print_json, print_note, print_table
from extemb_core.documents import Document
from extemb_core.loaders import Skipped
from extemb_core.utils.files import make_folder
from extemb_core.utils.validation import path_of, whole_number

SUFFIX = ".safetensors"
_MAX_STEM_BYTES = 200  # of a file's name, which may have 255


@dataclass(frozen=True, kw_only=True)
class CompressOptions(ModelOptions):
    """Options of `extemb compress`.

    Attributes:
        output: A name ending in .safetensors for one document, a folder for several.
        ratio: Tokens per extensible embedding.
        batch_size: Chunks per forward pass.
        force: Overwrite existing files.
    """

    output: str = field(metadata={"metavar": "PATH"})
    ratio: int | None = field(default=None, metadata={"default": KEPT_RATIO})
    batch_size: int | None = field(default=None, metadata={"default": "by the device"})
    force: bool = False

    def __post_init__(self) -> None:
        """Check all settings that can be checked without an LLM, which is slow to load."""
        if self.batch_size is not None:
            whole_number(self.batch_size, "batch_size")


@options_from(CompressOptions)
def compress(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files and folders; - is text from stdin.")],
    as_json: JsonOption = False,
    **settings: Any,
) -> None:
    """Compress documents into safetensors files, which `Compressed.load` reads.

    A file is written whole or not at all. Empty documents are reported and leave no file.
    """
    given = CompressOptions(**settings)
    with skipping() as skipped:
        _compress(load_documents(files, skipped), given, as_json=as_json, skipped=skipped)


def _compress(documents: Sequence[Document], given: CompressOptions, *, as_json: bool, skipped: Skipped) -> None:
    """Compress documents and write them to their files."""
    targets = _targets(documents, path_of(given.output))
    existing = [target for target in targets if target.exists()]
    if existing and not given.force:
        more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise _misused(f"{existing[0]}{more} is there already; pass --force to overwrite.")
    folder = targets[0].parent  # the same for all
    make_folder(folder, _misused, "pass another path.")  # before compressing what could not be written
    with library_output():
        model = given.load().embedder
        finest = model.config.finest(given.ratio)
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    with explain_interrupt(
        lambda: f"{sum(bool(row['output']) for row in rows)} of {len(documents)} documents are written"
    ):
        for document, target in zip(documents, targets, strict=True):
            with library_output():
                compressed = model.compress(document.text, ratio=finest, batch_size=given.batch_size)
            if len(compressed):
                compressed.save(target, metadata={"source": document.source, "title": document.title or ""})
            written = str(target) if len(compressed) else None
            row = {"source": document.source, "output": written, "ref": document.ref}
            rows.append(row | {"n_tokens": compressed.n_tokens, "positions": len(compressed)})
    seconds = time.perf_counter() - start
    n_tokens = sum(row["n_tokens"] for row in rows)
    speed = n_tokens / seconds if seconds > 0 else 0.0
    if as_json:
        value = {"documents": rows, "ratio": finest, "fingerprint": model.fingerprint, "n_tokens": n_tokens}
        value |= {"seconds": round(seconds, 3), "tokens_per_second": round(speed, 1)}
        print_json(value | {"not_read": [str(error) for error in skipped.unreadable]})
        return
    cells = [
        (row["source"], row["n_tokens"], row["positions"], row["output"] or "nothing: it is empty") for row in rows
    ]
    print_table(("source", "tokens", "positions", "output"), cells)
    print_note(f"{n_tokens:,} tokens at ratio {finest} in {seconds:.1f} s ({speed:,.0f} tokens/s)")


def _targets(documents: Sequence[Document], output: Path) -> list[Path]:
    """Choose one file per document; documents of the same name get their ref, or a number, in the file's name."""
    if output.suffix == SUFFIX and not output.is_dir():
        if len(documents) > 1:
            raise _misused(f"{output} is one file and there are {len(documents)} documents; pass a folder.")
        return [output]
    if output.exists() and not output.is_dir():
        raise _misused(f"{output} is a file; pass a folder, or a name ending in {SUFFIX}.")
    # A file's name may have 255 bytes: leave room for a ref, a number and the suffix.
    names_in_bytes = [os.fsencode(Path(document.source).stem or "document") for document in documents]
    stems = [name[:_MAX_STEM_BYTES].decode("utf-8", "ignore") for name in names_in_bytes]
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
