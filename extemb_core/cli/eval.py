"""`extemb eval`: measure what the embeddings are worth, one kind of measurement per command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from extemb_core.cli.allocation import keep_freed_memory
from extemb_core.cli.config_options import options_from
from extemb_core.cli.options import DEFAULT_LLM, CommandGroup, LlmOption, ResumeOption, option
from extemb_core.cli.output import library_output, print_note
from extemb_core.evaluation.settings import NeedleConfig, PerplexityConfig, QaConfig, SpeedConfig

app = CommandGroup(no_args_is_help=True, help="Measure what the embeddings are worth, against every control.")

OutOption = Annotated[str, option("--json", "FILE", "Record to write: settings, every sample, and the tables.")]
EmbedderOption = Annotated[
    str | None,
    option(
        "--embedder",
        "PATH",
        "The embedder: a folder, a Hugging Face id, or none for the controls alone.",
        "the one shipped for the LLM",
    ),
]
_COMMON = ("limit", "seed", "device", "dtype")


@app.command()
@options_from(
    PerplexityConfig, "data", "ratios", "contexts", "target", "windows", "window", "batch_size", *_COMMON,
    data=..., window="its own window",
)  # fmt: skip
def ppl(
    out: OutOption,
    llm: LlmOption = DEFAULT_LLM,
    embedder: EmbedderOption = None,
    resume: ResumeOption = True,
    **settings: Any,
) -> None:
    """Measure perplexity after a context, beside no context, nearest raw tokens, sinks and window, and full text."""
    from extemb_core.evaluation.perplexity import PerplexityExperiment

    _run(PerplexityConfig, PerplexityExperiment, out, llm, embedder, resume, settings)


@app.command()
@options_from(
    QaConfig, "data", "ratios", "passages", "template", "controls", "generate", "one_per_text", "batch_size", *_COMMON,
    data=..., controls="all that can be made",
)  # fmt: skip
def qa(
    out: OutOption,
    llm: LlmOption = DEFAULT_LLM,
    embedder: EmbedderOption = None,
    resume: ResumeOption = True,
    **settings: Any,
) -> None:
    """Measure answers to questions about texts, and the loss of the right answers, beside every control."""
    from extemb_core.evaluation.qa import QaExperiment

    _run(QaConfig, QaExperiment, out, llm, embedder, resume, settings)


@app.command()
@options_from(
    NeedleConfig, "data", "ratios", "tasks", "tokens", "depths", "trials", "batch_size", *_COMMON,
    data="plain sentences",
)  # fmt: skip
def needle(
    out: OutOption,
    llm: LlmOption = DEFAULT_LLM,
    embedder: EmbedderOption = None,
    resume: ResumeOption = True,
    **settings: Any,
) -> None:
    """Measure whether one fact hidden in a long text is found: a pass key, or the value of a key."""
    from extemb_core.evaluation.needle import NeedleExperiment

    _run(NeedleConfig, NeedleExperiment, out, llm, embedder, resume, settings)


@app.command()
@options_from(SpeedConfig, "data", "ratios", "tokens", "rounds", "new_tokens", *_COMMON, data="plain sentences")
def speed(
    out: OutOption,
    llm: LlmOption = DEFAULT_LLM,
    embedder: EmbedderOption = None,
    resume: ResumeOption = True,
    **settings: Any,
) -> None:
    """Measure time to first token, decoding and memory, from full text and from embeddings made now or before."""
    from extemb_core.evaluation.speed import SpeedExperiment

    _run(SpeedConfig, SpeedExperiment, out, llm, embedder, resume, settings)


def _run(
    config_type: Callable[..., Any],
    experiment_type: Callable[..., Any],
    out: str,
    llm_name: str,
    embedder_name: str | None,
    resume: bool,
    settings: dict[str, Any],
) -> None:
    """Measure with these settings of a configuration, and write the record."""
    keep_freed_memory()
    with library_output():
        from extemb_core.evaluation.runs import run
        from extemb_core.models.embedder import ExtensibleEmbedder
        from extemb_core.models.llm import LLM
        from extemb_core.weights.resolve import resolve_embedder

        folder = None if embedder_name == "none" else str(resolve_embedder(embedder_name, llm_name))
        config = config_type(llm=llm_name, embedder=folder, **settings)
        llm = LLM.from_pretrained(config.llm, device=config.device, dtype=config.dtype)
        embedder = ExtensibleEmbedder.from_pretrained(folder, llm=llm) if folder else None
        command = ["extemb", *sys.argv[1:]]
        try:
            record = run(experiment_type(config, llm, embedder), Path(out), command=command, resume=resume)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; the same command goes on from {out}.partial") from None
    typer.echo(out)
    print_note(f'{record["n"]} samples in {record["seconds"]:.0f} s; the tables are its "summary"')
