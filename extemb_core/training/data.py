"""Training text, tokenised once into a memory-mapped file and cut into samples.

A token file is a folder: `tokens.bin` (uint16 or uint32), `offsets.npy` (documents' ends, int64) and `meta.json`.
It is built in a temporary folder and renamed, so a folder under its final name is always whole; the next build removes
what a killed one left behind.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from extemb_core.errors import ConfigError, DocumentError, DocumentNotFoundError
from extemb_core.models.llm import LLM
from extemb_core.utils.files import locked, parse_json, partial_folder, sha256_of
from extemb_core.utils.jsonl import evenly, is_jsonl, read_jsonl, read_text_file
from extemb_core.utils.progress import progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenFile:
    """Documents as token ids on disk. `tokens`: (all tokens,) memory-mapped; `offsets`: (documents + 1,)."""

    tokens: np.ndarray[Any, Any]
    offsets: np.ndarray[Any, Any]
    meta: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> TokenFile:
        """Open what `build` made; raise `DocumentError` if it is something else, or damaged."""
        try:
            meta = parse_json((folder / "meta.json").read_text(encoding="utf-8"))
            if meta["dtype"] not in ("uint16", "uint32"):
                raise ValueError(f"tokens of type {meta['dtype']!r:.80}")
            offsets = np.load(folder / "offsets.npy", allow_pickle=False)
            if not offsets[-1]:
                return cls(np.empty(0, dtype=meta["dtype"]), offsets, meta)
            tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
            if len(tokens) != offsets[-1]:
                raise ValueError(f"{len(tokens):,} tokens where {offsets[-1]:,} belong")
            return cls(tokens, offsets, meta)
        except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
            raise DocumentError(
                f"{folder} is not a folder of tokens ({error}); pass text files, and remove it if it is in a cache"
            ) from error

    @classmethod
    def build(cls, files: Sequence[Path], llm: LLM, cache: Path, *, show_progress: bool | None = None) -> TokenFile:
        """Tokenise text files (.jsonl, .jsonl.zst with a "text" field, .txt, .md), or open what was built before.

        Args:
            files: Files of documents; or one folder of tokens, which is opened.
            llm: LLM whose tokenizer encodes them.
            cache: Folder that holds one sub-folder per set of files and tokenizer.
            show_progress: Show a bar; None shows it on a terminal.

        Raises:
            DocumentError: A row is not JSON with a text; the message has the file and line.
            ConfigError: The cache cannot be written to.
        """
        if len(files) == 1 and files[0].is_dir():
            made = cls.open(files[0])
            if made.meta.get("tokenizer", llm.tokenizer_digest) != llm.tokenizer_digest:
                raise DocumentError(
                    f"{files[0]} holds the tokens of another tokenizer than {llm.name}'s; pass text files"
                )
            return made
        digest = hashlib.sha256(llm.tokenizer_digest.encode())
        for file in files:
            if not file.is_file():
                raise DocumentNotFoundError(f"{file} does not exist; pass .jsonl, .jsonl.zst, .txt or .md files")
            digest.update(f"{sha256_of(file)} {is_jsonl(file)}".encode())  # its suffix says if it holds rows
        folder = cache / f"tokens-{digest.hexdigest()[:16]}"
        if not folder.is_dir():
            with locked(folder, ConfigError, "pass another --output, or cache="):
                if not folder.is_dir():  # another process may have built it while this one waited
                    with partial_folder(folder) as unfinished:
                        _tokenise(files, llm, unfinished, show_progress)
                        unfinished.rename(folder)
        return cls.open(folder)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_tokens(self) -> int:
        return int(self.offsets[-1])


class Samples:
    """Windows of consecutive tokens of one document each; a map-style dataset.

    A document is cut into windows of `length` tokens; a last window with fewer than `shortest` is left out, and
    so are documents shorter than that (`left_out` counts the tokens). Items are int64 arrays of (T,) ids.
    """

    def __init__(self, file: TokenFile, length: int, shortest: int, limit: int | None = None) -> None:
        self.file = file
        spans: list[tuple[int, int]] = []
        for start, stop in zip(file.offsets[:-1], file.offsets[1:], strict=True):
            spans += [(int(at), int(min(at + length, stop))) for at in range(int(start), int(stop), length)]
        spans = [(start, stop) for start, stop in spans if stop - start >= shortest]
        self.left_out = file.n_tokens - sum(stop - start for start, stop in spans)
        self.spans = evenly(spans, limit)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, stop = self.spans[index]
        return {"input_ids": np.asarray(self.file.tokens[start:stop], dtype=np.int64), "index": index}


def read_texts(file: Path) -> Iterator[str]:
    """Yield the documents of a .jsonl or .jsonl.zst file (field "text"), or the whole of any other text file."""
    if not is_jsonl(file):
        yield read_text_file(file)
        return
    for number, row in read_jsonl(file):
        if "text" not in row:
            raise DocumentError(f'{file}, line {number}: each row must have a "text"; fix or remove the row')
        if not isinstance(row["text"], str):
            kind = type(row["text"]).__name__
            raise DocumentError(f'{file}, line {number}: "text" is {kind}, not a string; fix or remove the row')
        yield row["text"]


def _tokenise(files: Sequence[Path], llm: LLM, folder: Path, show_progress: bool | None) -> None:
    dtype = "uint16" if len(llm.tokenizer) <= np.iinfo(np.uint16).max + 1 else "uint32"
    offsets = [0]
    seen: set[bytes] = set()
    skipped = 0
    with (folder / "tokens.bin").open("wb") as out, progress("tokenise", len(files), show_progress) as advance:
        for file in files:
            for text in read_texts(file):
                key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
                if not text.strip() or key in seen:
                    skipped += 1
                    continue
                seen.add(key)
                try:
                    ids = llm.encode(text).astype(dtype)
                except DocumentError as error:
                    raise DocumentError(f"{file}, document {len(offsets)}: {error}") from error
                out.write(ids.tobytes())
                offsets.append(offsets[-1] + len(ids))
            advance(1)
        out.flush()
        os.fsync(out.fileno())
    if skipped:
        logger.info("%d empty or repeated documents were left out", skipped)
    np.save(folder / "offsets.npy", np.array(offsets, dtype=np.int64))
    meta = {"dtype": dtype, "documents": len(offsets) - 1, "tokens": offsets[-1], "left_out": skipped,
            "tokenizer": llm.tokenizer_digest}  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
