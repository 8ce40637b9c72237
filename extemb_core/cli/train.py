"""`extemb train`: a recipe, or the main settings of `TrainingConfig` and of the embedder's configuration as options.

`extemb train make-targets` writes question rows for training whose answers are the LLM's own.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from extemb_core.cli.config_options import options_from
from extemb_core.cli.memory import keep_freed_memory
from extemb_core.cli.options import CommandGroup, DefaultCommand, JsonOption, ModelOptions, ResumeOption, option
from extemb_core.cli.output import explain_interrupt, goes_on_from, library_output, print_json, print_note
from extemb_core.training.config import TrainingConfig

if TYPE_CHECKING:
    from extemb_core.training.trainable import TrainableModel


app = CommandGroup(cls=DefaultCommand, help="Train an embedder or a reader; or write answers for it to learn.")


@dataclass(frozen=True, kw_only=True)
class TargetOptions(ModelOptions):
    """Options of `make-targets`; their defaults are repeated from `targets.make_targets`, whose module needs torch.

    Attributes:
        questions: Training questions: .jsonl[.zst] with "id", "context", "question" and "answers".
        output: A .jsonl file; resumes if interrupted.
        limit: Maximum number of questions, the first ones.
        max_document_tokens: Maximum tokens of a text; a question about a longer one keeps its references.
        batch_size: Questions per batch.
    """

    questions: tuple[str, ...]
    output: str = field(metadata={"metavar": "FILE"})
    limit: int | None = None
    max_document_tokens: int = 2048
    batch_size: int = 8


@app.command("make-targets")
@options_from(
    TargetOptions, "questions", "output", "llm", "limit", "max_document_tokens", "batch_size", "device", "dtype",
    llm=...,
)  # fmt: skip
def make_targets(as_json: JsonOption = False, **settings: Any) -> None:
    """Write question rows with the LLM's own answers from the full text, where these are right."""
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


@dataclass(frozen=True, kw_only=True)
class NewEmbedder:
    """Settings of `ExtensibleEmbedderConfig` that are options, with its defaults, as its module needs transformers.

    Attributes:
        entry_layer: LLM layer at whose input embeddings enter; 0 makes them input embeddings.
        token_weighting: Weight of a token in its group, above entry layer 0: uniform, rank or frequency (in --data).
        num_layers: Number of the LLM's first layers to use.
        adaptation: lora: adapters over the LLM's own tensors; full: a trained copy of the layers; none: the layers as
            they are, above entry layer 0.
        lora_rank: Rank of the adapters.
        downscaling: How outputs become embeddings: strided, mean, terminal or random.
        connector: Module between the layers and the LLM's input space: none, linear, mlp or conv.
        chunk_size: Tokens per chunk.
        ratios: Ratios to train.
    """

    entry_layer: int = 0
    token_weighting: str = "rank"
    num_layers: int = 8
    adaptation: str = "lora"
    lora_rank: int = 16
    downscaling: str = "strided"
    connector: str = "linear"
    chunk_size: int = 512
    ratios: tuple[int, ...] = (2, 4, 8, 16, 32)


_RECIPE = (
    "Stages to train: default, frozen, joint, paper, reader, text-reader, or a YAML file. Other options override it."
)


