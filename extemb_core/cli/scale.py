"""`extemb scale compress`: a corpus over many processes and machines."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated

import typer

from extemb_core.cli.options import (
    DEFAULT_LLM,
    DeviceOption,
    EmbedderOption,
    FinestRatioOption,
    JsonOption,
    LlmDtypeOption,
    LlmOption,
    SeveralValues,
    StoredDtypeOption,
)
from extemb_core.cli.output import debugging, library_output, print_json, print_note, reported
from extemb_core.scale import ROWS_PER_BATCH

app = typer.Typer(no_args_is_help=True)


@app.callback()  # without it a group of one command would be that command
def scale() -> None:
    """A corpus: compressed over many processes and machines."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Ray says of its own accord; what a run comes to is told at its end."""
    if debugging():
        yield
        return
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@app.command(cls=SeveralValues)
@reported
def compress(
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input",
            metavar="FILE...",
            help="Files or folders of Parquet or JSON Lines (.gz, .zst too), or their URLs; one kind at a time.",
        ),
    ],
    output: Annotated[
        str, typer.Option("--output", metavar="DIR", help="Folder that all machines see, or its URL (s3://...).")
    ],
    llm: LlmOption = DEFAULT_LLM,
    embedder: EmbedderOption = None,
    ratio: FinestRatioOption = None,
    dtype: StoredDtypeOption = "float16",
    passage_tokens: Annotated[
        int | None,
        typer.Option(
            "--passage-tokens",
            metavar="N",
            help="Cut documents into passages as `extemb index add` does.",
            show_default="whole documents",
        ),
    ] = None,
    column: Annotated[
        str, typer.Option("--column", metavar="NAME", help="Of the input, which holds the text.")
    ] = "text",
    rows_per_batch: Annotated[
        int, typer.Option("--rows-per-batch", metavar="N", help="Rows of a shard, and lost with a worker at most.")
    ] = ROWS_PER_BATCH,
    workers: Annotated[int, typer.Option("--workers", metavar="N", help="Processes.")] = 1,
    cpus: Annotated[float, typer.Option("--cpus-per-worker", metavar="N", help="Processors of each.")] = 1,
    gpus: Annotated[float, typer.Option("--gpus-per-worker", metavar="N", help="GPUs of each.")] = 0,
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            metavar="ADDRESS",
            help="Of a running cluster; auto for the one that this machine is part of.",
            show_default="a new one on this machine",
        ),
    ] = None,
    device: DeviceOption = "auto",
    llm_dtype: LlmDtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Compress the texts of a corpus into a folder of shards, with Ray Data.

    What is there already is not compressed again: the same command goes on after an interruption, and adds what is new.
    """
    with library_output(), _quiet():
        from extemb_core.scale.corpus import compress_corpus

        done = compress_corpus(
            inputs,
            output,
            llm=llm,
            embedder=embedder,
            ratio=ratio,
            dtype=dtype,  # type: ignore[arg-type]
            passage_tokens=passage_tokens,
            column=column,
            rows_per_batch=rows_per_batch,
            workers=workers,
            cpus_per_worker=cpus,
            gpus_per_worker=gpus,
            ray_address=ray_address,
            device=device,
            llm_dtype=llm_dtype,
        )
    if as_json:
        print_json(asdict(done))
        return
    batch = done.batch
    left_out = (
        f"; {batch.n_empty:,} rows are empty, {batch.n_unreadable:,} are no text"
        if (batch.n_empty or batch.n_unreadable)
        else ""
    )
    print_note(
        f"{batch.n_texts:,} texts of {batch.n_rows:,} rows, {batch.n_present:,} of them compressed before{left_out}; "
        f"{batch.n_tokens:,} tokens in {done.seconds:.1f} s, {len(done.shards):,} shards in {output}"
    )
