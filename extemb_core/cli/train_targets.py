"""`extemb train make-targets`: question rows to train on whose answers are the LLM's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from extemb_core.cli.options import DeviceOption, DtypeOption, JsonOption, LlmOption, option
from extemb_core.cli.output import library_output, print_json, print_note


def make_targets(
    questions: Annotated[
        list[str],
        option(
            "--questions",
            "FILE...",
            'Training questions: .jsonl[.zst] with "id", "context", "question" and "answers".',
        ),
    ],
    output: Annotated[str, option("--output", "FILE", "A .jsonl file. Resumes if interrupted.")],
    llm: LlmOption,
    limit: Annotated[int | None, option("--limit", "N", "Maximum number of questions, the first ones.")] = None,
    max_document_tokens: Annotated[
        int, option("--max-document-tokens", "N", "A question about a longer text keeps its references.")
    ] = 2048,
    batch_size: Annotated[int, option("--batch-size", "N", "Questions at once.")] = 8,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write question rows whose answers are the LLM's own from the full text, where these are right."""
    with library_output():
        from extemb_core.models.llm import LLM
        from extemb_core.training import targets

        counts = targets.make_targets(
            LLM.from_pretrained(llm, device=device, dtype=dtype),
            questions,
            Path(output),
            limit=limit,
            max_document_tokens=max_document_tokens,
            batch_size=batch_size,
        )
    if as_json:
        print_json({"output": output, "n": counts.n, "own": counts.own, "too_long": counts.too_long})
        return
    typer.echo(output)
    print_note(
        f"{counts.own} of {counts.n} answers are the LLM's own; {counts.too_long} texts were too long to ask about"
    )
