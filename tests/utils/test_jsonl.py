"""Rows are read line by line, however long a line is and wherever blocks end."""

from __future__ import annotations

import json

import pytest

from extemb_core.utils.jsonl import read_jsonl


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
