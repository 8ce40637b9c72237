"""Question files (JSON Lines with "id", "context", "question" and "answers", plain or .zst), and how they are put."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from statistics import median
from typing import Any

from extemb_core.errors import DocumentError
from extemb_core.utils.jsonl import is_jsonl, read_jsonl
from extemb_core.utils.validation import path_of

_LONG_ANSWER_WORDS = 12


_FIELDS = '"id", "context", "question" (text) and "answers" (a list of text)'


@dataclass(frozen=True)
class Question:
    """One question about one text; `answers` are its reference answers."""

    id: str
    context: str
    question: str
    answers: tuple[str, ...]

    @cached_property
    def document(self) -> str:
        """Name of the text: the same for all questions about it."""
        return hashlib.sha256(self.context.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def read_questions(files: Sequence[str | os.PathLike[str]], *, unique: bool = True) -> list[Question]:
    """Read all rows of some files.

    Args:
        files: .jsonl or .jsonl.zst.
        unique: Require that no id occurs twice; training does not need that.

    Raises:
        DocumentError: A row is not a question, or its id occurs twice; the message has the file and line.
    """
    questions: list[Question] = []
    seen: dict[str, str] = {}
    for file in map(path_of, files):
        if not is_jsonl(file):
            raise DocumentError(f"{file} is not .jsonl or .jsonl.zst; pass rows with {_FIELDS}")
        for number, row in read_jsonl(file):
            where = f"{file}, line {number}"
            question = _question(row, where)
            if unique and question.id in seen:
                raise DocumentError(f'{where}: the "id" {question.id!r} stands in {seen[question.id]} too; rename one')
            seen[question.id] = where
            questions.append(question)
    return questions


def _question(row: dict[str, Any], where: str) -> Question:
    for name in ("id", "context", "question", "answers"):
        value = row.get(name)
        texts = value if name == "answers" else [value]
        if not (isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)):
            problem = f"is {value!r:.40}" if name in row else "is missing"
            raise DocumentError(f'{where}: "{name}" {problem}; a row needs {_FIELDS}')
    return Question(row["id"], row["context"], row["question"], tuple(row["answers"]))


@cache
def templates() -> Mapping[str, Mapping[str, Any]]:
    """Read the prompts that questions are evaluated with, by name."""
    file = resources.files("extemb_core") / "question_templates.json"
    return dict(json.loads(file.read_text(encoding="utf-8")))


def template_for(answers: Sequence[str]) -> str:
    """Choose the prompt that goes with these reference answers: yes or no, sentences, or a few words."""
    if all(re.fullmatch("yes|no", answer.strip(), re.IGNORECASE) for answer in answers):
        return "yes_no"
    return "long" if median(len(answer.split()) for answer in answers) > _LONG_ANSWER_WORDS else "short"
