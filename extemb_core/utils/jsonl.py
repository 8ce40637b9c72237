"""Read data files: JSON Lines or plain text, also compressed with zstd. Errors name file and line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from extemb_core.errors import DocumentError, DocumentNotFoundError, optional_import
from extemb_core.utils.files import parse_json

_BLOCK_BYTES = 1 << 16
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Item = TypeVar("Item")


def is_jsonl(file: Path) -> bool:
    """Return whether a file's name says that it holds JSON Lines."""
    return file.name.removesuffix(".zst").endswith(".jsonl")


def read_jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a .jsonl or .jsonl.zst file with their line numbers, from 1; empty lines are skipped.

    Raises:
        DocumentError: A line is not a JSON object in UTF-8, or holds a lone surrogate, or the compressed data is
            damaged.
    """
    for number, line in enumerate(_lines(_blocks_of(file)), 1):
        if not (text := _decoded(line, file, number)).strip():
            continue
        try:
            row = parse_json(text)
        except ValueError as error:
            raise DocumentError(f"{file}, line {number}: not JSON ({error}); fix or remove the row") from error
        if not isinstance(row, dict):
            raise DocumentError(
                f"{file}, line {number}: a JSON {type(row).__name__}, not an object; fix or remove the row"
            )
        if _SURROGATE.search(text):  # written as an escape, as UTF-8 has no surrogates
            try:
                json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise DocumentError(
                    f"{file}, line {number}: {error.object[error.start]!r} is half of a character, as a text has that "
                    "was cut within an emoji; fix or remove the row"
                ) from error
        yield number, row


def read_text_file(file: Path) -> str:
    """Read the text of a file that does not hold rows."""
    return _decoded(b"".join(_blocks_of(file)), file, 1)


def _blocks_of(file: Path) -> Iterator[bytes]:
    if not file.is_file():
        raise DocumentNotFoundError(f"{file} does not exist; check the path")
    return _decompressed(file) if file.suffix == ".zst" else _blocks(file)


def _blocks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        yield from iter(partial(stream.read, _BLOCK_BYTES), b"")


def _decompressed(file: Path) -> Iterator[bytes]:
    """Decompress all frames of a .zst file. The package's own stream reader does not notice a truncated file."""
    zstandard = optional_import("zstandard", "train", f"reading {file.name}")
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = None
    try:
        for compressed in _blocks(file):
            rest = compressed
            while rest:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(rest)
                rest, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise DocumentError(f"{file} is not a whole .zst file ({error}); get it again") from error
    if frame is not None:
        raise DocumentError(f"{file} ends in the middle of its compressed data; get it again")


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []  # of one line, which may span many blocks
    for block in blocks:
        end, *lines = block.split(b"\n")
        parts.append(end)
        for line in lines:
            yield b"".join(parts)
            parts = [line]
    yield b"".join(parts)


def _decoded(data: bytes, file: Path, line: int) -> str:
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")  # a file may begin with a byte order mark
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start)
        raise DocumentError(f"{file}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from error


def evenly(items: Sequence[Item], limit: int | None) -> list[Item]:
    """Choose at most `limit` items, evenly from all of them, so that every part of a file has its share.

    The items chosen for a limit of n are among those for 2n - 1.
    """
    if limit is None or limit >= len(items):
        return list(items)
    return [items[at * (len(items) - 1) // max(1, limit - 1)] for at in range(limit)]
