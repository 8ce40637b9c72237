"""`extemb train make-targets`: question rows to train on whose answers are the LLM's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from extemb_core.cli.config_options import options_from
from extemb_core.cli.options import JsonOption
from extemb_core.cli.output import library_output, print_json, print_note


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """Options that `targets.make_targets` has defaults for too: its module needs torch.

    Attributes:
        questions: Training questions: .jsonl[.zst] with "id", "context", "question" and "answers".
        output: A .jsonl file; resumes if interrupted.
        llm: The frozen LLM: a known name, a folder or a Hugging Face id.
        limit: Maximum number of questions, the first ones.
        max_document_tokens: A question about a longer text keeps its references.
        batch_size: Questions at once.
        device: auto (CUDA, then CPU), cpu, cuda or cuda:N.
        dtype: Of the LLM: auto (bfloat16 on CUDA, float32 elsewhere), float32, bfloat16 or float16.
    """

    questions: tuple[str, ...]
    output: str = field(metadata={"metavar": "FILE"})
    llm: str
    limit: int | None = None
    max_document_tokens: int = 2048
    batch_size: int = 8
    device: str = "auto"
    dtype: str = "auto"


@options_from(TargetOptions)
def make_targets(as_json: JsonOption = False, **settings: Any) -> None:
    """Write question rows whose answers are the LLM's own from the full text, where these are right."""
    output = settings.pop("output")
    with library_output():
        from extemb_core.models.llm import LLM
        from extemb_core.training import targets

        llm = LLM.from_pretrained(settings.pop("llm"), device=settings.pop("device"), dtype=settings.pop("dtype"))
        counts = targets.make_targets(llm, settings.pop("questions"), Path(output), **settings)
    if as_json:
        print_json({"output": output, "n": counts.n, "own": counts.own, "too_long": counts.too_long})
        return
    typer.echo(output)
    print_note(
        f"{counts.own} of {counts.n} answers are the LLM's own; {counts.too_long} texts were too long to ask about"
    )
