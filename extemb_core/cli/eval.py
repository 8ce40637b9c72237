"""`extemb eval`: measure what the embeddings are worth, one kind of measurement per command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from extemb_core.cli.allocation import keep_freed_memory
from extemb_core.cli.options import DEFAULT_LLM, DeviceOption, DtypeOption, LlmOption, SeveralValues
from extemb_core.cli.output import library_output, print_note, reported

app = typer.Typer(no_args_is_help=True, help="Measure what the embeddings are worth, against every control.")

OutOption = Annotated[
    str,
    typer.Option("--json", metavar="FILE", help="The record: settings, every sample, and the tables. Goes on if cut."),
]
RatiosOption = Annotated[
    list[str] | None, typer.Option("--ratios", metavar="N...", help="Ratios to measure.", show_default="4 8 16 32")
]
EmbedderOption = Annotated[
    str | None,
    typer.Option(
        "--embedder",
        metavar="PATH",
        help="The embedder: a folder, a Hugging Face id, or none for the controls alone.",
        show_default="the one shipped for the LLM",
    ),
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", metavar="N", help="At most so many samples, evenly from all.")
]
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", help="Of the bootstrap and of all that is drawn.")]
BatchOption = Annotated[int, typer.Option("--batch-size", metavar="N", help="Samples at once.")]
ResumeOption = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Take over the samples that an earlier run finished.")
]


@app.command(cls=SeveralValues)
@reported
def ppl(
    context: typer.Context,
    data: Annotated[
        list[str],
        typer.Option("--data", metavar="FILE...", help='Held-out text: .jsonl[.zst] with a "text" field, .txt, .md.'),
    ],
    out: OutOption,
    llm: LlmOption = DEFAULT_LLM,
    embedder: EmbedderOption = None,
    ratios: RatiosOption = None,
    contexts: Annotated[
        list[str] | None,
        typer.Option("--contexts", metavar="N...", help="Tokens of context.", show_default="1024 2048 4096"),
    ] = None,
    target: Annotated[int, typer.Option("--target", metavar="N", help="Tokens after it that are predicted.")] = 512,
    windows: Annotated[int, typer.Option("--windows", metavar="N", help="Windows per document.")] = 1,
    window: Annotated[
        int | None,
        typer.Option("--window", metavar="N", help="Positions the LLM is given.", show_default="its own window"),
    ] = None,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    batch_size: BatchOption = 8,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    resume: ResumeOption = True,
) -> None:
    """Perplexity of the tokens that follow a context, beside none, nearest raw tokens, sinks and window, full text."""
    from extemb_core.evaluation.perplexity import PerplexityConfig, PerplexityExperiment

    _run(PerplexityConfig, PerplexityExperiment, context.params)


@app.command(cls=SeveralValues)
@reported
def qa(
    context: typer.Context,
    data: Annotated[
        list[str],
        typer.Option("--data", metavar="FILE...", help="Questions: .jsonl[.zst] with id, context, question, answers."),
    ],
    out: OutOption,
    llm: LlmOption = DEFAULT_LLM,
    embedder: EmbedderOption = None,
    ratios: RatiosOption = None,
    passages: Annotated[
        int, typer.Option("--passages", metavar="N", help="Passages per question: its own and others.")
    ] = 1,
    template: Annotated[
        str, typer.Option("--template", metavar="NAME", help="auto (by the answers), short, yes_no or long.")
    ] = "auto",
    controls: Annotated[
        list[str] | None,
        typer.Option(
            "--controls",
            metavar="NAME...",
            help="Besides none and full: truncated, chosen, lingua, random, wrong; above entry layer 0 anchors and "
            "random_states too.",
            show_default="all that can be made",
        ),
    ] = None,
    generate: Annotated[
        bool,
        typer.Option(
            "--generate/--loss-only",
            help="Let the LLM answer, or measure the loss of the right answers alone: quicker.",
        ),
    ] = True,
    one_per_text: Annotated[
        bool, typer.Option("--one-per-text/--all-questions", help="One question about each text, drawn by the seed.")
    ] = False,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    batch_size: BatchOption = 8,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    resume: ResumeOption = True,
) -> None:
    """Answers to questions about texts, and the loss of the right answers, beside every control."""
    from extemb_core.evaluation.qa import QaConfig, QaExperiment

    _run(QaConfig, QaExperiment, context.params)


@app.command(cls=SeveralValues)
@reported
def needle(
    context: typer.Context,
    out: OutOption,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="FILE...", help="Text to hide it in.", show_default="plain sentences"),
    ] = None,
    llm: LlmOption = DEFAULT_LLM,
    embedder: EmbedderOption = None,
    ratios: RatiosOption = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", metavar="NAME...", help="What is looked for.", show_default="passkey key_value"),
    ] = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option("--tokens", metavar="N...", help="Lengths of text.", show_default="1024 4096 16384 65536 102400"),
    ] = None,
    depths: Annotated[int, typer.Option("--depths", metavar="N", help="Places in each text.")] = 5,
    trials: Annotated[int, typer.Option("--trials", metavar="N", help="Texts per place.")] = 1,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    batch_size: BatchOption = 8,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    resume: ResumeOption = True,
) -> None:
    """Whether one fact hidden in a long text is found: a pass key, or the value of a key."""
    from extemb_core.evaluation.needle import NeedleConfig, NeedleExperiment

    _run(NeedleConfig, NeedleExperiment, context.params)


@app.command(cls=SeveralValues)
@reported
def speed(
    context: typer.Context,
    out: OutOption,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="FILE...", help="Text to read.", show_default="plain sentences"),
    ] = None,
    llm: LlmOption = DEFAULT_LLM,
    embedder: EmbedderOption = None,
    ratios: RatiosOption = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(
            "--tokens",
            metavar="N...",
            help="Lengths of text.",
            show_default="1024 2048 4096 8192 16384 32768 65536 102400",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", help="Measurements of each side.")] = 3,
    new_tokens: Annotated[int, typer.Option("--new-tokens", metavar="N", help="Tokens to decode.")] = 16,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    resume: ResumeOption = True,
) -> None:
    """Time to first token, decoding and memory, from full text and from embeddings made now or before."""
    from extemb_core.evaluation.speed import SpeedConfig, SpeedExperiment

    _run(SpeedConfig, SpeedExperiment, context.params)


def whole_numbers(name: str, words: Sequence[str]) -> tuple[int, ...]:
    """`4 8` and `4,8` alike."""
    try:
        return tuple(int(each) for word in words for each in word.split(",") if each.strip())
    except ValueError:
        raise typer.BadParameter(f"{' '.join(words)!r} are not whole numbers.", param_hint=f"'--{name}'") from None


def _run(config_type: Callable[..., Any], experiment_type: Callable[..., Any], given: dict[str, Any]) -> None:
    """Measure with the options given; those that were left out have the configuration's own defaults."""
    settings = {name: value for name, value in given.items() if value not in (None, [], ())}
    out, resume, chosen = settings.pop("out"), settings.pop("resume"), settings.pop("embedder", None)
    for name in ("ratios", "contexts", "tokens"):
        if name in settings:
            settings[name] = whole_numbers(name, settings[name])
    for name in ("data", "controls", "tasks"):
        if name in settings:
            settings[name] = tuple(settings[name])
    keep_freed_memory()
    with library_output():
        from extemb_core.evaluation.runs import run
        from extemb_core.models.embedder import ExtensibleEmbedder
        from extemb_core.models.llm import LLM
        from extemb_core.weights.resolve import resolve_embedder

        where = None if chosen == "none" else str(resolve_embedder(chosen, settings["llm"]))
        config = config_type(embedder=where, **settings)
        llm = LLM.from_pretrained(config.llm, device=config.device, dtype=config.dtype)
        embedder = ExtensibleEmbedder.from_pretrained(where, llm=llm) if where else None
        command = ["extemb", *sys.argv[1:]]
        try:
            record = run(experiment_type(config, llm, embedder), Path(out), command=command, resume=resume)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; the same command goes on from {out}.partial") from None
    typer.echo(out)
    print_note(f'{record["n"]} samples in {record["seconds"]:.0f} s; the tables are its "summary"')
