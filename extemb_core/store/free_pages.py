"""Tell whether an LMDB file was cut: whether pages that are in use lie beyond its end.

A last page beyond the end is no proof: LMDB also counts pages that a transaction took at the end of the file and gave
back before its commit, and never writes them. They are in its list of free pages, which the package lmdb does not
expose, so that list is read here, as LMDB 0.9 writes it on little-endian machines (version 1 of its format).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_HEADER = struct.Struct("<QHHHH")  # of a page: number, padding, flags, end of its pointers, begin of its nodes
_META = struct.Struct("<IIQQ" + 2 * "IHHQQQQQ" + "QQ")  # two trees, the free pages' first: its padding is the page size
_NODE = struct.Struct("<HHHH")  # low and high half of a size, or of a page number with the flags above it; bytes of key
_LEAF, _ELSEWHERE = 0x02, 0x01  # flags of a page, and of a node whose data is on pages of its own
_NO_ROOT = 2**64 - 1
_NUMBER = struct.Struct("<Q")


def is_cut(file: Path, transaction_id: int) -> bool:
    """Return whether a page in use lies beyond the end of a file, in the state that an open transaction sees."""
    with file.open("rb") as stream:
        try:
            page_size = _META.unpack(_read(stream, _HEADER.size, _META.size))[4]
            start = transaction_id % 2 * page_size  # two pages hold the last two states, alternately
            fields = _META.unpack(_read(stream, start + _HEADER.size, _META.size))
            root, last, state = fields[11], fields[-2], fields[-1]
            there = stream.seek(0, 2) // page_size
            beyond = sum(number >= there for number in _free_pages(stream, page_size, root))
        except (EOFError, struct.error, RecursionError):  # the list of free pages itself is incomplete
            return True
    return bool(state != transaction_id or beyond < last + 1 - there)


def _free_pages(stream: BinaryIO, page_size: int, number: int) -> Iterator[int]:
    """Yield the numbers of all free pages in the subtree of a page."""
    if number == _NO_ROOT:
        return
    page = _read(stream, number * page_size, page_size)
    _, _, flags, end, _ = _HEADER.unpack_from(page)
    for (at,) in struct.iter_unpack("<H", page[_HEADER.size : end]):
        low, high, above, n_key = _NODE.unpack_from(page, at)
        data = at + _NODE.size + n_key
        if not flags & _LEAF:
            yield from _free_pages(stream, page_size, low | high << 16 | above << 32)
            continue
        size = low | high << 16
        if above & _ELSEWHERE:
            (first,) = _NUMBER.unpack_from(page, data)
            numbers = _read(stream, first * page_size + _HEADER.size, size)
        else:
            numbers = page[data : data + size]
        count, *listed = struct.unpack(f"<{size // _NUMBER.size}Q", numbers)
        yield from listed[:count]


def _read(stream: BinaryIO, start: int, size: int) -> bytes:
    stream.seek(start)
    if len(data := stream.read(size)) < size:
        raise EOFError
    return data
