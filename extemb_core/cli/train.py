"""`extemb train`: a recipe, or the main settings of `TrainingConfig` and of the embedder's configuration as options."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from extemb_core.cli import train_targets
from extemb_core.cli.allocation import keep_freed_memory
from extemb_core.cli.options import JsonOption, OwnCommand, SeveralValues
from extemb_core.cli.output import library_output, print_json, print_note, reported

if TYPE_CHECKING:
    from extemb_core.training.trainer import TrainableModel

app = typer.Typer(cls=OwnCommand, help="Train an embedder or a reader; or write answers for it to learn.")
app.command("make-targets", cls=SeveralValues)(train_targets.make_targets)

_NEW = "A new embedder"
_RUN = "The run"


@app.command(cls=SeveralValues)
@reported
def train(
    context: typer.Context,
    llm: Annotated[
        str, typer.Option("--llm", metavar="NAME", help="The frozen LLM: a known name, a folder or a Hugging Face id.")
    ],
    output: Annotated[
        str, typer.Option("--output", metavar="DIR", help="Folder for checkpoints, logs and what was trained.")
    ],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="FILE...", help='Training text: .jsonl[.zst] with a "text" field, .txt, .md.'),
    ] = None,
    questions: Annotated[
        list[str] | None,
        typer.Option(
            "--questions",
            metavar="FILE...",
            help='Training questions: .jsonl[.zst] with "id", "context", "question" and "answers".',
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="NAME",
            help="Stages to train: default, frozen, joint, paper, reader, text-reader, or a YAML file. "
            "Other options override it.",
            show_default="two-stream auto-regression alone, as the options below say",
        ),
    ] = None,
    eval_data: Annotated[
        list[str] | None,
        typer.Option("--eval-data", metavar="FILE...", help="Held-out text, for the loss at every ratio."),
    ] = None,
    start_from: Annotated[
        str | None,
        typer.Option("--start-from", metavar="PATH", help="Go on from this embedder instead of a new one."),
    ] = None,
    entry_layer: Annotated[
        int | None,
        typer.Option(
            "--entry-layer",
            metavar="N",
            help="LLM layer at whose input embeddings enter; 0: as input embeddings.",
            show_default="0",
            rich_help_panel=_NEW,
        ),
    ] = None,
    token_weighting: Annotated[
        str | None,
        typer.Option(
            "--token-weighting",
            metavar="NAME",
            help="Weight of a token in its group, above entry layer 0: uniform, rank or frequency (in --data).",
            show_default="rank",
            rich_help_panel=_NEW,
        ),
    ] = None,
    num_layers: Annotated[
        int | None,
        typer.Option(
            "--num-layers",
            metavar="N",
            help="Number of the LLM's first layers it uses.",
            show_default="8",
            rich_help_panel=_NEW,
        ),
    ] = None,
    adaptation: Annotated[
        str | None,
        typer.Option(
            "--adaptation",
            metavar="NAME",
            help="lora: adapters over the LLM's own tensors; full: a trained copy of the layers; "
            "none: the layers as they are, above entry layer 0.",
            show_default="lora",
            rich_help_panel=_NEW,
        ),
    ] = None,
    lora_rank: Annotated[
        int | None,
        typer.Option("--lora-rank", metavar="N", help="Rank of the adapters.", show_default="16", rich_help_panel=_NEW),
    ] = None,
    downscaling: Annotated[
        str | None,
        typer.Option(
            "--downscaling",
            metavar="NAME",
            help="Which outputs become embeddings: strided, mean, terminal or random.",
            show_default="strided",
            rich_help_panel=_NEW,
        ),
    ] = None,
    connector: Annotated[
        str | None,
        typer.Option(
            "--connector",
            metavar="NAME",
            help="Between the layers and the LLM's input space: none, linear, mlp or conv.",
            show_default="linear",
            rich_help_panel=_NEW,
        ),
    ] = None,
    chunk_size: Annotated[
        int | None,
        typer.Option("--chunk-size", metavar="N", help="Tokens per chunk.", show_default="512", rich_help_panel=_NEW),
    ] = None,
    ratios: Annotated[
        list[int] | None,
        typer.Option(
            "--ratios",
            metavar="N...",
            help="Ratios to train.",
            show_default="2 4 8 16 32, or those of --start-from",
            rich_help_panel=_NEW,
        ),
    ] = None,
    sample_length: Annotated[
        int, typer.Option("--sample-length", metavar="N", help="Tokens of a sample.", rich_help_panel=_RUN)
    ] = 1536,
    chunk_sizes: Annotated[
        list[int] | None,
        typer.Option(
            "--chunk-sizes",
            metavar="N...",
            help="Chunk lengths in training, one drawn per batch.",
            show_default="that of the embedder",
            rich_help_panel=_RUN,
        ),
    ] = None,
    total_tokens: Annotated[
        int, typer.Option("--total-tokens", metavar="N", help="Tokens to train on.", rich_help_panel=_RUN)
    ] = 1_500_000,
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", help="Samples per batch and device.", rich_help_panel=_RUN)
    ] = 4,
    accumulation_steps: Annotated[
        int,
        typer.Option("--accumulation-steps", metavar="N", help="Gradient accumulation steps.", rich_help_panel=_RUN),
    ] = 1,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", metavar="X", help="Peak learning rate.", rich_help_panel=_RUN)
    ] = 3e-4,
    connector_lr_factor: Annotated[
        float,
        typer.Option(
            "--connector-lr-factor",
            metavar="X",
            help="Connector's learning rate over the layers'.",
            rich_help_panel=_RUN,
        ),
    ] = 5.0,
    warmup_steps: Annotated[
        int,
        typer.Option("--warmup-steps", metavar="N", help="Warm-up steps of the learning rate.", rich_help_panel=_RUN),
    ] = 20,
    decay_steps: Annotated[
        int | None,
        typer.Option(
            "--decay-steps",
            metavar="N",
            help="Last steps, in which the learning rate falls to 0; 0: constant.",
            show_default="all after the warm-up",
            rich_help_panel=_RUN,
        ),
    ] = None,
    mixed_share: Annotated[
        float,
        typer.Option(
            "--mixed-share",
            metavar="X",
            help="Share of documents compressed around a part left as text, above entry layer 0.",
            rich_help_panel=_RUN,
        ),
    ] = 0.0,
    save_minutes: Annotated[
        float | None,
        typer.Option("--save-minutes", metavar="X", help="Minutes between checkpoints.", rich_help_panel=_RUN),
    ] = None,
    save_steps: Annotated[
        int, typer.Option("--save-steps", metavar="N", help="Steps between checkpoints.", rich_help_panel=_RUN)
    ] = 50,
    eval_steps: Annotated[
        int, typer.Option("--eval-steps", metavar="N", help="Steps between evaluations.", rich_help_panel=_RUN)
    ] = 50,
    max_minutes: Annotated[
        float | None,
        typer.Option(
            "--max-minutes", metavar="X", help="Save and stop after so many minutes; resumable.", rich_help_panel=_RUN
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Random seed.", rich_help_panel=_RUN)] = 0,
    device: Annotated[
        str,
        typer.Option(
            "--device", metavar="NAME", help="auto (CUDA, then CPU), cpu, cuda or cuda:N.", rich_help_panel=_RUN
        ),
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="NAME",
            help="Of the frozen LLM: auto (bfloat16 on CUDA, float32 elsewhere), float32 or bfloat16; "
            "`extemb doctor` says whether bfloat16 is safe here.",
            rich_help_panel=_RUN,
        ),
    ] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Resume from the last checkpoint.", rich_help_panel=_RUN)
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Train an embedder for an LLM. Resumes if interrupted; the LLM is never changed.

    For answers in the LLM's own words to train on: extemb train make-targets --help.
    """
    embedder = {
        name: value
        for name, value in (
            ("entry_layer", entry_layer),
            ("token_weighting", token_weighting),
            ("num_layers", num_layers),
            ("adaptation", adaptation),
            ("lora_rank", lora_rank),
            ("downscaling", downscaling),
            ("connector", connector),
            ("chunk_size", chunk_size),
            ("ratios", tuple(ratios or ())),
        )
        if value not in (None, ())
    }
    settings: dict[str, Any] = {
        "llm": llm,
        "data": tuple(data or ()),
        "questions": tuple(questions or ()),
        "eval_data": tuple(eval_data or ()),
        "start_from": start_from,
        "max_minutes": max_minutes,
        "device": device,
    }
    run_settings = {
        "sample_length": sample_length,
        "chunk_sizes": tuple(chunk_sizes or ()),
        "batch_size": batch_size,
        "accumulation_steps": accumulation_steps,
        "learning_rate": learning_rate,
        "connector_lr_factor": connector_lr_factor,
        "warmup_steps": warmup_steps,
        "decay_steps": decay_steps,
        "mixed_share": mixed_share,
        "save_minutes": save_minutes,
        "save_steps": save_steps,
        "eval_steps": eval_steps,
        "seed": seed,
        "dtype": dtype,
    }
    for name, value in run_settings.items():  # a recipe's stages have their own, where none is given here
        source = context.get_parameter_source(name)
        if recipe is None or (source is not None and source.name == "COMMANDLINE"):
            settings[name] = value
    if start_from is not None:
        if wanted := embedder.pop("ratios", ()):
            settings["ratios"] = wanted
        if embedder:
            option = "--" + next(iter(embedder)).replace("_", "-")
            raise typer.BadParameter(
                f"{option} describes a new embedder, and {start_from} is what it is; leave one of the two out.",
                param_hint="'--start-from'",
            )
    keep_freed_memory()
    start = time.perf_counter()
    try:
        with library_output():
            trained = _run(recipe, output, total_tokens, resume, settings | {"embedder": embedder})
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {_how_to_go_on(Path(output))}") from None
    from extemb_core.training.trainer import is_first_process

    if not is_first_process():
        return
    result: dict[str, Any] = {
        "output": output,
        "fingerprint": trained.embedder.fingerprint if trained is not None and trained.embedder is not None else None,
        "seconds": round(time.perf_counter() - start, 1),
    }
    if as_json:
        print_json(result)
        return
    typer.echo(output)
    if trained is None:
        print_note("the time is up before the last stage is finished; the same command goes on")
    elif trained.embedder is None:
        print_note(f"trained in {result['seconds']:.0f} s; it is an LLM now: --llm {output}/reader")
    else:
        print_note(f"trained in {result['seconds']:.0f} s; try it:")
        reader = f"{output}/reader" if trained.reader is not None else llm
        print_note(f'extemb ask "..." --documents FILE --llm {reader} --embedder {output}')


def _run(
    recipe: str | None, output: str, total_tokens: int, resume: bool, settings: dict[str, Any]
) -> TrainableModel | None:
    if recipe is not None:
        from extemb_core.training.recipes import read_recipe, train_recipe

        return train_recipe(read_recipe(recipe), output, total_tokens, resume=resume, **settings)
    from extemb_core.training.config import TrainingConfig
    from extemb_core.training.trainer import train as train_once

    return train_once(TrainingConfig(output=output, total_tokens=total_tokens, **settings), resume=resume)


def _how_to_go_on(output: Path) -> str:
    """Where the last whole checkpoint is, in words."""
    whole = [mark.parent for mark in output.rglob("checkpoint-*/complete.json")]
    if not whole:
        return "there is no checkpoint yet, so the same command starts anew"
    last = max(whole, key=lambda folder: (folder / "complete.json").stat().st_mtime_ns)
    return f"the last checkpoint is {last}, and the same command goes on from it"
