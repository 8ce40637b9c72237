from __future__ import annotations

import json

import pytest

from extemb_core.errors import DocumentError
from extemb_core.questions import Question, read_questions

GOOD = {"id": "a", "context": "The boat is blue.", "question": "What colour?", "answers": ["blue", "Blue"]}


def write(folder, *rows):
    file = folder / "rows.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def test_rows_become_questions_and_one_text_has_one_name(tmp_path):
    first, second = read_questions([write(tmp_path, GOOD | {"licence": "x"}, GOOD | {"id": "b", "question": "Why?"})])
    assert first == Question("a", "The boat is blue.", "What colour?", ("blue", "Blue"))
    assert first.document == second.document


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: a JSON list"),
        ({**GOOD, "id": 3}, '"id" is 3'),
        ({k: v for k, v in GOOD.items() if k != "context"}, '"context" is missing'),
        ({**GOOD, "question": " "}, "\"question\" is ' '"),
        ({**GOOD, "answers": "blue"}, "\"answers\" is 'blue'"),
        ({**GOOD, "answers": []}, '"answers" is []'),
        ({**GOOD, "answers": ["blue", None]}, '"answers" is'),
        ({"text": "a row of another file"}, '"id" is missing'),
        (GOOD, "line 2: the \"id\" 'a' stands in .*line 1 too"),
    ],
)
def test_a_row_that_is_no_question_is_named_with_its_line(tmp_path, row, message):
    with pytest.raises(DocumentError, match=message.replace("[", r"\[").replace("(", r"\(")) as caught:
        read_questions([write(tmp_path, GOOD, row)])
    assert "rows.jsonl, line 2" in str(caught.value)


def test_another_type_of_file_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("no rows")
    with pytest.raises(DocumentError, match="not .jsonl"):
        read_questions([tmp_path / "text.txt"])
