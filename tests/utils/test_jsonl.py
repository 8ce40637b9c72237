"""Rows are read line by line, however long a line is and wherever blocks end."""

from __future__ import annotations

import json

import pytest

from extemb_core.errors import DocumentError
from extemb_core.utils.jsonl import evenly, read_jsonl


@pytest.mark.parametrize("block", [1, 2, 7, 100_000])
def test_lines_are_those_of_the_file_wherever_blocks_end(tmp_path, monkeypatch, block):
    monkeypatch.setattr("extemb_core.utils.jsonl._BLOCK_BYTES", block)
    file = tmp_path / "a.jsonl"
    for text in ("", "\n", '{"a": 1}', '{"a": 1}\n\n{"b": "zwölf"}\r\n', '\n\n{"a": 1}\n{"b": 2}'):
        file.write_bytes(text.encode())
        expected = [(at, json.loads(line)) for at, line in enumerate(text.split("\n"), 1) if line.strip()]
        assert list(read_jsonl(file)) == expected


def test_a_long_line_costs_as_much_as_its_length(tmp_path, monkeypatch):
    """Were it copied with each of its 40,000 blocks, this would take minutes."""
    monkeypatch.setattr("extemb_core.utils.jsonl._BLOCK_BYTES", 500)
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "x" * 20_000_000}) + "\n{}\n")
    assert [len(row.get("text", "")) for _, row in read_jsonl(file)] == [20_000_000, 0]


def test_half_a_character_is_told_with_its_line_and_a_whole_one_is_read(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": "\\ud83d\\ude00", "b": "\\\\ud83d"}\n{"a": ["x", {"\\ud83d": 1}]}\n')
    rows = read_jsonl(file)
    assert next(rows) == (1, {"a": "😀", "b": "\\ud83d"})
    with pytest.raises(
        DocumentError, match=r"a.jsonl, line 2: '\\ud83d' is half of a character.*fix or remove the row"
    ):
        next(rows)


def test_a_byte_order_mark_alone_is_an_empty_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf\r\n{"a": 1}\r\n')
    assert list(read_jsonl(file)) == [(2, {"a": 1})]


@pytest.mark.parametrize("count", [2, 5, 300, 400, 585])
def test_what_a_limit_chooses_is_among_what_nearly_twice_of_it_does(count):
    items = range(count)
    assert evenly(items, 1) == [0]
    for limit in range(2, count + 1):
        chosen = evenly(items, limit)
        assert (len(set(chosen)), chosen[0], chosen[-1]) == (limit, 0, count - 1)
        assert set(chosen) <= set(evenly(items, 2 * limit - 1))
