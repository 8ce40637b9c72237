"""`extemb eval`: measure what the embeddings are worth, one kind of measurement per command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from extemb_core.cli.config_options import options_from
from extemb_core.cli.memory import keep_freed_memory
from extemb_core.cli.options import SHIPPED, CommandGroup, LlmOption, ResumeOption, option
from extemb_core.cli.output import explain_interrupt, goes_on_from, library_output, print_note
from extemb_core.evaluation import settings as kinds
from extemb_core.weights.registry import DEFAULT_LLM

app = CommandGroup(no_args_is_help=True, help="Measure what the embeddings are worth, against every control.")

_OUT = "Record to write: settings, every sample, and the tables."
_EMBEDDER = "The embedder: a folder, a Hugging Face id, or none for the controls alone."

Experiment = Callable[..., Any]


def _measurement(
    config_type: type[Any], *fields: str, **defaults: Any
) -> Callable[[Callable[[], Experiment]], Callable[..., None]]:
    """Make a command that measures from a function that has its name and help, and imports its kind of experiment."""

    def register(import_experiment: Callable[[], Experiment]) -> Callable[..., None]:
        def measure(
            out: Annotated[str, option("--json", "FILE", _OUT)],
            llm: LlmOption = DEFAULT_LLM,
            embedder: Annotated[str | None, option("--embedder", "PATH", _EMBEDDER, SHIPPED)] = None,
            resume: ResumeOption = True,
            **settings: Any,
        ) -> None:
            keep_freed_memory()
            with library_output():
                from extemb_core.evaluation.runs import run
                from extemb_core.models.embedder import ExtensibleEmbedder
                from extemb_core.models.llm import LLM
                from extemb_core.weights.resolve import resolve_embedder

                folder = None if embedder == "none" else str(resolve_embedder(embedder, llm))
                config = config_type(llm=llm, embedder=folder, **settings)
                model = LLM.from_pretrained(config.llm, device=config.device, dtype=config.dtype)
                measured = ExtensibleEmbedder.from_pretrained(folder, llm=model) if folder else None
                experiment = import_experiment()(config, model, measured)
                with explain_interrupt(lambda: goes_on_from(f"{out}.partial", resume=resume)):
                    record = run(experiment, Path(out), command=["extemb", *sys.argv[1:]], resume=resume)
            typer.echo(out)
            print_note(f'{record["n"]} samples in {record["seconds"]:.0f} s; the tables are its "summary"')

        measure.__name__, measure.__doc__ = import_experiment.__name__, import_experiment.__doc__
        command = options_from(config_type, *fields, "limit", "seed", "device", "dtype", **defaults)(measure)
        return app.command()(command)

    return register


@_measurement(
    kinds.PerplexityConfig, "data", "ratios", "contexts", "target", "windows", "window", "batch_size",
    data=..., window="its own window",
)  # fmt: skip
def ppl() -> Experiment:
    """Measure perplexity after a context, beside no context, nearest raw tokens, sinks and window, and full text."""
    from extemb_core.evaluation.perplexity import PerplexityExperiment

    return PerplexityExperiment


@_measurement(
    kinds.QaConfig, "data", "ratios", "passages", "template", "controls", "generate", "one_per_text", "batch_size",
    "remeasure", data=..., controls="all that can be made", remeasure="no arm",
)  # fmt: skip
def qa() -> Experiment:
    """Measure answers to questions about texts, and the loss of the right answers, beside every control."""
    from extemb_core.evaluation.qa import QaExperiment

    return QaExperiment


@_measurement(
    kinds.NeedleConfig, "data", "ratios", "controls", "tasks", "tokens", "depths", "trials", "batch_size",
    data="plain sentences", controls="all but lingua that can be made",
)  # fmt: skip
def needle() -> Experiment:
    """Measure whether one fact hidden in a long text is found: a pass key, or the value of a key."""
    from extemb_core.evaluation.needle import NeedleExperiment

    return NeedleExperiment


@_measurement(kinds.SpeedConfig, "data", "ratios", "tokens", "rounds", "new_tokens", data="plain sentences")
def speed() -> Experiment:
    """Measure time to first token, decoding and memory, from full text and from embeddings made now or before."""
    from extemb_core.evaluation.speed import SpeedExperiment

    return SpeedExperiment


@_measurement(kinds.PlanConfig, "data", "passages", "plans", "batch_size", data=...)
def plan() -> Experiment:
    """Fit what an answer loses when a sentence is read in less detail: the table that plans for a question use."""
    from extemb_core.evaluation.plan_losses import PlanExperiment

    return PlanExperiment


@_measurement(kinds.HeadsConfig, "data", "batch_size", data=...)
def heads() -> Experiment:
    """Find the LLM's attention heads that look, in compressed text, at what answers a question: plans use them."""
    from extemb_core.evaluation.retrieval_heads import HeadsExperiment

    return HeadsExperiment
