"""`extemb train pack | run | unpack | make-targets`: training elsewhere, and what to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from extemb_core.cli.options import DeviceOption, DtypeOption, JsonOption, LlmOption
from extemb_core.cli.output import library_output, reported
from extemb_core.cli.output import print_json as emit
from extemb_core.cli.output import print_note as note


@reported
def pack(
    output: Annotated[str, typer.Option("--output", metavar="DIR", help="The bundle's folder; it must not exist.")],
    llm: LlmOption,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            metavar="NAME",
            help="What to train: default, frozen, joint, paper, reader, text-reader, or a YAML file.",
        ),
    ] = "default",
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
    total_tokens: Annotated[int, typer.Option("--total-tokens", metavar="N", help="Tokens to train on.")] = 1_500_000,
    start_from: Annotated[
        str | None, typer.Option("--start-from", metavar="PATH", help="Go on from this embedder.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", metavar="N", help="Tokens of text that travel.", show_default="all"),
    ] = None,
    max_questions: Annotated[
        int | None,
        typer.Option("--max-questions", metavar="N", help="Questions that travel.", show_default="all"),
    ] = None,
    slice_size: Annotated[
        str, typer.Option("--slice-size", metavar="SIZE", help="Of each file, such as 60MiB.")
    ] = "60MiB",
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", metavar="N", help="Samples per batch.", show_default="that of the recipe"),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="NAME", help="In which the weights travel and the LLM runs.")
    ] = "bfloat16",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Random seed.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Pack all that a training needs into slices, for a machine without a network: there, `python run.py`."""
    with library_output():
        from extemb_core.training.bundles import pack as write
        from extemb_core.training.recipes import read_recipe

        settings: dict[str, Any] = {"seed": seed}
        if batch_size is not None:
            settings["batch_size"] = batch_size
        slices = write(
            read_recipe(recipe),
            output,
            llm=llm,
            total_tokens=total_tokens,
            data=data or (),
            questions=questions or (),
            start_from=start_from,
            max_tokens=max_tokens,
            max_questions=max_questions,
            slice_size=slice_size,
            dtype=dtype,
            **settings,
        )
    size = sum(file.stat().st_size for file in slices)
    if as_json:
        emit({"output": output, "slices": len(slices), "bytes": size})
        return
    typer.echo(output)
    note(f"{len(slices)} slices, {size / 2**20:.0f} MiB; copy the folder, then there:")
    note("python run.py --output left --max-minutes 9")


@reported
def run(
    bundle: Annotated[str, typer.Argument(metavar="DIR", help="A bundle.")],
    output: Annotated[
        str, typer.Option("--output", metavar="DIR", help="Folder for slices of what is trained, to go on from.")
    ],
    max_minutes: Annotated[
        float | None, typer.Option("--max-minutes", metavar="X", help="Save and stop after so many minutes.")
    ] = None,
    checkpoint_size_limit: Annotated[
        str, typer.Option("--checkpoint-size-limit", metavar="SIZE", help="Of each file that is left.")
    ] = "15MiB",
    resume_from: Annotated[
        str | None, typer.Option("--resume-from", metavar="DIR", help="Slices that an earlier call left.")
    ] = None,
    work: Annotated[
        str | None,
        typer.Option("--work", metavar="DIR", help="Unpack and train here.", show_default="DIR/unpacked"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Verify and unpack a bundle, train within the time, and leave slices. `python run.py` does the same."""
    with library_output():
        from extemb_core.training.bundles import run as train

        finished = train(
            bundle,
            output,
            work=work,
            max_minutes=max_minutes,
            checkpoint_size_limit=checkpoint_size_limit,
            resume_from=resume_from,
        )
    if as_json:
        emit({"output": output, "finished": finished})
        return
    typer.echo(output)
    note(
        f"finished; get it out: extemb train unpack {output} --output DIR"
        if finished
        else "the time is up; the same command goes on, or another machine with --resume-from"
    )


@reported
def unpack(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Slices: a bundle, or what `run` left.")],
    output: Annotated[str, typer.Option("--output", metavar="DIR", help="Where to; it must not exist.")],
    as_json: JsonOption = False,
) -> None:
    """Verify slices and join them."""
    with library_output():
        from extemb_core.training.bundles import unpack as join

        join(folder, output)
    if as_json:
        emit({"output": output})
    else:
        typer.echo(output)


@reported
def make_targets(
    questions: Annotated[
        list[str],
        typer.Option(
            "--questions",
            metavar="FILE...",
            help='Training questions: .jsonl[.zst] with "id", "context", "question" and "answers".',
        ),
    ],
    output: Annotated[str, typer.Option("--output", metavar="FILE", help="A .jsonl file. Resumes if interrupted.")],
    llm: LlmOption,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="At most so many questions, the first ones.")
    ] = None,
    max_document_tokens: Annotated[
        int,
        typer.Option("--max-document-tokens", metavar="N", help="A question about a longer text keeps its references."),
    ] = 2048,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", help="Questions at once.")] = 8,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write question rows whose answers are the LLM's own from the full text, where these are right."""
    with library_output():
        from extemb_core.models.llm import LLM
        from extemb_core.training.targets import make_targets as make

        counts = make(
            LLM.from_pretrained(llm, device=device, dtype=dtype),
            questions,
            Path(output),
            limit=limit,
            max_document_tokens=max_document_tokens,
            batch_size=batch_size,
        )
    if as_json:
        emit({"output": output, "n": counts.n, "own": counts.own, "too_long": counts.too_long})
        return
    typer.echo(output)
    note(f"{counts.own} of {counts.n} answers are the LLM's own; {counts.too_long} texts were too long to ask about")