@app.command()
@options_from(TrainingConfig, "llm", "output", "data", "questions", "eval_data", "start_from")
@options_from(
    NewEmbedder,
    panel="A new embedder",
    num_layers="8, or those below the entry layer",
    downscaling="strided, or mean above entry layer 0",
    connector="linear, or none above entry layer 0",
    ratios="2 4 8 16 32, above entry layer 0 also 1, or those of --start-from",
)
@options_from(
    TrainingConfig,
    "sample_length", "chunk_sizes", "total_tokens", "batch_size", "accumulation_steps", "learning_rate",
    "connector_lr_factor", "warmup_steps", "decay_steps", "mixed_share", "focus_share", "save_minutes", "save_steps",
    "eval_steps", "max_minutes", "dataloader_num_workers", "seed", "device", "dtype",
    panel="The run",
    chunk_sizes="that of the embedder",
    decay_steps="all after the warm-up",
)  # fmt: skip
def train(
    context: typer.Context,
    recipe: Annotated[str | None, option("--recipe", "NAME", _RECIPE, "two-stream auto-regression alone")] = None,
    resume: ResumeOption = True,
    as_json: JsonOption = False,
    **settings: Any,
) -> None:
    """Train an embedder for an LLM. Resumes if interrupted; the LLM is never changed.

    For answers in the LLM's own words to train on: extemb train make-targets --help.
    """
    # Settings that are not on the command line keep the values of a recipe's stages.
    sources = {name: context.get_parameter_source(name) for name in settings}
    given = {name: value for name, value in settings.items() if getattr(sources[name], "name", "") == "COMMANDLINE"}
    embedder = {name: given.pop(name) for name in NewEmbedder.__dataclass_fields__ if name in given}
    start_from = given.get("start_from")
    if start_from is not None:
        if "ratios" in embedder:
            given["ratios"] = embedder.pop("ratios")
        if embedder:
            flag = "--" + next(iter(embedder)).replace("_", "-")
            raise typer.BadParameter(
                f"{flag} describes a new embedder, and {start_from} is what it is; leave one of the two out.",
                param_hint="'--start-from'",
            )
    keep_freed_memory()
    output, total_tokens = given.pop("output"), given.pop("total_tokens", settings["total_tokens"])
    start = time.perf_counter()
    given["embedder"] = embedder
    stages: list[TrainingConfig] = []
    with library_output(), explain_interrupt(lambda: _how_to_resume(stages, resume)):
        trained, finished = _train(recipe, output, total_tokens, resume, given, stages)
    from extemb_core.training.trainer import is_first_process

    if not is_first_process():
        return
    seconds = time.perf_counter() - start
    if as_json:
        fingerprint = trained.embedder.fingerprint if trained and trained.embedder else None
        print_json({"output": output, "fingerprint": fingerprint, "finished": finished, "seconds": round(seconds, 1)})
        return
    typer.echo(output)
    if not finished:
        goes_on = goes_on_from("there", resume=resume)
        print_note(f"the time is up before all {total_tokens:,} tokens are seen; {goes_on}")
    if trained is None:
        return
    if trained.embedder is None:
        print_note(f"trained in {seconds:.0f} s; it is an LLM now: --llm {shlex.quote(f'{output}/reader')}")
    else:
        reader = f"{output}/reader" if trained.reader is not None else given["llm"]
        print_note(f"trained in {seconds:.0f} s; try it:")
        print_note(f'extemb ask "..." --documents FILE --llm {shlex.quote(reader)} --embedder {shlex.quote(output)}')


def _train(
    recipe: str | None,
    output: str,
    total_tokens: int,
    resume: bool,
    given: dict[str, Any],
    stages: list[TrainingConfig],
) -> tuple[TrainableModel | None, bool]:
    """Return what was trained so far, and whether it is finished; None if a recipe's last stage is not finished.

    The run, or the runs of a recipe's stages, are added to `stages` before they begin.
    """
    if recipe is not None:
        from extemb_core.training.recipes import read_recipe, stage_configs, train_recipe

        own = read_recipe(recipe)
        stages += stage_configs(own, output, total_tokens, **given)
        trained = train_recipe(own, output, total_tokens, resume=resume, **given)
        return trained, trained is not None
    from extemb_core.training import trainer
    from extemb_core.training.checkpoints import is_finished

    config = TrainingConfig(output=output, total_tokens=total_tokens, **given)
    stages.append(config)
    trained = trainer.train(config, resume=resume)
    return trained, config.max_minutes is None or is_finished(config)


def _how_to_resume(stages: Sequence[TrainingConfig], resume: bool) -> str:
    """Say where the last whole checkpoint is, and how to go on from it."""
    from extemb_core.training.checkpoints import checkpoint_to_resume

    if not stages:
        return "nothing had begun, so the same command does"
    last = checkpoint_to_resume(stages)
    if last is None:
        return "there is no checkpoint yet, so the same command starts anew"
    return f"the last checkpoint is {last}, and {goes_on_from('it', resume=resume)}"
