"""Make targets for question training: the LLM's own answers from the full text, where these are right.

An answer in the LLM's own words is easier to learn than a reference in another's (sequence-level distillation, as in
PISCO and CompLLM). If its own answer does not agree with a reference, the reference stays the target.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from extemb_core.context.assembly import assemble_chat
from extemb_core.errors import ConfigError
from extemb_core.evaluation.metrics import f1
from extemb_core.models.entry import PromptInputs
from extemb_core.models.generation import Sampling
from extemb_core.models.llm import LLM
from extemb_core.questions import Question, read_questions, template_for, templates
from extemb_core.utils.files import atomic_write_text, sha256_of
from extemb_core.utils.journal import Journal, to_json
from extemb_core.utils.progress import progress
from extemb_core.utils.validation import path_of, whole_number

_AGREEMENT = 0.5  # minimum F1 with the best reference


@dataclass(frozen=True)
class TargetCounts:
    """Counts: of `n` targets, `own` are the LLM's answers; `too_long` questions were left as they are."""

    n: int
    own: int
    too_long: int


def make_targets(
    llm: LLM,
    files: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    limit: int | None = None,
    max_document_tokens: int = 2048,
    batch_size: int = 8,
    show_progress: bool | None = None,
) -> TargetCounts:
    """Write question rows whose answers are the targets; the references are kept under "references".

    A call that was stopped goes on when it is repeated: finished rows are in `output` + ".partial".

    Args:
        llm: LLM that answers.
        files: Question files.
        output: A .jsonl file.
        limit: Maximum number of questions, the first ones.
        max_document_tokens: Maximum tokens of a text; a question about a longer one keeps its references.
        batch_size: Questions per batch.
        show_progress: Show a bar; None shows it on a terminal.

    Raises:
        ConfigError: The partial file is of another run, or another process writes it.
        DocumentError: A row is not a question.
    """
    out = path_of(output)
    if out.suffix != ".jsonl":
        raise ConfigError(f"output={str(output)!r} does not end in .jsonl, which its rows are; pass such a name")
    for name, number in (("limit", limit), ("max_document_tokens", max_document_tokens), ("batch_size", batch_size)):
        if number is not None:
            whole_number(number, name)
    questions = read_questions(files, unique=False)[:limit]
    identity = {
        "llm": llm.name,
        "questions": [sha256_of(path_of(file)) for file in files],
        "limit": limit,
        "max_document_tokens": max_document_tokens,
        "llm_digest": llm.weights_digest(),
    }
    journal = Journal(out.with_name(out.name + ".partial"), identity, "remove it, or pass another output")
    with closing(journal), progress("targets", len(questions), show_progress) as advance:
        advance(len(journal.rows))
        for at in range(len(journal.rows), len(questions), batch_size):
            batch = questions[at : at + batch_size]
            for row in _rows(llm, batch, max_document_tokens):
                journal.add(row)
            journal.sync()
            advance(len(batch))
        atomic_write_text(out, "".join(to_json(row) + "\n" for row in journal.rows))
        journal.remove()
    kinds = [row["target"] for row in journal.rows]
    return TargetCounts(len(journal.rows), kinds.count("own"), kinds.count("too long"))


def _rows(llm: LLM, questions: Sequence[Question], max_document_tokens: int) -> list[dict[str, Any]]:
    prompts: dict[int, dict[int, PromptInputs]] = defaultdict(dict)  # by the maximum length of the answer
    for at, question in enumerate(questions):
        template = templates()[template_for(question.answers)]
        ids = llm.encode(question.context)
        content = [template["before"], ids, template["after"].replace("{question}", question.question)]
        prompt = assemble_chat(llm, [{"role": "user", "content": content}])
        new = template["max_new_tokens"]
        if len(ids) <= max_document_tokens and len(prompt) + new <= llm.context_window:
            prompts[new][at] = prompt.inputs(llm)
    answers: dict[int, str] = {}
    for new, alike in prompts.items():
        generated = llm.generate(list(alike.values()), Sampling(max_new_tokens=new))
        answers |= zip(alike, (answer.text.strip() for answer in generated), strict=True)
    rows = []
    for at, question in enumerate(questions):
        agrees = at in answers and f1(answers[at], question.answers) >= _AGREEMENT
        chosen = [answers[at]] if agrees else list(question.answers)
        target = "own" if agrees else "reference" if at in answers else "too long"
        rows.append(asdict(question) | {"answers": chosen, "references": list(question.answers), "target": target})
    return rows
