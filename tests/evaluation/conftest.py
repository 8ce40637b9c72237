"""A text, and questions on short contexts, in files."""

from __future__ import annotations

import json

import pytest
from tiny import SENTENCES


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n".join(f"{at}. {SENTENCES}" for at in range(30)))
    return file


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.jsonl"
    rows = [
        {"id": f"q:{at}", "context": f"Ship {at} is {c}. " * 3, "question": "Which colour?", "answers": [c]}
        for at, c in enumerate(("red", "blue", "green"))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
